"""Serve a converted model on a Mac: serve.py --engine mlx, set up by environment variables.

MODEL_PATH=outputs/mlx python scripts/mlx_inference_server.py

HOST and PORT are read too (else 127.0.0.1 and 8000); flags win over variables.
"""

import os
import shlex
from dataclasses import dataclass, field

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError
from pokegemma.serving.commands import ServerOptions, build_launch
from pokegemma.serving.supervisor import serve


@dataclass
class MlxServerOptions:
    model_path: str | None = field(default=None, metadata={"help": "Folder of convert_to_mlx.py; else MODEL_PATH."})
    host: str | None = field(default=None, metadata={"help": "Address to listen on; else HOST."})
    port: int | None = field(default=None, metadata={"help": "Port to listen on; else PORT."})
    print_command: bool = field(default=False, metadata={"help": "Print mlx-vlm's command line, start nothing."})
    ready_timeout_s: float = field(default=600.0, metadata={"help": "Give up when it does not answer by then."})


def read_address(options: MlxServerOptions) -> tuple[str, int]:
    """Return host and port: flags, then variables, then defaults."""
    port = options.port if options.port is not None else os.environ.get("PORT") or 8000
    if not str(port).isdecimal() or not 1 <= int(port) <= 65535:
        raise PokegemmaError(f"PORT: {port} is not between 1 and 65535")
    return options.host or os.environ.get("HOST") or "127.0.0.1", int(port)


def main() -> None:
    (options,) = parse_options(MlxServerOptions, description=__doc__)
    model_path = options.model_path or os.environ.get("MODEL_PATH")
    if not model_path:
        raise PokegemmaError("MODEL_PATH is not set: name a folder that scripts/convert_to_mlx.py wrote")
    host, port = read_address(options)
    launch = build_launch("mlx", model_path, ServerOptions(host=host, port=port))
    if options.print_command:
        print(shlex.join(launch.command))
        return
    serve(launch, on_ready=lambda: print(launch.ready_line, flush=True), ready_timeout_s=options.ready_timeout_s)


if __name__ == "__main__":
    run(main)
