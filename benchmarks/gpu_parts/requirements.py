"""Check that this Python has what on_gpu.py needs, before anything of it is imported; print one line if it has not."""

import sys
import tomllib
from importlib import util
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[2] / "pyproject.toml"

NOT_NEEDED = {"bitsandbytes", "deepspeed", "httpx2", "python-dotenv", "scikit-learn", "tensorboard", "wandb"}
"""Without bitsandbytes no row of QLoRA is measured, without deepspeed none of ZeRO-3; the others are not imported."""


def find_problems() -> list[str]:
    """Return which packages are missing or outside the range of pyproject.toml."""
    if missing := [name for name in ("packaging", "psutil") if util.find_spec(name) is None]:
        return [f"{name} is not installed" for name in missing]
    from packaging.requirements import Requirement

    from pokegemma.environment import unmet_requirements

    lines = tomllib.loads(PYPROJECT.read_text(encoding="utf-8"))["project"]["dependencies"]
    return unmet_requirements(line for line in lines if Requirement(line).name not in NOT_NEEDED)


if __name__ == "__main__":
    if problems := find_problems():
        sys.exit(f"error: {'; '.join(problems)}: install that, or carry it as wheels (--wheels FOLDER)")
