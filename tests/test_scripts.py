"""Every script as a user runs it: --help, one success, one mistake."""

import functools
import importlib.util
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from pokegemma.provenance import PROJECT_ROOT
from tests.serving.adversary import run_adversary

SCRIPTS = {path.stem: path for path in sorted((PROJECT_ROOT / "scripts").glob("*.py"))}


@dataclass(frozen=True)
class Calls:
    """One call that succeeds and one with a user's mistake.

    {out} is a folder that is not there yet, {occupied} one that holds a file, {tiny_model}, {toy_dataset} and
    {server_url} are the fixtures, {NAME} is what the successful call of script NAME wrote. `says`: the beginning of
    what stdout or the error tells. `writes`: what is in {out} afterwards.
    """

    success: str
    says: str
    writes: tuple[str, ...]
    mistake: str
    error: str
    needs: str = ""  # a package that ./init.sh installs only when asked


TRAINING = (
    "--finetuning lora --max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --warmup_steps 0 "
    "--eval_strategy no --dataloader_num_workers 0 --report_to none --logging_steps 1"
)
TABLE = {
    "check_parity": Calls(
        success="--model_path {tiny_model} --dataset_path {toy_dataset} --output_dir {out} --num_samples 2 "
        "--transformers {tiny_model} --max_new_tokens 4 --max_log_probability_difference 0",
        says="PASS  transformers ",
        writes=("parity.json", "report.html", "run.json"),
        mistake="--model_path {tiny_model} --dataset_path {toy_dataset} --output_dir {out}",
        error="nothing to compare: pass --gguf, --mlx, --transformers or --server",
    ),
    "convert_eevee_data_v2": Calls(
        success="--eevee_data_dir {record_toy_game}/runs --output_dir {out} --num_workers 1",
        says="sessions                3 (0 without samples, 0 unreadable or copies)",
        writes=("train.jsonl", "eval.jsonl", "frames", "grid_images", "conversion_report.json", "run.json"),
        mistake="--eevee_data_dir missing --output_dir {out}",
        error="--eevee_data_dir missing: no such folder",
    ),
    "convert_to_mlx": Calls(
        success="--model_path {tiny_model} --output_path {out} --quantization_bits 8",
        says="part            stored as       weights        MiB",
        writes=("config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "run.json"),
        mistake="--model_path missing --output_path {out}",
        error="--model_path missing: no such folder",
        needs="mlx_vlm",
    ),
    "convert_to_gguf": Calls(
        success="--model_path {tiny_model} --output_dir {out} --quantization bf16 q8_0",
        says="ollama create pokegemma --file {out}/Modelfile-q8_0",
        writes=(
            "model-bf16.gguf",
            "model-q8_0.gguf",
            "mmproj-f16.gguf",
            "Modelfile-bf16",
            "Modelfile-q8_0",
            "run.json",
        ),
        mistake="--model_path missing --output_dir {out}",
        error="--model_path missing: no such folder",
        needs="llama_cpp",
    ),
    "describe_environment": Calls(
        success="--shell", says="fitting_config=", writes=(), mistake="--gpus 2", error="unknown options: "
    ),
    "evaluate": Calls(
        success="--model_path {tiny_model} --dataset_path {toy_dataset} --output_dir {out} --max_samples 2 "
        "--no_generate",
        says="                     accuracy",
        writes=("metrics.json", "predictions.jsonl", "report.html", "run.json"),
        mistake="--model_path {tiny_model} --dataset_path missing --output_dir {out}",
        error="missing/eval.jsonl not found",
    ),
    "find_batch_size": Calls(
        success="--dataset_path {toy_dataset} --model_name {tiny_model} --finetuning lora --dataloader_num_workers 0 "
        "--effective_batch_size 1 --gradient_checkpointing true --trial_steps 2 --output {out}/batch.json",
        says="take BATCH_SIZE=1 GRAD_ACCUM=1: 1 samples a step",
        writes=("batch.json",),
        mistake="--dataset_path missing --model_name {tiny_model}",
        error="missing not found",
    ),
    "health_monitor": Calls(
        success="--server_url {server_url} --dataset_path {toy_dataset} --num_checks 2 --interval_s 0 "
        "--log_file {out}/health.jsonl --timeout_s 100 --max_latency_p95_s 90",
        says="checks         2 (2 ok)",
        writes=("health.jsonl",),
        mistake="--server_url http://127.0.0.1:8000 --dataset_path missing --log_file {out}/health.jsonl",
        error="missing not found",
    ),
    "make_tiny_model": Calls(
        success="--output_dir {out}",
        says="tiny Gemma 3 checkpoint in ",
        writes=("config.json", "model.safetensors", "tokenizer.model", "processor_config.json", "run.json"),
        mistake="--output_dir {occupied}",
        error="{occupied} exists",
    ),
    "merge_qlora": Calls(
        success="--lora_path {sft_pokemon_gemma3} --output_path {out} --verify --num_samples 1",
        says="logits on the answers of 1 samples",
        writes=("config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "run.json"),
        mistake="--lora_path missing --output_path {out}",
        error="missing: no such folder",
    ),
    "mlx_inference_server": Calls(
        success="--model_path google/gemma-3-4b-it --port 8001 --print_command",  # a Hub id needs no folder here
        says=f"env {shlex.join([sys.executable, '-m', 'mlx_vlm', 'server', '--model', 'google/gemma-3-4b-it'])} "
        "--host 127.0.0.1 --port 8001",
        writes=(),
        mistake="",
        error="MODEL_PATH is not set",
    ),
    "model_registry": Calls(
        success="register --model_path {merge_qlora} --registry_uri {out}/registry.db",
        says="registered ",
        writes=("registry.db", "artifacts"),
        mistake="promote 1 --registry_uri {out}/registry.db",
        error="{out}/registry.db: no registry there",
    ),
    "precompute_features": Calls(
        success="--dataset_path {toy_dataset} --model_name_or_path {tiny_model} --vision_features {out}",
        says="{out}: 50 frames, 0.00 MiB each, 0.00 GiB",
        writes=("key.json", "chunks"),
        mistake="--dataset_path missing --vision_features {out}",
        error="missing not found",
    ),
    "production_pipeline": Calls(
        # A whole model: tests/release/test_production_pipeline.py merges an adapter.
        success="--checkpoint {tiny_model} --dataset_path {toy_dataset} --output_dir {out} --exports none "
        "--no_register --max_samples 2 --no_generate --min_gain_over_baseline -1",
        says="evaluate ",
        writes=("evaluation", "README.md", "pipeline.json", "logs"),
        mistake="--checkpoint missing --dataset_path {toy_dataset} --output_dir {out}",
        error="--checkpoint missing: no such folder",
    ),
    "record_toy_game": Calls(
        success="--output_dir {out} --num_sessions 3 --num_turns 6",
        says="{out}/runs: 3 sessions, 18 turns",
        writes=("runs", "run.json"),
        mistake="--output_dir {out} --num_turns 0",
        error="--num_turns: 0 is not between 1 and 10000",
    ),
    "serve": Calls(
        success="--engine vllm --model_path {tiny_model} --print_command",
        says="vllm serve ",
        writes=(),
        mistake="--engine mlx --model_path {tiny_model}",
        error="--model_path {tiny_model}: not converted for MLX",
    ),
    "setup_wandb": Calls(
        success="--dry_run",
        says='    "name": "eval/button_accuracy",',
        writes=(),
        mistake="--fixed lora_rank=8",
        error=f"{PROJECT_ROOT}/wandb_config.yaml: sweep parameter lora_rank",
    ),
    "sft_pokemon_gemma3": Calls(
        success=f"--model_name_or_path {{tiny_model}} --dataset_path {{toy_dataset}} --output_dir {{out}} {TRAINING}",
        says="training done, result in {out}",
        writes=("adapter_config.json", "adapter_model.safetensors", "loss_curve.png", "run.json"),
        mistake="--model_name_or_path {tiny_model} --dataset_path missing --output_dir {out}",
        error="missing not found",
    ),
    "validate_training": Calls(
        success="--dataset_path {toy_dataset} --model_name_or_path {tiny_model} --skip_step --num_workers 1 "
        "--contact_sheet {out}/sheet.png --output_dir {out}",
        says="PASS  environment",
        writes=("sheet.png",),
        mistake="--dataset_path missing --contact_sheet {out}/sheet.png",
        error="missing not found",
    ),
}
SLOW = {
    "check_parity",
    "convert_to_gguf",
    "convert_to_mlx",
    "evaluate",
    "find_batch_size",
    "merge_qlora",
    "model_registry",
    "production_pipeline",
    "sft_pokemon_gemma3",
}


def run_script(name: str, *arguments: str, cwd: Path = PROJECT_ROOT) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPTS[name]), *arguments]
    return subprocess.run(command, cwd=cwd, capture_output=True, text=True, stdin=subprocess.DEVNULL, check=False)


