"""The pipeline on a tiny adapter: from checkpoint to registered version, and again with nothing redone."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model

from pokegemma.cli import parse_options
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.fingerprints import FileHashes
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.provenance import PROJECT_ROOT, write_run_record
from pokegemma.release.options import PipelineOptions
from pokegemma.release.pipeline import explain_steps, run_pipeline
from pokegemma.release.plan import list_adapter, make_steps
from pokegemma.release.step_runner import hash_contents
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions
from tests.processes import call_script

pytest.importorskip("pokegemma.release.registry", exc_type=PokegemmaError)


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return an adapter with random weights, as training would leave it."""
    folder = tmp_path_factory.mktemp("adapter")
    options = ModelOptions(model_name_or_path=str(tiny_model), finetuning="lora")
    torch.manual_seed(0)
    model = get_peft_model(open_checkpoint(tiny_model).load_model(), lora_config(options, FAMILIES["gemma3"]))
    for name, weight in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.02)
    model.save_pretrained(folder)
    write_run_record(
        folder,
        stage="train",
        options={"layout": "grid", "lora_r": 16},
        status="completed",
        base_model=str(tiny_model),
        base_fingerprint=open_checkpoint(tiny_model).weights_fingerprint(),
        dataset={"path": "gone", "sha256": "d" * 64},
    )
    return folder


class Release:
    """A pipeline's folder with a copy of the dataset, run through its script or within this process."""

    def __init__(self, folder: Path, adapter: Path, dataset: Path) -> None:
        self.dataset = Path(shutil.copytree(dataset, folder / "dataset"))
        self.output = folder / "release"
        self.options = {
            "checkpoint": str(adapter),
            "dataset_path": str(self.dataset),
            "output_dir": str(self.output),
            "exports": ["none"],
            "registry_uri": str(folder / "registry.db"),
            "max_samples": 4,
            "generate": False,
            "min_gain_over_baseline": -1.0,
            "device": "cpu",
        }

    def reasons(self, **changes: Any) -> dict[str, str]:
        return dict(explain_steps(PipelineOptions(**{**self.options, **changes})))

    def run(self, **changes: Any) -> dict[str, bool]:
        """Run what has to run; return which steps did."""
        result = run_pipeline(PipelineOptions(**{**self.options, **changes}))
        return {step["name"]: step["ran"] for step in result["steps"]}

    def flags(self) -> list[str]:
        """Return the options as flags of the script."""
        values = {key: value[0] if isinstance(value, list) else value for key, value in self.options.items()}
        return [word for key, value in values.items() for word in (f"--{key}", str(value))]

    def times(self) -> dict[str, int]:
        """Return when each step was done."""
        return {path.name: path.stat().st_mtime_ns for path in (self.output / "logs").iterdir()}


@pytest.fixture(scope="module")
def release(
    adapter: Path,
    toy_dataset: Path,
    empty_registry: Path,
    forked_python: str,
    tmp_path_factory: pytest.TempPathFactory,
) -> Iterator[Release]:
    """Return a release made by one command; what its steps start is forked."""
    folder = tmp_path_factory.mktemp("pipeline")
    shutil.copy(empty_registry, folder / "registry.db")
    made = Release(folder, adapter, toy_dataset)
    assert set(made.reasons()) == {"merge", "evaluate", "register"}
    assert not made.output.exists()  # asking made nothing
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "executable", forked_python)
        done = call_script("production_pipeline", *made.flags(), "--json")
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert {step["name"]: step["ran"] for step in result["steps"]} == {
            "merge": True,
            "evaluate": True,
            "register": True,
        }
        assert result["version"] == 1
        yield made


@pytest.mark.slow(30)
def test_one_command_leads_from_checkpoint_to_registered_version(release: Release) -> None:
    from pokegemma.release.registry import Registry

    described = Registry(release.options["registry_uri"], "pokegemma").describe("1")
    assert described["dataset_sha256"] == "d" * 64
    assert described["evaluation"]["num_decisions"] == 4
    assert Path(described["model_path"]) == release.output / "merged"
    for name in ("merged/model.safetensors", "evaluation/report.html", "logs/merge.log", "logs/register.log"):
        assert (release.output / name).is_file()
    assert (release.output / "README.md").read_text() == (release.output / "merged" / "README.md").read_text()


