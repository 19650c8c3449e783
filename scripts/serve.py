"""Serve a model over HTTP with an engine's own OpenAI-compatible server.

python scripts/serve.py --engine llama.cpp --model_path outputs/gguf --quantization q8_0

Prints a line when the server is ready, and runs until Ctrl-C. The engine's own messages go to stderr.
"""

import shlex
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.serving.engine_command_lines import EngineName, Launch, ServerOptions, build_launch
from pokegemma.serving.supervisor import serve


@dataclass
class ServeOptions:
    engine: EngineName = field(metadata={"help": "Engine whose server to start."})
    model_path: str = field(
        metadata={
            "help": "transformers, vllm: checkpoint folder or Hugging Face id; llama.cpp: a .gguf file next to its "
            "mmproj, or the folder of convert_to_gguf.py; mlx: the folder of convert_to_mlx.py."
        }
    )
    host: str = field(default="127.0.0.1", metadata={"help": "Address to listen on; 0.0.0.0 lets the network in."})
    port: int = field(default=8000, metadata={"help": "Port to listen on."})
    print_command: bool = field(default=False, metadata={"help": "Print the engine's command line and start nothing."})
    quantization: str | None = field(
        default=None, metadata={"help": "Which of a folder's GGUF files: f16, q8_0 ...; default: the only one."}
    )
    device: str = field(default="auto", metadata={"help": "For transformers: auto, cuda:0, mps, cpu ..."})
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto",
        metadata={"help": "For transformers (auto: as the weights are stored) and vllm (auto: bfloat16)."},
    )
    context_tokens: int | None = field(
        default=None,
        metadata={"help": "For llama.cpp and vllm: longest prompt with answer; default: enough for the layout."},
    )
    log_probabilities: int = field(
        default=0, metadata={"help": "For how many likeliest tokens the server can return log-probabilities; 0: none."}
    )
    llama_server: str | None = field(
        default=None,
        metadata={"help": "llama.cpp's llama-server; default: the one on PATH, else llama-cpp-python's server."},
    )
    engine_flags: str = field(
        default="", metadata={"help": "Further flags for the engine: --engine_flags='--tensor-parallel-size 2'."}
    )
    ready_timeout_s: float = field(default=600.0, metadata={"help": "Fail when it does not answer by then."})
    log_file: str | None = field(default=None, metadata={"help": "Append the engine's messages to this file."})

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
