"""The loop of play, with players that need no model, in the toy game."""

import random
from pathlib import Path
from time import monotonic, sleep

import numpy as np
import pytest
from PIL import Image

from pokegemma.data.prompts import BUTTONS
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.loop import STAGES, play
from pokegemma.play.players import ButtonChoice, ExpertPlayer, RandomPlayer, RepeatPlayer, draw_button
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal
from pokegemma.play.stuck import StuckEscape


class ScriptedPlayer:
    """Decide the given buttons in turn, the last for ever; None is an answer without a button."""

    name = "scripted"

    def __init__(self, *buttons: str | None) -> None:
        self._buttons = list(buttons)
        self.told: list[tuple[str, ...]] = []
        self.goals: list[str | None] = []
        self.times: list[float | None] = []

    def start(self, goal: str | None) -> None:
        self.goals.append(goal)

    def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
        self.times.append(time)
        button = self._buttons.pop(0) if len(self._buttons) > 1 else self._buttons[0]
        return ButtonChoice(button, reasoning="so")

    def pressed(self, *buttons: str) -> None:
        self.told.append(buttons)

    def prepare(self) -> None:
        pass


def test_the_expert_leaves_the_room_and_every_stage_of_every_turn_is_timed() -> None:
    game, shown = ToyEmulator(5), []
    result = play(
        game,
        ExpertPlayer(game.world),
        max_turns=200,
        is_done=lambda: game.world.is_done,
        on_turn=lambda turn, screen: shown.append((turn.number, screen.size)),
    )
    assert (result.ended, game.world.is_done) == ("done", True)
    assert {stage: len(values) for stage, values in result.seconds.items()} == dict.fromkeys(
        STAGES, len(result.buttons)
    )
    assert shown == [(number + 1, (240, 160)) for number in range(len(result.buttons))]
    assert {turn.decided_by for turn in result.turns} == {"expert"}


@pytest.mark.parametrize("player", [RandomPlayer(3), RepeatPlayer(3)])
def test_blind_players_play_to_the_end_of_their_turns(player: RandomPlayer | RepeatPlayer) -> None:
    game = ToyEmulator(5)
    result = play(game, player, max_turns=12, is_done=lambda: game.world.is_done)
    assert (result.ended, len(result.buttons)) == ("max_turns", 12)
    assert len(set(result.buttons)) == (1 if isinstance(player, RepeatPlayer) else 6)


def test_a_player_is_told_the_goal_and_what_was_pressed_instead() -> None:
    player = ScriptedPlayer("a")
    result = play(ToyEmulator(5), player, goal="leave", max_turns=40, noise=0.5, rng=random.Random(0))
    assert player.goals == ["leave"]
    assert player.told == [turn.pressed for turn in result.turns]
    assert {turn.button for turn in result.turns} == {"a"}
    replaced = [turn for turn in result.turns if turn.pressed != ("a",)]
    assert 10 < len(replaced) < 30
    assert {turn.decided_by for turn in replaced} == {"noise"}


def test_the_expert_corrects_other_buttons_and_labels_what_chance_pressed() -> None:
    game = ToyEmulator(5)
    right = game.world.expert_button()
    result = play(game, ScriptedPlayer("select"), max_turns=1, expert=game.world.expert_button)
    assert (result.turns[0].correction.button, result.turns[0].correction.by) == (right, "expert")
    game = ToyEmulator(5)
    result = play(
        game, ExpertPlayer(game.world), max_turns=60, noise=0.5, rng=random.Random(1), expert=game.world.expert_button
    )
    assert all((turn.correction is not None) == (turn.decided_by == "noise") for turn in result.turns)


def test_a_button_that_changed_nothing_is_replaced_by_another() -> None:
    game = ToyEmulator(5)
    result = play(game, ScriptedPlayer("b"), max_turns=3, stuck=2, rng=random.Random(0))
    assert result.buttons[:2] == ["b", "b"]
    assert result.buttons[2] != "b"
    assert [turn.decided_by for turn in result.turns] == ["model", "model", "stuck"]


def test_all_buttons_are_tried_before_one_is_repeated() -> None:
    screen, escape, pressed = Image.new("RGB", (4, 4)), StuckEscape(1, rng=random.Random(0)), []
    for _ in range(8):
        pressed.append(escape.choose(screen, "up", probabilities=None))
        escape.pressed(pressed[-1])
    assert sorted(pressed) == sorted(BUTTONS)


