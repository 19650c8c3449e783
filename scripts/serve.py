"""Serve a model over HTTP with an engine's own OpenAI-compatible server.

python scripts/serve.py --engine llama.cpp --model_path outputs/gguf --quantization q8_0

Prints a line when the server is ready, and runs until Ctrl-C. The engine's own messages go to stderr.
"""

import shlex
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.options import option
from pokegemma.serving.engine_command_lines import EngineName, Launch, ServerOptions, build_launch
from pokegemma.serving.supervisor import serve


@dataclass
class ServeOptions:
    engine: EngineName = option(..., "Engine whose server to start.")
    model_path: str = option(
        ...,
        "transformers, vllm: checkpoint folder or Hugging Face id. llama.cpp: a .gguf file next to its "
        "mmproj, or the folder of convert_to_gguf.py. mlx: the folder of convert_to_mlx.py.",
    )
    host: str = option("127.0.0.1", "Address to listen on. 0.0.0.0 accepts connections from the network.")
    port: int = option(8000, "Port to listen on.")
    print_command: bool = option(False, "Print the engine's command line and start nothing.")
    quantization: str | None = option(
        None, "Type of the GGUF file to take from a folder, such as f16 or q8_0. Default: the only one."
    )
    device: str = option("auto", "Device for transformers: auto, cuda:0, mps or cpu.")
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "Type of the weights, for transformers (auto: as they are stored) and vllm (auto: bfloat16)."
    )
    context_tokens: int | None = option(
        None, "Longest prompt with its answer in tokens, for llama.cpp and vllm. Default: enough for the layout."
    )
    log_probabilities: int = option(
        0, "Number of likeliest tokens for which the server can return log-probabilities. 0: none."
    )
    llama_server: str | None = option(
        None, "Path of llama.cpp's llama-server. Default: the one on PATH, else llama-cpp-python's server."
    )
    engine_flags: str = option("", "Further flags for the engine, such as --engine_flags='--tensor-parallel-size 2'.")
    ready_timeout_s: float = option(600.0, "Seconds in which the server must answer for the first time.")
    log_file: str | None = option(None, "Append the engine's messages to this file.")

    def __post_init__(self) -> None:
        check_ranges(self, "port", at_least=1, at_most=65535)
        check_ranges(self, "context_tokens", at_least=1)
        check_ranges(self, "log_probabilities", at_least=0, at_most=20)


def launch_from(options: ServeOptions) -> Launch:
    """Return how to start the server."""
    try:
        flags = tuple(shlex.split(options.engine_flags))
    except ValueError as error:
        raise PokegemmaError(f"--engine_flags {options.engine_flags}: {error}") from error
    names = ServerOptions.__dataclass_fields__.keys() - {"engine_flags"}
    server = ServerOptions(**{name: getattr(options, name) for name in names}, engine_flags=flags)
    return build_launch(options.engine, options.model_path, server)


def main() -> None:
    (options,) = parse_options(ServeOptions, description=__doc__)
    launch = launch_from(options)
    if options.print_command:
        print(shlex.join(launch.command))
        return
    serve(
        launch,
        on_ready=lambda: print(launch.ready_line, flush=True),
        ready_timeout_s=options.ready_timeout_s,
        log_file=Path(options.log_file) if options.log_file else None,
    )


if __name__ == "__main__":
    run(main)
