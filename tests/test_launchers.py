"""init.sh, train_gemma3.sh and run_tests.sh, in a temporary copy of the project whose steps only record their calls."""

import contextlib
import hashlib
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tarfile
import tomllib
import zipfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pokegemma.environment import Gpu, Hardware, visible_gpus
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.settings import read_settings
from tests.processes import WAIT_S, is_running, killed_after, take_sigint, wait_until, wait_until_ended

LAUNCHERS = [
    "init.sh",
    "train_gemma3.sh",
    "train_gemma3n.sh",
    "run_tests.sh",
    ".ci/run",
    "training_configs/slurm.sbatch",
]
CONFIGS = ["cpu_mps", "deepspeed_zero3", "fsdp2", "multi_gpu", "single_gpu"]
STEPS = ["record_toy_game", "convert_eevee_data_v2", "make_tiny_model", "validate_training", "merge_qlora", "evaluate"]
SECRET = "hf_secret value#1"

# Stands for each script of a step: adds its name and arguments to calls.jsonl, makes what the next steps look for.
RECORDER = """
import json, os, sys, time
from pathlib import Path
name = Path(sys.argv[0]).stem
names = ("HF_TOKEN", "WANDB_API_KEY", "OMP_NUM_THREADS", "CUDA_VISIBLE_DEVICES", "ACCELERATE_USE_CPU")
with open("calls.jsonl", "a") as calls:
    calls.write(json.dumps([name, sys.argv[1:], {n: os.environ.get(n) for n in names}]) + "\\n")
if "--output_dir" in sys.argv:
    folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
    folder.mkdir(parents=True, exist_ok=True)
    (folder / {"make_tiny_model": "config.json", "convert_eevee_data_v2": "train.jsonl"}.get(name, "x")).touch()
print(name, "was here")
sys.exit(7 if name == os.environ.get("FAILING_STEP") else 0)
"""

# Stands for training where a test signals it: waits for SIGTERM, then writes run.json as the real one does.
INTERRUPTIBLE = """
import os, signal, sys, time
from pathlib import Path
folder = Path(sys.argv[sys.argv.index("--output_dir") + 1])
folder.mkdir(parents=True, exist_ok=True)
def save(number, frame):
    time.sleep(1)  # what interrupts it now would show
    (folder / "run.json").write_text('{\\n  "status": "interrupted"\\n}')
    os.write(1, b"saved\\n")
    sys.exit(0)
signal.signal(signal.SIGTERM, save)
(folder / ("started" + os.environ.get("RANK", ""))).touch()
time.sleep(600)
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of the project with stubs for the steps and for init.sh, which hands out this Python."""
    folder = tmp_path / "my project"
    (folder / "scripts").mkdir(parents=True)
    for name in ("accelerate_configs", "pokegemma"):
        (folder / name).symlink_to(PROJECT_ROOT / name)
    for name in ("train_gemma3.sh", "train_gemma3n.sh", ".env.example"):
        shutil.copy(PROJECT_ROOT / name, folder / name)
    facts = "fitting_config=cpu_mps num_gpus=0 num_cores=2"  # the real script takes half a second; `stub_gpus` uses it
    (folder / "scripts" / "describe_environment.py").write_text(f"print({facts!r})\n")
    for name in [*STEPS, "sft_pokemon_gemma3"]:
        (folder / "scripts" / f"{name}.py").write_text(RECORDER)
    (folder / "init.sh").write_text(f'#!/bin/sh\n[ "$1" = --print-python ] && echo "{sys.executable}" || true\n')
    (folder / "init.sh").chmod(0o755)
    # accelerate itself takes seconds to start: only the test of signals uses it.
    launch = folder / "accelerate" / "commands" / "launch.py"
    launch.parent.mkdir(parents=True)
    for package in (launch.parent, launch.parent.parent):
        (package / "__init__.py").touch()
    launch.write_text(
        "import json, subprocess, sys\n"
        "at = sys.argv.index('scripts/sft_pokemon_gemma3.py')\n"
        "open('launch.json', 'w').write(json.dumps(sys.argv[1:at]))\n"
        "sys.exit(1 if subprocess.call([sys.executable, *sys.argv[at:]]) else 0)\n"
    )
    return folder


def clean_environ(**changes: str) -> dict[str, str]:
    """The environment without anything that the launchers read, with `changes`."""
    text = (PROJECT_ROOT / ".env.example").read_text()
    names = {line.split("=")[0] for line in text.splitlines() if line[:1].isupper()}
    names |= {"HF_TOKEN", "VIRTUAL_ENV", "CONDA_PREFIX", "PYTHON", "TORCH_INDEX_URL", "OMP_NUM_THREADS"}
    return {**{k: v for k, v in os.environ.items() if k not in names}, **changes}


def launch(
    project: Path, *arguments: str, launcher: str = "train_gemma3.sh", **variables: str
) -> subprocess.CompletedProcess:
    return subprocess.run(
        ["bash", project / launcher, *arguments],
        env=clean_environ(**variables),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
    )


@pytest.fixture
def start(project: Path) -> Iterator[Callable[..., subprocess.Popen]]:
    """Return a function that starts train_gemma3.sh, with options of Popen; none outlives the test."""
    with contextlib.ExitStack() as stack:

        def run(*, env: dict[str, str] | None = None, **options: Any) -> subprocess.Popen:
            command = ["bash", project / "train_gemma3.sh"]
            process = subprocess.Popen(
                command, env=env or clean_environ(), stderr=subprocess.PIPE, text=True, **options
            )
            return stack.enter_context(killed_after(process))

        yield run


def calls_of(project: Path) -> list[tuple[str, list[str], dict[str, str]]]:
    path = project / "calls.jsonl"
    return [tuple(json.loads(line)) for line in path.read_text().splitlines()] if path.exists() else []


def make_dataset(project: Path) -> None:
    for folder in ("data", "other"):
        (project / folder).mkdir()
        (project / folder / "train.jsonl").touch()
        (project / folder / "eval.jsonl").touch()


# --- files


@pytest.mark.parametrize("name", LAUNCHERS)
def test_launcher_is_executable_and_parses(name):
    assert os.access(PROJECT_ROOT / name, os.X_OK)
    subprocess.run(["bash", "-n", PROJECT_ROOT / name], check=True)


@pytest.mark.parametrize("name", ["init.sh", "train_gemma3.sh", "train_gemma3n.sh"])
def test_help_names_the_command_and_installs_nothing(name, tmp_path):
    shutil.copy(PROJECT_ROOT / name, tmp_path)
    help_text = subprocess.run(["bash", tmp_path / name, "--help"], capture_output=True, text=True, check=True).stdout
    assert f"./{name}" in help_text and "set -euo" not in help_text
    assert [path.name for path in tmp_path.iterdir()] == [name]