@pytest.mark.slow(30)
def test_a_second_run_repeats_nothing(release: Release) -> None:
    before = release.times()
    assert release.run() == {"merge": False, "evaluate": False, "register": False}
    assert release.times() == before
    assert set(release.reasons().values()) == {"unchanged"}


@pytest.mark.slow(30)
@pytest.mark.parametrize(
    ("step", "option", "tight"),
    [
        ("merge", "max_stored_difference", 0.0),
        ("evaluate", "min_accuracy", 1.0),
        ("evaluate", "min_gain_over_baseline", 1.0),
    ],
)
def test_a_failed_gate_names_value_and_limit_and_repeats_no_step(
    step: str, option: str, tight: float, release: Release
) -> None:
    before = release.times()
    with pytest.raises(CheckFailedError, match=rf"^the gate of {step} failed: .* --{option} {tight:.4g}"):
        release.run(**{option: tight})
    assert release.run() == {"merge": False, "evaluate": False, "register": False}
    assert release.times() == before


@pytest.mark.slow(30)
def test_a_dry_run_names_what_each_change_would_repeat(release: Release) -> None:
    assert release.reasons(dtype="float32")["merge"] == "runs: settings changed"
    assert release.reasons(dtype="float32")["evaluate"] == "runs if the output of merge differs"
    changed = release.reasons(max_samples=5)
    assert (changed["merge"], changed["evaluate"]) == ("unchanged", "runs: settings changed")
    assert release.reasons(name="other")["register"] == "runs: settings changed"


@pytest.mark.slow(30)
def test_a_changed_dataset_repeats_evaluation_and_not_the_merge(release: Release) -> None:
    path = release.dataset / "eval.jsonl"
    lines = path.read_text(encoding="utf-8").splitlines()
    path.write_text("\n".join(lines[:-1]) + "\n", encoding="utf-8")
    assert release.run() == {"merge": False, "evaluate": True, "register": True}
    log = (release.output / "logs" / "register.log").read_text()
    assert "version 1 has this content already" in log
    assert "its results of evaluation were replaced" in log
    assert release.run() == {"merge": False, "evaluate": False, "register": False}


@pytest.mark.slow(30)
def test_a_version_that_the_registry_lost_is_registered_again(
    release: Release, empty_registry: Path, tmp_path: Path
) -> None:
    from pokegemma.release.registry import Registry

    registry = Path(release.options["registry_uri"])
    registry.rename(tmp_path / "away.db")
    try:
        assert release.reasons()["register"].startswith(f"runs: {registry}: ")
        other = shutil.copytree(release.output / "merged", tmp_path / "other")
        (other / "config.json").write_text("{}")
        shutil.copy(empty_registry, tmp_path / "new.db")
        assert Registry(str(tmp_path / "new.db"), "pokegemma").register(other).version == 1
        (tmp_path / "new.db").rename(registry)
        # In a new process: this one still has the earlier file open.
        command = [sys.executable, str(PROJECT_ROOT / "scripts" / "production_pipeline.py"), *release.flags()]
        done = subprocess.run([*command, "--dry_run"], capture_output=True, text=True, check=True)
        assert "register    runs: version 1 is another model now" in done.stdout
    finally:
        (tmp_path / "away.db").rename(registry)


@pytest.mark.slow(30)
def test_a_moved_release_keeps_its_results(release: Release, tmp_path: Path) -> None:
    from pokegemma.release.registry import Registry

    old, new = release.output, tmp_path / "moved"
    old.rename(new)
    release.output = new
    try:
        assert release.run(output_dir=str(new)) == {"merge": False, "evaluate": False, "register": True}
        assert release.run(output_dir=str(new)) == {"merge": False, "evaluate": False, "register": False}
        Registry(release.options["registry_uri"], "pokegemma").export("1", tmp_path / "exported")
    finally:
        new.rename(old)
        release.output = old


def test_an_adapter_is_identified_by_its_weights_and_not_by_training_state(tmp_path: Path) -> None:
    seen = set()
    for text in ("one", "two"):
        for name in ("adapter_model.bin", "training_args.bin", "optimizer.pt"):
            (tmp_path / name).write_text(text if name == "adapter_model.bin" else f"{text} of no matter")
        seen.add(hash_contents(list_adapter(tmp_path), FileHashes()))
    assert len(seen) == 2
    (tmp_path / "training_args.bin").write_text("other")
    assert hash_contents(list_adapter(tmp_path), FileHashes()) in seen


