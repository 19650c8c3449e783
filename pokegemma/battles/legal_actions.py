"""The legal actions in a battle's last request, in metamon's numbers, each with the choice that the simulator takes."""

from dataclasses import dataclass
from typing import Any

from pokegemma.battles.trajectories.actions import FIRST_SWITCH, FIRST_TERA, order_moves, order_switches
from pokegemma.battles.trajectories.from_battle import find_bench
from pokegemma.battles.trajectories.names import clean_move
from pokegemma.battles.trajectories.records import MAX_MOVES
from pokegemma.errors import PokegemmaError

try:
    from poke_env.battle import Battle, Move, Pokemon
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error


@dataclass(frozen=True)
class LegalAction:
    """What an action does. `choice` is the simulator's text for it: "move 2", "move 2 terastallize" or "switch 3"."""

    choice: str
    subject: Move | Pokemon
    terastallizes: bool = False


def find_legal_actions(battle: Battle) -> dict[int, LegalAction]:
    """Return the legal actions by number, ascending.

    The numbers are those of `trajectories.actions`, and the actions are among those that the state allows. A single
    move that is not among the active Pokémon's (Struggle, Recharge, generation 1's Fight) is 0. Mega evolution, Z moves
    and Dynamax have no number.
    """
    request = battle.last_request
    legal = {}
    if "active" in request:
        active = request["active"][0]
        places = _number_moves(battle, active["moves"])
        usable = [place for place, move in enumerate(active["moves"]) if not move.get("disabled")]
        moves = dict(zip(usable, battle.available_moves, strict=True))
        numbers = [action for action, place in places.items() if place in moves]
        for action in numbers:
            legal[action] = LegalAction(f"move {places[action] + 1}", moves[places[action]])
        if active.get("canTerastallize"):
            for action in numbers:
                move = legal[action]
                legal[FIRST_TERA + action] = LegalAction(
                    f"{move.choice} terastallize", move.subject, terastallizes=True
                )
    for action, (place, pokemon) in _number_switches(battle).items():
        legal[action] = LegalAction(f"switch {place + 1}", pokemon)
    return dict(sorted(legal.items()))


def _number_moves(battle: Battle, moves: list[dict[str, Any]]) -> dict[int, int]:
    """Return the numbers of a request's moves, those included that are disabled: action -> place in the request.

    A move that Mimic has copied may be there twice. A state, like poke-env, lists it once, so it has one number.
    """
    active = battle.active_pokemon
    names = [move.id for move in active.moves.values()] if active is not None else []
    places: dict[str, int] = {}
    for place, move in enumerate(moves):
        name = clean_move(move["id"])
        if name not in places or moves[places[name]].get("disabled"):
            places[name] = place
    ordered = [clean_move(names[place]) for place in order_moves(names)]
    numbered = {action: places[name] for action, name in enumerate(ordered) if name in places}
    free = (action for action in range(MAX_MOVES) if action not in numbered)
    for place in sorted(set(places.values()) - set(numbered.values())):
        numbered[next(free)] = place
    return dict(sorted(numbered.items()))


def _number_switches(battle: Battle) -> dict[int, tuple[int, Pokemon]]:
    """Return the Pokémon that may be switched in: action -> its place in the request, and itself."""
    places = {each["ident"]: place for place, each in enumerate(battle.last_request["side"]["pokemon"])}
    bench = list(find_bench(battle).items())
    available = {id(pokemon) for pokemon in battle.available_switches}
    ordered = [bench[place] for place in order_switches([pokemon.species for _, pokemon in bench])]
    return {
        action: (places[ident], pokemon)
        for action, (ident, pokemon) in enumerate(ordered, FIRST_SWITCH)
        if id(pokemon) in available
    }
