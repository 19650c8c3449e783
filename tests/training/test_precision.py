"""An explicit --bf16 wins over the accelerate config, and run.json states the precision that was used."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT, read_run_record
from pokegemma.training.options import TrainingOptions
from pokegemma.training.precision import LAUNCHED, choose_bf16, deepspeed_precision
from tests.processes import call_script

CONFIG = """compute_environment: LOCAL_MACHINE
distributed_type: "NO"
num_machines: 1
num_processes: 1
mixed_precision: bf16
use_cpu: true
"""
# Runs the training script, then prints the types in which its linear layers computed.
OBSERVER = """import runpy, sys, torch
seen = set()
def look(module, inputs, output):
    if isinstance(module, torch.nn.Linear):
        seen.add(str(output.dtype))
torch.nn.modules.module.register_module_forward_hook(look)
sys.argv = sys.argv[1:]
try:
    runpy.run_path(sys.argv[0], run_name="__main__")
finally:
    print("computed in", *sorted(seen))
"""


@pytest.fixture(autouse=True)
def no_cpu_by_config(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ACCELERATE_USE_CPU", raising=False)


def set_gpu(monkeypatch: pytest.MonkeyPatch, *, has_bf16: bool) -> None:
    """Have torch say that there is a GPU, which emulates bfloat16 where it lacks it."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: has_bf16 or including_emulation
    )


@pytest.mark.parametrize("launched", ["no", "bf16", "fp16"])
@pytest.mark.parametrize("asked", [True, False])
def test_an_explicit_flag_wins_over_the_launcher(monkeypatch: pytest.MonkeyPatch, launched: str, asked: bool) -> None:
    monkeypatch.setenv(LAUNCHED, launched)
    assert choose_bf16(asked, use_cpu=False) is asked
    assert os.environ[LAUNCHED] == ("bf16" if asked else "no")


def test_the_precision_comes_from_the_flag_then_the_launcher_then_the_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.delenv(LAUNCHED, raising=False)
    assert choose_bf16(None, use_cpu=False) is False
    assert LAUNCHED not in os.environ
    monkeypatch.setenv(LAUNCHED, "bf16")
    assert choose_bf16(None, use_cpu=False) is True
    set_gpu(monkeypatch, has_bf16=True)
    monkeypatch.setenv(LAUNCHED, "no")
    assert choose_bf16(None, use_cpu=False) is True
    monkeypatch.setenv(LAUNCHED, "no")
    assert choose_bf16(None, use_cpu=True) is False


