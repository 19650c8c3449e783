"""Checks of the installed packages and of the hardware."""

from importlib import metadata

import torch

from pokegemma.data.checks.records import Check
from pokegemma.environment import Hardware, unmet_requirements
from pokegemma.provenance import package_versions


def check_environment() -> Check:
    """Fail if a package that pokegemma requires is missing or outside its range."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    try:
        problems = unmet_requirements(metadata.requires("pokegemma") or [])
    except metadata.PackageNotFoundError:
        return Check("environment", "FAIL", f"pokegemma is not installed; run ./init.sh ({versions})")
    if problems:
        found = f"{len(problems)} packages are missing or outside their range"
        return Check("environment", "FAIL", f"{found}; run ./init.sh ({versions})", tuple(problems))
    return Check("environment", "PASS", versions)


def check_hardware(hardware: Hardware) -> Check:
    """Report the hardware; fail if this torch cannot use the GPU of the machine, warn if the machine has none."""
    found = f"{hardware.describe()}; accelerate_configs/{hardware.accelerate_config}.yaml fits"
    if hardware.gpus and not torch.cuda.is_available():
        return Check("hardware", "FAIL", f"{found}; torch {torch.__version__} cannot use the GPU: run ./init.sh again")
    if not hardware.gpus and not hardware.mps:
        return Check("hardware", "WARN", f"{found}; without a GPU only a tiny model trains in reasonable time")
    if hardware.usable_gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("hardware", "WARN", f"{found}; no bfloat16 here, and float32 takes twice the memory")
    return Check("hardware", "PASS", found)
