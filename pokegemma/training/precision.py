"""In which precision training computes: set by `--bf16`, else by the accelerate config, else by what the GPU can do."""

import logging
import os
from typing import Any, Literal

import torch
from accelerate.utils import parse_flag_from_env

from pokegemma.errors import PokegemmaError

logger = logging.getLogger(__name__)

LAUNCHED = "ACCELERATE_MIXED_PRECISION"
"""The variable with the `mixed_precision` of `accelerate launch`; "no" is also its default."""


def is_forced_to_cpu() -> bool:
    """Return whether the accelerate config contains `use_cpu: true`."""
    return parse_flag_from_env("ACCELERATE_USE_CPU")


def choose_bf16(asked: bool | None, *, use_cpu: bool) -> bool:
    """Return whether to compute in bfloat16, and set the variable that accelerate, DeepSpeed and FSDP read.

    Otherwise transformers would prefer the launcher's bf16 to `--bf16 false`, and a GPU without bfloat16 would emulate
    it slowly.

    Args:
        asked: the value of `--bf16`; None without it.
        use_cpu: whether `--use_cpu` or the accelerate config sets the CPU.

    Raises:
        PokegemmaError: Gemma 3 cannot be trained in the precision of the accelerate config.
    """
    launched = os.environ.get(LAUNCHED, "no")
    has_gpu = torch.cuda.is_available() and not use_cpu
    has_bf16 = has_gpu and torch.cuda.is_bf16_supported(including_emulation=False)
    if asked is not None:
        bf16 = asked
    elif launched not in ("no", "bf16"):
        raise PokegemmaError(
            f'mixed_precision: {launched} in the accelerate config: Gemma 3 needs bf16 or "no"; or pass --bf16'
        )
    elif launched == "bf16" and has_gpu and not has_bf16:
        logger.warning("this GPU has no bfloat16 (mixed_precision in the accelerate config): training in float32")
        bf16 = False
    else:
        bf16 = launched == "bf16" or has_bf16
    if LAUNCHED in os.environ:
        os.environ[LAUNCHED] = "bf16" if bf16 else "no"
    return bf16


def deepspeed_precision(config: dict[str, Any], *, asked: bool | None) -> Literal["bf16", "no"]:
    """Return the precision in which DeepSpeed computes. A `deepspeed_config_file` overrides the accelerate config.

    Args:
        config: of DeepSpeed, whose precision is no longer "auto".
        asked: the value of `--bf16`; None without it.

    Raises:
        PokegemmaError: the file sets another precision than `--bf16`, or fp16.
    """
    enabled = {name: bool(config.get(name, {}).get("enabled")) for name in ("fp16", "bf16")}
    if enabled["fp16"]:
        raise PokegemmaError("fp16 in the DeepSpeed config overflows in Gemma 3; enable bf16 there, or neither")
    if asked is not None and asked != enabled["bf16"]:
        raise PokegemmaError(
            f"--bf16 {str(asked).lower()} contradicts bf16.enabled in the DeepSpeed config; write auto there"
        )
    return "bf16" if enabled["bf16"] else "no"
