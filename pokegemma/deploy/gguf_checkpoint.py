"""What a checkpoint holds, to be found again in the files it is converted to."""

import json
import math
from dataclasses import dataclass
from pathlib import Path

from safetensors import SafetensorError, safe_open

from pokegemma.errors import PokegemmaError
from pokegemma.training.families import TOWER
from pokegemma.training.models import load_config, load_processor, read_family


@dataclass(frozen=True)
class Checkpoint:
    """What a checkpoint holds that its GGUF files must hold as well."""

    path: Path
    num_text_tensors: int
    num_vision_tensors: int
    num_weights: int
    image_size_px: int
    image_tokens: int
    chat_template: str


def _weight_files(path: Path) -> list[Path]:
    index = path / "model.safetensors.index.json"
    if index.is_file():
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        return [path / name for name in sorted(names)]
    return [path / "model.safetensors"]


def _tensor_shapes(path: Path) -> dict[str, list[int]]:
    shapes = {}
    for file in _weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                shapes |= {name: weights.get_slice(name).get_shape() for name in weights.keys()}  # noqa: SIM118
        except (OSError, SafetensorError) as error:
            raise PokegemmaError(f"{file}: the weights cannot be read: {error}") from error
    return shapes


def read_checkpoint(path: Path) -> Checkpoint:
    """Return what a merged Gemma 3 holds, from its config and the headers of its weights.

    Raises:
        PokegemmaError: it is something that cannot be converted.
    """
    if not path.is_dir():
        raise PokegemmaError(f"--model_path {path}: no such folder")
    if (path / "adapter_config.json").is_file():
        raise PokegemmaError(f"{path} is an adapter; merge it first: scripts/merge_qlora.py --lora_path {path}")
    family = read_family(path)
    if family.name != "Gemma 3":
        raise PokegemmaError(f"{path} is a {family.name}; only Gemma 3 is converted to GGUF here")
    config = load_config(path)
    if getattr(config, "quantization_config", None):
        raise PokegemmaError(f"{path}: its weights are quantised; convert the full-precision checkpoint")
    if not (path / "tokenizer.model").is_file():
        raise PokegemmaError(
            f"{path}/tokenizer.model not found, which llama.cpp needs; copy it from the base checkpoint"
        )
    shapes = _tensor_shapes(path)
    eyes = [name for name in shapes if f"{TOWER}." in name or f"{family.projector}." in name]
    if not any(f"{TOWER}." in name for name in eyes):
        raise PokegemmaError(f"{path}: its weights hold no vision tower; it would not see")
    heads = [name for name in eyes if ".vision_model.head." in name]  # SigLIP's pooling, which Gemma does not use
    return Checkpoint(
        path=path,
        num_text_tensors=len(shapes) - len(eyes),
        num_vision_tensors=len(eyes) - len(heads),
        num_weights=sum(math.prod(shape) for shape in shapes.values()),
        image_size_px=config.vision_config.image_size,
        image_tokens=config.mm_tokens_per_image,
        chat_template=load_processor(path).chat_template,
    )
