"""Stretches of a session that show one picture over many turns, although several buttons were pressed."""

import itertools
from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass

from pokegemma.data.checks.pictures import PictureScan
from pokegemma.data.checks.records import NO_SAMPLES, Check, Split, percent, skipped
from pokegemma.data.prompts import answer_button

MIN_STRETCH_TURNS, MIN_STRETCH_BUTTONS = 16, 3
"""A player may be stuck: 8 turns with 4 buttons on one picture are the most in the 33 real sessions."""

MIN_SESSION_TURNS, MIN_SESSION_BUTTONS = 6, 2
"""The same for sessions that have one picture only."""

MAX_STILL_SHARE = 0.05
"""A game may hang for a while; if more decisions than this show a still picture, the recording is broken."""


@dataclass(frozen=True)
class Still:
    """Decisions of a session that show one picture while several buttons were pressed."""

    first_turn: int
    last_turn: int
    num_turns: int
    num_buttons: int

    def describe(self) -> str:
        return (
            f"turns {self.first_turn} to {self.last_turn}: {self.num_turns} decisions show one picture while "
            f"{self.num_buttons} buttons were pressed; the capture stood still"
        )


def find_still(decisions: Sequence[tuple[int, Hashable, str]]) -> list[Still]:
    """Return the stretches in which the capture of a session stood still.

    Args:
        decisions: turn, picture (anything that is equal for equal pictures) and button, in order.
    """
    stretches = [list(stretch) for _, stretch in itertools.groupby(decisions, key=lambda decision: decision[1])]
    whole = len(stretches) == 1
    least_turns = MIN_SESSION_TURNS if whole else MIN_STRETCH_TURNS
    least_buttons = MIN_SESSION_BUTTONS if whole else MIN_STRETCH_BUTTONS
    found = []
    for stretch in stretches:
        num_buttons = len({button for _, _, button in stretch})
        if len(stretch) >= least_turns and num_buttons >= least_buttons:
            found.append(Still(stretch[0][0], stretch[-1][0], len(stretch), num_buttons))
    return found


def check_still(splits: Iterable[Split], scan: PictureScan) -> Check:
    """Find sessions, or long stretches of them, that show one picture while several buttons were pressed.

    From such samples a model learns that the picture does not matter. They are a warning up to `MAX_STILL_SHARE` of
    all samples.
    """
    details, num_samples, num_still = [], 0, 0
    for split in splits:
        for session, samples in itertools.groupby(split.samples(), key=lambda sample: sample.session):
            decisions = []
            for sample in samples:
                num_samples += 1
                digest, button = scan.digests.get(f"{split.folder}/{sample.frames[-1]}"), answer_button(sample.output)
                if digest is not None and button is not None:
                    decisions.append((sample.metadata["turn"], digest, button))
            stretches = find_still(decisions)
            num_still += sum(still.num_turns for still in stretches)
            details += [f"{split.path.name}: {session} {still.describe()}" for still in stretches]
    if not num_samples:
        return skipped("still pictures", NO_SAMPLES)
    if not details:
        return Check("still pictures", "PASS", "no session shows one picture while several buttons were pressed")
    failed = num_still > MAX_STILL_SHARE * num_samples
    share = percent(num_still, num_samples)
    summary = f"{num_still} of {num_samples} decisions ({share}) were recorded while the capture stood still"
    return Check("still pictures", "FAIL" if failed else "WARN", summary, tuple(details))