def test_there_is_one_accelerate_config_for_each_topology():
    assert sorted(path.stem for path in (PROJECT_ROOT / "accelerate_configs").iterdir()) == CONFIGS


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_config_loads(name):
    from accelerate.commands.config.config_args import load_config_from_file

    config = load_config_from_file(str(PROJECT_ROOT / "accelerate_configs" / f"{name}.yaml"))
    expected = {
        "cpu_mps": ("NO", "no", 1),
        "single_gpu": ("NO", "bf16", 1),
        "multi_gpu": ("MULTI_GPU", "bf16", -1),  # -1: accelerate asks for --num_processes, which the launcher passes
        "deepspeed_zero3": ("DEEPSPEED", "bf16", -1),
        "fsdp2": ("FSDP", "bf16", -1),
    }
    assert (config.distributed_type.value, config.mixed_precision, config.num_processes) == expected[name]
    assert config.use_cpu is False


@pytest.mark.parametrize("name", CONFIGS)
def test_accelerate_launch_knows_every_key_of_the_config(name):
    from accelerate.commands.config.config_args import load_config_from_file
    from accelerate.commands.launch import launch_command_parser

    known = set(vars(launch_command_parser().parse_args(["script.py"])))
    config = load_config_from_file(str(PROJECT_ROOT / "accelerate_configs" / f"{name}.yaml"))
    assert set(config.deepspeed_config) | set(config.fsdp_config) <= known


# --- hardware

LISTING = "0, GPU-aa11, NVIDIA H100 80GB HBM3, 81559\n1, GPU-bb22, NVIDIA GB10, [N/A]\n"
H100, GB10 = Gpu("NVIDIA H100 80GB HBM3", 81559 / 1024), Gpu("NVIDIA GB10", None)


@pytest.mark.parametrize(
    ("cuda_visible_devices", "expected"),
    [
        (None, (H100, GB10)),
        ("", ()),
        ("-1", ()),
        ("1", (GB10,)),
        ("1,0", (GB10, H100)),
        ("0,7,1", (H100,)),
        ("GPU-bb", (GB10,)),
        ("MIG-1234", (Gpu("MIG slice", None),)),
    ],
)
def test_cuda_visible_devices_is_read_as_cuda_reads_it(cuda_visible_devices, expected):
    assert visible_gpus(LISTING, cuda_visible_devices) == expected


def test_no_gpu_is_seen_without_a_driver():
    assert visible_gpus("", None) == visible_gpus("", "0") == visible_gpus("", "MIG-1") == ()
    assert visible_gpus("NVIDIA-SMI has failed because it couldn't communicate with the driver.\n", None) == ()


@pytest.mark.parametrize(
    ("gpus", "cpu_build", "config"),
    [
        ((), False, "cpu_mps"),
        ((H100,), False, "single_gpu"),
        ((H100, GB10), False, "multi_gpu"),
        ((H100,), True, "cpu_mps"),
    ],
)
def test_the_config_that_fits_depends_on_the_gpus_torch_can_use(gpus, cpu_build, config):
    hardware = Hardware(gpus=gpus, mps=False, num_cores=8, memory_gib=32, torch_is_cpu_build=cpu_build)
    assert hardware.accelerate_config == config


# --- .env


def settings_of(tmp_path: Path, text: str, **environ: str) -> dict[str, str]:
    (tmp_path / ".env").write_text(text)
    return read_settings(tmp_path / ".env", environ)


def test_dotenv_values_keep_spaces_quotes_and_hashes(tmp_path):
    text = "A=two words  # a comment\n# another\nB=\"with # and 'quotes'\"\nC='$HOME stays'\nexport D=4\n\nE=a=b\n"
    assert settings_of(tmp_path, text) == {
        "A": "two words",
        "B": "with # and 'quotes'",
        "C": "$HOME stays",
        "D": "4",
        "E": "a=b",
    }


def test_the_environment_wins_over_dotenv_also_when_empty(tmp_path):
    settings = settings_of(tmp_path, "A=file\nB=file\nC=file\n", A="environment", B="")
    assert settings == {"A": "environment", "B": "", "C": "file"}


def test_an_empty_value_in_dotenv_is_not_set(tmp_path):
    assert settings_of(tmp_path, "CUDA_VISIBLE_DEVICES=   # all\nB=1\n") == {"B": "1"}


def test_the_example_sets_nothing_and_names_every_variable_of_the_launcher():
    assert read_settings(PROJECT_ROOT / ".env.example", {}) == {}
    launcher = (PROJECT_ROOT / "train_gemma3.sh").read_text()
    help_text = launcher.split("Variables, from the environment or .env")[1].split("Relative paths")[0]
    example = {
        line.split("=")[0] for line in (PROJECT_ROOT / ".env.example").read_text().splitlines() if line[:1].isupper()
    }
    assert example == {word for word in help_text.split() if word.isupper() and len(word) > 3}


def test_hugging_face_reads_the_token_under_its_own_name(tmp_path):
    assert settings_of(tmp_path, "HUGGINGFACE_TOKEN=a\n")["HF_TOKEN"] == "a"
    assert settings_of(tmp_path, "HUGGINGFACE_TOKEN=a\n", HF_TOKEN="b")["HF_TOKEN"] == "b"
    assert settings_of(tmp_path, "HF_TOKEN=a\n", HUGGINGFACE_TOKEN="b")["HF_TOKEN"] == "b"


def test_a_bad_line_of_dotenv_is_named_without_its_text(tmp_path):
    with pytest.raises(PokegemmaError) as caught:
        settings_of(tmp_path, "A=1\n\nHUGGINGFACE_TOKEN hf_secret\n")
    assert str(caught.value) == f"{tmp_path / '.env'}:3: not a setting; write NAME=value"


# --- train_gemma3.sh


def test_with_nothing_configured_the_demonstration_runs_every_step(project):
    result = launch(project)
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert list(calls) == [*STEPS[:4], "sft_pokemon_gemma3", *STEPS[4:]]
    assert calls["convert_eevee_data_v2"][:2] == ["--eevee_data_dir", "outputs/toy/recorded/runs"]
    assert " ".join(calls["sft_pokemon_gemma3"]) == (
        "--model_name_or_path outputs/toy/base_model --dataset_path outputs/toy/dataset "
        "--output_dir outputs/toy/adapter --config training_configs/toy.yaml"
    )
    assert calls["validate_training"][-2:] == ["--config", "training_configs/toy.yaml"]
    assert "[2/7] Converting" in result.stdout and "result: outputs/toy/dataset" in result.stdout
    assert result.stdout.endswith("; model: outputs/toy/merged; report: outputs/toy/evaluation/report.html\n")
    assert "sft_pokemon_gemma3 was here" in (project / "outputs/toy/logs/5-train.log").read_text()


