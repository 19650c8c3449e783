"""Serve a converted model on a Mac, as serve.py --engine mlx does, but configured by environment variables.

MODEL_PATH=outputs/mlx python scripts/mlx_inference_server.py

HOST and PORT are read, too (defaults: 127.0.0.1 and 8000). Flags override variables.
"""

import os
import shlex
from dataclasses import dataclass

from pokegemma.cli import parse_options, run
from pokegemma.errors import PokegemmaError, check_range
from pokegemma.options import option
from pokegemma.serving.engine_command_lines import ServerOptions, build_launch
from pokegemma.serving.supervisor import serve


@dataclass
class MlxServerOptions:
    model_path: str | None = option(None, "Folder of convert_to_mlx.py. Default: MODEL_PATH.")
    host: str | None = option(None, "Address to listen on. Default: HOST.")
    port: int | None = option(None, "Port to listen on. Default: PORT.")
    print_command: bool = option(False, "Print mlx-vlm's command line and start nothing.")
    ready_timeout_s: float = option(600.0, "Seconds in which the server must answer for the first time.")


def read_address(options: MlxServerOptions) -> tuple[str, int]:
    """Return host and port, from flags, variables or defaults, in this order."""
    name, port = "PORT", os.environ.get("PORT") or "8000"
    if options.port is not None:
        name, port = "--port", str(options.port)
    try:
        check_range(name, int(port), at_least=1, at_most=65535)
    except ValueError as error:
        raise PokegemmaError(f"{name} {port}: must be a number") from error
    return options.host or os.environ.get("HOST") or "127.0.0.1", int(port)


def main() -> None:
    (options,) = parse_options(MlxServerOptions, description=__doc__)
    model_path = options.model_path or os.environ.get("MODEL_PATH")
    if not model_path:
        raise PokegemmaError("MODEL_PATH is not set; set it to a folder that scripts/convert_to_mlx.py wrote")
    host, port = read_address(options)
    launch = build_launch("mlx", model_path, ServerOptions(host=host, port=port))
    if options.print_command:
        print(shlex.join(launch.command))
        return
    serve(launch, on_ready=lambda: print(launch.ready_line, flush=True), ready_timeout_s=options.ready_timeout_s)


if __name__ == "__main__":
    run(main)
