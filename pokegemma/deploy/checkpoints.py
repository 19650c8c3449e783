"""Which checkpoints can be exported at all."""

from pathlib import Path

from transformers import Gemma3Config

from pokegemma.errors import PokegemmaError
from pokegemma.training.families import FAMILIES
from pokegemma.training.models import load_config, read_family


def load_exportable_config(path: Path, *, target: str) -> Gemma3Config:
    """Return the config of a Gemma 3 in full precision; `target` is what it shall become, for the error.

    Raises:
        PokegemmaError: it is an adapter, quantised, or of another family.
    """
    if not path.is_dir():
        raise PokegemmaError(f"--model_path {path}: no such folder")
    if (path / "adapter_config.json").is_file():
        raise PokegemmaError(f"{path} is an adapter; merge it first: scripts/merge_qlora.py --lora_path {path}")
    family = read_family(path)
    if family is not FAMILIES["gemma3"]:
        raise PokegemmaError(f"{path} is a {family.name}; only Gemma 3 is converted to {target} here")
    config = load_config(path)
    if getattr(config, "quantization_config", None) or getattr(config, "quantization", None):
        raise PokegemmaError(f"{path}: its weights are quantised; convert the full-precision checkpoint")
    return config