def test_the_demonstration_can_run_again_over_its_own_output(project):
    assert launch(project).returncode == 0
    (project / "calls.jsonl").unlink()
    assert launch(project).returncode == 0
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert all("--overwrite" in calls[name] for name in calls if name != "validate_training")


def test_the_demonstration_touches_no_folder_with_other_files(project):
    (project / "photos").mkdir()
    (project / "photos" / "me.jpg").touch()
    result = launch(project, OUTPUT_DIR="photos")
    assert (result.returncode, calls_of(project)) == (2, [])
    assert "OUTPUT_DIR=photos" in result.stderr
    assert [path.name for path in (project / "photos").iterdir()] == ["me.jpg"]


def test_a_whole_model_has_nothing_to_merge(project):
    make_dataset(project)
    training = project / "scripts" / "sft_pokemon_gemma3.py"
    training.write_text(RECORDER.replace('"x"', '"config.json"'))  # full fine-tuning, which a config file may ask for
    result = launch(project, "--config", "full.yaml", DATASET_PATH="data", OUTPUT_DIR="out")
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert list(calls) == ["validate_training", "sft_pokemon_gemma3", "evaluate"]
    assert calls["evaluate"][:2] == ["--model_path", "out/adapter"]
    assert "[3/3]" in result.stdout and "model: out/adapter;" in result.stdout


@pytest.mark.parametrize("name", ["data/train.jsonl", "data/part.jsonl"])
def test_a_file_to_train_on_is_not_the_one_to_evaluate_on(project, name):
    make_dataset(project)
    (project / name).touch()
    result = launch(project, DATASET_PATH=name)
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert calls["sft_pokemon_gemma3"][2:4] == ["--dataset_path", name]
    assert calls["evaluate"][2:4] == ["--dataset_path", "data"]  # its eval.jsonl, as in training


def test_variables_and_arguments_reach_training_and_arguments_come_last(project):
    make_dataset(project)
    (project / ".env").write_text("DATASET_PATH=\"data\"  # mine\nOUTPUT_DIR='my runs'\nMAX_STEPS=5\nLAYOUT=grid\n")
    arguments = ["--finetuning", "lora", "--max_length=900", "--image-size", "448", "--overwrite"]
    result = launch(
        project,
        *arguments,
        LAYOUT="frames",
        BATCH_SIZE="2",
        GRAD_ACCUM="3",
        LEARNING_RATE="1e-4",
        EVAL_DATASET_PATH="other",
    )
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    data = ["--dataset_path", "data", "--eval_dataset_path", "other", "--layout", "frames"]
    assert list(calls) == ["validate_training", "sft_pokemon_gemma3", "merge_qlora", "evaluate"]
    settings = ["--max_steps", "5", "--per_device_train_batch_size", "2", "--gradient_accumulation_steps", "3"]
    settings += ["--learning_rate", "1e-4"]
    model = ["--model_name_or_path", "google/gemma-3-4b-it"]
    sheet = ["--contact_sheet", "my runs/contact_sheet.png"]
    assert calls["validate_training"] == [*model, *data, "--output_dir", "my runs", *sheet, *settings, *arguments]
    assert calls["sft_pokemon_gemma3"] == [*model, *data, "--output_dir", "my runs/adapter", *settings, *arguments]
    assert calls["merge_qlora"] == ["--lora_path", "my runs/adapter", "--output_path", "my runs/merged", "--verify"]
    assert calls["evaluate"] == [
        "--model_path",
        "my runs/merged",
        "--dataset_path",
        "other",
        "--layout",
        "frames",
        "--output_dir",
        "my runs/evaluation",
    ]


def test_a_trajectory_is_checked_as_it_is_trained_and_evaluated_in_its_layout(project):
    make_dataset(project)
    cut = ["--max_decisions", "8", "--overlap_decisions=1"]
    fast = ["--vision_features", "features", "--dataloader_num_workers", "0"]
    result = launch(project, *cut, *fast, DATASET_PATH="data", LAYOUT="trajectory")
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert all("--layout trajectory" in " ".join(calls[name]) for name in calls if name != "merge_qlora")
    assert calls["validate_training"][-7:] == calls["sft_pokemon_gemma3"][-7:] == [*cut, *fast]
    assert "--vision_features" not in calls["evaluate"]  # merging rounds the tower, where training had float32


def test_a_token_reaches_training_and_is_never_printed(project):
    (project / ".env").write_text(f'HUGGINGFACE_TOKEN="{SECRET}"\nWANDB_API_KEY="{SECRET}"\n')
    result = subprocess.run(
        ["bash", "-x", project / "train_gemma3.sh"],
        env=clean_environ(SHELLOPTS="xtrace"),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=True,
    )
    assert "+ run_step train" in result.stderr
    assert "hf_secret" not in result.stdout + result.stderr
    logs = "".join(path.read_text() for path in (project / "outputs/toy/logs").iterdir())
    assert "hf_secret" not in logs
    assert all(environ["HF_TOKEN"] == environ["WANDB_API_KEY"] == SECRET for _, _, environ in calls_of(project))


@pytest.mark.parametrize(("step", "status"), [("convert_eevee_data_v2", 7), ("sft_pokemon_gemma3", 1)])
def test_a_failing_step_stops_the_launcher_with_its_status(project, step, status):
    result = launch(project, FAILING_STEP=step)
    assert result.returncode == status  # `accelerate launch` turns every failure of training into 1
    assert calls_of(project)[-1][0] == step
    name = {"sft_pokemon_gemma3": "5 (train)"}.get(step, "2 (convert)")
    assert f"error: step {name} failed with exit status {status}" in result.stderr


@pytest.mark.parametrize(
    ("variables", "arguments", "message"),
    [
        ({"MODEL_NAME": "m"}, [], "MODEL_NAME=m, but DATASET_PATH is not set"),
        ({"EVAL_DATASET_PATH": "e"}, [], "EVAL_DATASET_PATH=e, but DATASET_PATH is not set"),
        ({"DATASET_PATH": "nowhere"}, [], "DATASET_PATH=nowhere: not found"),
        ({"DATASET_PATH": "no_eval"}, [], "no_eval/eval.jsonl not found; evaluation needs it"),
        ({"DATASET_PATH": "no_eval/train.jsonl"}, [], "no_eval/eval.jsonl not found; evaluation needs it"),
        ({"DATASET_PATH": "no_eval", "EVAL_DATASET_PATH": "x/y.jsonl"}, [], "x/y.jsonl not found; evaluation needs it"),
        ({"ACCELERATE_CONFIG": "tpu"}, [], "ACCELERATE_CONFIG=tpu: no such file, nor one of cpu_mps.yaml"),
        ({"ACCELERATE_CONFIG": "fsdp2", "CUDA_VISIBLE_DEVICES": ""}, [], "ACCELERATE_CONFIG=fsdp2 needs NVIDIA GPUs"),
        ({}, ["--output-dir=x"], "--output-dir: set OUTPUT_DIR instead"),
        ({}, ["--layout", "frames"], "--layout: set LAYOUT instead"),
    ],
)
def test_a_wrong_setting_is_one_line_and_exit_2(project, variables, arguments, message):
    (project / "no_eval").mkdir()
    (project / "no_eval" / "train.jsonl").touch()
    result = launch(project, *arguments, **variables)
    assert (result.returncode, calls_of(project)) == (2, [])
    assert result.stderr.startswith(f"error: {message}") and result.stderr.count("\n") == 1


