"""The legal actions in a battle's last request, in metamon's numbers, each with the choice that the simulator takes."""

from dataclasses import dataclass
from typing import Any

from pokegemma.errors import PokegemmaError

try:
    from poke_env.battle import Battle, Move, Pokemon
except ImportError as error:
    raise PokegemmaError(f"battles need {error.name}: ./init.sh --with battles") from error

NUM_ACTIONS = 13
FIRST_SWITCH, FIRST_TERA = 4, 9
"""Actions 0-3 are the active Pokémon's moves, 4-8 the switches, 9-12 the moves with terastallization."""


@dataclass(frozen=True)
class LegalAction:
    """What an action does. `choice` is the simulator's text for it: "move 2", "move 2 terastallize" or "switch 3"."""

    choice: str
    subject: Move | Pokemon
    terastallizes: bool = False


def find_legal_actions(battle: Battle) -> dict[int, LegalAction]:
    """Return the legal actions by number, ascending.

    Moves are sorted by name, and so are the Pokémon that may be switched in. A single move that is not among the active
    Pokémon's (Struggle, Recharge, generation 1's Fight) is 0. poke-env numbers actions differently. Mega evolution, Z
    moves and Dynamax have no number.
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
                legal[FIRST_TERA + action] = LegalAction(f"{move.choice} terastallize", move.subject, terastallizes=True)
    for action, (place, pokemon) in enumerate(_find_switches(battle), FIRST_SWITCH):
        legal[action] = LegalAction(f"switch {place + 1}", pokemon)
    return dict(sorted(legal.items()))


def _number_moves(battle: Battle, moves: list[dict[str, Any]]) -> dict[int, int]:
    """Return the numbers of a request's moves, those included that are disabled: action -> place in the request."""
    names = sorted(battle.active_pokemon.moves)[:FIRST_SWITCH] if battle.active_pokemon else []
    numbered = {}
    for place, move in enumerate(moves):
        # poke-env's name of a Hidden Power has its type, the request's has not.
        same = [name for name in names if name == move["id"] or (name.startswith("hiddenpower") and move["id"] in name)]
        if same:
            numbered[names.index(same[0])] = place
    free = (action for action in range(FIRST_SWITCH) if action not in numbered)
    for place in sorted(set(range(len(moves))) - set(numbered.values())):
        numbered[next(free)] = place
    return dict(sorted(numbered.items()))


def _find_switches(battle: Battle) -> list[tuple[int, Pokemon]]:
    """Return the Pokémon that may be switched in, sorted by name, each with its place in the request."""
    team = [battle.team[each["ident"]] for each in battle.last_request["side"]["pokemon"]]
    available = {id(pokemon) for pokemon in battle.available_switches}
    switches = [(place, pokemon) for place, pokemon in enumerate(team) if id(pokemon) in available]
    return sorted(switches, key=lambda switch: (switch[1].species, switch[0]))
