"""What every script shares: options from flags and YAML, logging to stderr, errors to exit codes."""

import argparse
import gc
import logging
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import yaml
from safetensors import SafetensorError
from tqdm import tqdm
from trl import TrlParser

from pokegemma.errors import PokegemmaError, describe_machine_error, one_line
from pokegemma.outputs import require_folder

# What a script imports lives as long as its process: to search it for garbage again and again takes a second or
# two. `run` puts the thresholds back.
_USUAL_THRESHOLDS = gc.get_threshold()
gc.set_threshold(100_000, 100, 100)

# Said on every start of a machine without a GPU, by libraries that only a GPU run uses; DeepSpeed says it on stdout.
logging.getLogger("bitsandbytes.backends.cpu.ops").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", category=FutureWarning, module="transformers|trl|peft|accelerate")
logging.getLogger("DeepSpeed").addFilter(lambda record: record.levelno >= logging.ERROR)


class _HelpFormatter(argparse.RawDescriptionHelpFormatter, argparse.ArgumentDefaultsHelpFormatter):
    """Keep the lines of a script's docstring, and show defaults."""


class _Parser(TrlParser):
    def error(self, message: str) -> NoReturn:
        raise PokegemmaError(f"{message} (see --help)")


def parse_options(*option_types: type, description: str, argv: Sequence[str] | None = None) -> tuple[Any, ...]:
    """Return one instance of each dataclass: its defaults, then `--config FILE` (YAML), then flags.

    Raises:
        PokegemmaError: an unknown option, a value of the wrong kind, a config file that cannot be read, or an
            `--output_dir` that is a file.
    """
    parser = _Parser(option_types, description=description, formatter_class=_HelpFormatter)
    arguments = []
    for argument in sys.argv[1:] if argv is None else argv:
        # TrlParser reads "--config f" only; everybody also types "--config=f".
        arguments += argument.split("=", 1) if argument.startswith("--config=") else [argument]
    if arguments[-1:] == ["--config"]:
        raise PokegemmaError("--config needs the path of a YAML file")
    try:
        options = parser.parse_args_and_config(arguments)
    except (ValueError, TypeError, OSError, yaml.YAMLError) as error:
        message = one_line(error, length=None)
        message = message.replace("Some specified arguments are not used by the HfArgumentParser:", "unknown options:")
        raise PokegemmaError(f"{message} (see --help)") from error
    values = {name: value for part in options for name, value in vars(part).items()}
    for action in parser._actions:
        # argparse checks the choices of flags, not of defaults that came from the YAML file.
        value = values.get(action.dest)
        for single in value if isinstance(value, list) else [value]:
            if action.choices and single is not None and single not in action.choices:
                choices = ", ".join(map(str, action.choices))
                raise PokegemmaError(f"--{action.dest}: {single!r} is not one of {choices}")
    if values.get("output_dir"):
        require_folder(Path(values["output_dir"]))
    return options


@dataclass(frozen=True)
class Command:
    """One of a script's commands: the class of its options, its function, and options that may be given by place."""

    options: type
    action: Callable[..., Any]
    positional: tuple[str, ...] = ()


def parse_command(
    commands: Mapping[str, Command], *, description: str, argv: Sequence[str] | None = None
) -> tuple[str, Any]:
    """Return the command that the first word names, and its options; words before the first flag go to `positional`.

    Raises:
        PokegemmaError: no such command, one word too many, or what `parse_options` refuses.
    """
    first, *words = (sys.argv[1:] if argv is None else argv) or [""]
    if first in ("-h", "--help"):
        parsers = [
            _Parser([command.options], prog=" ".join((name, *map(str.upper, command.positional))))
            for name, command in commands.items()
        ]
        print(description, *(parser.format_usage().removeprefix("usage: ") for parser in parsers), sep="\n")
        sys.exit(0)
    if first not in commands:
        raise PokegemmaError(f"{first or 'no command'}: take one of {', '.join(commands)} (see --help)")
    command, arguments = commands[first], []
    for name in command.positional:
        if words and not words[0].startswith("-"):
            arguments += [f"--{name}", words.pop(0)]
    if words and not words[0].startswith("-"):
        raise PokegemmaError(f"{first}: unexpected {words[0]!r} (see --help)")
    (options,) = parse_options(command.options, description=description, argv=[*arguments, *words])
    return first, options


def run(main: Callable[[], int | None]) -> NoReturn:
    """Run `main` as a script: its return value, or its error's `exit_code`, becomes the exit status."""
    gc.freeze()  # neither later collections nor the one at the end look at what has been imported
    gc.set_threshold(*_USUAL_THRESHOLDS)
    level = logging.INFO if os.environ.get("RANK", "0") == "0" else logging.WARNING
    logging.basicConfig(level=level, stream=sys.stderr, format="%(message)s")
    for chatty in ("httpx", "httpx2", "httpcore", "httpcore2", "filelock", "matplotlib", "PIL", "mlflow", "alembic"):
        logging.getLogger(chatty).setLevel(logging.WARNING)
    # SIGTERM unwinds like an error, so that no half-written folder stays behind; training has a handler of its own.
    signal.signal(signal.SIGTERM, lambda number, frame: sys.exit(128 + number))
    try:
        status = main() or 0
        sys.stdout.flush()
    except PokegemmaError as error:
        _print_error(str(error))
        status = error.exit_code
    except BrokenPipeError:  # `script | head` closed our stdout: nothing left to flush, and nobody knows the result
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + signal.SIGPIPE
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        status = 130
    except (OSError, RuntimeError, MemoryError, SafetensorError) as error:
        line = describe_machine_error(error)
        if line is None:  # a bug
            raise
        _print_error(line)
        status = PokegemmaError.exit_code
    sys.exit(status)


def _print_error(message: str) -> None:
    for bar in list(getattr(tqdm, "_instances", ())):
        bar.close()  # ends its line: the error has one of its own
    print(f"error: {message}", file=sys.stderr)
