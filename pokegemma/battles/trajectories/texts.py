"""A state as metamon's default observation: a text of 87 words and 48 numbers."""

import numpy as np

from pokegemma.battles.trajectories.actions import MAX_SWITCHES, sort_moves, sort_switches
from pokegemma.battles.trajectories.names import clean_move, clean_word
from pokegemma.battles.trajectories.records import (
    MAX_MOVES,
    TrajectoryError,
    TrajectoryMove,
    TrajectoryPokemon,
    TrajectoryState,
)

NUM_WORDS, NUM_NUMBERS = 87, 48
BLANK, PAD_NUMBER = "<blank>", -2.0

MAX_BLANK = 0.7
"""Largest share of pads among the words of battles: one with an empty bench to its end has 0.52."""

_STATS = ("base_atk", "base_spa", "base_def", "base_spd", "base_spe", "base_hp")
_BOOSTS = ("atk_boost", "spa_boost", "def_boost", "spd_boost", "spe_boost", "accuracy_boost", "evasion_boost")
_NUM_SWITCH_WORDS = 8


def list_words(state: TrajectoryState) -> list[str]:
    """Return the 87 words of a state.

    The format and whether a switch is forced (2); <player> and the active Pokémon (9); four times <move>, name, type,
    category (16); five times <switch>, name, item, ability, <moveset> and four names (45); <opponent> and its active
    Pokémon (8 words and the mark); <conditions>, weather, ours, theirs (4); the previous moves with their marks (4).

    Raises:
        TrajectoryError: there are more than five switches, or a field is not one word (types: two).
    """
    words = [f"<{state.format}>", "<forcedswitch>" if state.forced_switch else "<anychoice>"]
    words += ["<player>", *_active_words(state.player_active_pokemon)]
    moves = [_move_words(move) for move in sort_moves(state.player_active_pokemon)]
    for each in moves + [[BLANK] * 3] * (MAX_MOVES - len(moves)):
        words += ["<move>", *each]
    switches = [_switch_words(pokemon) for pokemon in sort_switches(state)]
    for each in switches + [[BLANK] * _NUM_SWITCH_WORDS] * (MAX_SWITCHES - len(switches)):
        words += ["<switch>", *each]
    words += ["<opponent>", *_active_words(state.opponent_active_pokemon)]
    words += ["<conditions>", state.weather, state.player_conditions, state.opponent_conditions]
    words += ["<player_prev>", clean_move(state.player_prev_move.name)]
    words += ["<opp_prev>", clean_move(state.opponent_prev_move.name)]
    if len(words) != NUM_WORDS:
        raise TrajectoryError(f"{len(words)} words instead of {NUM_WORDS}")
    for word in words:
        if not word or " " in word:
            raise TrajectoryError(f"{word!r} is not one word")
    return words


def list_numbers(state: TrajectoryState) -> np.ndarray:
    """Return the 48 numbers of a state, float32; -2 where there is no move or no Pokémon.

    Opponents left / 6; hp, level / 100, base stats / 255 (atk, spa, def, spd, spe, hp) and boosts / 6 (those, accuracy
    and evasion instead of hp) of the active Pokémon; four times power / 200, accuracy, priority / 5; hp of five
    switches; the opponent's active Pokémon as ours.

    Raises:
        TrajectoryError: there are more than five switches.
    """
    numbers = [state.opponents_remaining / 6.0, *_active_numbers(state.player_active_pokemon)]
    moves = sort_moves(state.player_active_pokemon)
    for move in moves:
        numbers += [move.base_power / 200.0, move.accuracy, move.priority / 5.0]
    numbers += [PAD_NUMBER] * 3 * (MAX_MOVES - len(moves))
    numbers += [pokemon.hp_pct for pokemon in sort_switches(state)]
    numbers += [PAD_NUMBER] * (MAX_SWITCHES - len(state.available_switches))
    numbers += _active_numbers(state.opponent_active_pokemon)
    if len(numbers) != NUM_NUMBERS:
        raise TrajectoryError(f"{len(numbers)} numbers instead of {NUM_NUMBERS}")
    return np.array(numbers, dtype=np.float32)


def _active_words(pokemon: TrajectoryPokemon) -> list[str]:
    return [pokemon.name, pokemon.item, pokemon.ability, *pokemon.types.split(" "), pokemon.effect, pokemon.status]


def _move_words(move: TrajectoryMove) -> list[str]:
    return [clean_move(move.name), clean_word(move.move_type), clean_word(move.category)]


def _switch_words(pokemon: TrajectoryPokemon) -> list[str]:
    names = [clean_move(move.name) for move in sort_moves(pokemon)]
    names += [BLANK] * (MAX_MOVES - len(names))
    return [pokemon.name, pokemon.item, pokemon.ability, "<moveset>", *names]


def _active_numbers(pokemon: TrajectoryPokemon) -> list[float]:
    numbers = [pokemon.hp_pct, pokemon.lvl / 100.0]
    numbers += [getattr(pokemon, stat) / 255.0 for stat in _STATS]
    numbers += [getattr(pokemon, boost) / 6.0 for boost in _BOOSTS]
    return numbers
