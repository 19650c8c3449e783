"""The decisions of a recorded session through the loop of scripts/play.py, timed from the screen to the button."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from PIL import Image

from pokegemma.data.samples import Sample
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.loop import play
from pokegemma.play.players import ButtonChoice


@dataclass(frozen=True)
class PlayedDecision:
    """One decision: what the model chose, and what had to be computed between screen and button."""

    button: str
    probabilities: np.ndarray
    seconds: float
    prepare_s: float
    num_pictures: int
    num_new: int
    num_cached: int


class RecordedGame:
    """An emulator whose screens are those of a recorded session, whatever is pressed."""

    name = "recorded session"
    frame_size = (240, 160)

    def __init__(self, session: Sequence[Sample], folder: Path) -> None:
        self._screens = [Image.open(folder / sample.frames[-1]).convert("RGB") for sample in session]
        self._turn = 0

    def screen(self) -> Image.Image:
        return self._screens[self._turn].copy()

    def press(self, button: str) -> None:
        self._turn = min(self._turn + 1, len(self._screens) - 1)

    def advance(self, frames: int) -> None: ...

    def save(self) -> bytes:
        return b""

    def load(self, state: bytes) -> None: ...

    def close(self) -> None: ...


class _RecordedPresses:
    """A player that decides by itself, and is told what was pressed in the recording: all ways see one prompt."""

    def __init__(self, player: CachedPlayer, session: Sequence[Sample]) -> None:
        self.name, self._player, self._session = player.name, player, session
        self.choices: list[ButtonChoice] = []
        self.work: list[tuple[int, int, int]] = []  # pictures, new tokens, cached tokens

    def start(self, goal: str | None) -> None:
        self._player.start(goal)

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        cache = self._player.cache
        pictures, computed = cache.num_encoded, cache.num_computed
        choice = self._player.decide(frame, time=time)
        new = cache.num_computed - computed
        self.work.append((cache.num_encoded - pictures, new, cache.num_tokens - new))
        self.choices.append(choice)
        return replace(choice, button=self._session[len(self.choices) - 1].metadata["buttons"][0])

    def pressed(self, *buttons: str) -> None:
        sample = self._session[len(self.choices) - 1]
        self._player.pressed(*sample.metadata["buttons"], answer=sample.output)

    def prepare(self) -> None:
        self._player.prepare()


def play_recorded(player: CachedPlayer, session: Sequence[Sample], folder: Path) -> list[PlayedDecision]:
    """Return each decision of a session, as the loop of play makes it: prepared after the press before."""
    told = _RecordedPresses(player, session)
    result = play(RecordedGame(session, folder), told, max_turns=len(session), goal=session[0].metadata["goal"])
    seconds = result.seconds
    return [
        PlayedDecision(choice.button, choice.probabilities, screen_s + decide_s, prepare_s, *work)
        for choice, screen_s, decide_s, prepare_s, work in zip(
            told.choices, seconds["screen"], seconds["decide"], seconds["prepare"], told.work, strict=True
        )
    ]
