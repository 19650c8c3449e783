"""Run a command with the settings of .env in its environment: `python -m pokegemma.settings COMMAND...`.

Tokens reach the command only through its environment. They are not printed, and are not arguments, which `ps` shows.
"""

import io
import os
import re
import sys
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file

_VALUE_AND_REST = re.compile(
    r"""=(?:\s*(?:'(?:\\'|[^'])*'|"(?:\\"|[^"])*")(?:#[^\r\n]*)?|.*?)((?:[^\S\n]+#.*)?\s*)\Z"""
)
"""The value of a setting, quoted or not, and its comment and line ending."""


def read_settings(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with the settings that `path` adds to it, and HF_TOKEN from HUGGINGFACE_TOKEN.

    A variable of `environ` overrides `path`, even if it is empty; an empty value in `path` counts as not set.

    Raises:
        PokegemmaError: a line is not NAME=value. The message contains the line's number, and none of its text.
    """
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            blank_lines = binding.original.string[: -len(binding.original.string.lstrip())].count("\n")
            raise PokegemmaError(f"{path}:{binding.original.line + blank_lines}: not a setting; write NAME=value")
    settings = {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value}
    merged = {**settings, **environ}
    for source in (environ, merged):
        # Hugging Face's libraries read HF_TOKEN. Either name in the environment overrides both in .env.
        if source.get("HF_TOKEN"):
            break
        if source.get("HUGGINGFACE_TOKEN"):
            merged["HF_TOKEN"] = source["HUGGINGFACE_TOKEN"]
            break
    return merged


def read_api_key(flag: str, variable: str | None) -> str | None:
    """Return a server's API key from the environment variable that the option `flag` names; None without the option.

    The key itself is not an option, since `ps` shows options.

    Raises:
        PokegemmaError: the variable is not set, or empty.
    """
    if variable is None:
        return None
    if not os.environ.get(variable):
        raise PokegemmaError(f"{flag} {variable}: this variable is not set")
    return os.environ[variable]


def check_settings(path: Path) -> None:
    """Refuse a file of settings that cannot be read or replaced.

    Raises:
        PokegemmaError: a line of it is not NAME=value, or its folder is missing or not writable.
    """
    try:
        read_settings(path, {})
    except (OSError, UnicodeDecodeError) as error:
        raise PokegemmaError(f"{path} cannot be read: {error}") from error
    if path.is_dir() or not os.access(path.resolve().parent, os.W_OK):
        raise PokegemmaError(f"{path} cannot be written")


def write_settings(path: Path, values: Mapping[str, str]) -> None:
    """Set `values` in the file: in the lines that have them, else in new ones at its end. All other bytes stay.

    python-dotenv's `set_key` would also remove blank lines before a setting, its comment, `export` and "\\r".

    Raises:
        PokegemmaError: a line of it is not NAME=value, or it cannot be written.
    """
    check_settings(path)
    path = path.resolve()  # a link stays a link
    try:
        text = path.read_bytes().decode() if path.is_file() else ""
        pieces, missing = ["\ufeff"] if text.startswith("\ufeff") else [], dict(values)
        for binding in parse_stream(io.StringIO(text, newline="")):
            line = binding.original.string
            if binding.key in values:
                line = f"{line[: line.index('=')]}={values[binding.key]}{_VALUE_AND_REST.search(line)[1]}"
                missing.pop(binding.key, None)
            pieces.append(line)
        end = "\r\n" if "\r\n" in text else "\n"
        if missing and text and not text.endswith(("\n", "\r")):
            pieces.append(end)
        pieces += [f"{name}={value}{end}" for name, value in missing.items()]
        with atomic_file(path) as temporary:
            temporary.touch(mode=0o600)  # it contains tokens
            temporary.write_bytes("".join(pieces).encode())
            if path.is_file():
                temporary.chmod(path.stat().st_mode)
    except OSError as error:
        raise PokegemmaError(f"{path} could not be written: {error.strerror}") from error


def run_command() -> None:
    """Replace this process by the command in sys.argv, with the settings of .env in its environment."""
    try:
        environ = read_settings(Path(".env"), os.environ)
    except PokegemmaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    os.execvpe(sys.argv[1], sys.argv[1:], environ)


if __name__ == "__main__":
    run_command()
