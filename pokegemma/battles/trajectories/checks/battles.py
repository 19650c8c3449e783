"""Check one trajectory file: its name, records, alignment, legality, terastallization, values, words and pads."""

import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TypeVar

from pokegemma.battles.trajectories.actions import (
    FIRST_SWITCH,
    MAX_SWITCHES,
    is_tera,
    legal_actions,
    sort_switches,
)
from pokegemma.battles.trajectories.checks.known_words import KnownWords
from pokegemma.battles.trajectories.files import decode_json_text, format_of, name_of
from pokegemma.battles.trajectories.names import generation_of
from pokegemma.battles.trajectories.records import NO_ACTION, BattleTrajectory, TrajectoryError, TrajectoryState
from pokegemma.battles.trajectories.texts import BLANK, MAX_BLANK, NUM_WORDS, list_numbers, list_words
from pokegemma.data.checks.records import percent

MAX_UNKNOWN = 0.02
"""Largest share of unknown words in a file: a new game's names are fewer, another format's are all."""

KINDS = ("names", "records", "alignment", "legality", "tera", "values", "words", "pads")
_Value = TypeVar("_Value")


@dataclass
class FileReport:
    """What was found in one file.

    Attributes:
        path: FORMAT/NAME.json.lz4, or RECORDING/FORMAT/NAME.json.lz4.
        problems: (kind of check, what is wrong).
        trajectory: None where the file contains none.
    """

    path: str
    trajectory: BattleTrajectory | None = None
    problems: list[tuple[str, str]] = field(default_factory=list)
    num_states: int = 0
    num_revealed: int = 0
    num_words: int = 0
    num_shown: int = 0
    num_blank: int = 0
    unknown: Counter[str] = field(default_factory=Counter)


def check_file(path: str, content: bytes, known: KnownWords) -> FileReport:
    """Return what is wrong with one file, all of it.

    Args:
        path: FORMAT/NAME.json.lz4, or RECORDING/FORMAT/NAME.json.lz4.
        content: its bytes.
    """
    report = FileReport(path)
    folder = format_of(path)
    name = _try(report, "names", lambda: name_of(path))
    if name is not None and not name.is_of_format(folder):
        report.problems.append(("names", f"battle_id {name.battle_id!r} lacks the folder's format {folder}"))
    trajectory = _try(report, "records", lambda: BattleTrajectory.from_json(decode_json_text(content, path)))
    if trajectory is None:
        return report
    report.trajectory = trajectory
    report.num_states = len(trajectory.states)
    report.num_revealed = sum(action != NO_ACTION for action in trajectory.actions)
    if name is not None and trajectory.states and trajectory.states[-1].battle_won != name.won:
        report.problems.append(("names", f"{'WIN' if name.won else 'LOSS'} in the name, but not in the last state"))
    for kind, find in (
        ("alignment", _find_misaligned),
        ("legality", _find_illegal),
        ("tera", _find_tera),
        ("values", _find_values),
    ):
        report.problems += [(kind, problem) for problem in find(trajectory)]
    if any(state.format != folder for state in trajectory.states):
        report.problems.append(("alignment", f"a state's format is not the folder's, {folder}"))
    _count_words(report, trajectory, known)
    return report


def _try(report: FileReport, kind: str, read: Callable[[], _Value]) -> _Value | None:
    try:
        return read()
    except TrajectoryError as error:
        report.problems.append((kind, str(error)))
        return None


def _find_misaligned(trajectory: BattleTrajectory) -> Iterator[str]:
    states, actions = trajectory.states, trajectory.actions
    if len(states) != len(actions):
        yield f"{len(states)} states, {len(actions)} actions: must be as many"
        return
    if len(states) < 2:
        yield f"{len(states)} states: must be at least 2"
        return
    if actions[-1] != NO_ACTION:
        yield f"the last action is {actions[-1]}: must be the filler {NO_ACTION}"
    if any(state.battle_won or state.battle_lost for state in states[:-1]):
        yield "a state before the last is won or lost"
    if states[-1].battle_won and states[-1].battle_lost:
        yield "the last state is won and lost"
    followed = [_is_followed(*pair, action) for pair, action in zip(itertools.pairwise(states), actions, strict=False)]
    switches = [each for each in followed if each is not None]
    if len(switches) >= 2 and 2 * sum(switches) < len(switches):  # dragged out or fainted on the way: a few
        yield f"{len(switches) - sum(switches)} of {len(switches)} switches bring in another Pokémon than their action"


