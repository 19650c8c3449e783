"""Every script as a user runs it: --help, one success, one mistake."""

import contextlib
import functools
import importlib
import importlib.util
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest

from docs.make_options import parser_of
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import call_script
from tests.serving.adversary import run_adversary

SCRIPTS = {path.stem: path for path in sorted((PROJECT_ROOT / "scripts").glob("*.py"))}


@dataclass(frozen=True)
class Calls:
    """One call that succeeds and one with a user's mistake.

    {out} is a folder that does not exist yet, {occupied} one with a file, {tiny_model}, {toy_dataset} and
    {server_url} are the fixtures, {NAME} is what the successful call of script NAME wrote. `prints`: words of a line on
    stdout. `writes`: what is in {out} afterwards. `names`: words of the error.
    """

    mistake: str
    names: str
    success: str = ""
    prints: str = ""
    writes: tuple[str, ...] = ()
    tested_in: str = ""  # the test that makes a successful call of a script that takes long
    needs: str = ""  # a package that ./init.sh installs only when asked


TRAINING = (
    "--finetuning lora --max_steps 1 --per_device_train_batch_size 1 --gradient_accumulation_steps 1 --warmup_steps 0 "
    "--eval_strategy no --dataloader_num_workers 0 --report_to none --logging_steps 1"
)
TABLE = {
    "battles_arena": Calls(
        success="--output_dir {out} --battle_format gen1randombattle --players random heuristic --num_rounds 2 "
        "--num_workers 1 --num_resamples 10",
        prints="report.html 4 battles",
        writes=("results.jsonl", "arena.json", "players.csv", "pairs.csv", "report.html", "replays", "run.json"),
        mistake="--output_dir {out} --players random random",
        names="--players random",
        needs="poke_env",
    ),
    "battles_card": Calls(
        tested_in="tests/battles/test_policy_card.py",
        mistake="--policy_path nowhere --arena_dir {out}",
        names="nowhere",
        needs="poke_env",
    ),
    "battles_check": Calls(
        tested_in="tests/battles/test_packing.py",
        mistake="--trajectories_dir nowhere",
        names="nowhere",
        needs="poke_env",
    ),
    "battles_online": Calls(
        tested_in="tests/battles/test_online.py",
        mistake="--ladder",
        names="--ladder --server",
        needs="poke_env",
    ),
    "battles_pack": Calls(
        tested_in="tests/battles/test_packing.py",
        mistake="--trajectories_dir nowhere --output_dir {out}",
        names="nowhere",
        needs="lz4",
    ),
    "battles_psro": Calls(
        tested_in="tests/battles/test_psro.py",
        mistake="--policy_path nowhere --output_dir {out}",
        names="--policy_path nowhere",
    ),
    "battles_parity": Calls(
        tested_in="tests/battles/test_policy_export.py",
        mistake="--policy_path {tiny_model} --gguf_path nowhere --trajectories_dir {out}",
        names="--gguf_path nowhere",
    ),
    "battles_record": Calls(
        success="--output_dir {out} --battle_format gen1randombattle --players random heuristic --num_battles 2 "
        "--num_workers 1",
        prints="{out} 2 battles",
        writes=("gen1randombattle", "run.json"),
        mistake="--output_dir {out} --players random nobody",
        names="nobody",
        needs="poke_env",
    ),
    "battles_selfplay": Calls(
        tested_in="tests/battles/test_selfplay.py",
        mistake="--policy_path nowhere --output_dir {out}",
        names="--policy_path nowhere",
    ),
    "battles_tiny_model": Calls(
        tested_in="tests/battles/test_cloning.py",
        mistake="--trajectories_dir nowhere --output_dir {out}",
        names="nowhere",
        needs="lz4",
    ),
    "build_toy_rom": Calls(
        success="--output_file {out}/toy.gba --seed 1",
        prints="{out}/toy.gba 1",
        writes=("toy.gba",),
        mistake="--output_file {out}/toy.rom",
        names="--output_file {out}/toy.rom",
    ),
    "check_parity": Calls(
        tested_in="tests/parity/test_parity.py",
        mistake="--model_path {tiny_model} --dataset_path {toy_dataset} --output_dir {out}",
        names="--gguf --mlx --transformers --server",
    ),
    "convert_eevee_data_v2": Calls(
        success="--eevee_data_dir {record_toy_game}/runs --output_dir {out} --num_workers 1",
        prints="sessions 3",
        writes=("train.jsonl", "eval.jsonl", "frames", "grid_images", "conversion_report.json", "run.json"),
        mistake="--eevee_data_dir nowhere --output_dir {out}",
        names="--eevee_data_dir nowhere",
    ),
    "convert_to_mlx": Calls(
        success="--model_path {tiny_model} --output_path {out} --quantization_bits 8",
        prints="--engine mlx {out}",
        writes=("config.json", "model.safetensors", "processor_config.json", "chat_template.jinja", "run.json"),
        mistake="--model_path nowhere --output_path {out}",
        names="--model_path nowhere",
        needs="mlx_vlm",
    ),
    "convert_to_gguf": Calls(
        success="--model_path {tiny_model} --output_dir {out} --quantization bf16 q8_0",
        prints="ollama create {out}/Modelfile-q8_0",
        writes=(
            "model-bf16.gguf",
            "model-q8_0.gguf",
            "mmproj-f16.gguf",
            "Modelfile-bf16",
            "Modelfile-q8_0",
            "run.json",
        ),
        mistake="--model_path nowhere --output_dir {out}",
        names="--model_path nowhere",
        needs="llama_cpp",
    ),
    "describe_environment": Calls(
        success="--shell", prints="fitting_config=", writes=(), mistake="--gpus 2", names="--gpus"
    ),
    "evaluate": Calls(
        success="--model_path {tiny_model} --dataset_path {toy_dataset} --output_dir {out} --max_samples 2 "
        "--no_generate",
        prints="accuracy macro-F1",
        writes=("metrics.json", "predictions.jsonl", "report.html", "run.json"),
        mistake="--model_path {tiny_model} --dataset_path nowhere --output_dir {out}",
        names="nowhere/eval.jsonl",
    ),
    "find_batch_size": Calls(
        tested_in="tests/training/batch_search/test_trial_runner.py",
        mistake="--dataset_path nowhere --model_name {tiny_model}",
        names="nowhere",
    ),
    "health_monitor": Calls(
        success="--server_url {server_url} --dataset_path {toy_dataset} --num_checks 2 --interval_s 0 "
        "--log_file {out}/health.jsonl --timeout_s 100 --max_latency_p95_s 90",
        prints="2 ok",
        writes=("health.jsonl",),
        mistake="--server_url http://127.0.0.1:8000 --dataset_path nowhere --log_file {out}/health.jsonl",
        names="nowhere",
    ),
    "make_replay": Calls(
        success="--sessions_path {record_toy_game} --output_file {out}/replay.html",
        prints="{out}/replay.html",
        writes=("replay.html",),
        mistake="--sessions_path nowhere --output_file {out}/replay.html",
        names="--sessions_path nowhere",
    ),
    "improve": Calls(
        tested_in="tests/play/improve/test_improve.py",
        mistake="--model_path {tiny_model} --output_dir {out} --level 3",
        names="level 3",
    ),
    "inspect_data": Calls(
        success="--data_path {record_toy_game}/runs --output_file {out}/page.html --num_workers 1",
        prints="sessions 3",
        writes=("page.html",),
        mistake="--data_path nowhere --output_file {out}/page.html",
        names="--data_path nowhere",
    ),
    "make_gemma270m": Calls(
        tested_in="tests/gemma/test_gemma270m.py",
        mistake="--output_dir {out} --dtype float16",
        names="--dtype float16",
    ),
    "make_tiny_model": Calls(
        success="--output_dir {out}",
        prints="{out}",
        writes=("config.json", "model.safetensors", "tokenizer.model", "processor_config.json", "run.json"),
        mistake="--output_dir {occupied}",
        names="{occupied} exists",
    ),
    "merge_qlora": Calls(
        success="--lora_path {sft_pokemon_gemma3} --output_path {out} --verify --num_samples 1",
        prints="logits 1",
        writes=("config.json", "model.safetensors", "tokenizer.model", "chat_template.jinja", "run.json"),
        mistake="--lora_path nowhere --output_path {out}",
        names="nowhere",
    ),
    "mlx_inference_server": Calls(
        success="--model_path google/gemma-3-4b-it --port 8001 --print_command",  # a Hub id needs no folder here
        prints=f"env {sys.executable} -m mlx_vlm server google/gemma-3-4b-it 127.0.0.1 8001",
        writes=(),
        mistake="",
        names="MODEL_PATH",
    ),
    "model_registry": Calls(
        success="register --model_path {merge_qlora} --registry_uri {out}/registry.db",
        prints="registered 1",
        writes=("registry.db", "artifacts"),
        mistake="promote 1 --registry_uri {out}/registry.db",
        names="{out}/registry.db",
    ),
    "play": Calls(
        success="--player expert --seed 5 --max_turns 4 --record {out} --json",
        prints='"num_turns": 4',
        writes=(),
        mistake="--game toy --max_turns 4",
        names="--model_path",
    ),
    "precompute_features": Calls(
        success="--dataset_path {toy_dataset} --model_name_or_path {tiny_model} --vision_features {out}",
        prints="{out} 50 frames",
        writes=("key.json", "chunks"),
        mistake="--dataset_path nowhere --vision_features {out}",
        names="nowhere",
    ),
    "production_pipeline": Calls(
        tested_in="tests/release/test_production_pipeline.py",
        mistake="--checkpoint nowhere --dataset_path {toy_dataset} --output_dir {out}",
        names="--checkpoint nowhere",
    ),
    "record_toy_game": Calls(
        success="--output_dir {out} --num_sessions 3 --num_turns 6",
        prints="{out}/runs 3 18",
        writes=("runs", "run.json"),
        mistake="--output_dir {out} --num_turns 0",
        names="--num_turns 0",
    ),
    "rl_battles": Calls(
        tested_in="tests/battles/test_offline_rl.py",
        mistake="--trajectories_dir nowhere --encoder {tiny_model} --output_dir {out}",
        names="nowhere",
        needs="poke_env",
    ),
    "serve": Calls(
        success="--engine vllm --model_path {tiny_model} --print_command",
        prints="vllm serve",
        writes=(),
        mistake="--engine mlx --model_path {tiny_model}",
        names="--model_path {tiny_model}",
    ),
    "setup_wandb": Calls(
        success="--dry_run",
        prints='"eval/button_accuracy"',
        writes=(),
        mistake="--fixed lora_rank=8",
        names=f"{PROJECT_ROOT}/wandb_config.yaml lora_rank",
    ),
    "sft_battles": Calls(
        tested_in="tests/battles/test_cloning.py",
        mistake="--trajectories_dir nowhere --finetuning full --output_dir {out}",
        names="nowhere",
        needs="poke_env",
    ),
    "sft_pokemon_gemma3": Calls(
        success=f"--model_name_or_path {{tiny_model}} --dataset_path {{toy_dataset}} --output_dir {{out}} {TRAINING}",
        prints="{out}",
        writes=("adapter_config.json", "adapter_model.safetensors", "loss_curve.png", "run.json"),
        mistake="--model_name_or_path {tiny_model} --dataset_path nowhere --output_dir {out}",
        names="nowhere",
    ),
    "validate_training": Calls(
        success="--dataset_path {toy_dataset} --model_name_or_path {tiny_model} --skip_step --num_workers 1 "
        "--contact_sheet {out}/sheet.png --output_dir {out}",
        prints="PASS environment",
        writes=("sheet.png",),
        mistake="--dataset_path nowhere --contact_sheet {out}/sheet.png",
        names="nowhere",
    ),
}
SLOW = {"convert_to_gguf", "convert_to_mlx", "evaluate", "merge_qlora", "model_registry", "sft_pokemon_gemma3"}


