"""Fixtures shared by all tests: the real sessions, made-up sessions, frames that can be told apart, a tiny model."""

import base64
import io
import json
import os
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from pokegemma.outputs import file_lock

MakeOnce = Callable[[str, Callable[[Path], object]], Path]
REAL_RUNS = Path(__file__).resolve().parents[2] / "shared" / "eevee_v1" / "runs"


def frame_png(value: int, *, size: tuple[int, int] = (240, 160), mode: str = "RGB", image_format: str = "PNG") -> bytes:
    """Return a picture in one colour, whose red is `value`."""
    buffer = io.BytesIO()
    Image.new("RGB", size, (value, 10, 20)).convert(mode).save(buffer, image_format)
    return buffer.getvalue()


def red_of(path: Path) -> int:
    """Return the red of a frame's middle: which frame it is."""
    with Image.open(path) as image:
        return image.convert("RGB").getpixel((image.width // 2, image.height // 2))[0]


def turn_record(turn: int, buttons: Any = "up", **changes: Any) -> dict[str, Any]:
    """Return a turn as Eevee v1 logged it; `changes` replace or add keys."""
    buttons = [buttons] if isinstance(buttons, str) else buttons
    return {
        "turn": turn,
        "timestamp": f"2025-06-25T18:{turn // 60:02d}:{turn % 60:02d}",
        "ai_analysis": {
            "parsed_json": {
                "button_presses": buttons,
                "reasoning": f"secret-reasoning-{turn}",
                "observations": f"secret-observation-{turn}",
                "context_detected": "navigation",
                "confidence": "high",
            },
            "raw_text": f"secret-raw-{turn}",
            "parsing_success": True,
        },
        "button_presses": buttons,
        "action_result": True,
        "screenshot_path": f"screenshot_{turn}.png",
        "execution_time": "2025-06-25T18:00:00",
        "template_used": "exploration_strategy",
        "template_version": "5.0",
        "visual_analysis": None,
        "strategic_context": None,
        "memory_context": None,
        **changes,
    }


def failed_turn(turn: int, *, text: str = "", error: str = "No JSON block found", **changes: Any) -> dict[str, Any]:
    """Return a turn whose answer failed, with v1's fallback button."""
    analysis = {"parsed_json": None, "raw_text": text, "parsing_success": False, "error": error}
    return turn_record(turn, ["b"], ai_analysis=analysis, **changes)


def raw_frame(turn: int, value: int) -> dict[str, Any]:
    """Return an enhanced turn that holds the frame without v1's overlay."""
    return {"turn_number": turn, "screenshot_base64": base64.b64encode(frame_png(value)).decode()}


def write_session(
    folder: Path,
    turns: Sequence[Any],
    *,
    steps: Sequence[int] | None = None,
    goal: str = "heal your pokemon",
    screenshots: str = "sshots",
    turns_key: str = "turns",
    **changes: Any,
) -> Path:
    """Write a session as v1 did. `steps` are the screenshots' numbers (default: one a turn); red = 2 x step number.

    A change to None leaves that key out of session_data.json.
    """
    (folder / screenshots).mkdir(parents=True, exist_ok=True)
    name = folder.name.removeprefix("session_")
    record = {
        "session_metadata": {"session_id": name, "goal": goal, "status": "running"},
        "session_id": name,
        "goal": goal,
        "start_time": "2025-06-25T18:00:00",
        turns_key: list(turns),
        "enhanced_turns": [],
        **changes,
    }
    record = {key: value for key, value in record.items() if value is not None}
    (folder / "session_data.json").write_text(json.dumps(record), encoding="utf-8")
    for step in range(1, len(turns) + 1) if steps is None else steps:
        (folder / screenshots / f"step_{step:04d}_grid.png").write_bytes(frame_png(2 * step % 256))
    return folder


def write_long_sessions(runs: Path) -> None:
    """Write two sessions of 5,999 turns each, whose conversion a test can interrupt."""
    frame = raw_frame(1, 5)  # drawn once: for every turn it would take ten seconds
    for name in ("a", "b"):
        turns = [turn_record(turn, screenshot_path=f"{name}{turn}") for turn in range(1, 6000)]
        raw = [frame | {"turn_number": turn} for turn in range(1, 6000)]
        write_session(runs / f"session_{name}", turns, steps=[], enhanced_turns=raw)


def conversion_command(folder: Path, *more: str) -> list[str]:
    """Return the command that converts `folder`/runs to `folder`/out with two workers."""
    script, paths = (
        "scripts/convert_eevee_data_v2.py",
        ("--eevee_data_dir", f"{folder}/runs", "--output_dir", f"{folder}/out"),
    )
    return [sys.executable, script, *paths, "--num_workers", "2", *more]


@pytest.fixture
def make_session(tmp_path: Path) -> Callable[..., Path]:
    """Return a function that writes a session under tmp_path/runs: make_session("s1", turns, **write_session's)."""
    return lambda name, turns, **options: write_session(tmp_path / "runs" / f"session_{name}", turns, **options)


@pytest.fixture(scope="session")
def make_once(tmp_path_factory: pytest.TempPathFactory) -> MakeOnce:
    """Return a function that has a new folder filled once, by the first worker that needs it, and returns the folder.

    Example:
        >>> make_once("tiny_gemma3", make_tiny_gemma3)  # calls make_tiny_gemma3(folder)
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent  # the folder of all workers

    def make_in(name: str, make: Callable[[Path], object]) -> Path:
        folder, done = root / "once" / name, root / "once" / f"{name}.done"
        folder.parent.mkdir(parents=True, exist_ok=True)
        with file_lock(root / "once" / f"{name}.lock"):
            if not done.exists():
                shutil.rmtree(folder, ignore_errors=True)  # of a worker that failed
                folder.mkdir()
                make(folder)
                done.touch()
        return folder

    return make_in


@pytest.fixture(scope="session")
def real_runs() -> Path:
    """Return the folder of the 33 real sessions."""
    if not REAL_RUNS.is_dir():
        pytest.skip("the real sessions (../shared/eevee_v1/runs) are not here")
    return REAL_RUNS


@pytest.fixture(scope="session")
def real_dataset(real_runs: Path, make_once: MakeOnce) -> Path:
    """Return the folder of the converted real sessions; a test that writes into it writes files of its own names."""
    from pokegemma.data.convert import WindowOptions
    from pokegemma.data.corpus import convert_corpus

    def make(folder: Path) -> None:
        window = WindowOptions(4, 4, 30.0, False)
        convert_corpus(real_runs, folder / "dataset", window=window, eval_fraction=0.1, num_workers=2)

    return make_once("real", make) / "dataset"


@pytest.fixture(scope="session")
def tiny_model(make_once: MakeOnce) -> Path:
    """Return a tiny Gemma 3 checkpoint: pictures of 56 px, 4 tokens each, a window shorter than a sample."""
    from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3

    return make_once(
        "tiny_gemma3", lambda folder: make_tiny_gemma3(folder, image_size_px=56, num_image_tokens=4, sliding_window=64)
    )


@pytest.fixture(scope="session")
def quantised_model(tiny_model: Path, make_once: MakeOnce) -> Path:
    """Return the tiny checkpoint with a config that says that its weights are stored in 4 bits."""

    def make(folder: Path) -> None:
        shutil.copytree(tiny_model, folder, dirs_exist_ok=True)
        config = json.loads((folder / "config.json").read_text())
        config["quantization_config"] = {"quant_method": "bitsandbytes", "load_in_4bit": True}
        (folder / "config.json").write_text(json.dumps(config))

    return make_once("quantised", make)


@pytest.fixture(scope="session")
def toy_dataset(make_once: MakeOnce) -> Path:
    """Return a converted dataset of five sessions of the toy game, ten turns each."""
    from pokegemma.data.convert import WindowOptions
    from pokegemma.data.corpus import convert_corpus
    from pokegemma.play.toy.recorder import record_sessions

    def make(folder: Path) -> None:
        record_sessions(folder / "recorded", num_sessions=5, seed=3, num_turns=10)
        convert_corpus(
            folder / "recorded" / "runs", folder / "dataset", window=WindowOptions(), eval_fraction=0.2, num_workers=1
        )

    return make_once("toy", make) / "dataset"
