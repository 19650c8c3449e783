"""What this machine can train on, and which of accelerate_configs/ fits. It loads no torch, so it is quick."""

import os
import platform
import shutil
import subprocess
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import metadata, util
from typing import Literal

import psutil
from packaging.requirements import Requirement

GIB = 2**30
_QUERY = ["nvidia-smi", "--query-gpu=index,uuid,name,memory.total", "--format=csv,noheader,nounits"]


@dataclass(frozen=True)
class Gpu:
    name: str
    memory_gib: float | None  # None if the driver does not report it: a MIG slice, memory shared with the CPU


@dataclass(frozen=True)
class Hardware:
    """`gpus`: the NVIDIA GPUs that CUDA_VISIBLE_DEVICES leaves, whether or not torch can use them.
    `num_cores`: physical cores that this process may run on. `mps`: an Apple GPU.
    """

    gpus: tuple[Gpu, ...]
    mps: bool
    num_cores: int
    memory_gib: float
    torch_is_cpu_build: bool

    @property
    def usable_gpus(self) -> tuple[Gpu, ...]:
        return () if self.torch_is_cpu_build else self.gpus

    @property
    def accelerate_config(self) -> str:
        """Name the file in accelerate_configs/ that fits, without its suffix."""
        return {0: "cpu_mps", 1: "single_gpu"}.get(len(self.usable_gpus), "multi_gpu")

    def describe(self) -> str:
        """Return in one line what was found."""
        parts = [
            f"{gpu.name} ({gpu.memory_gib:.0f} GiB)" if gpu.memory_gib is not None else gpu.name for gpu in self.gpus
        ]
        if self.gpus and self.torch_is_cpu_build:
            parts.append("which this CPU build of torch cannot use")
        if self.mps:
            parts.append("Apple GPU (MPS)")
        if not parts:
            parts.append("no GPU")
        cores = f"{self.num_cores} CPU core{'' if self.num_cores == 1 else 's'}"
        return ", ".join([*parts, cores, f"{self.memory_gib:.0f} GiB of memory"])


def detect_hardware(environ: Mapping[str, str] = os.environ) -> Hardware:
    """Look at this machine; `environ` is asked for CUDA_VISIBLE_DEVICES."""
    physical = psutil.cpu_count(logical=False) or psutil.cpu_count() or 1
    try:
        torch_is_cpu_build = metadata.version("torch").endswith("+cpu")
    except metadata.PackageNotFoundError:
        torch_is_cpu_build = False
    return Hardware(
        gpus=visible_gpus(_list_gpus(), environ.get("CUDA_VISIBLE_DEVICES")),
        mps=platform.system() == "Darwin" and platform.machine() == "arm64",
        num_cores=min(physical, usable_cores()),
        memory_gib=psutil.virtual_memory().total / GIB,
        torch_is_cpu_build=torch_is_cpu_build,
    )


def usable_cores() -> int:
    """Return how many cores this process may use; macOS has no limit."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def visible_gpus(listing: str, cuda_visible_devices: str | None) -> tuple[Gpu, ...]:
    """Return the GPUs of an nvidia-smi `listing` (index, uuid, name, MiB) that `cuda_visible_devices` leaves.

    As in CUDA: unset leaves all; else a list of indices or (beginnings of) UUIDs, read up to the first that is unknown.
    """
    rows = [[cell.strip() for cell in line.split(",")] for line in listing.splitlines() if line.count(",") == 3]
    gpus = {}
    for index, uuid, name, mib in rows:
        gpus[index, uuid] = Gpu(name, float(mib) / 1024 if mib.isdigit() else None)
    if cuda_visible_devices is None:
        return tuple(gpus.values())
    visible = []
    for wanted in (part.strip() for part in cuda_visible_devices.split(",")):
        if wanted.startswith("MIG-") and gpus:
            visible.append(Gpu("MIG slice", None))
            continue
        is_uuid = wanted.startswith("GPU-")
        found = [gpu for (i, uuid), gpu in gpus.items() if (uuid.startswith(wanted) if is_uuid else i == wanted)]
        if not found:
            break
        visible.append(found[0])
    return tuple(visible)


def _list_gpus() -> str:
    if shutil.which(_QUERY[0]) is None:
        return ""
    try:
        # Without persistence mode the driver starts up first, which takes seconds on machines with many GPUs.
        answer = subprocess.run(_QUERY, capture_output=True, text=True, timeout=60, check=False)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return answer.stdout if answer.returncode == 0 else ""


def unmet_requirements(requirements: Iterable[str]) -> list[str]:
    """Return what is wrong with the installed packages, a line each: a package is missing or outside its range.

    Args:
        requirements: as in pyproject.toml, such as "torch>=2.11". Those of another system or of an extra are met.
    """
    problems = []
    for requirement in map(Requirement, requirements):
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    return problems


def default_finetuning() -> Literal["qlora", "lora"]:
    """Return how to fine-tune by default: QLoRA needs bitsandbytes, which does not exist for macOS."""
    return "qlora" if util.find_spec("bitsandbytes") else "lora"
