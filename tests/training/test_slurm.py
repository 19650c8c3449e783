"""training_configs/slurm.sbatch, with srun and scontrol replaced: two machines, both of them this one."""

import functools
import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import psutil
import pytest
import yaml

from pokegemma.provenance import PROJECT_ROOT, read_run_record
from tests.processes import free_port, killed_after, wait_until
from tests.training.fsdp_on_cpu import FSDP_ON_CPU

JOB = PROJECT_ROOT / "training_configs/slurm.sbatch"
STUBS = {
    "srun": """#!/usr/bin/env bash
# Run a command once for each machine; the exit status is the worst one, as srun's.
shift
tasks=() status=0
for ((machine = 0; machine < SLURM_JOB_NUM_NODES; machine++)); do
    SLURM_NODEID=$machine "$@" &
    tasks+=($!)
done
echo "${tasks[@]}" >tasks
for task in "${tasks[@]}"; do wait "$task" || status=$?; done
exit "$status"
""",
    "scontrol": """#!/usr/bin/env bash
if [[ $1 == show ]]; then echo 127.0.0.1; else echo "$@" >>scontrol.log; fi
""",
}
OPTIONS = {
    "finetuning": "lora",
    "eval_steps": 100,
    "save_steps": 100,
    "logging_steps": 1,
    "report_to": "none",
    "per_device_train_batch_size": 1,
    "gradient_accumulation_steps": 1,
    "dataloader_num_workers": 0,
    "use_cpu": True,
}


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A project folder whose fsdp2.yaml and training script are for a CPU, with the stubs in bin/."""
    for name in ("accelerate_configs", "bin", "scripts"):
        (tmp_path / name).mkdir()
    (tmp_path / "scripts/sft_pokemon_gemma3.py").write_text(FSDP_ON_CPU)
    config = yaml.safe_load((PROJECT_ROOT / "accelerate_configs/fsdp2.yaml").read_text())
    config.update(use_cpu=True, mixed_precision="no")
    (tmp_path / "accelerate_configs/fsdp2.yaml").write_text(yaml.safe_dump(config))
    for name, text in STUBS.items():
        (tmp_path / "bin" / name).write_text(text)
        (tmp_path / "bin" / name).chmod(0o755)
    return tmp_path


def submit(project: Path, dataset: Path, model: Path, *, job_id: int, max_steps: int, python: str) -> subprocess.Popen:
    """Start the job as Slurm does: a copy of its file, what is printed appended to one log.

    `python` is what torchrun starts the training script with.
    """
    environment = {
        **os.environ,
        "PATH": f"{project / 'bin'}:{os.environ['PATH']}",
        "PYTHONPATH": str(PROJECT_ROOT),
        "HF_HUB_OFFLINE": "1",
        "POKEGEMMA_PYTHON": sys.executable,
        "PYTHON_EXEC": python,
        "ACCELERATE_CONFIG": "fsdp2",
        "MODEL_NAME": str(model),
        "DATASET_PATH": str(dataset),
        "OUTPUT_DIR": str(project / "run"),
        "SLURM_SUBMIT_DIR": str(project),
        "SLURM_JOB_ID": str(job_id),
        "SLURM_JOB_NUM_NODES": "2",
        "SLURM_GPUS_ON_NODE": "1",
        "SLURM_JOB_NODELIST": "node[1-2]",
    }
    options = {**OPTIONS, "max_steps": max_steps}
    flags = [str(word) for name, value in options.items() for word in (f"--{name}", value)]
    with (project / "slurm.log").open("a") as log:
        return subprocess.Popen(["bash", str(JOB), *flags], env=environment, stdout=log, stderr=subprocess.STDOUT)


@pytest.mark.slow(50)
def test_a_job_on_two_machines_saves_at_its_time_limit_and_continues(
    project: Path, toy_dataset: Path, tiny_model: Path, forked_python: str
) -> None:
    log = project / "slurm.log"
    job_id = next(port for port in iter(free_port, None) if port >= 20_000)  # the port that follows from it
    submit_job = functools.partial(submit, project, toy_dataset, tiny_model, job_id=job_id, python=forked_python)
    job = submit_job(max_steps=10_000)  # never done when the signal comes
    with killed_after(job):
        wait_until(lambda: job.poll() is not None or "'loss'" in log.read_text())
        assert job.poll() is None, log.read_text()[-3000:]
        for task in map(int, (project / "tasks").read_text().split()):  # Slurm signals every process of a step
            for process in [*psutil.Process(task).children(recursive=True), psutil.Process(task)]:
                process.send_signal(signal.SIGTERM)
        assert job.wait() == 0, log.read_text()[-3000:]
    record = read_run_record(project / "run/adapter")
    assert record["status"] == "interrupted" and record["global_step"] > 0
    assert (project / "scontrol.log").read_text() == f"requeue {job_id}\n"

    num_steps = record["global_step"] + 2
    with killed_after(submit_job(max_steps=num_steps)) as again:
        assert again.wait() == 0, log.read_text()[-3000:]
    record = read_run_record(project / "run/adapter")
    assert record["status"] == "completed"
    assert (record["parallel_mode"]["engine"], record["parallel_mode"]["num_processes"]) == ("fsdp2", 2)
    assert record["parallel_mode"]["num_sharded"] == record["parallel_mode"]["num_parameters"] > 0
    state = json.loads((project / "run/adapter/trainer_state.json").read_text())
    assert [entry["step"] for entry in state["log_history"] if "loss" in entry] == [*range(1, num_steps + 1)]
    assert (project / "scontrol.log").read_text() == f"requeue {job_id}\n"


def test_the_job_names_missing_variables() -> None:
    environment = {name: value for name, value in os.environ.items() if name not in ("DATASET_PATH", "OUTPUT_DIR")}
    result = subprocess.run(["bash", str(JOB)], env=environment, capture_output=True, text=True, cwd=PROJECT_ROOT)
    assert result.returncode != 0
    assert "DATASET_PATH: folder with train.jsonl" in result.stderr