@pytest.mark.parametrize(("folder", "sessions"), [("data", "data"), ("data/runs", "data/runs")])
def test_raw_sessions_are_answered_with_the_command_that_converts_them(project, folder, sessions):
    (project / folder / "session_20250625_184852").mkdir(parents=True)
    result = launch(project, DATASET_PATH="data")
    assert result.returncode == 2
    assert f"scripts/convert_eevee_data_v2.py --eevee_data_dir {sessions} --output_dir training_data" in result.stderr


def test_an_earlier_run_is_continued_or_replaced_only_when_asked(project):
    make_dataset(project)
    (project / "outputs/gemma-3-4b-it/adapter").mkdir(parents=True)
    result = launch(project, DATASET_PATH="data")
    assert (result.returncode, calls_of(project)) == (2, [])
    assert "outputs/gemma-3-4b-it contains an earlier run" in result.stderr
    assert launch(project, "--resume_from_checkpoint", "true", DATASET_PATH="data").returncode == 0
    assert calls_of(project)[-1][1][-1] == "--overwrite"


def test_gemma_3n_goes_through_the_same_steps_into_a_folder_of_its_own(project):
    make_dataset(project)
    result = launch(project, "--lora_r", "4", launcher="train_gemma3n.sh", DATASET_PATH="data")
    assert result.returncode == 0, result.stderr
    calls = {name: arguments for name, arguments, _ in calls_of(project)}
    assert list(calls) == ["validate_training", "sft_pokemon_gemma3", "merge_qlora", "evaluate"]
    assert calls["validate_training"][:2] == ["--model_name_or_path", "google/gemma-3n-E4B-it"]
    assert " ".join(calls["sft_pokemon_gemma3"]) == (
        "--model_name_or_path google/gemma-3n-E4B-it --dataset_path data "
        "--output_dir outputs/gemma-3n-E4B-it/adapter --lora_r 4"
    )
    again = launch(project, launcher="train_gemma3n.sh", DATASET_PATH="data")
    assert again.returncode == 2 and "continue with ./train_gemma3n.sh --resume_from_checkpoint" in again.stderr


def test_the_gemma_3n_launcher_takes_another_model_by_name(project):
    make_dataset(project)
    launch(project, launcher="train_gemma3n.sh", DATASET_PATH="data", MODEL_NAME="google/gemma-3n-E2B-it")
    assert calls_of(project)[0][1][1] == "google/gemma-3n-E2B-it"


def test_the_gemma_3n_launcher_has_no_demonstration(project):
    result = launch(project, launcher="train_gemma3n.sh")
    assert (result.returncode, calls_of(project)) == (2, [])
    assert "DATASET_PATH is not set; ./train_gemma3n.sh has no demonstration" in result.stderr


def stub_gpus(project: Path, count: int) -> str:
    """Put an nvidia-smi with `count` GPUs and a torch with CUDA in the project; return the PATH to use."""
    shutil.copy(PROJECT_ROOT / "scripts/describe_environment.py", project / "scripts")
    tools = project / "tools"
    tools.mkdir()
    rows = "".join(f"{i}, GPU-{i}, NVIDIA H100, 81559\\n" for i in range(count))
    (tools / "nvidia-smi").write_text(f"#!/bin/sh\nprintf '{rows}'\n")
    (tools / "nvidia-smi").chmod(0o755)
    metadata = project / "torch-9.dist-info" / "METADATA"
    metadata.parent.mkdir()
    metadata.write_text("Metadata-Version: 2.1\nName: torch\nVersion: 9\n")
    return f"{tools}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("variables", "expected", "visible"),
    [
        ({}, ["--config_file", "accelerate_configs/multi_gpu.yaml", "--num_processes", "2"], None),
        ({"CUDA_VISIBLE_DEVICES": "1"}, ["--config_file", "accelerate_configs/single_gpu.yaml"], "1"),
        (
            {"ACCELERATE_CONFIG": "fsdp2.yaml"},
            ["--config_file", "accelerate_configs/fsdp2.yaml", "--num_processes", "2"],
            None,
        ),
        ({"ACCELERATE_CONFIG": "single_gpu"}, ["--config_file", "accelerate_configs/single_gpu.yaml"], "0"),
        ({"ACCELERATE_CONFIG": "mine.yaml"}, ["--config_file", "mine.yaml"], None),
    ],
)
def test_training_runs_under_the_config_that_fits_or_was_named(project, variables, expected, visible):
    make_dataset(project)
    (project / "mine.yaml").write_text("distributed_type: MULTI_GPU\nnum_processes: 2\n")
    path = stub_gpus(project, 2)
    result = launch(project, DATASET_PATH="data", PATH=path, PYTHONPATH=str(project), **variables)
    assert result.returncode == 0, result.stderr
    assert json.loads((project / "launch.json").read_text()) == ["--quiet", *expected]
    environ = calls_of(project)[1][2]
    assert environ["CUDA_VISIBLE_DEVICES"] == visible
    assert int(environ["OMP_NUM_THREADS"]) >= 1


@pytest.mark.parametrize("use_cpu", ["true", "false"])
def test_the_check_knows_that_the_config_trains_on_the_cpu(project, use_cpu):
    make_dataset(project)
    (project / "mine.yaml").write_text(f"distributed_type: 'NO'\nnum_processes: 1\nuse_cpu: {use_cpu}\n")
    assert launch(project, DATASET_PATH="data", ACCELERATE_CONFIG="mine.yaml").returncode == 0
    environ = {name: environ for name, _, environ in calls_of(project)}["validate_training"]
    assert environ["ACCELERATE_USE_CPU"] == ("true" if use_cpu == "true" else None)


