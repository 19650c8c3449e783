"""Run a command with the settings of .env in its environment: `python -m pokegemma.settings COMMAND...`.

Tokens reach the command by its environment alone: they are never printed, nor arguments that `ps` would show.
"""

import io
import os
import sys
from collections.abc import Mapping
from pathlib import Path

from dotenv import dotenv_values
from dotenv.parser import parse_stream

from pokegemma.errors import PokegemmaError


def read_settings(path: Path, environ: Mapping[str, str]) -> dict[str, str]:
    """Return `environ` with what `path` adds to it, and HF_TOKEN from HUGGINGFACE_TOKEN.

    A variable that `environ` has wins, also when it is empty; an empty value in `path` counts as not set.

    Raises:
        PokegemmaError: a line that is not NAME=value. The message gives the line's number and none of its text.
    """
    text = path.read_text(encoding="utf-8-sig") if path.is_file() else ""
    for binding in parse_stream(io.StringIO(text)):
        if binding.error or (binding.key is not None and binding.value is None):
            blank_lines = binding.original.string[: -len(binding.original.string.lstrip())].count("\n")
            raise PokegemmaError(f"{path}:{binding.original.line + blank_lines}: not a setting; write NAME=value")
    settings = {name: value for name, value in dotenv_values(stream=io.StringIO(text)).items() if value}
    merged = {**settings, **environ}
    for source in (environ, merged):
        # Hugging Face's libraries read HF_TOKEN. Whichever of the two names the environment has wins over .env.
        if source.get("HF_TOKEN"):
            break
        if source.get("HUGGINGFACE_TOKEN"):
            merged["HF_TOKEN"] = source["HUGGINGFACE_TOKEN"]
            break
    return merged


def main() -> None:
    try:
        environ = read_settings(Path(".env"), os.environ)
    except PokegemmaError as error:
        sys.stderr.write(f"error: {error}\n")
        sys.exit(error.exit_code)
    os.execvpe(sys.argv[1], sys.argv[1:], environ)


if __name__ == "__main__":
    main()
