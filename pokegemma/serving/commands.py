"""The command lines of the engines' own OpenAI-compatible servers, for this kind of model.

None of them is ours: an engine's server is started with the flags that make its greedy answer the model's own.
"""

import importlib.util
import json
import logging
import shutil
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pokegemma.errors import PokegemmaError
from pokegemma.serving.model_folders import (
    ModelFacts,
    adds_bos,
    check_checkpoint,
    check_mlx_folder,
    find_gguf,
    is_hub_id,
    read_facts,
)

logger = logging.getLogger(__name__)

EngineName = Literal["transformers", "vllm", "llama.cpp", "mlx"]

PICTURE_BATCH = 1024
"""Fewest tokens that llama.cpp processes at once. A whole picture must fit: attention goes both ways inside it."""

_LLAMA_CPP_VARIABLES = ("HOST", "PORT", "CONFIG_FILE")
"""Environment variables that llama-cpp-python's server puts above its flags: HOST=0.0.0.0 would open it to all."""


@dataclass(frozen=True)
class ServerOptions:
    """What can be chosen about a server.

    `context_tokens`: longest prompt and answer together; None: what the layout that the model was trained with
    needs. `log_probabilities`: of how many of the likeliest tokens the server can tell them; 0: of none.
    `engine_flags` are appended to the engine's command line.
    """

    host: str = "127.0.0.1"
    port: int = 8000
    device: str = "auto"
    dtype: str = "auto"
    quantization: str | None = None
    context_tokens: int | None = None
    log_probabilities: int = 0
    llama_server: Path | None = None
    engine_flags: tuple[str, ...] = ()


@dataclass(frozen=True)
class Launch:
    """A server to start.

    `model` is the name that requests give. The server is ready when it answers `ready_path`; `missing` tells in a
    line what has to be installed first, and is None where everything is.
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
        """Return where this machine reaches it, without a path."""
        host = {"0.0.0.0": "127.0.0.1", "::": "::1"}.get(self.host, self.host)
        return f"http://{f'[{host}]' if ':' in host else host}:{self.port}"

    @property
    def ready_line(self) -> str:
        """Return what to tell the user when it is ready."""
        return f"ready: {self.url} ({self.engine}, model {self.model}); stop with Ctrl-C"


def build_launch(engine: EngineName, model_path: str, options: ServerOptions) -> Launch:
    """Return how to start `engine`'s server for a model.

    Raises:
        PokegemmaError: the model is none for this engine.
    """
    command, model, ready_path, missing = _BUILDERS[engine](model_path, options)
    return Launch(
        engine, (*command, *options.engine_flags), model, options.host, options.port, ready_path, missing=missing
    )


_Parts = tuple[tuple[str, ...], str, str, str | None]
"""Command, name of the model, path that tells that the server is ready, what is missing."""


def _missing(extra: str, *modules: str) -> str | None:
    lacking = [name for name in modules if importlib.util.find_spec(name) is None]
    if not lacking:
        return None
    return f"{', '.join(lacking)} is not installed here; ./init.sh --with {extra} installs it"


def _warn_of_causal(facts: ModelFacts, model_path: str, server: str) -> None:
    if facts.image_attention == "causal":
        logger.warning(
            "%s was trained with causal attention inside pictures; %s attends both ways there, so its answers differ "
            "from those measured: --engine mlx is right for this model",
            model_path,
            server,
        )


def _transformers(model_path: str, options: ServerOptions) -> _Parts:
    check_checkpoint(model_path, "transformers")
    facts = read_facts(model_path)
    if "@" in model_path:  # transformers serve reads NAME@REVISION
        raise PokegemmaError(
            f"--model_path {model_path}: transformers serve takes no path with an @; rename the folder"
        )
    _warn_of_causal(facts, model_path, "transformers serve")
    if options.log_probabilities:
        raise PokegemmaError("--log_probabilities: transformers serve tells none; take another engine")
    command = (
        # The first: no look at PyPI for a newer version on every start.
        "env",
        "HF_HUB_DISABLE_UPDATE_CHECK=1",
        sys.executable,
        "-m",
        "transformers.cli.transformers",
        "serve",
        model_path,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--device",
        options.device,
        "--dtype",
        options.dtype,
    )
    # Not /v1/models: that lists the cache of the Hub, and fails where there is none.
    return command, model_path, "/health", _missing("serve", "fastapi", "uvicorn", "openai")


def _vllm(model_path: str, options: ServerOptions) -> _Parts:
    check_checkpoint(model_path, "vllm")
    facts = read_facts(model_path)
    _warn_of_causal(facts, model_path, "vLLM")
    per_prompt = json.dumps({"image": facts.pictures_in_prompt})
    command = [
        shutil.which("vllm") or "vllm",
        "serve",
        model_path,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--served-model-name",
        model_path,
        # float16, which vLLM would make of float32 weights, overflows in Gemma 3.
        "--dtype",
        "bfloat16" if options.dtype == "auto" else options.dtype,
        "--max-model-len",
        str(options.context_tokens or facts.context_tokens),
        "--limit-mm-per-prompt",
        per_prompt,
        # Not the sampling that generation_config.json may hold: a request says how it wants its answer.
        "--generation-config",
        "vllm",
        # Attention goes both ways inside a picture: no cut through one.
        "--disable-chunked-mm-input",
        # Rules and goal are the same in every prompt of a session, and come first.
        "--enable-prefix-caching",
    ]
    if facts.model_type == "gemma3":
        command += ["--mm-processor-kwargs", json.dumps({"do_pan_and_scan": False})]
    if options.log_probabilities:
        command += ["--max-logprobs", str(options.log_probabilities)]
    missing = None
    if shutil.which("vllm") is None:
        missing = (
            "vllm is not installed here; it runs on machines with a GPU and wants an environment of its own "
            "(pip install vllm); --print_command shows what to run there"
        )
    return tuple(command), model_path, "/v1/models", missing


def llama_server_command(
    model: Path, mmproj: Path, facts: ModelFacts, options: ServerOptions, *, program: str = "llama-server"
) -> tuple[str, ...]:
    """Return the command line of llama.cpp's own server; requests name the model as `model` is written."""
    name, batch = str(model), str(max(PICTURE_BATCH, facts.image_tokens))
    return (
        program,
        "--model",
        name,
        "--mmproj",
        str(mmproj),
        "--alias",
        name,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--ctx-size",
        str(options.context_tokens or facts.context_tokens),
        "--parallel",
        "1",  # the context is shared by slots
        "--batch-size",
        batch,
        "--ubatch-size",
        batch,
        "--jinja",
        "--temp",
        "0",
        "--offline",
    )


