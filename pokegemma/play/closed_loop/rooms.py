"""Play rooms of the toy game, in Python or as ROMs, and write down what happened."""

import random
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path

from PIL import Image
from tqdm import tqdm

from pokegemma.data.recordings.corrections import Correction
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.families import family_of
from pokegemma.play.closed_loop.episodes import Episode, ObservedTurn
from pokegemma.play.closed_loop.processes import make_model_player, play_in_processes
from pokegemma.play.closed_loop.rules import RoomRules
from pokegemma.play.closed_loop.together import play_together
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.history import PlayView
from pokegemma.play.loop import play
from pokegemma.play.players import ButtonPlayer, ExpertPlayer, RandomPlayer, RepeatPlayer
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal
from pokegemma.play.rom.game import ToyRomEmulator
from pokegemma.play.toy.recorder import explain
from pokegemma.play.toy.world import ToyWorld

OTHER_PLAYERS = ("expert", "repeat", "random")
"""Players next to the model: the expert under the same noise, the previous button again, and any button."""


def count_expert_turns(seed: int | str, level: int) -> int:
    """Return how many turns the expert needs for a room."""
    world, number = ToyWorld(seed, level=level), 0
    while not world.is_done:
        world.press(world.expert_button())
        number += 1
    return number


def play_rooms(
    predictor: Predictor,
    view: PlayView,
    seeds: Sequence[int | str],
    rules: RoomRules,
    *,
    batch_size: int = 32,
    record_to: Path | None = None,
    only_mistakes: bool = False,
    num_workers: int = 1,
    load: Callable[[], Predictor] | None = None,
) -> list[Episode]:
    """Let a model play a room for each seed, with a progress bar; the likeliest button is chosen.

    Rooms in Python are decided for together in one forward pass. Where that is not possible (a ROM, since one emulator
    runs in a process; conversations, which write reasons; other families), rooms are played one after the other, in
    this process or in `num_workers`, which load the model with `load`.

    Args:
        record_to: folder to make for the sessions, one for each room, each turn labelled by the expert.
        only_mistakes: reject the turns in which the model chose the expert's button; see `Correction`.
    """
    games = [
        partial(
            play_room,
            seed=seed,
            rules=rules,
            folder=record_to and record_to / f"session_{number:05d}",
            only_mistakes=only_mistakes,
        )
        for number, seed in enumerate(seeds)
    ]
    label = f"play level {rules.level}"
    if num_workers > 1:
        assert load is not None
        return play_in_processes(games, view, load=load, num_workers=num_workers, label=label)
    is_inexact = family_of(predictor.model.config).inexact
    with tqdm(total=len(games), desc=label, unit="room") as progress:
        if rules.game == "toy" and view.layout != "trajectory" and not is_inexact:
            on_end = lambda _: progress.update()  # noqa: E731
            return play_together(predictor, view, games, batch_size=batch_size, on_end=on_end)
        player, episodes = make_model_player(predictor, view), []
        for game in games:
            episodes.append(game(player))
            progress.update()
        return episodes


def play_baseline(name: str, seeds: Sequence[int | str], rules: RoomRules) -> list[Episode]:
    """Let one of `OTHER_PLAYERS` play the same rooms, in Python, since they see no screen."""
    rules = replace(rules, game="toy")
    return [play_room(_make_baseline(name, seed), seed=seed, rules=rules) for seed in seeds]


def play_room(
    player: ButtonPlayer | None,
    *,
    seed: int | str,
    rules: RoomRules,
    folder: Path | None = None,
    only_mistakes: bool = False,
) -> Episode:
    """Play one room.

    Args:
        player: None for the expert.
        folder: of the session to record, each turn labelled by the expert; None records nothing.
        only_mistakes: reject the turns in which the player chose the expert's button.
    """
    open_game = ToyEmulator if rules.game == "toy" else ToyRomEmulator
    game = open_game(seed, level=rules.level)
    log = _TurnLog(game, only_mistakes=only_mistakes)
    player = player or ExpertPlayer(game.world)
    num_expert_turns = count_expert_turns(seed, rules.level)
    max_turns = int(rules.turns_per_expert_turn * num_expert_turns)
    facts = {"emulator": game.name, "player": player.name, "level": rules.level, "seed": seed, "noise": rules.noise}
    goal = game.world.goal
    try:
        with nullcontext() if folder is None else _LabelledJournal(folder, log, goal=goal, facts=facts) as journal:
            play(
                game,
                player,
                goal=goal,
                max_turns=max_turns,
                journal=journal,
                stuck=rules.stuck,
                noise=rules.noise,
                rng=random.Random(f"room {rules.level} {seed}"),
                expert=log.ask_expert,
                is_done=lambda: game.world.is_done,
                on_turn=log.add,
            )
        return Episode(seed, num_expert_turns, max_turns, game.world.is_done, tuple(log.turns))
    finally:
        game.close()


def _make_baseline(name: str, seed: int | str) -> ButtonPlayer | None:
    return {"expert": None, "repeat": RepeatPlayer(seed), "random": RandomPlayer(seed)}[name]


class _TurnLog:
    """The turns of an episode, with what only the game knows: situation, right button, whether a press did anything."""

    def __init__(self, game: ToyEmulator | ToyRomEmulator, *, only_mistakes: bool) -> None:
        self._game, self._only_mistakes = game, only_mistakes
        self.turns: list[ObservedTurn] = []
        self.situation, self.right = "", ""

    def ask_expert(self) -> str:
        self.situation, self.right = self._game.world.situation, self._game.world.expert_button()
        return self.right

    def label(self, turn: PlayedTurn) -> Correction:
        """Return the expert's whole answer, or the rejection of a turn that was right."""
        if self._only_mistakes and turn.button == self.right:
            return Correction(None, "expert")
        return Correction(self.right, "expert", explain(self.right, situation=self.situation))

    def add(self, turn: PlayedTurn, screen: Image.Image) -> None:
        changed = self._game.screen().tobytes() != screen.tobytes()
        self.turns.append(ObservedTurn(self.situation, self.right, turn.button, turn.pressed[0], changed))


class _LabelledJournal(SessionJournal):
    """A journal whose turns have the expert's label and situation."""

    def __init__(self, folder: Path, log: _TurnLog, *, goal: str, facts: dict[str, object]) -> None:
        super().__init__(folder, goal=goal, facts=facts)
        self._log = log

    def record(self, turn: PlayedTurn) -> None:
        super().record(replace(turn, situation=self._log.situation, correction=self._log.label(turn)))
