"""What the cells of the tutorials work with: a folder for their files, and the project's scripts."""

import atexit
import logging
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
import warnings
from pathlib import Path

from pokegemma.provenance import PROJECT_ROOT

# Remarks about the machine, which libraries make in a notebook too.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)
warnings.filterwarnings("ignore", message="IProgress not found")
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|peft|accelerate")


def enter_work_folder() -> None:
    """Make a temporary folder the current one, which is removed when the notebook's kernel ends.

    From then on neither cells nor scripts show progress bars, which would be stored in the notebook.
    """
    folder = Path(tempfile.mkdtemp(prefix="pokegemma-tutorial-")).resolve()
    atexit.register(shutil.rmtree, folder, ignore_errors=True)
    os.chdir(folder)
    os.environ["TQDM_DISABLE"] = "1"  # tqdm reads it when it is imported, which the first cell has not done yet


class Printed(str):
    """What a script printed. A notebook does not show it again where it is the value of a cell."""

    def _ipython_display_(self) -> None:
        pass


def run(command: str, *arguments: object, status: int = 0, **variables: object) -> Printed:
    """Run a script of the project, print what it prints, and return its stdout.

    Logs and progress bars, which scripts write to stderr, are printed only if the exit status is not 0.

    Args:
        command: path in the project, such as "scripts/evaluate.py" or "train_gemma3.sh", and options, as in a shell.
        arguments: more options.
        status: exit status that the script must have: 1 where a check is to fail, 2 where an option is refused.
        variables: environment variables of the script, such as MAX_STEPS=20.

    Raises:
        RuntimeError: it has another exit status.

    Example:
        >>> run("scripts/make_tiny_model.py --output_dir tiny")
    """
    script, *options = shlex.split(command)
    program = [] if script.endswith(".sh") else [sys.executable]
    settings = {"MPLBACKEND": "Agg", "PYTHONUNBUFFERED": "1", **{name: str(value) for name, value in variables.items()}}
    with (
        tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace", newline="") as errors,
        subprocess.Popen(
            [*program, PROJECT_ROOT / script, *options, *map(str, arguments)],
            env=os.environ | settings,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        ) as process,
    ):
        lines = []
        for line in process.stdout:
            print(line, end="", flush=True)
            lines.append(line)
        process.wait()
        if process.returncode:
            errors.seek(0)
            print(re.sub(r"[^\n]*\r", "", errors.read()), end="")  # without the states of progress bars
    if process.returncode != status:
        raise RuntimeError(f"{script} ended with exit status {process.returncode}, not {status}")
    return Printed("".join(lines))