@pytest.mark.slow
@pytest.mark.parametrize("num_processes", [1, 2])
@pytest.mark.parametrize(("number", "status"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_lets_training_save_and_skips_what_follows(project, start, number, status, num_processes):
    shutil.rmtree(project / "accelerate")  # the real one
    (project / "scripts" / "sft_pokemon_gemma3.py").write_text(INTERRUPTIBLE)
    kind = "MULTI_GPU" if num_processes > 1 else '"NO"'  # torchrun starts the processes, or accelerate does
    config = f"distributed_type: {kind}\nnum_processes: {num_processes}\nuse_cpu: true\n"
    (project / "mine.yaml").write_text(config)
    process = start(
        env=clean_environ(ACCELERATE_CONFIG="mine.yaml"),
        stdout=subprocess.PIPE,
        start_new_session=True,
        preexec_fn=take_sigint,
    )
    wait_until(lambda: len(list((project / "outputs/toy/adapter").glob("started*"))) == num_processes, process)
    # Ctrl-C goes to the whole process group of the terminal, SIGTERM usually to the launcher alone.
    if number == signal.SIGINT:
        os.killpg(process.pid, number)
    else:
        process.send_signal(number)
    output, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == status
    assert output.count("saved") == num_processes and "[6/7]" not in output
    assert "./train_gemma3.sh --resume_from_checkpoint" in errors
    assert "Traceback" not in output + errors and "Terminated" not in errors


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGHUP])
def test_a_signal_in_another_step_ends_it_and_its_children(project, start, number):
    (project / "scripts" / "record_toy_game.py").write_text(
        "import subprocess, sys\n"
        "child = subprocess.Popen([sys.executable, '-c', 'import time; time.sleep(600)'])\n"
        "open('pids', 'w').write(str(child.pid))\nchild.wait()\n"
    )
    process = start(
        stdout=subprocess.DEVNULL,
        preexec_fn=lambda: signal.signal(number, signal.SIG_DFL),  # nohup ignores SIGHUP, and bash then must
    )
    wait_until(lambda: (project / "pids").exists() and (project / "pids").read_text(), process)
    process.send_signal(number)
    _, errors = process.communicate(timeout=WAIT_S)
    assert process.returncode == 128 + number
    assert "stopped in step 1 (record)" in errors
    wait_until_ended([int((project / "pids").read_text())])


def test_a_second_signal_ends_a_step_that_does_not_stop(project, start):
    (project / "scripts" / "record_toy_game.py").write_text(
        "import os, signal, time\nsignal.signal(signal.SIGTERM, lambda *_: open('asked', 'w').close())\n"
        "open('started', 'w').write(str(os.getpid()))\nwhile True: time.sleep(1)\n"
    )
    process = start(stdout=subprocess.DEVNULL)
    wait_until(lambda: (project / "started").exists() and (project / "started").read_text(), process)
    process.send_signal(signal.SIGTERM)
    wait_until((project / "asked").exists, process)
    step = int((project / "started").read_text())
    assert is_running(step)
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=WAIT_S)
    assert process.returncode == 143
    assert not is_running(step)


# --- init.sh


def write_command(path: Path, body: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{body}\n")
    path.chmod(0o755)


@pytest.fixture
def bare_project(tmp_path: Path) -> Path:
    """What init.sh needs of the project, and an empty folder of commands, `bin`, to be put first in PATH."""
    folder = tmp_path / "bare project"
    folder.mkdir()
    requirements = sorted(path.name for path in PROJECT_ROOT.glob("requirements*.txt"))
    for name in ("init.sh", ".env.example", *requirements, "pyproject.toml"):
        shutil.copy(PROJECT_ROOT / name, folder / name)
    shutil.copytree(PROJECT_ROOT / "pokegemma", folder / "pokegemma", ignore=shutil.ignore_patterns("__pycache__"))
    (folder / "scripts").mkdir()
    (folder / "scripts" / "describe_environment.py").touch()
    (tmp_path / "bin").mkdir()
    return folder


def init(project: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess:
    path = f"{project.parent / 'bin'}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(
        ["bash", project / "init.sh", *arguments],
        env=clean_environ(PATH=path, **variables),
        capture_output=True,
        text=True,
        timeout=WAIT_S,
        check=False,
        stdin=subprocess.DEVNULL,
    )


def make_environment(project: Path, *, pip: str, torch: str = "2.13.0+cpu") -> Path:
    """Make an environment whose Python is this one and finds the project's package.

    `-m pip` runs `pip` (shell) instead. `torch`: the version that is installed there; "" for none.
    """
    environment = project.parent / "env"
    search = f"import sys; sys.path[:0] = [{str(project)!r}]; "
    write_command(
        environment / "bin" / "python",
        f'[ "$1$2" = -mpip ] && {{ shift 2; {pip}; exit; }}\n'
        f'if [ "$1$2" = -I-c ]; then shift 2; code=$1; shift\n'
        f'case $code in *m.version*) [ "$1" = torch ] && [ -n "{torch}" ] || exit 1; echo "{torch}"; exit;; esac\n'
        f'exec "{sys.executable}" -I -c "{search}$code" "$@"; fi\n'
        f'exec "{sys.executable}" "$@"',
    )
    return environment


RECORD_PIP = 'echo "$*" >>"$PIP_CALLS"'


@pytest.mark.parametrize("name", ["python3.13", "PYTHON"])
def test_init_refuses_a_python_that_is_too_old(bare_project, name):
    for command in ("python3.13", "python3.12", "python3.11", "python3"):
        write_command(bare_project.parent / "bin" / command, "echo 3.9")
    write_command(bare_project.parent / "bin" / "uv", "exit 1")
    old = str(bare_project.parent / "bin" / "python3")
    result = init(bare_project, **({"PYTHON": old} if name == "PYTHON" else {}))
    if name == "PYTHON":
        assert result.returncode == 2
        assert f"error: PYTHON={old}:  {old} is 3.9; pokegemma needs Python 3.11 or newer" in result.stderr
    else:  # uv could fetch a Python, but this one fails
        assert result.returncode == 1 and "Making .venv with uv (Python: 3.12) failed" in result.stderr
    assert not (bare_project / ".venv").exists()


def test_init_without_uv_names_the_pythons_it_found(bare_project):
    tools = bare_project.parent / "bin"
    for command in ("bash", "dirname", "sed", "cat", "cksum", "tr", "uname"):
        (tools / command).symlink_to(shutil.which(command))
    for command in ("python3.13", "python3"):
        write_command(tools / command, "echo 3.9" if command == "python3" else "exit 127")
    result = subprocess.run(
        [tools / "bash", bare_project / "init.sh"],
        env={"PATH": str(tools)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 2
    assert result.stderr == (
        "error: pokegemma needs Python 3.11 or newer; python3 is 3.9; install one, or name it: "
        "PYTHON=/path/to/python3.11 ./init.sh\n"
    )


@pytest.mark.parametrize("variable", ["VIRTUAL_ENV", "CONDA_PREFIX"])
def test_init_refuses_an_active_environment_that_is_too_old(bare_project, variable):
    write_command(bare_project.parent / "env" / "bin" / "python", "echo 3.10")
    result = init(bare_project, **{variable: str(bare_project.parent / "env")})
    assert result.returncode == 2
    assert "has Python 3.10; pokegemma needs 3.11 or newer: " in result.stderr
    assert not (bare_project / ".venv").exists()


def test_init_fills_an_active_conda_environment(bare_project):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls = bare_project.parent / "calls"
    assert init(bare_project, CONDA_PREFIX=str(environment), PIP_CALLS=str(calls)).returncode == 0
    assert "-r requirements.txt\n" in calls.read_text()
    assert not (bare_project / ".venv").exists()


def test_init_fills_the_active_environment_once(bare_project):
    shutil.copy(PROJECT_ROOT / "scripts/describe_environment.py", bare_project / "scripts")
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls = bare_project.parent / "calls"
    calls.touch()
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls)}

    first = init(bare_project, **variables)
    assert first.returncode == 0, first.stderr
    assert "hardware: " in first.stdout and "accelerate config that fits: accelerate_configs/" in first.stdout
    installs = [line for line in calls.read_text().splitlines() if line.startswith("install")]
    assert [line.split("--no-input ")[1] for line in installs] == ["-r requirements.txt", "--no-deps -e ."]
    assert (bare_project / ".env").read_text() == (PROJECT_ROOT / ".env.example").read_text()
    assert not (bare_project / ".venv").exists()

    calls.write_text("")
    assert init(bare_project, "--quiet", **variables).stdout == ""
    assert calls.read_text() == ""

    assert init(bare_project, "--dev", **variables).returncode == 0
    assert "-r requirements.txt -r requirements-dev.txt" in calls.read_text()

    calls.write_text("")
    assert init(bare_project, **variables).returncode == init(bare_project, "--dev", **variables).returncode == 0
    assert calls.read_text() == ""

    with (bare_project / "requirements.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert init(bare_project, **variables).returncode == 0
    assert "install" in calls.read_text()


def test_init_installs_an_extra_once_and_keeps_it_apart_from_the_test_tools(bare_project):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls = bare_project.parent / "calls"
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls)}
    assert init(bare_project, "--with", "ray", **variables).returncode == 0
    assert "-r requirements.txt -r requirements-ray.txt\n" in calls.read_text()

    calls.write_text("")
    for arguments in (["--with", "ray"], [], ["--with", "ray", "--quiet"]):
        assert init(bare_project, *arguments, **variables).returncode == 0
    assert calls.read_text() == ""

    assert init(bare_project, "--dev", "--with", "ray", **variables).returncode == 0
    assert "-r requirements.txt -r requirements-ray.txt -r requirements-dev.txt\n" in calls.read_text()

    calls.write_text("")
    with (bare_project / "requirements-ray.txt").open("a") as requirements:
        requirements.write("# changed\n")
    assert init(bare_project, "--dev", **variables).returncode == 0
    assert calls.read_text() == ""
    assert init(bare_project, "--with", "ray", **variables).returncode == 0
    assert "-r requirements-ray.txt" in calls.read_text()


