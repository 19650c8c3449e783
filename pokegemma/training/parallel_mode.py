"""The parallel mode that was requested, and the one that a wrapped model is in."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from transformers import TrainingArguments

from pokegemma.errors import PokegemmaError

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class ParallelMode:
    """The mode in which a model is trained.

    Attributes:
        engine: "none", "ddp", "fsdp1", "fsdp2", or "deepspeed_zero0" to "deepspeed_zero3". "megatron_lm" can be
            requested but is never in force.
        num_processes: processes that train together.
        model_class: class of the wrapped model; None for a requested mode.
        num_sharded: parameters that this process has only a part of (FSDP2, ZeRO-3).
        num_parameters: all parameters of the model, counted as tensors.
    """

    engine: str
    num_processes: int
    model_class: str | None = None
    num_sharded: int = 0
    num_parameters: int = 0

    def describe(self) -> str:
        """Return the mode in words, for a message."""
        return f"{self.engine} with {self.num_processes} process{'es' * (self.num_processes > 1)}"


def requested_mode(training: TrainingArguments, environ: Mapping[str, str] = os.environ) -> ParallelMode:
    """Return the mode that options request, or the accelerate config by the variables of its launcher."""
    num_processes = int(environ.get("WORLD_SIZE", 1))
    if training.deepspeed or environ.get("ACCELERATE_USE_DEEPSPEED") == "true":
        plugin = training.deepspeed_plugin
        stage = environ.get("ACCELERATE_DEEPSPEED_ZERO_STAGE", "0") if plugin is None else plugin.zero_stage
        engine = f"deepspeed_zero{stage}"
    elif training.fsdp:
        engine = f"fsdp{training.fsdp_plugin_args['fsdp_version']}"
    elif environ.get("ACCELERATE_USE_FSDP") == "true":
        engine = f"fsdp{environ.get('FSDP_VERSION', 1)}"
    elif environ.get("ACCELERATE_USE_MEGATRON_LM") == "true":
        engine = "megatron_lm"
    else:
        engine = "ddp" if num_processes > 1 else "none"
    return ParallelMode(engine, num_processes)


def check_requested_mode(training: TrainingArguments) -> None:
    """Refuse a mode that accelerate would replace by another one without a message.

    accelerate 1.15 runs FSDP and Megatron-LM on accelerators only. With `use_cpu` it takes DistributedDataParallel. The
    model need not be loaded.

    Raises:
        PokegemmaError: the mode will not be in force.
    """
    asked, state = requested_mode(training), training.distributed_state
    if asked.engine.startswith("deepspeed"):
        in_force = training.deepspeed_plugin is not None
    elif asked.engine in ("none", "ddp"):
        in_force = True
    else:
        in_force = state.distributed_type not in ("NO", "MULTI_CPU")
    if asked.engine == "megatron_lm" or not in_force:
        raise PokegemmaError(
            f"the accelerate config asks for {asked.describe()}, which does not run on {state.device.type} here "
            f"(accelerate: {state.distributed_type.value}); use accelerate_configs/multi_gpu.yaml or cpu_mps.yaml"
        )
    if asked.num_processes != state.num_processes:
        raise PokegemmaError(
            f"the launcher started {asked.num_processes} processes, accelerate found {state.num_processes}; "
            "start training with accelerate launch or torchrun"
        )


def use_one_gpu(training: TrainingArguments) -> None:
    """Let a process use one GPU, also where it sees several, for which transformers would take DataParallel.

    That cuts batches at places that have nothing to do with each other: pixel_values and image_index, or the states
    and the actions of battles.
    """
    if training.n_gpu > 1:
        logger.warning("using one of %d GPUs; accelerate launch uses all", training.n_gpu)
        training._n_gpu = 1


def refuse_sharding(training: TrainingArguments) -> None:
    """Refuse a mode that shards weights, for weights of 4 bits.

    Users of FSDP2 report wrong outputs of such layers, without an error:
    https://github.com/bitsandbytes-foundation/bitsandbytes/issues/1945. Nothing that shards them is tested here.

    Raises:
        PokegemmaError: FSDP, DeepSpeed or Megatron-LM was requested.
    """
    requested = requested_mode(training)
    if requested.engine not in ("none", "ddp"):
        raise PokegemmaError(
            f"--finetuning qlora does not work with {requested.engine}; use --finetuning lora, or "
            "accelerate_configs/multi_gpu.yaml"
        )


def _is_sharded(parameter: torch.nn.Parameter) -> bool:
    if isinstance(parameter, DTensor):
        return any(placement.is_shard() for placement in parameter.placements)
    share = getattr(parameter, "ds_tensor", None)  # the part of a parameter that ZeRO-3 leaves to this process
    return share is not None and share.numel() < parameter.ds_numel


def mode_in_force(model: torch.nn.Module) -> ParallelMode:
    """Return the mode of a wrapped model, as a training step gets it, by its class and its parameters."""
    model = getattr(model, "_orig_mod", model)  # compiled after it was wrapped
    if isinstance(model, FSDPModule):
        engine = "fsdp2"
    elif isinstance(model, FullyShardedDataParallel):
        engine = "fsdp1"
    elif isinstance(model, DistributedDataParallel):
        engine = "ddp"
    elif hasattr(model, "zero_optimization_stage"):  # DeepSpeedEngine, whose package exists on Linux only
        engine = f"deepspeed_zero{model.zero_optimization_stage()}"
    else:
        engine = "none"
    initialized = torch.distributed.is_available() and torch.distributed.is_initialized()
    parameters = list(model.parameters())
    return ParallelMode(
        engine=engine,
        num_processes=torch.distributed.get_world_size() if initialized else 1,
        model_class=type(model).__name__,
        num_sharded=sum(map(_is_sharded, parameters)),
        num_parameters=len(parameters),
    )


def require_mode(model: torch.nn.Module, training: TrainingArguments) -> dict[str, Any]:
    """Return the mode of a wrapped model as a dictionary for run.json.

    Raises:
        PokegemmaError: it is not the requested mode, or FSDP2 or ZeRO-3 have sharded nothing.
    """
    asked, mode = requested_mode(training), mode_in_force(model)
    whole = mode.engine in ("fsdp2", "deepspeed_zero3") and mode.num_processes > 1 and not mode.num_sharded
    # torchrun's only process gets DDP, too.
    engines = {"none", "ddp"} if asked.num_processes == 1 and asked.engine in ("none", "ddp") else {asked.engine}
    if mode.engine not in engines or mode.num_processes != asked.num_processes or whole:
        raise PokegemmaError(
            f"the accelerate config asks for {asked.describe()}, but {mode.describe()} is in force "
            f"({mode.model_class}, {mode.num_sharded} of {mode.num_parameters} parameters sharded); nothing was trained"
        )
    return vars(mode)
