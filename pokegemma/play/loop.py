"""The loop of play: look at the screen, decide, press, record."""

import random
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from typing import Literal

import numpy as np
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.data.recordings.corrections import Correction, is_blind
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.play.emulators.emulator import Emulator
from pokegemma.play.noise import replace_press
from pokegemma.play.players import ButtonChoice, ButtonPlayer
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal
from pokegemma.play.stuck import StuckEscape

STAGES = ("screen", "decide", "press", "record", "prepare", "show")
"""What the time of a turn is spent on: grab the screen, choose a button, press it and wait for the game, wait until the
turn is recorded, compute what the next decision needs, and call `on_turn`."""

MAX_INVALID_ANSWERS = 20

OnTurn = Callable[[PlayedTurn, Image.Image], None]


@dataclass
class PlayResult:
    """What was played.

    Attributes:
        turns: in order.
        seconds: for each of `STAGES`, the time that each turn took.
        ended: done: the game says so; max_turns; interrupted: by Ctrl-C.
    """

    turns: list[PlayedTurn] = field(default_factory=list)
    seconds: dict[str, list[float]] = field(default_factory=lambda: {stage: [] for stage in STAGES})
    ended: Literal["done", "max_turns", "interrupted"] = "max_turns"

    @property
    def buttons(self) -> list[str]:
        """What was pressed."""
        return [button for turn in self.turns for button in turn.pressed]


def play(
    emulator: Emulator,
    player: ButtonPlayer,
    *,
    max_turns: int,
    goal: str | None = None,
    journal: SessionJournal | None = None,
    stuck: int | None = None,
    noise: float = 0.0,
    rng: random.Random | None = None,
    expert: Callable[[], str] | None = None,
    is_done: Callable[[], bool] = lambda: False,
    on_turn: OnTurn | None = None,
    stop_on_interrupt: bool = False,
) -> PlayResult:
    """Play from the emulator's present state, as a new session of the player.

    Example:
        >>> game = ToyEmulator(5)
        >>> result = play(game, player, goal=game.world.goal, max_turns=200, is_done=lambda: game.world.is_done)
        >>> result.ended, len(result.turns)
        ('done', 34)

    Args:
        goal: what the player is told.
        journal: records each turn, if given; turns are numbered from where it ends.
        stuck: press another button than one that was pressed on the same screen this often; see `StuckEscape`.
        noise: the fraction of presses that are replaced by another button at random.
        rng: draws both.
        expert: returns the right button for the state before a press; it becomes the turn's correction where another
            button was pressed, or the same by chance.
        is_done: whether the game is over; asked before each turn.
        on_turn: called with each turn and its screen, after the press and the journal.
        stop_on_interrupt: end at Ctrl-C instead of raising KeyboardInterrupt.

    Raises:
        PokegemmaError: the emulator or a server failed. The turn of a press that failed is recorded, without a press.
        CheckFailedError: the model's answers name no button.
    """
    session = _Session(emulator, player, journal, rng or random.Random(0), stuck, noise, expert, on_turn)
    player.start(goal)
    player.prepare()
    try:
        while len(session.result.turns) < max_turns:
            if is_done():
                session.result.ended = "done"
                break
            session.play_turn()
        else:
            session.result.ended = "done" if is_done() else "max_turns"
    except KeyboardInterrupt:
        if not stop_on_interrupt:
            raise
        session.result.ended = "interrupted"
    return session.result


@dataclass
class _Session:
    """What the turns of one call of `play` share; see its arguments."""

    emulator: Emulator
    player: ButtonPlayer
    journal: SessionJournal | None
    rng: random.Random
    stuck: int | None
    noise: float
    expert: Callable[[], str] | None
    on_turn: OnTurn | None
    result: PlayResult = field(default_factory=PlayResult)

    def __post_init__(self) -> None:
        self._escape = None if self.stuck is None else StuckEscape(self.stuck, rng=self.rng)
        self._num_before = self.journal.num_turns if self.journal else 0
        self._began, self._clock, self._thought_s = datetime.now(), time.monotonic(), 0.0
        self._num_invalid = 0

    def play_turn(self) -> None:
        seconds = dict.fromkeys(STAGES, 0.0)
        began = time.perf_counter()

        def end_stage(stage: str) -> None:
            nonlocal began
            now = time.perf_counter()
            seconds[stage], began = now - began, now

        # The game stands still while the player decides: that time is no pause of the session.
        elapsed_s = time.monotonic() - self._clock - self._thought_s
        screen = self.emulator.screen()
        if self.journal is not None:
            self.journal.begin(screen)  # written while the player decides
        end_stage("screen")
        choice = self.player.decide(screen, time=elapsed_s)
        turn = self._choose(choice, screen, self._began + timedelta(seconds=elapsed_s))
        end_stage("decide")
        try:
            self.emulator.press(turn.pressed[0])
        except PokegemmaError:
            self._record(replace(turn, pressed=()))
            raise
        end_stage("press")
        self._record(turn)
        end_stage("record")
        self.player.pressed(*turn.pressed)
        self.player.prepare()
        end_stage("prepare")
        self.result.turns.append(turn)
        if self.on_turn is not None:
            self.on_turn(turn, screen)
        end_stage("show")
        for stage, value in seconds.items():
            self.result.seconds[stage].append(value)
        self._thought_s += seconds["decide"] + seconds["prepare"]

    def _choose(self, choice: ButtonChoice, screen: Image.Image, when: datetime) -> PlayedTurn:
        """Return the turn with the button to press: the player's, or another by escape or noise."""
        button, decided_by = choice.button, choice.decided_by
        self._num_invalid = self._num_invalid + 1 if button is None else 0
        if self._num_invalid == MAX_INVALID_ANSWERS:
            raise CheckFailedError(
                f"{self.player.name}: {MAX_INVALID_ANSWERS} answers in a row name no button; is this model trained on "
                "converted sessions, and is --layout that of its training?"
            )
        if button is None:
            button, decided_by = self.rng.choice(BUTTONS), "random"
        pressed = button
        if self._escape is not None:
            pressed = self._escape.choose(screen, button, probabilities=choice.probabilities)
            decided_by = decided_by if pressed == button else "stuck"
        if self.noise:
            replaced = replace_press(pressed, noise=self.noise, rng=self.rng)
            pressed, decided_by = replaced, decided_by if replaced == pressed else "noise"
        if self._escape is not None:
            self._escape.pressed(pressed)
        return PlayedTurn(
            number=self._num_before + len(self.result.turns) + 1,
            time=when,
            button=button,
            pressed=(pressed,),
            probabilities=_as_tuple(choice.probabilities),
            reasoning=choice.reasoning,
            situation=choice.situation,
            decided_by=decided_by,
            correction=self._correct(pressed, decided_by),
            new_start=self._num_before > 0 and not self.result.turns,
        )

    def _correct(self, pressed: str, decided_by: str) -> Correction | None:
        if self.expert is None:
            return None
        right = self.expert()
        return None if right == pressed and not is_blind(decided_by) else Correction(right, "expert")

    def _record(self, turn: PlayedTurn) -> None:
        if self.journal is not None:
            self.journal.record(turn)


def _as_tuple(probabilities: np.ndarray | None) -> tuple[float, ...] | None:
    return None if probabilities is None else tuple(map(float, probabilities))
