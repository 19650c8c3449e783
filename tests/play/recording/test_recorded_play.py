"""Play is recorded, converted and trained on: nothing is lost, and training shows what play showed."""

import functools
import json
import random
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.eevee_v1.sessions import read_session
from pokegemma.data.prompts import parse_answer
from pokegemma.data.samples import Sample, read_samples
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.emulators.emulator import PressTiming
from pokegemma.play.emulators.frames import FrameEmulator
from pokegemma.play.emulators.skyemu_client import SkyEmuError, SkyEmuLimits
from pokegemma.play.emulators.skyemu_console import SkyEmuConsole
from pokegemma.play.emulators.toy import ToyEmulator
from pokegemma.play.history import History, PlayView
from pokegemma.play.loop import play
from pokegemma.play.players import ButtonChoice, ExpertPlayer
from pokegemma.play.recording.journal import PlayedTurn, SessionJournal
from pokegemma.play.toy.world import ToyWorld
from tests.play.skyemu_server import FAULTS, SkyEmuServer, SkyEmuState, ToyFrames
from tests.processes import call_script

LIMITS = SkyEmuLimits(timeout_s=0.05, patience_s=20)
DELAY_S = 0.1
"""Of an answer that comes too late for LIMITS."""


def convert(runs: Path, output: Path, **options: Any) -> tuple[dict[str, Any], list[Sample]]:
    report = convert_corpus(runs, output, window=WindowOptions(), eval_fraction=0.0, num_workers=1, **options)
    return report, list(read_samples(output / "train.jsonl"))


class ShownPlayer:
    """Press what the expert would, and remember what a model would be shown at each decision."""

    name = "shown"

    def __init__(self, game: ToyEmulator) -> None:
        self.game, self.history = game, History(PlayView(layout="grid"))
        self.shown: list[tuple[str, str, bytes, list[bytes]]] = []

    def start(self, goal: str | None) -> None:
        self.history.start(goal)

    def decide(self, frame: Image.Image, *, time: float | None = None) -> ButtonChoice:
        sample = self.history.see(frame, time=time)
        (grid,) = (self.history.picture(name) for name in self.history.picture_names(sample))
        frames = [self.history._frames[name].tobytes() for name in sample.frames]
        self.shown.append((sample.context, sample.question, grid.tobytes(), frames))
        return ButtonChoice(self.game.world.expert_button(), decided_by="expert", reasoning="the way")

    def pressed(self, *buttons: str) -> None:
        self.history.pressed(*buttons)

    def prepare(self) -> None:
        pass


def test_training_shows_what_play_showed_also_with_noise_and_after_a_resumed_session(tmp_path: Path) -> None:
    game, folder = ToyEmulator(5, level=4), tmp_path / "runs" / "session_s"
    goal, rng, player = game.world.goal, random.Random(3), ShownPlayer(game)
    noise = {"noise": 0.3, "rng": rng, "expert": lambda: game.world.expert_button()}
    for _ in range(2):
        with SessionJournal(folder, goal=goal, facts={"noise": 0.3}) as journal:
            for num_turns in (5, 3):  # the second time in one journal, the player starts anew, too
                play(game, player, max_turns=num_turns, goal=goal, journal=journal, **noise)
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert (report["turns"], report["samples"], len(player.shown)) == (16, 16, 16)
    for sample, (context, question, grid, frames) in zip(samples, player.shown, strict=True):
        assert (sample.context, sample.question) == (context, question)
        assert [read_rgb(tmp_path / "out" / path) for path in sample.frames] == frames
        assert read_rgb(tmp_path / "out" / sample.image) == grid
    noisy = [sample for sample in samples if sample.metadata.get("corrected")]
    assert 0 < len(noisy) < 16
    assert all(parse_answer(sample.output).button != sample.metadata["buttons"][0] for sample in noisy)


def read_rgb(path: Path) -> bytes:
    with Image.open(path) as picture:
        return picture.convert("RGB").tobytes()


def assert_screens_of_the_expert(samples: list[Sample], seed: int, dataset: Path) -> None:
    room = ToyWorld(seed)
    for sample in samples:
        assert read_rgb(dataset / sample.frames[-1]) == room.render().tobytes()
        room.press(room.expert_button())


def test_a_recorded_run_gives_each_turn_as_a_sample(tmp_path: Path) -> None:
    game = ToyEmulator(7)
    with SessionJournal(tmp_path / "runs" / "session_s", goal=game.world.goal, facts={}) as journal:
        result = play(game, ExpertPlayer(game.world), max_turns=99, journal=journal, is_done=lambda: game.world.is_done)
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert result.ended == "done"
    assert report["samples"] == report["turns"] == len(result.turns) == journal.num_turns
    assert [parse_answer(sample.output).button for sample in samples] == result.buttons
    assert {sample.metadata["label_by"] for sample in samples} == {"expert"}
    assert_screens_of_the_expert(samples, 7, tmp_path / "out")


