"""Play with a model of any family in this process, each decision from its whole prompt: Gemma 3n and Gemma 4."""

import random
import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from pokegemma.data.prompts import AnswerError, parse_answer
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import Predictor
from pokegemma.play.history import History, PlayView
from pokegemma.play.players import ButtonChoice, Decide, draw_button


class PlainPlayer:
    """Choose buttons without a cache; see `ButtonPlayer`.

    The families' own processors read pictures from files, so the screens of a prompt are files of a temporary folder.

    Args:
        view: layout grid or frames.
        decide: scored: the probabilities of the buttons in up to eight passes; generate: the written answer counts.
        temperature: 0: the likeliest button; else one drawn from the probabilities at this temperature, with `rng`.

    Raises:
        PokegemmaError: the layout is trajectory, or a temperature is given to a written answer.
    """

    def __init__(
        self,
        predictor: Predictor,
        view: PlayView,
        *,
        name: str = "model",
        decide: Decide = "scored",
        temperature: float = 0.0,
        rng: random.Random | None = None,
    ) -> None:
        if view.layout == "trajectory":
            raise PokegemmaError("--layout trajectory is for Gemma 3 only; use grid or frames")
        require_scores(decide, temperature)
        self.name, self.history = name, History(view)
        self._folder = tempfile.TemporaryDirectory(prefix="pokegemma_play_")
        collator = replace(predictor.collator, layout=view.layout, dataset_folder=Path(self._folder.name))
        self._predictor, self._generates = replace(predictor, collator=collator), decide == "generate"
        self._temperature, self._rng = temperature, rng or random.Random(0)

    def start(self, goal: str | None) -> None:
        self.history.start(goal)
        for path in Path(self._folder.name).iterdir():
            path.unlink()

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        sample = self.history.see(frame, time=time)
        self._write_pictures(sample)
        decided_by = f"model:{self.name}"
        if not self._generates:
            probabilities: np.ndarray = self._predictor.score([sample])[0]
            button = draw_button(probabilities, temperature=self._temperature, rng=self._rng)
            return ButtonChoice(button, probabilities, decided_by=decided_by)
        (written,) = self._predictor.generate([sample])
        try:
            answer = parse_answer(written.text)
        except AnswerError:
            return ButtonChoice(None, reasoning=written.text, decided_by=decided_by)
        return ButtonChoice(answer.button, None, answer.reasoning, answer.context, decided_by)

    def pressed(self, *buttons: str) -> None:
        self.history.pressed(*buttons)

    def prepare(self) -> None:
        """Do nothing: there is no cache."""

    def _write_pictures(self, sample: Sample) -> None:
        """Make the folder contain the pictures of a decision and no others."""
        folder, names = Path(self._folder.name), set(self.history.picture_names(sample))
        for path in folder.iterdir():
            if path.name not in names:
                path.unlink()
        for name in names:
            if not (folder / name).exists():
                self.history.picture(name).save(folder / name, "PNG", compress_level=1)


def require_scores(decide: Decide, temperature: float) -> None:
    """Check that buttons are not to be drawn where only a written answer is asked for.

    Raises:
        PokegemmaError: they are.
    """
    if decide == "generate" and temperature > 0:
        raise PokegemmaError(f"--temperature {temperature:g} needs the buttons' probabilities: use --decide scored")