def write_source_package(path: Path) -> None:
    """Write a source package of llama-cpp-python that holds llama.cpp's converter, in short."""
    with tarfile.open(path, "w:gz") as archive:
        for name in ("convert_hf_to_gguf.py", "conversion/base.py", "gguf-py/gguf/__init__.py", "LICENSE"):
            member = tarfile.TarInfo(f"llama/vendor/llama.cpp/{name}")
            member.size = len(name)
            archive.addfile(member, io.BytesIO(name.encode()))


DOWNLOAD = f"""{RECORD_PIP}; [ "$1" != download ] || {{
    while [ "$1" != --dest ]; do shift; done
    cp "$PACKAGE" "$2/llama_cpp_python-${{5#*==}}.tar.gz"; }}"""


def test_init_fetches_the_converter_of_llama_cpp_once(bare_project):
    environment = make_environment(bare_project, pip=DOWNLOAD)
    calls, package = bare_project.parent / "calls", bare_project.parent / "package"
    write_source_package(package)
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls), "PACKAGE": str(package)}
    converter = environment / "share/llama.cpp"
    assert init(bare_project, **variables).returncode == 0
    assert not converter.exists()

    result = init(bare_project, "--with", "gguf", **variables)
    assert result.returncode == 0, result.stderr
    assert f"Fetching llama.cpp's converter into {converter} ..." in result.stdout
    assert (converter / "convert_hf_to_gguf.py").is_file()
    pin = next(
        line for line in (PROJECT_ROOT / "requirements-gguf.txt").read_text().splitlines() if line[:1] not in ("#", "")
    )
    version = pin.split("==")[1]
    assert f" --no-binary llama-cpp-python llama-cpp-python=={version}\n" in calls.read_text()
    assert json.loads((converter / "run.json").read_text())["version"] == version

    calls.write_text("")
    assert init(bare_project, "--with", "gguf", "--quiet", **variables).stdout == ""
    assert "download" not in calls.read_text()

    shutil.rmtree(converter)  # somebody cleans up; another version is pinned
    assert init(bare_project, "--with", "gguf", **variables).returncode == 0
    requirements = bare_project / "requirements-gguf.txt"
    requirements.write_text(requirements.read_text().replace(version, "9.9.9"))
    assert init(bare_project, "--with", "gguf", **variables).returncode == 0
    assert calls.read_text().count("download") == 2
    assert json.loads((converter / "run.json").read_text())["version"] == "9.9.9"


NPM = 'echo "$*" >>"$NPM_CALLS"; cmp "$3/package-lock.json" "$LOCK" && mkdir -p "$3/node_modules"'


def test_init_installs_the_simulator_by_its_lock_file_once(bare_project):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls, lock = bare_project.parent / "npm_calls", bare_project / "pokegemma/battles/node/package-lock.json"
    write_command(bare_project.parent / "bin" / "node", "echo v20.1.0")
    write_command(bare_project.parent / "bin" / "npm", NPM)
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": os.devnull, "NPM_CALLS": str(calls), "LOCK": str(lock)}
    simulator = environment / "share/pokegemma-simulator"
    assert init(bare_project, **variables).returncode == 0
    assert not simulator.exists()

    result = init(bare_project, "--with", "battles", **variables)
    assert result.returncode == 0, result.stderr
    assert f"Installing Pokémon Showdown's simulator into {simulator} ..." in result.stdout
    assert calls.read_text() == f"ci --prefix {simulator} --ignore-scripts --no-audit --no-fund\n"

    calls.write_text("")
    assert init(bare_project, "--with", "battles", "--quiet", **variables).stdout == ""
    assert calls.read_text() == ""

    lock.write_text(lock.read_text() + "\n")  # another version is pinned
    assert init(bare_project, "--with", "battles", **variables).returncode == 0
    assert calls.read_text().startswith("ci ")


