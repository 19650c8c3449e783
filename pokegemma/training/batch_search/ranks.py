"""Processes that a launcher started to search together, each on its own GPU, in lockstep."""

import os
import re
from collections.abc import MutableMapping
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch.distributed

from pokegemma.errors import PokegemmaError
from pokegemma.training.batch_search.attempts import RunTrial, Trial, combine_trials

_LAUNCHER = re.compile(r"(RANK|WORLD_SIZE|LOCAL_\w+|GROUP_\w+|ROLE_\w+|MASTER_\w+|TORCHELASTIC_\w+)$")
_SHARDING = ("ACCELERATE_USE_FSDP", "ACCELERATE_USE_DEEPSPEED")


@dataclass(frozen=True)
class Ranks:
    """This process, `rank` of `size`, of which `local_size` are on this machine."""

    rank: int
    size: int
    local_size: int

    def gather(self, value: Any) -> list[Any]:
        """Return the value of every process, by rank; all must call it."""
        if self.size == 1:
            return [value]
        values = [None] * self.size
        torch.distributed.all_gather_object(values, value)
        return values


def join_ranks(environ: MutableMapping[str, str] = os.environ) -> Ranks:
    """Join the processes of torchrun or `accelerate launch`, and make only its own GPU visible to this one.

    The launcher's variables are removed from the environment, since a trial trains in one process. Without a launcher
    there is one process, which gets the first GPU.

    Raises:
        PokegemmaError: the launcher would shard the model, and a trial in one process does not.
    """
    if any(environ.get(name) == "true" for name in _SHARDING):
        raise PokegemmaError(
            "a trial measures the whole model on one GPU, not one that fsdp2 or deepspeed_zero3 shards"
        )
    local_rank = int(environ.get("LOCAL_RANK", 0))
    ranks = Ranks(
        int(environ.get("RANK", 0)), int(environ.get("WORLD_SIZE", 1)), int(environ.get("LOCAL_WORLD_SIZE", 1))
    )
    if ranks.size > 1:
        torch.distributed.init_process_group("gloo", timeout=timedelta(days=1))  # a trial of another may be slower
    for name in [name for name in environ if _LAUNCHER.match(name)]:
        del environ[name]
    visible = environ.get("CUDA_VISIBLE_DEVICES")
    devices = visible.split(",") if visible is not None else [str(index) for index in range(ranks.local_size)]
    if local_rank < len(devices):  # fewer where the processes share a CPU
        environ["CUDA_VISIBLE_DEVICES"] = devices[local_rank]
    return ranks


def in_lockstep(run_trial: RunTrial, ranks: Ranks) -> RunTrial:
    """Return a `run_trial` for all processes: each runs the trial at the same time, and all get the same result."""

    def run(batch_size: int, gradient_checkpointing: bool) -> Trial:
        try:
            result: Trial | PokegemmaError = run_trial(batch_size, gradient_checkpointing)
        except PokegemmaError as error:  # the other processes must get it, or they would wait forever
            result = error
        trials = ranks.gather(result)
        errors = [trial for trial in trials if isinstance(trial, PokegemmaError)]
        if errors:
            raise errors[0]
        return combine_trials(trials)

    return run
