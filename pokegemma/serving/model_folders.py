"""What a folder or file holds that somebody wants to serve, read without loading it."""

import json
import re
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import read_run_record

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICTURES = {"grid": 1, "frames": 4}
_TEXT_TOKENS = 128  # of a decision, beside its picture
_FIXED_TOKENS = 768  # rules, goal, and an answer of 256 tokens


@dataclass(frozen=True)
class ModelFacts:
    """What the command lines of servers depend on.

    `pictures_in_prompt` and `context_tokens` are enough for the layout that the model was trained with; where that
    is not known, for a trajectory of 16 decisions.
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
    """Return the value of `key` in a run record, or in the record of the stage before that it holds."""
    if key in record:
        return record[key]
    for value in record.values():
        if isinstance(value, dict) and (found := _find_key(value, key)) is not None:
            return found
    return None


def read_facts(model_path: str) -> ModelFacts:
    """Return the facts of a model, from config.json and run.json in its folder; a GGUF folder has the second alone, a
    Hub id neither here.

    Raises:
        PokegemmaError: config.json is damaged.
    """
    folder = Path(model_path)
    config = _read_json(folder / "config.json")
    record = read_run_record(folder) or {}
    layout = _find_key(record, "layout")
    pictures = _PICTURES.get(str(layout)) or 4 + int(_find_key(record, "max_decisions") or 16)
    image_tokens = config.get("mm_tokens_per_image") or _find_key(record, "image_tokens") or 256
    attention = config.get("image_attention") or _find_key(record, "image_attention") or "bidirectional"
    needed = -(-(pictures * (image_tokens + _TEXT_TOKENS) + _FIXED_TOKENS) // 1024) * 1024
    longest = (config.get("text_config") or config).get("max_position_embeddings") or needed
    return ModelFacts(
        model_type=config.get("model_type"),
        image_attention=str(attention),
        pictures_in_prompt=pictures,
        image_tokens=image_tokens,
        context_tokens=min(needed, longest),
    )


def is_hub_id(model_path: str) -> bool:
    """Return whether a model is named as on the Hub, and is no path here."""
    return not Path(model_path).exists() and _HUB_ID.fullmatch(model_path) is not None


def _weights_format(folder: Path) -> str | None:
    """Return what a safetensors file says of who wrote it: "pt" or "mlx"; None where it says nothing."""
    files = sorted(folder.glob("*.safetensors"))
    if not files:
        raise PokegemmaError(f"{folder}: no weights in it (*.safetensors)")
    with open(files[0], "rb") as file:
        try:
            (length,) = struct.unpack("<Q", file.read(8))
            header = json.loads(file.read(min(length, 2**27)))
            return header.get("__metadata__", {}).get("format")
        except (struct.error, ValueError, AttributeError) as error:
            raise PokegemmaError(f"{files[0]}: not a safetensors file") from error


def _check_folder(model_path: str, engine: str) -> Path:
    folder = Path(model_path)
    if not folder.exists():
        raise PokegemmaError(f"--model_path {model_path}: no such file or folder")
    if folder.suffix == ".gguf" or (folder.is_dir() and any(folder.glob("*.gguf"))):
        raise PokegemmaError(f"--model_path {model_path}: GGUF files are for --engine llama.cpp, not {engine}")
    if (folder / "adapter_config.json").is_file() and not (folder / "config.json").is_file():
        raise PokegemmaError(f"--model_path {model_path}: an adapter; merge it first with scripts/merge_qlora.py")
    if not (folder / "config.json").is_file():
        raise PokegemmaError(f"--model_path {model_path}: no config.json in it, so it is no model")
    return folder


def check_checkpoint(model_path: str, engine: str) -> None:
    """Refuse what is no checkpoint for transformers or vLLM; a Hub id passes unseen.

    Raises:
        PokegemmaError: it is not there, or for another engine.
    """
    if not is_hub_id(model_path) and _weights_format(_check_folder(model_path, engine)) == "mlx":
        raise PokegemmaError(f"--model_path {model_path}: converted for MLX, so for --engine mlx, not {engine}")


def check_mlx_folder(model_path: str) -> None:
    """Refuse what was not converted for MLX; a Hub id passes unseen.

    Raises:
        PokegemmaError: it is not there, or for another engine.
    """
    if not is_hub_id(model_path) and _weights_format(_check_folder(model_path, "mlx")) != "mlx":
        raise PokegemmaError(
            f"--model_path {model_path}: not converted for MLX; make a folder for it with scripts/convert_to_mlx.py"
        )


def adds_bos(model_path: str) -> bool:
    """Return whether the tokenizer in a folder adds a BOS to every text; False for a Hub id, which is not here."""
    processor = _read_json(Path(model_path) / "tokenizer.json").get("post_processor") or {}
    return any("SpecialToken" in part for part in processor.get("single") or ())


def find_gguf(model_path: str, quantization: str | None) -> tuple[Path, Path]:
    """Return the files of the language model and of the vision tower with its projector.

    Args:
        model_path: a .gguf file, or a folder that scripts/convert_to_gguf.py wrote.
        quantization: which of the folder's model-<quantization>.gguf; None: the only one.

    Raises:
        PokegemmaError: there is no such file, the choice is open, or the projector is missing.
    """
    path = Path(model_path)
    if path.is_dir():
        models = {file.stem.removeprefix("model-"): file for file in sorted(path.glob("model-*.gguf"))}
        if not models:
            hint = "; make one with scripts/convert_to_gguf.py" if (path / "config.json").is_file() else ""
            raise PokegemmaError(f"--model_path {model_path}: no model-*.gguf in it{hint}")
        if quantization is None and len(models) > 1:
            raise PokegemmaError(f"--model_path {model_path}: choose with --quantization: {', '.join(models)}")
        if quantization is not None and quantization not in models:
            raise PokegemmaError(f"--quantization {quantization}: {model_path} has {', '.join(models)}")
        path = models[quantization or next(iter(models))]
    elif quantization is not None:
        raise PokegemmaError(f"--quantization chooses in a folder, and --model_path {model_path} is none")
    if not path.is_file():
        raise PokegemmaError(f"--model_path {model_path}: no such file or folder")
    projectors = sorted(path.parent.glob("mmproj*.gguf"))
    if path in projectors:
        raise PokegemmaError(f"--model_path {model_path}: the projector, not the language model that it belongs to")
    if len(projectors) != 1:
        found = f"several ({', '.join(file.name for file in projectors)})" if projectors else "none"
        raise PokegemmaError(f"{path.parent}: one mmproj*.gguf wanted, {found} found; without it the model is blind")
    for file in (path, projectors[0]):
        with open(file, "rb") as opened:
            if opened.read(4) != b"GGUF":
                raise PokegemmaError(f"{file}: not a GGUF file")
    return path, projectors[0]
