"""The program of a launcher's processes: several training runs, each in a process forked from this one.

A launcher takes ten seconds of a core to start two processes, most of them for imports. Forked after the imports, a run
starts with the state of a launched process: no process group, and the environment that the launcher has set.

    accelerate launch --config_file CONFIG tests/training/launched_runs.py RUNS.json
"""

import contextlib
import gc
import importlib
import json
import multiprocessing
import os
import runpy
import shutil
import signal
import sys
from dataclasses import asdict, dataclass, field
from pathlib import Path

from pokegemma.provenance import PROJECT_ROOT


@dataclass(frozen=True)
class LaunchedRun:
    """A training run.

    `output` is its folder; what process 1 prints goes to `output`.1.log. `port` is where its processes meet.
    `environment` replaces variables of the launcher. A run of `num_processes` 1 leaves the other processes out.
    `status` is the exit status that is expected: after another one there are no further runs. `fsdp_on_cpu`: see
    fsdp_on_cpu.py. `continues` is a finished run that is copied to `output` as it was before its last steps.
    """

    output: str
    arguments: list[str]
    port: int
    environment: dict[str, str] = field(default_factory=dict)
    num_processes: int = 2
    status: int = 0
    fsdp_on_cpu: bool = False
    continues: str | None = None

    def log(self, rank: int) -> Path:
        return Path(f"{self.output}.{rank}.log")


def write_runs(path: Path, runs: list[LaunchedRun]) -> None:
    path.write_text(json.dumps([asdict(run) for run in runs]), encoding="utf-8")


def copy_unfinished(finished: Path, output: Path) -> None:
    """Copy a finished run without its result and its last checkpoint."""
    shutil.copytree(finished, output)
    last = max(output.glob("checkpoint-*"), key=lambda path: int(path.name.partition("-")[2]))
    shutil.rmtree(last)
    (output / "adapter_model.safetensors").unlink()


TRAINING_MODULES = ["pokegemma.training.sft", "deepspeed", "matplotlib.pyplot", "peft.tuners.lora.bnb"]
"""What a training run imports. accelerate imports DeepSpeed, if it is installed, to look at a model's class (2 s)."""


def import_for_training() -> None:
    """Import before the forks what each run would import after it."""
    for name in TRAINING_MODULES:
        with contextlib.suppress(ModuleNotFoundError):  # DeepSpeed exists on Linux only
            importlib.import_module(name)
    gc.freeze()  # a collection after the fork would copy the pages of all objects


def train(run: LaunchedRun, rank: int) -> None:
    """Be the training script."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    log = os.open(run.log(rank), os.O_WRONLY | os.O_CREAT)
    os.dup2(log, 1)
    os.dup2(log, 2)
    # Process 0 opens the port by itself: the launcher's holds the answers of the runs before.
    os.environ.update(MASTER_PORT=str(run.port), TORCHELASTIC_USE_AGENT_STORE="False", **run.environment)
    if run.fsdp_on_cpu:
        from tests.training.fsdp_on_cpu import allow_fsdp_on_cpu

        allow_fsdp_on_cpu()
    if run.continues and rank == 0:  # the others wait for its port
        copy_unfinished(Path(run.continues), Path(run.output))
    sys.argv = ["sft_pokemon_gemma3.py", *run.arguments]
    runpy.run_path(str(PROJECT_ROOT / "scripts/sft_pokemon_gemma3.py"), run_name="__main__")


def main() -> None:
    import_for_training()
    if os.environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        import deepspeed

        # It would try a compiler on all its parts, then compile what only processes of a CPU exchange tensors by.
        deepspeed.ops.__compatible_ops__ = {}
    rank = int(os.environ.get("RANK", "0"))
    signal.signal(
        signal.SIGTERM, lambda *_: sys.exit(1)
    )  # from the launcher, when the other has failed; ends the run, too
    for record in json.loads(Path(sys.argv[1]).read_text(encoding="utf-8")):
        run = LaunchedRun(**record)
        if rank >= run.num_processes:
            continue
        process = multiprocessing.get_context("fork").Process(target=train, args=(run, rank), daemon=True)
        process.start()
        process.join()
        if process.exitcode != run.status:
            sys.exit(f"{run.output}: exit status {process.exitcode}")


if __name__ == "__main__":
    main()
