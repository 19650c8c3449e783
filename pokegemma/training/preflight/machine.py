"""Will this model train on these samples on this machine? Versions, hardware, disk, token lengths, memory."""

import shutil
import tempfile
from importlib import metadata
from pathlib import Path

import torch
from packaging.requirements import Requirement

from pokegemma.data.checks.records import Check
from pokegemma.environment import Hardware
from pokegemma.provenance import package_versions
from pokegemma.training.preflight.memory import GIB


def check_environment() -> Check:
    """Fail if a package that pokegemma requires is missing or outside its range."""
    versions = ", ".join(f"{name} {version}" for name, version in package_versions().items())
    try:
        requirements = [Requirement(line) for line in metadata.requires("pokegemma") or []]
    except metadata.PackageNotFoundError:
        return Check("environment", "FAIL", f"pokegemma is not installed; run ./init.sh ({versions})")
    problems = []
    for requirement in requirements:
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": ""}):
            continue
        try:
            installed = metadata.version(requirement.name)
        except metadata.PackageNotFoundError:
            problems.append(f"{requirement.name} is not installed")
            continue
        if not requirement.specifier.contains(installed, prereleases=True):
            problems.append(f"{requirement.name} {installed} is not {requirement.specifier}")
    if problems:
        return Check(
            "environment", "FAIL", f"{len(problems)} packages wrong; run ./init.sh ({versions})", tuple(problems)
        )
    return Check("environment", "PASS", versions)


def check_hardware(hardware: Hardware) -> Check:
    """Say what there is to train on; fail if this torch cannot use the GPU that is there, warn if there is none."""
    found = f"{hardware.describe()}; accelerate_configs/{hardware.accelerate_config}.yaml fits"
    if hardware.gpus and not torch.cuda.is_available():
        return Check("hardware", "FAIL", f"{found}; torch {torch.__version__} cannot use the GPU: run ./init.sh again")
    if not hardware.gpus and not hardware.mps:
        return Check("hardware", "WARN", f"{found}; without a GPU only a tiny model trains in reasonable time")
    if hardware.usable_gpus and not torch.cuda.is_bf16_supported(including_emulation=False):
        return Check("hardware", "WARN", f"{found}; no bfloat16 here, and float32 takes twice the memory")
    return Check("hardware", "PASS", found)


def check_disk(needs: dict[Path, int | None]) -> Check:
    """Fail if a folder is not writable or its disk has less free than will be written; None: nobody knows how much.

    A folder that does not exist yet is on the disk of its nearest parent that does.
    """
    disks: dict[int, list[tuple[Path, int | None]]] = {}
    for folder, needed in needs.items():
        place = next(path for path in (folder.absolute(), *folder.absolute().parents) if path.exists())
        try:  # permissions do not tell: root may write everywhere, but not to /proc or a read-only disk
            with tempfile.TemporaryDirectory(prefix=".pokegemma_", dir=place):
                pass
        except OSError as error:
            return Check("disk space", "FAIL", f"{place} is not writable ({error.strerror})")
        disks.setdefault(place.stat().st_dev, []).append((place, needed))
    found, full = [], False
    for folders in disks.values():
        free, place = shutil.disk_usage(folders[0][0]).free, folders[0][0]
        needed = sum(amount or 0 for _, amount in folders)
        full |= free < needed
        what = f"about {needed / GIB:.1f} GiB needed" if needed else "how much is needed is unknown"
        found.append(f"{free / GIB:.1f} GiB free at {place}, {what}")
    return Check("disk space", "FAIL" if full else "PASS", "; ".join(found))
