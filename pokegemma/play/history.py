"""What a model is shown of the session that it plays: the last frames, earlier buttons, and earlier answers."""

from collections import deque
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.convert import WindowOptions
from pokegemma.data.frame_pictures import fit_tile, open_picture, to_rgb
from pokegemma.data.grids import compose_grid
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample, find_control_token
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP, Trajectory
from pokegemma.errors import PokegemmaError, check_range
from pokegemma.play.players import require_buttons

UNSEEN = "unseen"
"""Name of the frame of the next decision, which does not exist yet."""


@dataclass(frozen=True)
class PlayView:
    """How play is shown to a model, as its training data were.

    Attributes:
        window: which frames a decision shows.
        max_decisions: with layout trajectory, decisions in a conversation.
        overlap_decisions: how many of them are repeated from the conversation before.

    Raises:
        PokegemmaError: the numbers leave nothing to show.
    """

    layout: Layout = "grid"
    window: WindowOptions = field(default_factory=WindowOptions)
    max_decisions: int = DEFAULT_MAX_DECISIONS
    overlap_decisions: int = DEFAULT_OVERLAP

    def __post_init__(self) -> None:
        check_range("num_frames", self.window.num_frames, at_least=1)
        check_range("max_gap_s", self.window.max_gap_s, above=0)
        check_range("overlap_decisions", self.overlap_decisions, at_least=0, below=self.max_decisions)


class History:
    """The session so far, as samples: what `data.convert` would write of the same turns.

    A sample names its pictures; `picture` returns them. Frames that no later prompt shows are forgotten.
    """

    def __init__(self, view: PlayView) -> None:
        self.view = view
        self.start(None)

    def start(self, goal: str | None) -> None:
        """Begin a session without frames, buttons and clock.

        Raises:
            PokegemmaError: the goal contains a control token of the model.
        """
        self.context = prompts.build_context(goal)
        if token := find_control_token(self.context):
            raise PokegemmaError(f"--goal contains {token}, a control token of the model")
        self._window: deque[str] = deque(maxlen=self.view.window.num_frames)  # names of frames, oldest first
        self._frames: dict[str, Image.Image] = {}
        self._previous: deque[str] = deque(maxlen=prompts.MAX_PREVIOUS_BUTTONS)
        self._stretch: list[Sample] = []  # decisions of the conversation, answered
        self._num_context = 0
        self._asked: Sample | None = None
        self._num_seen = 0
        self._last_time: float | None = None
        self._shown_since = 0  # frames without a time after the one of `_last_time`

    def see(self, frame: Image.Image | str | Path, *, time: float | None = None) -> Sample | Trajectory:
        """Append the frame to the window, which a long pause empties before; return the decision to make.

        Raises:
            PokegemmaError: the frame is a file that cannot be read.
        """
        picture = to_rgb(frame) if isinstance(frame, Image.Image) else open_picture(frame)
        self._shown_since += 1
        if time is not None:
            last, longest_s = self._last_time, self.view.window.max_gap_s * self._shown_since
            if last is not None and abs(time - last) > longest_s:
                self._window.clear()
            self._last_time, self._shown_since = time, 0
        self._num_seen += 1
        name = f"{self._num_seen:04d}.png"
        self._window.append(name)
        needed = {*self._window, *(name for sample in self._stretch for name in sample.frames)}
        self._frames = {one: frame for one, frame in (*self._frames.items(), (name, picture)) if one in needed}
        self._asked = self._sample(list(self._window))
        return self._example(self._asked)

    @property
    def asked(self) -> Sample | Trajectory | None:
        """The decision that `see` returned last, until its buttons are recorded."""
        return self._asked and self._example(self._asked)

    def pressed(self, *buttons: str, answer: str | None = None) -> None:
        """Record which buttons were pressed after the last frame.

        Args:
            answer: the answer to record in a conversation, as `prompts.build_output` writes it; None: the first of
                `buttons`, without a reason.

        Raises:
            ValueError: one of them is not a button.
        """
        require_buttons(buttons)
        if self._asked is not None and buttons and self.view.layout == "trajectory":
            output = answer or prompts.build_output(button=buttons[0], reasoning="", context="")
            self._stretch.append(replace(self._asked, output=output))
            if len(self._stretch) == self.view.max_decisions:
                self._stretch = self._stretch[self.view.max_decisions - self.view.overlap_decisions :]
                self._num_context = self.view.overlap_decisions
        self._previous.extend(buttons)
        self._asked = None

    def expected(self) -> Sample | Trajectory:
        """Return the next decision as far as it is known: its own frame is named `UNSEEN`."""
        return self._example(self._sample([*self._window, UNSEEN][-self.view.window.num_frames :]))

    def picture(self, name: str) -> Image.Image:
        """Return a picture of a decision by its name: a frame, or a grid of the frames that the name lists."""
        if self.view.layout != "grid":
            return self._frames[name]
        return Image.fromarray(compose_grid([np.asarray(fit_tile(self._frames[one])) for one in name.split()]))

    def messages(self, example: Sample | Trajectory) -> list[dict[str, Any]]:
        """Return a decision as a conversation for a chat template, with the last answer."""
        if isinstance(example, Trajectory):
            return prompts.build_trajectory_messages(example)
        return prompts.build_messages(example, self.view.layout)

    def picture_names(self, example: Sample | Trajectory) -> tuple[str, ...]:
        """Return the names of a decision's pictures in the order of its text."""
        if isinstance(example, Trajectory):
            return prompts.trajectory_images(example)
        return prompts.sample_images(example, self.view.layout)

    def _sample(self, window: list[str]) -> Sample:
        """Return the sample that the converter would write, with names of frames instead of paths."""
        frames = (window[0],) * (self.view.window.min_frames - len(window)) + tuple(window)
        return Sample(
            id=f"decision {self._num_seen}",
            frames=frames,
            image=" ".join(frames),
            context=self.context,
            question=prompts.build_question(list(self._previous)),
            output="{}",
            metadata={"session": "play", "turn": self._num_seen, "previous_buttons": list(self._previous)},
        )

    def _example(self, sample: Sample) -> Sample | Trajectory:
        if self.view.layout != "trajectory":
            return sample
        return Trajectory((*self._stretch, sample), num_context=self._num_context)