def run_script(name: str, *arguments: str, cwd: Path = PROJECT_ROOT) -> subprocess.CompletedProcess[str]:
    with contextlib.chdir(cwd):
        return call_script(name, *arguments)


def has_words(line: str, words: str, **places: object) -> bool:
    return all(word in line for word in words.format(**places).split())


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


def test_every_script_is_called() -> None:
    assert set(TABLE) == set(SCRIPTS)
    elsewhere = {name: calls.tested_in for name, calls in TABLE.items() if not calls.success}
    assert [name for name, file in elsewhere.items() if name not in (PROJECT_ROOT / file).read_text()] == []


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_shows_what_the_script_does(name: str) -> None:
    source = SCRIPTS[name].read_text(encoding="utf-8")
    done = run_script(name, "--help")
    assert done.returncode == 0, done.stderr
    assert source.split('"""')[1].splitlines()[0] in done.stdout
    assert f"scripts/{name}.py" in done.stdout  # a command to paste
    assert re.search(r'\n\nif __name__ == "__main__":\n    (cli\.)?run\(main\)\n$', source)


def test_a_script_runs_from_any_folder(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS["describe_environment"]), "--gpus", "2"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert has_words(done.stderr.splitlines()[-1], "error: --gpus")


@pytest.mark.parametrize("name", slowly([name for name in TABLE if TABLE[name].success]))
def test_a_right_call_succeeds(name: str, succeed: Callable) -> None:
    require_packages(name)
    done, out = succeed(name)
    assert done.returncode == 0, done.stderr
    lines = done.stdout.splitlines()
    assert any(has_words(line, TABLE[name].prints, out=out) for line in lines), done.stdout
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
    assert errors[0].startswith("error: ")
    assert has_words(errors[0], TABLE[name].names, **places)
    assert "Traceback" not in done.stderr
    assert done.stdout == ""
    assert sorted(tmp_path.rglob("*")) == before


