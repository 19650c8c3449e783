"""The 13 actions of metamon, and which of them a state allows.

    0-3    the active Pokémon's moves, sorted by name
    4-8    the Pokémon that may be switched in, sorted by name
    9-12   moves 0-3 with Terastallization

Struggle and Recharge are 0. `NO_ACTION` (-1) was never revealed. poke-env's numbers are others.
"""

from collections.abc import Sequence

from pokegemma.battles.trajectories.names import clean_move, clean_species
from pokegemma.battles.trajectories.records import MAX_MOVES, TrajectoryMove, TrajectoryPokemon, TrajectoryState

NUM_ACTIONS = 13
FIRST_SWITCH, FIRST_TERA = 4, 9
MAX_SWITCHES = FIRST_TERA - FIRST_SWITCH


def order_moves(names: Sequence[str]) -> list[int]:
    """Return which of an active Pokémon's moves actions 0-3 are, as places in `names`: the first four, by name."""
    return sorted(range(min(len(names), MAX_MOVES)), key=lambda place: clean_move(names[place]))


def order_switches(names: Sequence[str]) -> list[int]:
    """Return which Pokémon of the bench actions 4-8 are, as places in `names`, the species in the team's order."""
    return sorted(range(len(names)), key=lambda place: clean_species(names[place]))


def sort_moves(pokemon: TrajectoryPokemon) -> list[TrajectoryMove]:
    """Return a Pokémon's moves in the order of actions 0-3."""
    return [pokemon.moves[place] for place in order_moves([move.name for move in pokemon.moves])]


def sort_switches(state: TrajectoryState) -> list[TrajectoryPokemon]:
    """Return the Pokémon that may be switched in, in the order of actions 4-8."""
    bench = state.available_switches
    return [bench[place] for place in order_switches([pokemon.name for pokemon in bench])]


def legal_actions(state: TrajectoryState) -> tuple[int, ...]:
    """Return the actions that a state allows, ascending; empty where it allows none.

    A state has no word for moves without PP, disabled moves, and a trapped Pokémon: what the simulator refuses for
    these reasons is allowed here, as in metamon's `maybe_valid_actions`. A running battle's request has them.
    """
    num_moves = 0 if state.forced_switch else min(len(state.player_active_pokemon.moves), MAX_MOVES)
    num_switches = min(len(state.available_switches), MAX_SWITCHES)
    legal = [*range(num_moves), *range(FIRST_SWITCH, FIRST_SWITCH + num_switches)]
    if state.can_tera:
        legal += range(FIRST_TERA, FIRST_TERA + num_moves)
    return tuple(legal)


def is_tera(action: int) -> bool:
    """Return whether an action terastallizes."""
    return action >= FIRST_TERA