@functools.cache
def help_of(name: str) -> subprocess.CompletedProcess[str]:
    return run_script(name, "--help")


@pytest.fixture(scope="session")
def server_url() -> Iterator[str]:
    """Return the URL of a server that answers every question rightly, without a model."""
    with run_adversary("valid") as server:
        yield server.url


@pytest.fixture(scope="session")
def succeed(
    tiny_model: Path, toy_dataset: Path, server_url: str, tmp_path_factory: pytest.TempPathFactory
) -> Callable[[str], tuple[subprocess.CompletedProcess[str], Path]]:
    """Return a function that makes a script's successful call, once, and returns it with its {out}."""
    folder = tmp_path_factory.mktemp("scripts")

    @functools.cache
    def call(name: str) -> tuple[subprocess.CompletedProcess[str], Path]:
        places = {"out": folder / name, "tiny_model": tiny_model, "toy_dataset": toy_dataset, "server_url": server_url}
        for script in SCRIPTS:
            if f"{{{script}}}" in TABLE[name].success:
                done, places[script] = call(script)
                assert done.returncode == 0, done.stderr
        return run_script(name, *shlex.split(TABLE[name].success.format(**places)), cwd=folder), places["out"]

    return call


def slowly(names: list[str]) -> list[object]:
    return [pytest.param(name, marks=[pytest.mark.slow] if name in SLOW else []) for name in names]