def calls_of(name: str, flag: str, value: object) -> Iterator[list[str]]:
    """Yield a call with a value of `flag` for each command of a script that has it, or for the script itself.

    What else is required gets the current folder: most scripts do not look at it before all options have been read.
    """
    for command in getattr(importlib.import_module(f"scripts.{name}"), "COMMANDS", [None]):
        words = [] if command is None else [command]
        words += ["--gguf", "."] if name == "check_parity" else []  # at least one export
        actions = parser_of(f"scripts.{name}", *words)._actions
        if flag in [option for action in actions for option in action.option_strings]:
            for action in actions:
                if action.required and flag not in action.option_strings:
                    words += [action.option_strings[0], (action.choices or ["."])[0]]
            yield [*words, flag, str(value)]


@pytest.mark.slow(6)
def test_an_output_dir_that_is_a_file_is_one_line_in_every_script(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    line = f"error: --output_dir {tmp_path / 'file'}: {tmp_path / 'file'} is not a folder; choose another\n"
    found, wrong = set(), {}
    for name in SCRIPTS:
        for call in calls_of(name, "--output_dir", tmp_path / "file"):
            done = run_script(name, *call)
            found.add(name)
            if (done.returncode, done.stdout) != (2, "") or not done.stderr.endswith(line):
                wrong[name] = done.stderr
    assert wrong == {}
    assert {"battles_online", "convert_eevee_data_v2", "model_registry", "rl_battles"} <= found and len(found) > 15