def _llama_cpp(model_path: str, options: ServerOptions) -> _Parts:
    model, mmproj = find_gguf(model_path, options.quantization)
    facts = read_facts(str(model.parent))
    _warn_of_causal(facts, model_path, "llama.cpp")
    name = str(model)
    program = options.llama_server or shutil.which("llama-server")
    if options.llama_server is not None and shutil.which(options.llama_server) is None:
        raise PokegemmaError(f"--llama_server {options.llama_server}: no such program")
    if program is not None:
        return llama_server_command(model, mmproj, facts, options, program=str(program)), name, "/health", None
    tokens, batch = str(options.context_tokens or facts.context_tokens), str(max(PICTURE_BATCH, facts.image_tokens))
    command = (
        "env",
        *(word for variable in _LLAMA_CPP_VARIABLES for word in ("-u", variable)),
        sys.executable,
        "-m",
        "llama_cpp.server",
        "--model",
        name,
        "--clip_model_path",
        str(mmproj),
        "--chat_format",
        "mtmd",  # the chat template of the GGUF
        "--model_alias",
        name,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--n_ctx",
        tokens,
        "--n_batch",
        batch,
        "--n_ubatch",
        batch,
        "--n_gpu_layers",
        "-1",
        # It punishes repetition unless a request forbids it, and JSON repeats quotes. 0: it looks back at none.
        "--last_n_tokens_size",
        "0",
        # Without it no log-probabilities; with it logits of every token of the prompt are computed and kept.
        "--logits_all",
        str(bool(options.log_probabilities)).lower(),
        "--verbose",
        "false",
    )
    return command, name, "/v1/models", _missing("gguf", "llama_cpp", "uvicorn", "fastapi")


def _mlx(model_path: str, options: ServerOptions) -> _Parts:
    check_mlx_folder(model_path)
    facts = read_facts(model_path)
    if facts.image_attention == "bidirectional":
        logger.warning(
            "mlx-vlm attends causally inside pictures, %s both ways: its answers may differ from those measured; "
            "scripts/check_parity.py tells by how much",
            model_path,
        )
    if adds_bos(model_path):
        logger.warning(
            "%s: its tokenizer adds a BOS, and mlx-vlm's server would begin prompts with two; convert it again with "
            "scripts/convert_to_mlx.py",
            model_path,
        )
    command = (
        # A request that names another model makes it drop this one, and fetch that: offline, it is refused.
        "env",
        *([] if is_hub_id(model_path) else ["HF_HUB_OFFLINE=1"]),
        sys.executable,
        "-m",
        "mlx_vlm",
        "server",
        "--model",
        model_path,
        "--host",
        options.host,
        "--port",
        str(options.port),
        "--top-logprobs-k",
        str(options.log_probabilities),
    )
    return command, model_path, "/v1/models", _missing("mlx", "mlx_vlm", "mlx")


_BUILDERS: dict[str, Callable[[str, ServerOptions], Any]] = {
    "transformers": _transformers,
    "vllm": _vllm,
    "llama.cpp": _llama_cpp,
    "mlx": _mlx,
}
