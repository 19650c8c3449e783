"""run.json: how the files next to it were made."""

import json
import os
import platform
import re
import subprocess
import time
from importlib import metadata
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import RUN_FILE, atomic_file

_PACKAGES = ("torch", "transformers", "trl", "peft", "accelerate", "deepspeed", "bitsandbytes", "datasets", "pillow")
_PACKAGES += ("mlx", "mlx-vlm", "llama-cpp-python")
_SECRET = re.compile(r"(^|_)(token|key|password|secret)$", re.IGNORECASE)

PROJECT_ROOT = Path(__file__).resolve().parents[1]
"""The checkout that this package runs from."""

_HUB_ID = re.compile(r"\w[\w.-]*/\w[\w.-]*")


def is_hub_id(name: str) -> bool:
    """Return whether a model or a dataset is named as on the Hugging Face Hub, and is not a path here."""
    return not Path(name).exists() and _HUB_ID.fullmatch(name) is not None


def package_versions() -> dict[str, str]:
    """Return the installed version of each package that can change a result."""
    versions = {"python": platform.python_version()}
    for package in _PACKAGES:
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return versions


def git_commit() -> str | None:
    """Return the commit of the checkout this package runs from, with "+changes" if it was edited; None outside git."""
    try:
        commit = subprocess.run(
            ["git", "-C", PROJECT_ROOT, "rev-parse", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
        changes = subprocess.run(
            ["git", "-C", PROJECT_ROOT, "status", "--porcelain", "--untracked-files=no"],
            capture_output=True,
            text=True,
            check=True,
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return None
    return f"{commit}+changes" if changes else commit


def _without_secrets(value: Any) -> Any:
    if isinstance(value, dict):
        return {k: _without_secrets(v) for k, v in value.items() if not (_SECRET.search(str(k)) and v)}
    return [_without_secrets(item) for item in value] if isinstance(value, list | tuple) else value


def write_run_record(folder: Path, *, stage: str, options: dict[str, Any], **facts: Any) -> None:
    """Write `folder`/run.json: stage, time, commit, versions, resolved options (secrets left out) and `facts`."""
    write_record(Path(folder) / RUN_FILE, stage=stage, options=options, **facts)


def write_record(path: Path, *, stage: str, options: dict[str, Any], **facts: Any) -> None:
    """Write the same into a file of another name."""
    record = {
        "stage": stage,
        "created": time.strftime("%Y-%m-%dT%H:%M:%S%z"),
        "git_commit": git_commit(),
        "versions": package_versions(),
        "machine": {"platform": platform.platform(), "cpus": os.cpu_count()},
        "options": _without_secrets(options),
        **facts,
    }
    with atomic_file(path) as temporary:
        temporary.write_text(json.dumps(record, indent=2, ensure_ascii=False, default=str) + "\n", encoding="utf-8")


def read_run_record(folder: Path) -> dict[str, Any] | None:
    """Return the run.json of `folder`, or None if it does not exist. A checkpoint-N folder has that of its run.

    Raises:
        PokegemmaError: it is not a JSON object.
    """
    folder = Path(folder)
    path = folder / RUN_FILE
    if not path.is_file() and folder.name.startswith("checkpoint-"):
        path = folder.parent / RUN_FILE
    if not path.is_file():
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError) as error:
        raise PokegemmaError(f"{path} is damaged ({error}); delete it to go on without it") from error
    if not isinstance(record, dict):
        raise PokegemmaError(f"{path} is damaged (not a JSON object); delete it to go on without it")
    return record