def test_merging_depends_on_the_samples_that_it_is_verified_on(
    adapter: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    dataset = Path(shutil.copytree(toy_dataset, tmp_path / "dataset"))
    options = PipelineOptions(
        checkpoint=str(adapter), dataset_path=str(dataset), output_dir=str(tmp_path / "out"), exports=["none"]
    )

    def inputs() -> dict[str, str]:
        return make_steps(options)[0].dependencies(FileHashes())

    first = inputs()
    lines = (dataset / "eval.jsonl").read_text(encoding="utf-8").splitlines(keepends=True)
    (dataset / "eval.jsonl").write_text("".join(lines[:8]), encoding="utf-8")
    assert inputs() == first  # only the first eight are read
    (dataset / "eval.jsonl").write_text("".join(lines[1:]), encoding="utf-8")
    assert {name for name, digest in inputs().items() if digest != first[name]} == {"samples to verify on"}
    (dataset / "eval.jsonl").write_text("".join(lines), encoding="utf-8")
    shutil.copy(dataset / json.loads(lines[1])["image"], dataset / json.loads(lines[0])["image"])
    assert inputs() != first


def test_a_mistake_is_reported_before_any_work(adapter: Path, toy_dataset: Path, tmp_path: Path) -> None:
    good = {"checkpoint": str(adapter), "dataset_path": str(toy_dataset), "output_dir": str(tmp_path / "out")}
    for changes, message in (
        ({"checkpoint": "missing"}, "--checkpoint missing: no such folder"),
        ({"checkpoint": str(toy_dataset)}, "^--checkpoint .*adapter_config.json"),
        ({"dataset_path": "missing"}, "missing"),
        ({"exports": ["onnx"]}, "^--exports: 'onnx'"),
        ({"exports": ["none", "mlx"]}, "^--exports: none and mlx"),
        ({"output_dir": str(adapter / "adapter_config.json")}, "adapter_config.json: not a folder"),
        ({"parity_samples": 0}, "^--parity_samples 0: "),
        ({"quantization": ["f16", "q9"]}, "^--quantization: 'q9'"),
        ({"min_accuracy": 60}, "^--min_accuracy 60: "),
        ({"min_agreement": -0.1}, "^--min_agreement -0.1: "),
        ({"min_gain_over_baseline": 5}, "^--min_gain_over_baseline 5: "),
        ({"max_export_gib": -1}, "^--max_export_gib -1: "),
    ):
        with pytest.raises(PokegemmaError, match=message):
            make_steps(PipelineOptions(**{**good, **changes}))
    assert list(tmp_path.iterdir()) == []


def test_bits_that_mlx_does_not_store_are_refused_by_the_command_line() -> None:
    words = ["--checkpoint", "c", "--dataset_path", "d", "--output_dir", "o", "--quantization_bits"]
    with pytest.raises(PokegemmaError, match=r"--quantization_bits.*5"):
        parse_options(PipelineOptions, description="", argv=[*words, "5"])
    (options,) = parse_options(PipelineOptions, description="", argv=[*words, "8"])
    assert options.quantization_bits == 8


def test_each_step_reads_the_outputs_that_its_script_reads(adapter: Path, toy_dataset: Path, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp")
    paths = {"checkpoint": str(adapter), "dataset_path": str(toy_dataset), "output_dir": str(tmp_path)}
    steps = make_steps(PipelineOptions(**paths))
    read = {step.name: [earlier.name for earlier in steps if earlier.output in step.inputs.values()] for step in steps}
    assert read == {
        "merge": [],
        "evaluate": ["merge"],
        "export_gguf": ["merge"],
        "parity": ["merge", "export_gguf"],
        "register": ["merge", "evaluate", "export_gguf", "parity"],
    }


def test_a_whole_model_is_not_merged(tiny_model: Path, toy_dataset: Path, tmp_path: Path) -> None:
    options = PipelineOptions(
        checkpoint=str(tiny_model), dataset_path=str(toy_dataset), output_dir=str(tmp_path / "out"), exports=["none"]
    )
    assert make_steps(options)[0].inputs["model"] == tiny_model
    assert explain_steps(options) == [
        ("merge", f"left out: {tiny_model} is a whole model"),
        ("evaluate", "runs: not done yet"),
        ("register", "runs: not done yet"),
    ]