def test_bf16_in_the_accelerate_config_is_accepted_without_a_gpu(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """As on a Mac; transformers refuses only the option."""
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    monkeypatch.setenv(LAUNCHED, "bf16")
    options = TrainingOptions(output_dir=str(tmp_path))
    assert (options.mixed_precision, options.bf16, options.use_cpu) == ("bf16", True, False)


@pytest.mark.parametrize("by_flag", [True, False])
def test_use_cpu_does_not_query_the_gpu(by_flag: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    set_gpu(monkeypatch, has_bf16=True)
    monkeypatch.delenv(LAUNCHED, raising=False)
    if not by_flag:
        monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    options = TrainingOptions(output_dir=str(tmp_path), use_cpu=by_flag)
    assert (options.mixed_precision, options.bf16, options.use_cpu) == ("no", False, True)


def test_a_gpu_without_bfloat16_trains_in_float32_with_a_warning(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    set_gpu(monkeypatch, has_bf16=False)
    monkeypatch.setenv(LAUNCHED, "bf16")
    assert choose_bf16(None, use_cpu=False) is False
    assert os.environ[LAUNCHED] == "no"
    assert caplog.messages == [
        "this GPU has no bfloat16 (mixed_precision in the accelerate config): training in float32"
    ]


@pytest.mark.parametrize("launched", ["fp16", "fp8"])
def test_fp16_and_fp8_in_the_accelerate_config_are_refused(monkeypatch: pytest.MonkeyPatch, launched: str) -> None:
    monkeypatch.setenv(LAUNCHED, launched)
    with pytest.raises(PokegemmaError, match=rf"^mixed_precision: {launched} in the accelerate config: Gemma 3 needs"):
        choose_bf16(None, use_cpu=False)


def test_a_flag_that_contradicts_the_deepspeed_config_is_refused() -> None:
    on, off = ({"bf16": {"enabled": enabled}, "fp16": {"enabled": False}} for enabled in (True, False))
    assert [deepspeed_precision(on, asked=asked) for asked in (None, True)] == ["bf16", "bf16"]
    assert [deepspeed_precision(config, asked=asked) for config in (off, {}) for asked in (None, False)] == ["no"] * 4
    for config, asked in ((on, False), (off, True)):
        with pytest.raises(PokegemmaError, match=f"^--bf16 {str(asked).lower()} contradicts bf16.enabled"):
            deepspeed_precision(config, asked=asked)
    with pytest.raises(PokegemmaError, match="fp16 in the DeepSpeed config overflows"):
        deepspeed_precision({"fp16": {"enabled": True}}, asked=None)


def test_bf16_in_a_deepspeed_file_is_read(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    pytest.importorskip("deepspeed", reason="DeepSpeed exists on Linux only")
    file = tmp_path / "deepspeed.json"
    for name, value in {
        LAUNCHED: "no",
        "ACCELERATE_USE_DEEPSPEED": "true",
        "ACCELERATE_DEEPSPEED_CONFIG_FILE": str(file),
        "ACCELERATE_USE_CPU": "true",
        "WORLD_SIZE": "1",
        "RANK": "0",
        "LOCAL_RANK": "0",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": "0",
    }.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(TrainingOptions, "device", torch.device("cpu"))  # no process group for a question of precision
    for enabled, asked, expected in ((True, None, "bf16"), ("auto", True, "bf16"), ("auto", False, "no")):
        file.write_text(json.dumps({"bf16": {"enabled": enabled}, "zero_optimization": {"stage": 2}}))
        options = TrainingOptions(output_dir=str(tmp_path), bf16=asked)
        assert (options.mixed_precision, options.bf16) == (expected, expected == "bf16")
    file.write_text(json.dumps({"bf16": {"enabled": True}, "zero_optimization": {"stage": 2}}))
    with pytest.raises(PokegemmaError, match="--bf16 false contradicts"):
        TrainingOptions(output_dir=str(tmp_path), bf16=False)


STEP = {
    "finetuning": "lora",
    "max_steps": 1,
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "eval_strategy": "no",
    "save_strategy": "no",
    "report_to": "none",
    "dataloader_num_workers": 0,
}


def assert_precision(output: Path, expected: str) -> None:
    options = read_run_record(output)["options"]
    assert (options["mixed_precision"], options["bf16"]) == (expected, expected == "bf16")


@pytest.mark.parametrize(
    ("launched", "flags", "expected"),
    [("bf16", ["--bf16", "false"], "no"), ("bf16", [], "bf16"), ("no", ["--bf16", "true"], "bf16")],
)
def test_training_computes_in_the_precision_of_the_flag_or_the_launcher(
    launched: str,
    flags: list[str],
    expected: str,
    toy_dataset: Path,
    tiny_model: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv(LAUNCHED, launched)
    monkeypatch.setenv("ACCELERATE_USE_CPU", "true")
    types: set[torch.dtype] = set()

    def look(module: torch.nn.Module, inputs: tuple, output: Any) -> None:
        if isinstance(module, torch.nn.Linear):
            types.add(output.dtype)

    paths = {"dataset_path": toy_dataset, "model_name_or_path": tiny_model, "output_dir": tmp_path / "adapter"}
    words = [word for name, value in {**STEP, **paths}.items() for word in (f"--{name}", value)]
    handle = torch.nn.modules.module.register_module_forward_hook(look)
    try:
        result = call_script("sft_pokemon_gemma3", *words, *flags)
    finally:
        handle.remove()
    assert result.returncode == 0, result.stderr[-3000:]
    assert types == {{"bf16": torch.bfloat16, "no": torch.float32}[expected]}
    assert_precision(tmp_path / "adapter", expected)


@pytest.mark.slow
def test_training_computes_in_the_precision_of_the_accelerate_config(
    toy_dataset: Path, tiny_model: Path, tmp_path: Path
) -> None:
    config, observer, output = tmp_path / "config.yaml", tmp_path / "observer.py", tmp_path / "adapter"
    config.write_text(CONFIG)
    observer.write_text(OBSERVER)
    launcher = ["accelerate.commands.launch", "--quiet", "--config_file", config, observer]
    paths = {"dataset_path": toy_dataset, "model_name_or_path": tiny_model, "output_dir": output}
    flags = [word for name, value in {**STEP, **paths}.items() for word in (f"--{name}", value)]
    command = [sys.executable, "-m", *launcher, PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py", *flags]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, env=environment)
    assert result.returncode == 0, result.stderr[-3000:]
    assert "computed in torch.bfloat16\n" in result.stdout
    assert_precision(output, "bf16")
