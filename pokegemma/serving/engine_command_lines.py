"""The command lines of the engines' own OpenAI-compatible servers.

Each server is started with the flags that make its greedy answer that of the model.
"""

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import is_hub_id
from pokegemma.serving.model_folders import (
    ModelFacts,
    adds_bos,
    check_model,
    find_gguf,
    read_facts,
)

logger = logging.getLogger(__name__)

EngineName = Literal["transformers", "vllm", "llama.cpp", "mlx"]

PICTURE_BATCH = 1024
"""Fewest tokens in a batch of llama.cpp. A whole picture must fit, since attention is bidirectional inside it."""

_TEXT_BATCH = 512
"""Tokens in a batch without pictures: llama.cpp reserves the logits of all of them, 1 MiB for each of a Gemma."""

_LLAMA_CPP_VARIABLES = ("HOST", "PORT", "CONFIG_FILE")
"""Variables that override the flags of llama-cpp-python's server: HOST=0.0.0.0 would open it to the network."""


@dataclass(frozen=True)
class ServerOptions:
    """Options of a server.

    `context_tokens`: the longest prompt and answer together; None: enough for the layout that the model was trained
    with. `log_probabilities`: for how many of the likeliest tokens the server can return them; 0: for none.
    `engine_flags` are appended to the engine's command line.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    context_tokens: int | None = None
    log_probabilities: int = 0
    llama_server: str | None = None
    engine_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A server to start.

    `model` is its name in requests. The server is ready when it answers `ready_path`. `missing` is a line about what
    has to be installed first, or None.
    """

    engine: EngineName
    command: tuple[str, ...]
    model: str
    host: str
    port: int
    ready_path: str
    missing: str | None = None

    @property
    def url(self) -> str:
        """Return the URL by which this machine reaches it, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def ready_line(self) -> str:
        """Return the line to print when it is ready."""
        return f"ready: {self.url} ({self.engine}, model {self.model}); stop with Ctrl-C"


def build_launch(engine: EngineName, model_path: str, options: ServerOptions) -> Launch:
    """Return how to start `engine`'s server for a model.

    Raises:
        PokegemmaError: the model is not one for this engine.
    """
    command, model, ready_path, missing = _BUILDERS[engine](model_path, options)
    command = (*command, *options.engine_flags)
    return Launch(engine, command, model, options.host, options.port, ready_path, missing=missing)


_Parts = tuple[Sequence[str], str, str, str | None]
"""Command, name of the model, path of Launch.ready_path, and what is missing."""


def _words(flags: Mapping[str, object]) -> list[str]:
    """Return flags with their values as words of a command line; a flag with the value None stands alone."""
    return [str(word) for flag, value in flags.items() for word in (flag, value) if word is not None]


def _missing(extra: str, *modules: str) -> str | None:
    missing = [name for name in modules if importlib.util.find_spec(name) is None]
    if not missing:
        return None
    return f"{', '.join(missing)} is not installed here; ./init.sh --with {extra} installs it"


def _warn_of_causal(facts: ModelFacts, model_path: str, server: str) -> None:
    if facts.image_attention == "causal":
        logger.warning(
            "%s was trained with causal attention inside pictures, but %s uses bidirectional attention there: its "
            "answers differ from those measured; --engine mlx attends as in training",
            model_path,
            server,
        )


def _transformers(model_path: str, options: ServerOptions) -> _Parts:
    check_model(model_path, "transformers")
    if "@" in model_path:  # transformers serve reads NAME@REVISION
        raise PokegemmaError(f"--model_path {model_path}: transformers serve takes no path with an @; rename it")
    if options.log_probabilities:
        raise PokegemmaError("--log_probabilities: transformers serve returns none; choose another engine")
    _warn_of_causal(read_facts(model_path), model_path, "transformers serve")
    # The variable: no request to PyPI for a newer version on every start.
    command = ["env", "HF_HUB_DISABLE_UPDATE_CHECK=1", sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += [model_path, *_words({"--host": options.host, "--port": options.port})]
    command += _words({"--device": options.device, "--dtype": options.dtype})
    # Not /v1/models: that lists the cache of the Hub, and fails where there is none.
    return command, model_path, "/health", _missing("serve", "fastapi", "uvicorn", "openai")


def _vllm(model_path: str, options: ServerOptions) -> _Parts:
    check_model(model_path, "vllm")
    facts = read_facts(model_path)
    _warn_of_causal(facts, model_path, "vLLM")
    program = shutil.which("vllm")
    pictures = {
        "--limit-mm-per-prompt": json.dumps({"image": facts.pictures_in_prompt}),
        # Attention is bidirectional inside a picture, so a chunk must not end inside one.
        "--disable-chunked-mm-input": None,
    }
    flags = {
        "--host": options.host,
        "--port": options.port,
        "--served-model-name": model_path,
        # vLLM would convert float32 weights to float16, which overflows in Gemma 3.
        "--dtype": "bfloat16" if options.dtype == "auto" else options.dtype,
        "--max-model-len": options.context_tokens or facts.context_tokens,
        **(pictures if facts.pictures_in_prompt else {}),
        # Not the sampling of generation_config.json: a request contains its own.
        "--generation-config": "vllm",
        # Rules and goal are the same in every prompt of a session, and come first.
        "--enable-prefix-caching": None,
    }
    if facts.model_type == "gemma3":
        flags["--mm-processor-kwargs"] = json.dumps({"do_pan_and_scan": False})
    if options.log_probabilities:
        flags["--max-logprobs"] = options.log_probabilities
    missing = (
        "vllm is not installed here; it runs on machines with a GPU and needs an environment of its own "
        "(pip install vllm); --print_command prints the command to run there"
    )
    command = [program or "vllm", "serve", model_path, *_words(flags)]
    return command, model_path, "/v1/models", None if program else missing


def _tokens(facts: ModelFacts, options: ServerOptions) -> tuple[int, int]:
    """Return llama.cpp's context and batch in tokens."""
    batch = max(PICTURE_BATCH, facts.image_tokens) if facts.pictures_in_prompt else _TEXT_BATCH
    return options.context_tokens or facts.context_tokens, batch