def record_room(runs: Path, seed: int) -> tuple[list[str], Counter[str]]:
    """Record the expert in a room behind a stand-in that often fails; return what was pressed and the faults."""
    room = ToyFrames(seed)
    with SkyEmuServer(SkyEmuState(room), faults=0.2, seed=seed, delay_s=DELAY_S) as server:
        game = FrameEmulator(SkyEmuConsole(server.url, limits=LIMITS), timing=PressTiming())

        def check_press(turn: PlayedTurn, screen: Image.Image) -> None:
            assert len(room.presses) == turn.number
            assert room.presses[-1] == turn.button
            assert server.state.pressed == []
            assert game.screen().tobytes() == room.world.render().tobytes()

        rules = {"max_turns": 99, "is_done": lambda: room.world.is_done, "on_turn": check_press}
        with SessionJournal(runs / f"session_{seed}", goal=room.world.goal, facts={}) as journal:
            play(game, ExpertPlayer(room.world), journal=journal, **rules)
        game.close()
        assert server.state.pressed == []
        return room.presses, server.num_faults


@pytest.mark.slow(35)
def test_five_hundred_faults_of_skyemu_lose_no_turn_and_press_none_twice(tmp_path: Path) -> None:
    num_faults: Counter[str] = Counter()
    pressed: list[list[str]] = []
    with ThreadPoolExecutor(2) as rooms:  # most of a fault is waiting
        while num_faults.total() < 500:
            seeds = range(len(pressed), len(pressed) + 2)
            for presses, faults in rooms.map(functools.partial(record_room, tmp_path / "runs"), seeds):
                num_faults += faults
                pressed.append(presses)
    assert set(num_faults) == set(FAULTS)
    report, samples = convert(tmp_path / "runs", tmp_path / "out")
    assert report["samples"] == report["turns"] == sum(map(len, pressed))
    assert report["problems"] == []
    for seed, presses in enumerate(pressed):
        session = [sample for sample in samples if sample.session == str(seed)]
        assert [parse_answer(sample.output).button for sample in session] == presses
        assert_screens_of_the_expert(session, seed, tmp_path / "out")


def test_a_skyemu_that_ends_leaves_all_turns_and_is_played_on_later(tmp_path: Path) -> None:
    frames, folder = ToyFrames(5), tmp_path / "runs" / "session_s"
    goal, limits = frames.world.goal, SkyEmuLimits(timeout_s=0.1, patience_s=0.2)
    for _ in range(2):
        with SkyEmuServer(SkyEmuState(frames)) as server:
            game = FrameEmulator(SkyEmuConsole(server.url, limits=limits), timing=PressTiming())

            def stop(turn: Any, screen: Image.Image, server: SkyEmuServer = server) -> None:
                if turn.number % 5 == 4:
                    server.close()

            with pytest.raises(SkyEmuError), SessionJournal(folder, goal=goal, facts={}) as journal:
                play(game, ExpertPlayer(frames.world), max_turns=99, journal=journal, on_turn=stop)
            game.close()
    turns = read_session(folder).turns
    assert [turn.decision.status for turn in turns] == [*["decision"] * 4, "action_failed"] * 2
    assert [turn.decision.pressed[0] for turn in turns if turn.decision.pressed] == frames.presses
    assert [turn.number for turn in turns if turn.new_start] == [6]


@pytest.mark.slow(15)
def test_a_recorded_and_corrected_run_of_a_model_can_be_trained_on(tmp_path: Path, tiny_model: Path) -> None:
    checkpoint, runs = open_checkpoint(tiny_model), tmp_path / "runs"
    collator = Gemma3Collator(processor=checkpoint.processor, layout="grid", dataset_folder=tmp_path)
    player = CachedPlayer(Predictor(model=checkpoint.load_model(), collator=collator), PlayView(), name="tiny")
    for seed in (1, 2):
        game = ToyEmulator(seed)
        with SessionJournal(runs / f"session_{seed}", goal=game.world.goal, facts={"seed": seed}) as journal:
            play(game, player, max_turns=6, goal=game.world.goal, journal=journal)
    report, before = convert(runs, tmp_path / "before")
    assert report["samples"] == report["turns"] == 12
    assert report["labels_by"] == {"model:tiny": 12}
    wrong = next(sample for sample in before if sample.id == "2/3")
    button = "left" if parse_answer(wrong.output).button != "left" else "right"
    (tmp_path / "corrections.jsonl").write_text(
        json.dumps({"session": "session_2", "turn": 3, "button": button, "by": "human"}) + "\n"
    )
    _, after = convert(runs, tmp_path / "after", corrections=tmp_path / "corrections.jsonl")
    assert [new.id for old, new in zip(before, after, strict=True) if old != new] == ["2/3"]
    for step in ("before", "after"):
        flags = (
            "--finetuning lora --max_steps 2 --per_device_train_batch_size 2 --gradient_accumulation_steps 1 "
            "--warmup_steps 0 --eval_strategy no --dataloader_num_workers 0 --report_to none --logging_steps 1"
        )
        folders = ("--model_name_or_path", tiny_model, "--dataset_path", tmp_path / step)
        done = call_script("sft_pokemon_gemma3", *folders, "--output_dir", tmp_path / f"adapter_{step}", *flags.split())
        assert done.returncode == 0, done.stderr
        assert (tmp_path / f"adapter_{step}" / "adapter_model.safetensors").stat().st_size > 0
