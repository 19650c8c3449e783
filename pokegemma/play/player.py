"""Play one session: a frame goes in, a button comes out, with prompts as in the model's training."""

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.frame_pictures import fit_tile, open_picture, to_rgb
from pokegemma.data.grids import compose_grid
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP, Trajectory
from pokegemma.errors import check_range
from pokegemma.evaluation.predict import Predictor
from pokegemma.play.prompt_cache import PromptCache

_UNSEEN = "unseen"
"""Name of the frame of the next decision, which does not exist yet."""


@dataclass(frozen=True)
class ButtonChoice:
    """The likeliest of `prompts.BUTTONS`, and the probabilities (8,) of all, normalised over the eight."""

    button: str
    probabilities: np.ndarray


class Player:
    """Choose the buttons of one session: the work of earlier decisions is reused, with the results of whole prompts.

        player = Player(predictor, goal="leave the house")
        while playing:
            decision = player.decide(frame)  # a PIL picture just grabbed, or a file
            press(decision.button)
            player.pressed(decision.button)
            player.prepare()  # while the game moves: the next decision then computes its own frame only

    The layout is that of the collator. The model is shown what `data.convert` makes of a recorded session: the last
    `num_frames` frames as grid or pictures, or trajectory conversations of at most `max_decisions` decisions. A new
    conversation begins with the last `overlap_decisions` of the one before (take the values of training from run.json).

    Raises:
        PokegemmaError: the model's family has no exact cache, or the numbers leave nothing to show.
    """

    def __init__(
        self,
        predictor: Predictor,
        *,
        goal: str | None,
        num_frames: int = 4,
        max_decisions: int = DEFAULT_MAX_DECISIONS,
        overlap_decisions: int = DEFAULT_OVERLAP,
    ) -> None:
        check_range("num_frames", num_frames, at_least=1)
        check_range("overlap_decisions", overlap_decisions, at_least=0, below=max_decisions)
        self.collator = predictor.collator
        self.cache = PromptCache(predictor)
        self.context = prompts.build_context(goal)
        self.max_decisions, self.overlap_decisions = max_decisions, overlap_decisions
        self.num_frames = num_frames
        self._window: deque[str] = deque(maxlen=num_frames)  # names of frames, oldest first
        self._frames: dict[str, Image.Image] = {}
        self._previous: deque[str] = deque(maxlen=prompts.MAX_PREVIOUS_BUTTONS)
        self._stretch: list[Sample] = []  # decisions of the conversation, answered
        self._num_context = 0
        self._asked: Sample | None = None
        self._num_seen = 0
        self._written: tuple[str, list[int]] = ("", [])  # the conversation's text up to its last answer, and its tokens

    def decide(self, frame: Image.Image | str | Path) -> ButtonChoice:
        """Return the button for the screen that the player sees now.

        Raises:
            PokegemmaError: the frame is a file that cannot be read, or the goal contains control symbols.
            CheckFailedError: the model returns NaN.
        """
        picture = to_rgb(frame) if isinstance(frame, Image.Image) else open_picture(frame)
        self._num_seen += 1
        name = f"{self._num_seen:04d}.png"
        self._window.append(name)
        needed = {*self._window, *(name for sample in self._stretch for name in sample.frames)}
        self._frames = {one: frame for one, frame in (*self._frames.items(), (name, picture)) if one in needed}
        self._asked = self._sample(list(self._window))
        _, ids = self._prompt(self._asked)
        probabilities = self.cache.score(ids, [self._picture(one) for one in self._names(self._asked)])
        return ButtonChoice(prompts.BUTTONS[int(probabilities.argmax())], probabilities)

    def pressed(self, *buttons: str, answer: str | None = None) -> None:
        """Record which buttons were pressed after the last decision: its own, others, or none.

        Args:
            answer: the answer to record in a trajectory conversation, as `prompts.build_output` writes it; None: the
                first of `buttons`, without reasons.
        """
        if self._asked is not None and buttons and self.collator.layout == "trajectory":
            output = answer or prompts.build_output(button=buttons[0], reasoning="", context="")
            self._answer(self._asked, output)
        self._previous.extend(buttons)
        self._asked = None

    def prepare(self) -> None:
        """Compute the beginning of the next prompt now, up to the frame that does not exist yet."""
        sample = self._sample([*self._window, _UNSEEN][-self.num_frames :])
        _, ids = self._prompt(sample)
        names, processor = self._names(sample), self.collator.processor
        num_known = next(number for number, name in enumerate(names) if _UNSEEN in name)
        soft = [at for at, token in enumerate(ids) if token == processor.tokenizer.image_token_id]
        known = [self._picture(name) for name in names[:num_known]]
        self.cache.prepare(ids[: soft[num_known * processor.image_seq_length]], known)

    def _sample(self, window: list[str], output: str = "{}") -> Sample:
        """Return the sample that the converter would write, with names of frames instead of paths."""
        frames = (window[0],) * (self.num_frames - len(window)) + tuple(window)
        return Sample(
            id=f"decision {self._num_seen}",
            frames=frames,
            image=" ".join(frames),
            context=self.context,
            question=prompts.build_question(list(self._previous)),
            output=output,
            metadata={"session": "play", "turn": self._num_seen, "previous_buttons": list(self._previous)},
        )

    def _example(self, sample: Sample) -> Sample | Trajectory:
        if self.collator.layout != "trajectory":
            return sample
        return Trajectory((*self._stretch, sample), num_context=self._num_context)

    def _names(self, sample: Sample) -> tuple[str, ...]:
        return self.collator.picture_paths(self._example(sample))

    def _picture(self, name: str) -> Image.Image:
        if self.collator.layout != "grid":
            return self._frames[name]
        return Image.fromarray(compose_grid([np.asarray(fit_tile(self._frames[one])) for one in name.split()]))

    def _prompt(self, sample: Sample) -> tuple[str, list[int]]:
        """Return a prompt's text and its tokens, as the collator writes them."""
        example = self._example(sample)
        if isinstance(example, Sample):
            messages = prompts.build_messages(example, self.collator.layout)
        else:
            messages = prompts.build_trajectory_messages(example)
        text, (written, ids) = self._render(messages[:-1], ask=True), self._written
        if written and text.startswith(written):
            return text, ids + self.collator.tokenize_pieces([text[len(written) :]])[0]
        row = self.collator.tokenize(example)
        return text, row.ids[: row.answer_starts[-1]]

    def _answer(self, sample: Sample, output: str) -> None:
        """Append an answered decision to the conversation; where that is full, begin the next."""
        text, ids = self._prompt(sample)
        self._stretch.append(replace(sample, output=output))
        messages = prompts.build_trajectory_messages(Trajectory(tuple(self._stretch), self._num_context))
        whole = self._render(messages, ask=False)
        self._written = whole, ids + self.collator.tokenize_pieces([whole[len(text) :]])[0]
        if len(self._stretch) == self.max_decisions:
            self._stretch = self._stretch[self.max_decisions - self.overlap_decisions :]
            self._num_context = self.overlap_decisions

    def _render(self, messages: Sequence[dict[str, Any]], *, ask: bool) -> str:
        return self.collator.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
