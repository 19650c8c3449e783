"""The legal actions in a battle's last request, in metamon's numbers, each with the choice that the simulator takes."""

from dataclasses import dataclass
from typing import Any

from pokegemma.battles.trajectories.actions import FIRST_SWITCH, FIRST_TERA
from pokegemma.battles.trajectories.names import clean_move, clean_species
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

    The numbers are those of `trajectories.actions`; a single move that is not among the active Pokémon's (Struggle,
    Recharge, generation 1's Fight) is 0. Mega evolution, Z moves and Dynamax have no number.
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
    for action, (place, pokemon) in enumerate(_find_switches(battle), FIRST_SWITCH):
        legal[action] = LegalAction(f"switch {place + 1}", pokemon)
    return dict(sorted(legal.items()))


def _number_moves(battle: Battle, moves: list[dict[str, Any]]) -> dict[int, int]:
    """Return the numbers of a request's moves, those included that are disabled: action -> place in the request."""
    active = battle.active_pokemon
    names = sorted(map(clean_move, list(active.moves)[:MAX_MOVES])) if active is not None else []
    numbered = {}
    for place, move in enumerate(moves):
        if (name := clean_move(move["id"])) in names:
            numbered[names.index(name)] = place
    free = (action for action in range(MAX_MOVES) if action not in numbered)
    for place in sorted(set(range(len(moves))) - set(numbered.values())):
        numbered[next(free)] = place
    return dict(sorted(numbered.items()))


def _find_switches(battle: Battle) -> list[tuple[int, Pokemon]]:
    """Return the Pokémon that may be switched in, sorted by name, each with its place in the request."""
    team = [battle.team[each["ident"]] for each in battle.last_request["side"]["pokemon"]]
    available = {id(pokemon) for pokemon in battle.available_switches}
    switches = [(place, pokemon) for place, pokemon in enumerate(team) if id(pokemon) in available]
    return sorted(switches, key=lambda switch: (clean_species(switch[1].species), switch[0]))
