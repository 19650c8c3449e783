"""The steps of a long measurement: none is done twice, none with other options, none that was interrupted counts."""

import json
from pathlib import Path

import pytest

from benchmarks.steps import Progress
from pokegemma.errors import PokegemmaError

SCRIPT = """
import sys
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
sys.exit(3) if not folder.is_dir() else open(folder / "calls", "a").write(" ".join(sys.argv[1:]) + "\\n")
"""


@pytest.fixture
def progress(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Progress:
    """Return the steps of a project whose scripts only write down how they were called."""
    monkeypatch.setattr("benchmarks.steps.PROJECT_ROOT", tmp_path)
    (tmp_path / "scripts").mkdir()
    for name in ("battles_pack", "sft_battles"):
        (tmp_path / "scripts" / f"{name}.py").write_text(SCRIPT)
    return Progress.read(tmp_path / "progress.json")


def test_a_step_is_done_once_and_not_with_other_options(progress: Progress, tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match=r"battles_pack\.py failed; the same command continues"):
        progress.script("pack", "battles_pack", output_dir=tmp_path / "none")
    options = {"output_dir": tmp_path, "overwrite": True, "players": ["a", "b"]}
    progress.script("pack", "battles_pack", **options)
    again = Progress.read(progress.path)
    again.script("pack", "battles_pack", **options, resume={"num_workers": 1})
    assert (tmp_path / "calls").read_text() == f"--output_dir {tmp_path} --overwrite --players a b\n"
    with pytest.raises(PokegemmaError, match="'pack' was done with other options"):
        again.script("pack", "battles_pack", **options, seed=1)


def test_training_that_a_signal_ended_is_no_step_that_was_done(progress: Progress, tmp_path: Path) -> None:
    """Its scripts exit with 0 then, and run.json tells."""
    (tmp_path / "run.json").write_text(json.dumps({"status": "running"}))
    with pytest.raises(PokegemmaError, match="training was interrupted"):
        progress.script("train", "sft_battles", output_dir=tmp_path)
    assert not progress.steps
    (tmp_path / "run.json").write_text(json.dumps({"status": "completed"}))
    progress.script("train", "sft_battles", output_dir=tmp_path, resume={"resume_from_checkpoint": True})
    assert list(progress.steps) == ["train"]
    assert (tmp_path / "calls").read_text().endswith(f"--output_dir {tmp_path} --resume_from_checkpoint\n")