def llama_server_command(
    model: Path, mmproj: Path | None, facts: ModelFacts, options: ServerOptions, *, program: str = "llama-server"
) -> tuple[str, ...]:
    """Return the command line of llama.cpp's own server; requests name the model as `model` is written."""
    context, batch = _tokens(facts, options)
    flags = {
        "--model": model,
        **({} if mmproj is None else {"--mmproj": mmproj}),
        "--alias": model,
        "--host": options.host,
        "--port": options.port,
        "--ctx-size": context,
        "--parallel": 1,  # the context is shared by slots
        "--batch-size": batch,
        "--ubatch-size": batch,
        "--jinja": None,
        "--temp": 0,
        "--offline": None,
    }
    return (program, *_words(flags))


def _llama_cpp(model_path: str, options: ServerOptions) -> _Parts:
    model, mmproj = find_gguf(model_path, options.quantization)
    facts = read_facts(str(model.parent))
    _warn_of_causal(facts, model_path, "llama.cpp")
    if options.llama_server and shutil.which(options.llama_server) is None:
        raise PokegemmaError(f"--llama_server {options.llama_server}: no such program")
    program = options.llama_server or shutil.which("llama-server")
    if program is not None:
        command = llama_server_command(model, mmproj, facts, options, program=program)
        return command, str(model), "/health", None
    context, batch = _tokens(facts, options)
    flags = {
        "--model": model,
        # The chat template of the GGUF, with pictures; without them it is what the server takes by itself.
        **({} if mmproj is None else {"--clip_model_path": mmproj, "--chat_format": "mtmd"}),
        "--model_alias": model,
        "--host": options.host,
        "--port": options.port,
        "--n_ctx": context,
        "--n_batch": batch,
        "--n_ubatch": batch,
        "--n_gpu_layers": -1,
        # The tokens over which repetition is penalised, which it does unless a request forbids it. JSON repeats quotes.
        "--last_n_tokens_size": 0,
        # Needed for log-probabilities; logits of every token of the prompt are then computed and kept.
        "--logits_all": str(bool(options.log_probabilities)).lower(),
        "--verbose": "false",
    }
    unset = [word for variable in _LLAMA_CPP_VARIABLES for word in ("-u", variable)]
    command = ["env", *unset, sys.executable, "-m", "llama_cpp.server", *_words(flags)]
    return command, str(model), "/v1/models", _missing("gguf", "llama_cpp", "uvicorn", "fastapi")


def _mlx(model_path: str, options: ServerOptions) -> _Parts:
    check_model(model_path, "mlx")
    if read_facts(model_path).image_attention == "bidirectional":
        logger.warning(
            "%s was trained with bidirectional attention inside pictures, but mlx-vlm uses causal attention there: its "
            "answers may differ from those measured; scripts/check_parity.py measures by how much",
            model_path,
        )
    if adds_bos(model_path):
        logger.warning(
            "%s: its tokenizer adds a BOS, so prompts of mlx-vlm's server would begin with two; convert the model "
            "again with scripts/convert_to_mlx.py",
            model_path,
        )
    # A request that names another model makes it replace this one by a download. Offline, such a request fails.
    offline = [] if is_hub_id(model_path) else ["HF_HUB_OFFLINE=1"]
    flags = {
        "--model": model_path,
        "--host": options.host,
        "--port": options.port,
        "--top-logprobs-k": options.log_probabilities,
    }
    command = ["env", *offline, sys.executable, "-m", "mlx_vlm", "server", *_words(flags)]
    return command, model_path, "/v1/models", _missing("mlx", "mlx_vlm", "mlx")


_BUILDERS: dict[EngineName, Callable[[str, ServerOptions], _Parts]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "mlx": _mlx,
}