def require_packages(name: str) -> None:
    needs = TABLE[name].needs
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs} (./init.sh --with)")


def test_every_script_is_in_the_table() -> None:
    assert set(TABLE) == set(SCRIPTS)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_what_the_script_does(name: str) -> None:
    first_line = SCRIPTS[name].read_text(encoding="utf-8").split('"""')[1].splitlines()[0]
    assert help_of(name).returncode == 0, help_of(name).stderr
    assert first_line in help_of(name).stdout
    assert f"scripts/{name}.py" in help_of(name).stdout  # a command to paste


@pytest.mark.parametrize("name", slowly(list(TABLE)))
def test_a_right_call_succeeds(name: str, succeed: Callable) -> None:
    require_packages(name)
    done, out = succeed(name)
    assert done.returncode == 0, done.stderr
    assert any(line.startswith(TABLE[name].says.format(out=out)) for line in done.stdout.splitlines()), done.stdout
    assert [path for path in TABLE[name].writes if not (out / path).exists()] == []
    assert "error: " not in done.stderr


@pytest.mark.parametrize("name", TABLE)
def test_a_mistake_is_one_line_and_writes_nothing(
    name: str, tmp_path: Path, tiny_model: Path, toy_dataset: Path
) -> None:
    require_packages(name)
    occupied = tmp_path / "occupied"
    occupied.mkdir()
    (occupied / "mine.txt").touch()
    before = sorted(tmp_path.rglob("*"))
    places = {"out": tmp_path / "out", "occupied": occupied, "tiny_model": tiny_model, "toy_dataset": toy_dataset}
    done = run_script(name, *shlex.split(TABLE[name].mistake.format(**places)), cwd=tmp_path)
    errors = [line for line in done.stderr.splitlines() if "error" in line.lower()]
    assert done.returncode == 2, done.stderr
    assert len(errors) == 1
    assert errors[0].startswith(f"error: {TABLE[name].error.format(**places)}")
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before
