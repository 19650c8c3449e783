"""Play several games at once, and make their decisions in one forward pass."""

import hashlib
import logging
import threading
import types
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np
import torch
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.data.samples import Sample
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import pad_rows
from pokegemma.gemma.batches.picture_resize import to_pixels
from pokegemma.gemma.button_scores import checked_scores, score_buttons
from pokegemma.gemma.families import require_exact
from pokegemma.play.history import History, PlayView
from pokegemma.play.players import ButtonChoice, ButtonPlayer
from pokegemma.play.prompt_cache import hash_picture

logger = logging.getLogger(__name__)

GameResult = TypeVar("GameResult")


def score_together(
    predictor: Predictor,
    samples: Sequence[Sample],
    pictures: Sequence[Sequence[Image.Image]],
    known: dict[bytes, np.ndarray] | None = None,
) -> np.ndarray:
    """Return the probabilities (N, 8) of the buttons, for N samples whose pictures are in memory, in one forward pass.

    Args:
        known: probabilities of earlier calls by a hash of what the model saw, to look up here and to add to. Most
            decisions of a player that is stuck are about a screen that it has seen.

    Raises:
        CheckFailedError: they are NaN.
    """
    known = {} if known is None else known
    rows = [predictor.collator.tokenize(sample) for sample in samples]
    prompts = [row.ids[: row.answer_starts[-1]] for row in rows]
    keys = [_hash_input(prompt, shown) for prompt, shown in zip(prompts, pictures, strict=True)]
    new = {key: place for place, key in enumerate(keys) if key not in known}
    if new:
        scores = _score(
            predictor, [prompts[place] for place in new.values()], [pictures[place] for place in new.values()]
        )
        known.update(zip(new, scores, strict=True))
    return np.stack([known[key] for key in keys])


def _hash_input(prompt: Sequence[int], pictures: Sequence[Image.Image]) -> bytes:
    digest = hashlib.sha256(np.asarray(prompt, np.int64).tobytes())
    for picture in pictures:
        digest.update(hash_picture(picture))
    return digest.digest()


def _score(
    predictor: Predictor, prompts: Sequence[Sequence[int]], pictures: Sequence[Sequence[Image.Image]]
) -> np.ndarray:
    collator, device = predictor.collator, predictor.model.device
    batch = pad_rows(prompts, collator.processor.tokenizer, side="left")
    batch["token_type_ids"] = collator.token_types(batch["input_ids"])
    shown = [picture for several in pictures for picture in several]
    batch["pixel_values"] = to_pixels(collator.processor, shown)
    batch["image_index"] = torch.arange(len(shown))
    batch = {name: tensor.to(device) for name, tensor in batch.items()}
    return checked_scores(score_buttons(predictor.model, batch, collator.button_tokens))


def play_together(
    predictor: Predictor,
    view: PlayView,
    games: Sequence[Callable[[ButtonPlayer], GameResult]],
    *,
    batch_size: int = 32,
    on_end: Callable[[GameResult], None] = lambda result: None,
) -> list[GameResult]:
    """Play each of `games` with a player of its own, and return their results in order.

    Each game runs in a thread, `batch_size` at once, and waits in `decide` until all others do so, too. The model then
    decides for all of them. Which decisions share a pass depends only on the games, so the results are the same in
    every run. The likeliest button is chosen.

    Args:
        games: functions that play one game with a player.
        on_end: called in this thread with each result, in the order in which games end.

    Raises:
        PokegemmaError: the model's family or the layout has no batch of prompts, or a game raised it.
    """
    require_exact(predictor.model.config, "--closed_loop")
    results: list[GameResult] = [None] * len(games)  # type: ignore[list-item]
    table = _Table()
    num_threads = min(batch_size, len(games))

    def play(first: int) -> None:
        with table:
            player = _TablePlayer(table, view, place=first)
            for number in range(first, len(games), num_threads):
                results[number] = games[number](player)
                table.end_game(results[number])

    threads = [threading.Thread(target=play, args=(number,), daemon=True) for number in range(num_threads)]
    table.num_playing = num_threads
    for thread in threads:
        thread.start()
    try:
        table.serve(predictor, on_end)
    finally:
        table.stop()
        for thread in threads:
            thread.join()
    return results


class _StoppedError(Exception):
    """The other games stopped."""


@dataclass
class _Table:
    """Where games put what they have to decide, and take what was decided."""

    num_playing: int = 0
    _asked: dict[int, tuple[Sample, list[Image.Image]]] = field(default_factory=dict)
    _answers: dict[int, np.ndarray] = field(default_factory=dict)
    _ended: list[object] = field(default_factory=list)
    _error: BaseException | None = None
    _is_stopped: bool = False
    _changed: threading.Condition = field(default_factory=threading.Condition)

    def ask(self, place: int, sample: Sample, pictures: list[Image.Image]) -> np.ndarray:
        """Return the probabilities (8,) of the buttons, once all games wait."""
        with self._changed:
            self._asked[place] = sample, pictures
            self._changed.notify_all()
            self._changed.wait_for(lambda: place in self._answers or self._is_stopped)
            if self._is_stopped:
                raise _StoppedError
            return self._answers.pop(place)

    def end_game(self, result: object) -> None:
        with self._changed:
            self._ended.append(result)
            self._changed.notify_all()

    def __enter__(self) -> None:
        pass

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: types.TracebackType | None
    ) -> bool:
        """Leave the table; what a game raised is raised again in the thread that serves it."""
        with self._changed:
            self.num_playing -= 1
            if not isinstance(error, _StoppedError):
                self._error = self._error or error
            self._changed.notify_all()
        return True

    def stop(self) -> None:
        with self._changed:
            self._is_stopped = True
            self._changed.notify_all()

    def serve(self, predictor: Predictor, on_end: Callable[..., None]) -> None:
        """Decide for the games until none is left; raise what one of them raised."""
        known: dict[bytes, np.ndarray] = {}
        while True:
            with self._changed:
                self._changed.wait_for(
                    lambda: self._error or self._ended or len(self._asked) == self.num_playing,
                )
                ended, self._ended = self._ended, []
                asked = dict(sorted(self._asked.items())) if len(self._asked) == self.num_playing else {}
                if self._error:
                    raise self._error
            for result in ended:
                on_end(result)
            if not asked:
                if self.num_playing == 0 and not self._ended:
                    return
                continue
            samples, pictures = zip(*asked.values(), strict=True)
            scores = score_together(predictor, samples, pictures, known)
            with self._changed:
                self._asked.clear()
                self._answers = dict(zip(asked, scores, strict=True))
                self._changed.notify_all()


class _TablePlayer:
    """A player of one game whose decisions are made at a table."""

    name = "model"

    def __init__(self, table: _Table, view: PlayView, *, place: int) -> None:
        self._table, self._place, self._history = table, place, History(view)

    def start(self, goal: str | None) -> None:
        self._history.start(goal)

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        sample = self._history.see(frame, time=time)
        pictures = [self._history.picture(name) for name in self._history.picture_names(sample)]
        probabilities = self._table.ask(self._place, sample, pictures)
        return ButtonChoice(BUTTONS[int(probabilities.argmax())], probabilities)

    def pressed(self, *buttons: str) -> None:
        self._history.pressed(*buttons)

    def prepare(self) -> None:
        """Do nothing: decisions of one pass have no earlier work in common."""