def test_init_installs_the_server_without_its_optional_packages(bare_project):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls, lock = bare_project.parent / "npm_calls", bare_project / "pokegemma/battles/node_server/package-lock.json"
    write_command(bare_project.parent / "bin" / "node", "echo v20.1.0")
    write_command(bare_project.parent / "bin" / "npm", NPM)
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": os.devnull, "NPM_CALLS": str(calls), "LOCK": str(lock)}
    result = init(bare_project, "--with", "showdown", **variables)
    assert result.returncode == 0, result.stderr
    server = environment / "share/pokegemma-showdown"
    assert f"Installing Pokémon Showdown's server into {server} ..." in result.stdout
    assert calls.read_text() == f"ci --prefix {server} --ignore-scripts --no-audit --no-fund --omit=optional\n"


@pytest.mark.parametrize("version", ["echo v18.19.1", "exit 127"])
def test_init_names_a_node_that_is_too_old_before_it_installs_anything(bare_project, version):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    write_command(bare_project.parent / "bin" / "node", version)
    calls = bare_project.parent / "calls"
    result = init(bare_project, "--with", "battles", VIRTUAL_ENV=str(environment), PIP_CALLS=str(calls))
    assert result.returncode == 2
    assert "--with battles needs Node.js 20 or newer and npm" in result.stderr and result.stderr.count("\n") == 1
    assert not calls.exists()


def write_weights(folder: Path) -> str:
    """Write wheels with the pieces of made-up weights, and return the SHA-256 of the whole."""
    folder.mkdir()
    pieces = [f"piece {number};".encode() for number in range(4)]
    for number, piece in enumerate(pieces):
        with zipfile.ZipFile(folder / f"part{number + 1}-1.0.0-py3-none-any.whl", "w") as wheel:
            wheel.writestr(f"part{number + 1}/data/gemma-3-270m-q4_k_m.gguf.part{number:02d}", piece)
            wheel.writestr(f"part{number + 1}/__init__.py", "raise SystemExit('this runs no code of a wheel')")
    with zipfile.ZipFile(folder / "main-1.0.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("main/data/GEMMA_TERMS.html", "terms")
    return hashlib.sha256(b"".join(pieces)).hexdigest()


DOWNLOAD_WEIGHTS = f"""{RECORD_PIP}; [ "$1" != download ] || {{
    while [ "$1" != --dest ]; do shift; done
    cp "$WHEELS"/* "$2"; }}"""


def test_init_installs_gemma_only_where_its_terms_are_accepted(bare_project):
    environment = make_environment(bare_project, pip=DOWNLOAD_WEIGHTS)
    calls, wheels = bare_project.parent / "calls", bare_project.parent / "wheels"
    sha256 = write_weights(wheels)
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls), "WHEELS": str(wheels)}
    refused = init(bare_project, "--with", "gemma270m", **variables)
    assert refused.returncode == 2 and refused.stderr.count("\n") == 1
    for words in ("https://ai.google.dev/gemma/terms", "--accept-gemma-terms"):
        assert words in refused.stderr
    assert not calls.exists() and not (environment / "share").exists()

    accepted = ("--with", "gemma270m", "--accept-gemma-terms")
    wrong = init(bare_project, *accepted, **variables)
    assert wrong.returncode == 1 and f"its SHA-256 is {sha256}, not a5fd3b62" in wrong.stderr
    assert not (environment / "share" / "gemma270m").exists()
    assert "--require-hashes -r pokegemma/gemma/gemma270m/packages.txt" in calls.read_text()

    module = bare_project / "pokegemma/gemma/gemma270m/package.py"
    module.write_text(re.sub('WEIGHTS_SHA256 = "[0-9a-f]{64}"', f'WEIGHTS_SHA256 = "{sha256}"', module.read_text()))
    result = init(bare_project, *accepted, **variables)
    assert result.returncode == 0, result.stderr
    assert "subject to the Gemma Terms of Use found at ai.google.dev/gemma/terms" in result.stdout
    weights = environment / "share" / "gemma270m"
    assert (weights / "gemma-3-270m-q4_k_m.gguf").read_text() == "piece 0;piece 1;piece 2;piece 3;"
    assert sorted(path.name for path in weights.iterdir()) == [
        "GEMMA_TERMS.html",
        "gemma-3-270m-q4_k_m.gguf",
        "run.json",
    ]

    calls.write_text("")
    assert init(bare_project, "--with", "gemma270m", "--quiet", **variables).stdout == ""
    assert calls.read_text() == ""


def test_gemma_is_refused_before_an_environment_is_made(bare_project):
    refused = init(bare_project, "--with", "gemma270m")
    assert refused.returncode == 2
    assert not (bare_project / ".venv").exists()


def test_init_says_what_pip_said_when_the_converter_cannot_be_fetched(bare_project, tmp_path):
    environment = make_environment(bare_project, pip='[ "$1" != download ] || { echo "no route to host"; exit 3; }')
    temporary = tmp_path / "temporary"
    temporary.mkdir()
    result = init(bare_project, "--with", "gguf", VIRTUAL_ENV=str(environment), TMPDIR=str(temporary))
    assert result.returncode == 1
    assert "no route to host" in result.stderr
    assert "error: Fetching llama.cpp's converter into" in result.stderr
    assert not (environment / "share").exists()
    assert list(temporary.iterdir()) == []


def test_init_adds_pip_where_uv_made_an_environment_without(bare_project):
    package, calls = bare_project.parent / "package", bare_project.parent / "calls"
    write_source_package(package)
    pip = f'[ "$1" != --version ] || [ -f "{bare_project.parent}/pip" ] || exit 1; {DOWNLOAD}'
    environment = make_environment(bare_project, pip=pip)
    write_command(
        bare_project.parent / "bin" / "uv",
        f'echo "uv $*" >>"{calls}"; case "$*" in *" pip") touch "{bare_project.parent}/pip";; esac',
    )
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls), "PACKAGE": str(package)}
    result = init(bare_project, "--with", "gguf", **variables)
    assert result.returncode == 0, result.stderr
    assert f"uv pip install --quiet --python {environment}/bin/python pip\n" in calls.read_text()
    assert (environment / "share/llama.cpp/convert_hf_to_gguf.py").is_file()


@pytest.mark.parametrize("arguments", [["--with"], ["--with", "nothing"], ["--with", "dev"], ["--with", "--dev"]])
def test_init_refuses_an_extra_that_is_not_there(bare_project, arguments):
    result = init(bare_project, *arguments)
    assert result.returncode == 2
    name = " ".join(arguments[1:])
    assert result.stderr.startswith(f"error: ./init.sh --with {name}: no such extra; there are: ")
    assert " ray" in result.stderr and "dev" not in result.stderr.split("there are")[1]
    assert not (bare_project / ".venv").exists()