def _is_followed(before: TrajectoryState, after: TrajectoryState, action: int) -> bool | None:
    """Return whether a switch brings in its Pokémon; None for other actions."""
    switches = sort_switches(before)
    if not FIRST_SWITCH <= action < FIRST_SWITCH + min(len(switches), MAX_SWITCHES):
        return None
    return after.player_active_pokemon.base_species == switches[action - FIRST_SWITCH].base_species


def _find_illegal(trajectory: BattleTrajectory) -> Iterator[str]:
    for index, (state, action) in enumerate(zip(trajectory.states, trajectory.actions, strict=False)):
        legal = legal_actions(state)
        if action != NO_ACTION and action not in legal:
            yield f"actions[{index}] is {action}, legal are {', '.join(map(str, legal)) or 'none'}"


def _find_tera(trajectory: BattleTrajectory) -> Iterator[str]:
    used = [index for index, action in enumerate(trajectory.actions) if is_tera(action)]
    if len(used) > 1:
        yield f"{len(used)} terastallizations (actions {', '.join(map(str, used))}): must be at most one"
    for index, state in enumerate(trajectory.states):
        if state.can_tera and _generation(state) not in (None, 9):
            yield f"states[{index}] can terastallize in {state.format}"
        if used and index > used[0] and state.can_tera:
            yield f"states[{index}] can terastallize after actions[{used[0]}] did"


def _generation(state: TrajectoryState) -> int | None:
    try:
        return generation_of(state.format)
    except TrajectoryError:
        return None


def _find_values(trajectory: BattleTrajectory) -> Iterator[str]:
    for index, state in enumerate(trajectory.states):
        if _generation(state) is None:
            yield f"states[{index}]: format {state.format!r} is not gen1 to gen9 and a name"
        if not 0 <= state.opponents_remaining <= 6:
            yield f"states[{index}]: opponents_remaining {state.opponents_remaining}"
        if len(state.available_switches) > MAX_SWITCHES:
            yield f"states[{index}]: {len(state.available_switches)} switches, at most {MAX_SWITCHES} have an action"
        for pokemon in (state.player_active_pokemon, state.opponent_active_pokemon, *state.available_switches):
            if not 0 <= pokemon.hp_pct <= 1:
                yield f"states[{index}]: {pokemon.name} has hp_pct {pokemon.hp_pct}"
            if pokemon.types != " ".join(sorted(pokemon.types.split(" "))) or len(pokemon.types.split(" ")) != 2:
                yield f"states[{index}]: {pokemon.name} has types {pokemon.types!r}, must be two words, sorted"


def _count_words(report: FileReport, trajectory: BattleTrajectory, known: KnownWords) -> None:
    """Count unknown words and pads, and report where their shares, or a text or number itself, are wrong."""
    for index, state in enumerate(trajectory.states):
        unknown, num_shown = known.count_unknown(state)
        report.unknown += unknown
        report.num_shown += num_shown
        try:
            report.num_blank += list_words(state).count(BLANK)
            report.num_words += NUM_WORDS
            if not math.isfinite(float(abs(list_numbers(state)).sum())):
                report.problems.append(("values", f"states[{index}]: a number is not finite"))
        except TrajectoryError as error:
            report.problems.append(("words", f"states[{index}]: {error}"))
    if report.unknown.total() > MAX_UNKNOWN * report.num_shown:
        named = ", ".join(repr(word[:60]) for word, _ in report.unknown.most_common(5))
        share = percent(report.unknown.total(), report.num_shown)
        report.problems.append(("words", f"{share} of its words are unknown: {named}"))
    if report.num_blank > MAX_BLANK * report.num_words:
        share = percent(report.num_blank, report.num_words)
        report.problems.append(("pads", f"{share} of its words are pads"))
