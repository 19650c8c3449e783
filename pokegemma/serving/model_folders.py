"""Facts of a model's folder or file that serving depends on, read without loading the model."""

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.text import TEXT_MODEL
from pokegemma.provenance import is_hub_id, read_run_record

_PICTURES = {"grid": 1, "frames": 4}
_TEXT_TOKENS = 128  # of a decision, without its picture
_FIXED_TOKENS = 768  # rules, goal, and an answer of 256 tokens
_STATE_TOKENS = 1024  # the state of a battle and an answer, with room


@dataclass(frozen=True)
class ModelFacts:
    """Facts that the command lines of servers depend on.

    `pictures_in_prompt` and `context_tokens` are enough for the layout that the model was trained with; where that is
    not known, for a trajectory of DEFAULT_MAX_DECISIONS.
    """

    model_type: str | None
    image_attention: str
    pictures_in_prompt: int
    image_tokens: int
    context_tokens: int


def _read_json(path: Path) -> dict[str, Any]:
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        return {}
    except (OSError, ValueError) as error:
        raise PokegemmaError(f"{path} cannot be read: {error}") from error
    if not isinstance(value, dict):
        raise PokegemmaError(f"{path}: not a JSON object")
    return value


def _find_key(record: dict[str, Any], key: str) -> Any:
    """Return the value of `key` in a run record, or in the record of an earlier stage within it."""
    if key in record:
        return record[key]
    for value in record.values():
        if isinstance(value, dict) and (found := _find_key(value, key)) is not None:
            return found
    return None


def read_facts(model_path: str) -> ModelFacts:
    """Return the facts of a model, from config.json and run.json in its folder.

    A policy for battles gets a context for one state.

    A GGUF folder has only run.json; for a Hub id both are missing.

    Raises:
        PokegemmaError: config.json is damaged.
    """
    folder = Path(model_path)
    config = _read_json(folder / "config.json")
    record = read_run_record(folder) or {}
    layout = _find_key(record, "layout")
    pictures = _PICTURES.get(str(layout)) or 4 + int(_find_key(record, "max_decisions") or DEFAULT_MAX_DECISIONS)
    image_tokens = config.get("mm_tokens_per_image") or _find_key(record, "image_tokens") or 256
    attention = config.get("image_attention") or _find_key(record, "image_attention") or "bidirectional"
    model_type = config.get("model_type") or record.get("model_type")
    needed = -(-(pictures * (image_tokens + _TEXT_TOKENS) + _FIXED_TOKENS) // 1024) * 1024
    if model_type == TEXT_MODEL:
        pictures, needed = 0, _STATE_TOKENS
    longest = (config.get("text_config") or config).get("max_position_embeddings") or needed
    return ModelFacts(
        model_type=model_type,
        image_attention=str(attention),
        pictures_in_prompt=pictures,
        image_tokens=image_tokens,
        context_tokens=min(needed, longest),
    )


def _weights_format(folder: Path) -> str | None:
    """Return the format in a safetensors file's metadata: "pt", "mlx", or None without any."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PokegemmaError(f"{folder}: no weights in it (*.safetensors)")
    try:
        with safe_open(files[0], framework="numpy") as weights:
            return (weights.metadata() or {}).get("format")
    except SafetensorError as error:
        raise PokegemmaError(f"{files[0]}: not a safetensors file") from error


def check_model(model_path: str, engine: str) -> None:
    """Refuse a folder that is not a model for an engine other than llama.cpp; a Hub id passes without a check.

    Raises:
        PokegemmaError: the folder does not exist, or is for another engine.
    """
    if is_hub_id(model_path):
        return
    folder, flag = Path(model_path), f"--model_path {model_path}"
    if not folder.exists():
        raise PokegemmaError(f"{flag}: no such file or folder")
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        raise PokegemmaError(f"{flag}: GGUF files are for --engine llama.cpp, not {engine}")
    if not (folder / "config.json").is_file():
        if (folder / "adapter_config.json").is_file():
            raise PokegemmaError(f"{flag} is an adapter; merge it first with scripts/merge_qlora.py")
        raise PokegemmaError(f"{flag} is not a model: config.json is missing")
    is_mlx = _weights_format(folder) == "mlx"
    if is_mlx and engine != "mlx":
        raise PokegemmaError(f"{flag} was converted for MLX; choose --engine mlx instead of {engine}")
    if not is_mlx and engine == "mlx":
        raise PokegemmaError(f"{flag} was not converted for MLX; convert it with scripts/convert_to_mlx.py")


def adds_bos(model_path: str) -> bool:
    """Return whether the tokenizer in a folder adds a BOS to every text; False for a Hub id."""
    processor = _read_json(Path(model_path) / "tokenizer.json").get("post_processor") or {}
    return any("SpecialToken" in part for part in processor.get("single") or ())


def find_gguf(model_path: str, quantization: str | None) -> tuple[Path, Path | None]:
    """Return the files of the language model and of the vision tower with its projector; a policy has no second one.

    Args:
        model_path: a .gguf file, or a folder that scripts/convert_to_gguf.py wrote.
        quantization: which of the folder's model-<quantization>.gguf; None: the only one.

    Raises:
        PokegemmaError: a file is missing or damaged, or there are several to choose from.
    """
    path, flag = Path(model_path), f"--model_path {model_path}"
    if path.is_dir():
        path = _choose_gguf(path, quantization, flag)
    elif quantization is not None:
        raise PokegemmaError(f"--quantization {quantization} chooses a file of a folder, but {flag} is not a folder")
    if not path.is_file():
        raise PokegemmaError(f"{flag}: no such file or folder")
    mmproj = None if read_facts(str(path.parent)).model_type == TEXT_MODEL else _find_mmproj(path, flag)
    for file in (path, mmproj):
        if file is not None:
            with open(file, "rb") as opened:
                if opened.read(4) != b"GGUF":
                    raise PokegemmaError(f"{file}: not a GGUF file")
    return path, mmproj


def _find_mmproj(path: Path, flag: str) -> Path:
    projectors = sorted(path.parent.glob("mmproj*.gguf"))
    if path in projectors:
        raise PokegemmaError(f"{flag} is the projector; choose the language model that it belongs to")
    if len(projectors) != 1:
        found = f"several ({', '.join(file.name for file in projectors)})" if projectors else "none"
        raise PokegemmaError(f"{path.parent}: needs one vision part (mmproj*.gguf), but has {found}")
    return projectors[0]


def _choose_gguf(folder: Path, quantization: str | None, flag: str) -> Path:
    models = {file.stem.removeprefix("model-"): file for file in sorted(folder.glob("model-*.gguf"))}
    if not models:
        hint = "; make one with scripts/convert_to_gguf.py" if (folder / "config.json").is_file() else ""
        raise PokegemmaError(f"{flag}: no model-*.gguf in it{hint}")
    if quantization is None and len(models) > 1:
        raise PokegemmaError(f"{flag}: choose with --quantization: {', '.join(models)}")
    if quantization is not None and quantization not in models:
        raise PokegemmaError(f"--quantization {quantization}: {folder} has {', '.join(models)}")
    return models[quantization or next(iter(models))]