def test_every_extra_has_its_pins():
    with (PROJECT_ROOT / "pyproject.toml").open("rb") as file:
        extras = tomllib.load(file)["project"]["optional-dependencies"]
    assert set(extras) == {path.stem.split("-")[1] for path in PROJECT_ROOT.glob("requirements-*.txt")} - {"dev"}
    untested = [name for name in extras if f"--with {name}" not in (PROJECT_ROOT / "run_tests.sh").read_text()]
    # torchvision, of which PyPI has none for a CPU build of torch; weights, whose terms a person accepts
    assert sorted(untested) == ["gemma270m", "gemma3n"]


def test_init_leaves_no_stamp_when_an_installation_fails(bare_project):
    environment = make_environment(bare_project, pip='[ "$1" = --version ] || { echo "no space left"; exit 3; }')
    for _ in range(2):
        result = init(bare_project, VIRTUAL_ENV=str(environment))
        assert result.returncode == 1
        assert "no space left" in result.stderr
        assert "error: Installing requirements.txt into" in result.stderr
    assert sorted(path.name for path in environment.iterdir()) == ["bin"]


def test_init_starts_again_after_a_failed_change_of_requirements_is_undone(bare_project):
    pip = 'echo "$*" >>"$PIP_CALLS"; [ "$1" = install ] && grep -q broken requirements.txt && exit 3; true'
    environment, calls = make_environment(bare_project, pip=pip), bare_project.parent / "calls"
    variables = {"VIRTUAL_ENV": str(environment), "PIP_CALLS": str(calls)}
    assert init(bare_project, **variables).returncode == 0
    good = (bare_project / "requirements.txt").read_text()
    (bare_project / "requirements.txt").write_text("broken\n")
    assert init(bare_project, **variables).returncode == 1
    (bare_project / "requirements.txt").write_text(good)
    calls.write_text("")
    assert init(bare_project, **variables).returncode == 0
    assert "install" in calls.read_text()


def test_init_never_overwrites_dotenv(bare_project):
    environment = make_environment(bare_project, pip="true")
    (bare_project / ".env").write_text("MAX_STEPS=1\n")
    assert init(bare_project, VIRTUAL_ENV=str(environment)).returncode == 0
    assert (bare_project / ".env").read_text() == "MAX_STEPS=1\n"


def test_init_takes_torch_from_the_index_it_is_given(bare_project):
    environment = make_environment(bare_project, pip=RECORD_PIP)
    calls = bare_project.parent / "calls"
    index = "https://index.example/cpu"
    result = init(bare_project, VIRTUAL_ENV=str(environment), PIP_CALLS=str(calls), TORCH_INDEX_URL=index)
    assert result.returncode == 0, result.stderr
    assert calls.read_text().splitlines()[1].endswith(f"--index-url {index} torch==2.13.0")


CPU_INDEX = "--index-url https://download.pytorch.org/whl/cpu"


@pytest.mark.parametrize(
    ("extras", "torch", "installed"),
    [
        ([], "", "torch==2.13.0"),
        (["gemma3n"], "", "torch==2.13.0 torchvision==0.28.0"),
        (["gemma3n"], "2.13.0+cpu", "torchvision==0.28.0"),
        ([], "2.13.0+cpu", None),
        ([], "2.12.0+cpu", "torch==2.13.0"),
        (["gemma3n"], "2.13.0", None),
    ],
)
@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="needs a machine without an NVIDIA GPU")
def test_init_takes_torch_for_cpus_where_there_is_no_gpu(bare_project, extras, torch, installed):
    environment = make_environment(bare_project, pip=RECORD_PIP, torch=torch)
    calls = bare_project.parent / "calls"
    flags = [word for extra in extras for word in ("--with", extra)]
    assert init(bare_project, *flags, VIRTUAL_ENV=str(environment), PIP_CALLS=str(calls)).returncode == 0
    from_index = [line for line in calls.read_text().splitlines() if "--index-url" in line]
    assert [line.split(CPU_INDEX)[1] for line in from_index] == ([f" {installed}"] if installed else [])


@pytest.mark.skipif(bool(shutil.which("nvidia-smi")), reason="needs a machine without an NVIDIA GPU")
def test_init_takes_torch_from_pypi_where_the_index_for_cpus_fails(bare_project):
    pip = f'{RECORD_PIP}; case "$*" in *--index-url*) echo "no route to host" >&2; exit 1;; esac'
    environment, calls = make_environment(bare_project, pip=pip, torch=""), bare_project.parent / "calls"
    result = init(bare_project, VIRTUAL_ENV=str(environment), PIP_CALLS=str(calls))
    assert (result.returncode, result.stderr) == (0, "")
    assert sum("PyPI" in line for line in result.stdout.splitlines()) == 1
    assert [line.split("--no-input ")[1] for line in calls.read_text().splitlines() if "install" in line] == [
        f"{CPU_INDEX} torch==2.13.0",
        "-r requirements.txt",
        "--no-deps -e .",
    ]


@pytest.mark.parametrize(
    ("command", "variables"),
    [("nvidia-smi", {}), ("sbatch", {}), (None, {"NVIDIA_VISIBLE_DEVICES": "all"}), (None, {"CUDA_HOME": "/cuda"})],
)
def test_init_takes_torch_from_pypi_where_a_gpu_is_or_will_be(bare_project, command, variables):
    environment, calls = make_environment(bare_project, pip=RECORD_PIP, torch=""), bare_project.parent / "calls"
    if command:
        write_command(bare_project.parent / "bin" / command, "exit 0")
    assert init(bare_project, VIRTUAL_ENV=str(environment), PIP_CALLS=str(calls), **variables).returncode == 0
    assert "--index-url" not in calls.read_text()


def test_init_uses_uv_where_it_is_installed(bare_project):
    make_environment(bare_project, pip="exit 9")
    calls = bare_project.parent / "calls"
    write_command(
        bare_project.parent / "bin" / "uv",
        f'echo "$*" >>"{calls}"; [ "$1" = venv ] && cp -R "{bare_project.parent}/env" "{bare_project}/.venv"; true',
    )
    result = init(bare_project)
    assert result.returncode == 0, result.stderr
    python = f"{bare_project}/.venv/bin/python"
    made, *installed = calls.read_text().splitlines()
    assert made.startswith("venv --quiet --clear --seed --python python3") and made.endswith(" .venv")
    assert installed == [
        f"pip install --quiet --python {python} -r requirements.txt",
        f"pip install --quiet --python {python} --no-deps -e .",
    ]
