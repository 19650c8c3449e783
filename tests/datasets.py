"""Made-up datasets for tests, and the original's leak put back into a real one."""

import json
import random
from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from pokegemma.data.checks.records import Split
from pokegemma.data.frame_pictures import read_frame
from pokegemma.data.grids import compose_grid
from pokegemma.data.prompts import MAX_PREVIOUS_BUTTONS, build_context, build_output, build_question
from pokegemma.data.samples import Sample

FRAME_PX = (240, 160)


def draw_frame(path: Path, number: int) -> None:
    """Write a frame that no other number has, and that has more than one colour."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.new("RGB", FRAME_PX, (number % 256, number // 256, 40))
    picture.paste((250, 250, 250), (10, 10, 60, 60))
    picture.save(path)


def make_sample(session: str, turn: int, button: str, previous: Iterable[str] = (), **changes: Any) -> Sample:
    """Return a sample of one frame, written as the converter writes it; `changes` replace fields of it."""
    goal = "leave the house"
    sample = Sample(
        id=f"{session}/{turn}",
        frames=(f"frames/{session}/{turn:04d}.png",),
        image=None,
        context=build_context(goal),
        question=build_question(list(previous)),
        output=build_output(button=button, reasoning=f"nothing stands in the way {turn}", context="navigation"),
        metadata={
            "session": session,
            "turn": turn,
            "goal": goal,
            "buttons": [button],
            "previous_buttons": list(previous)[-MAX_PREVIOUS_BUTTONS:],
            "frame_turns": [turn],
        },
    )
    return replace(sample, **changes)


def play_session(session: str, *, num_turns: int = 20, seed: int = 0) -> list[Sample]:
    """Return the samples of a session in which `b` follows `a`, `select` follows `start`, and the rest is chance."""
    generator, pressed, samples = random.Random(f"{session} {seed}"), [], []
    for turn in range(1, num_turns + 1):
        last = pressed[-1] if pressed else None
        button = {"a": "b", "start": "select"}.get(last) or generator.choice(
            ["up", "down", "left", "right", "a", "start"]
        )
        samples.append(make_sample(session, turn, button, pressed))
        pressed.append(button)
    return samples


def write_split(path: Path, samples: Iterable[Sample], *, draw: bool = True) -> Split:
    """Write a JSONL file and, with `draw`, its frames, each different from all others."""
    samples = list(samples)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("".join(f"{sample.to_json()}\n" for sample in samples), encoding="utf-8")
    if draw:
        for number, name in enumerate(sorted({name for sample in samples for name in sample.frames})):
            draw_frame(path.parent / name, number + 1000 * (path.stem == "eval"))
    return Split(path.stem, path)


def write_dataset(folder: Path, *, num_sessions: int = 6, num_turns: int = 20) -> tuple[Split, Split]:
    """Write train.jsonl and eval.jsonl (two sessions) of played sessions."""
    sessions = [play_session(f"s{number}", num_turns=num_turns) for number in range(num_sessions)]
    train = write_split(folder / "train.jsonl", [sample for samples in sessions[2:] for sample in samples])
    held_out = write_split(folder / "eval.jsonl", [sample for samples in sessions[:2] for sample in samples])
    return train, held_out


def with_grids(split: Split) -> list[Sample]:
    """Return the samples of a split with grid pictures, and write these."""
    samples = []
    for sample in split.samples():
        image = f"grids/{sample.session}_{sample.metadata['turn']:04d}.png"
        (split.folder / "grids").mkdir(exist_ok=True)
        tiles = [read_frame((split.folder / name).read_bytes()).tile for name in sample.frames]
        Image.fromarray(compose_grid(tiles)).save(split.folder / image)
        samples.append(replace(sample, image=image))
    return samples


def put_leak_back(split: Split, runs: Path, *, keys: tuple[str, ...] = ("reasoning", "observations")) -> Split:
    """Write `leaked_NAME.jsonl` beside a split: each prompt says its own turn's analysis, as the original's did."""
    sessions: dict[str, dict[int, dict[str, Any]]] = {}
    for path in sorted(runs.glob("session_*/session_data.json")):
        turns = json.loads(path.read_text(encoding="utf-8"))["turns"]
        sessions[path.parent.name.removeprefix("session_")] = {
            turn["turn"]: turn["ai_analysis"]["parsed_json"] for turn in turns
        }
    leaked = []
    for sample in split.samples():
        analysis = sessions[sample.session][sample.metadata["turn"]]
        secret = " | ".join(str(analysis.get(key, "")) for key in keys)
        leaked.append(replace(sample, question=f"Recent Context: {secret}\n{sample.question}"))
    return replace(write_split(split.path.with_name(f"leaked_{split.path.name}"), leaked, draw=False), name=split.name)