def test_the_way_out_follows_the_probabilities_and_a_loop_over_two_screens_is_found() -> None:
    screens = [Image.new("RGB", (4, 4), colour) for colour in ("red", "blue")]
    probabilities = np.array([0.5, 0.0, 0.0, 0.5, 0.0, 0.0, 0.0, 0.0])
    escape = StuckEscape(2, rng=random.Random(0))
    for screen in screens * 2:
        assert escape.choose(screen, "up", probabilities=probabilities) == "up"
        escape.pressed("up")
    assert escape.choose(screens[0], "up", probabilities=probabilities) == "right"


def test_an_answer_without_a_button_presses_any_and_twenty_of_them_end_the_play() -> None:
    result = play(ToyEmulator(5), ScriptedPlayer(None, "up"), max_turns=2)
    assert [turn.decided_by for turn in result.turns] == ["random", "model"]
    with pytest.raises(CheckFailedError, match="20 answers in a row"):
        play(ToyEmulator(5), ScriptedPlayer(None), max_turns=30)


def test_turns_are_recorded_and_numbered_on(tmp_path: Path) -> None:
    game = ToyEmulator(5)
    for _ in range(2):
        with SessionJournal(tmp_path / "session_1", goal="leave", facts={}) as journal:
            play(game, ExpertPlayer(game.world), max_turns=3, journal=journal)
    assert journal.num_turns == 6
    assert len(list((tmp_path / "session_1" / "sshots").iterdir())) == 6


def test_the_screen_is_written_while_the_player_decides(tmp_path: Path) -> None:
    written = []

    class WaitingPlayer(ScriptedPlayer):
        def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
            path, deadline = tmp_path / "sshots" / f"step_{len(written) + 1:04d}_grid.png", monotonic() + 5
            while not path.exists() and monotonic() < deadline:
                sleep(0.001)
            written.append(path.exists())
            return super().decide(frame, time=time)

    with SessionJournal(tmp_path, goal="leave", facts={}) as journal:
        play(ToyEmulator(5), WaitingPlayer("up"), max_turns=3, journal=journal)
    assert written == [True] * 3


class BrokenEmulator(ToyEmulator):
    """A game whose third press fails."""

    def press(self, button: str) -> None:
        if len(self._pressed) == 2:
            raise PokegemmaError("the emulator does not answer")
        super().press(button)


def test_a_press_that_fails_is_recorded_as_a_turn_without_a_press(tmp_path: Path) -> None:
    game, turns = BrokenEmulator(5), []

    class Journal(SessionJournal):
        def record(self, turn: PlayedTurn) -> None:
            turns.append(turn)
            super().record(turn)

    with pytest.raises(PokegemmaError, match="does not answer"), Journal(tmp_path, goal="x", facts={}) as journal:
        play(game, ExpertPlayer(game.world), max_turns=9, journal=journal)
    assert [len(turn.pressed) for turn in turns] == [1, 1, 0]


def test_ctrl_c_ends_the_play_or_is_raised() -> None:
    def interrupt(turn: PlayedTurn, screen: Image.Image) -> None:
        if turn.number == 2:
            raise KeyboardInterrupt

    result = play(ToyEmulator(5), ScriptedPlayer("up"), max_turns=9, on_turn=interrupt, stop_on_interrupt=True)
    assert (result.ended, len(result.turns)) == ("interrupted", 2)
    with pytest.raises(KeyboardInterrupt):
        play(ToyEmulator(5), ScriptedPlayer("up"), max_turns=9, on_turn=interrupt)


def test_the_time_that_the_player_takes_is_no_pause(monkeypatch: pytest.MonkeyPatch) -> None:
    now = 0.0
    monkeypatch.setattr("pokegemma.play.loop.time.monotonic", lambda: now)
    monkeypatch.setattr("pokegemma.play.loop.time.perf_counter", lambda: now)

    class SlowPlayer(ScriptedPlayer):
        def decide(self, frame: Image.Image | str | Path, *, time: float | None = None) -> ButtonChoice:
            nonlocal now
            now += 100
            return super().decide(frame, time=time)

    class SlowEmulator(ToyEmulator):
        def press(self, button: str) -> None:
            nonlocal now
            now += 2
            super().press(button)

    player = SlowPlayer("up")
    result = play(SlowEmulator(5), player, max_turns=3)
    assert player.times == [0, 2, 4]
    assert [(turn.time - result.turns[0].time).total_seconds() for turn in result.turns] == [0, 2, 4]


def test_temperature_draws_in_proportion_to_the_probabilities() -> None:
    probabilities, rng = np.array([0.7, 0.3, 0, 0, 0, 0, 0, 0]), random.Random(0)
    assert {draw_button(probabilities, temperature=0, rng=rng) for _ in range(9)} == {"up"}
    drawn = [draw_button(probabilities, temperature=1, rng=rng) for _ in range(1000)]
    assert set(drawn) == {"up", "down"}
    assert 0.65 < drawn.count("up") / 1000 < 0.75
