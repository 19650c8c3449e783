"""Make an ordinary checkpoint of a Gemma 3 in a GGUF file: dequantised weights, config and tokenizer."""

import importlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from transformers import Gemma3ForCausalLM, GemmaTokenizer, GgufConfig

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.checkpoint_files import load_part, write_added_tokens
from pokegemma.gemma.loading import Dtype
from pokegemma.gemma.text.tokenizer_files import (
    CONTROL,
    USER_DEFINED,
    write_tokenizer_files,
    write_tokenizer_model,
)

_TOKENS, _SCORES, _TYPES = (f"tokenizer.ggml.{name}" for name in ("tokens", "scores", "token_type"))
_IGNORED = "gemma3.rope.scaling.factor"


def read_gguf_fields(path: Path) -> dict[str, Any]:
    """Return the metadata of a GGUF file, with its vocabulary.

    Raises:
        PokegemmaError: the gguf package is missing, the file is damaged, or it is not a Gemma 3 that can be converted.
    """
    try:
        gguf = importlib.import_module("gguf")
    except ImportError as error:
        raise PokegemmaError("gguf is not installed; ./init.sh --with gemma270m adds it") from error
    try:
        fields = {name: field.contents() for name, field in gguf.GGUFReader(path).fields.items()}
    except (OSError, ValueError, IndexError, KeyError) as error:
        raise PokegemmaError(f"{path} is not a whole GGUF file: {' '.join(str(error).split())[:200]}") from error
    architecture = fields.get("general.architecture")
    if architecture != "gemma3":
        raise PokegemmaError(f"{path}: architecture {architecture!r}, not 'gemma3'")
    if _IGNORED in fields:  # transformers (5.23) ignores it, and would compute other logits without a message
        raise PokegemmaError(f"{path}: positions of a larger Gemma 3 ({_IGNORED}); take a 270M or 1B")
    return fields


def load_gguf(path: Path, *, dtype: Dtype = "float32") -> Gemma3ForCausalLM:
    """Return the Gemma 3 for text alone in a GGUF file, dequantised. float32 holds its values exactly.

    Raises:
        PokegemmaError: it cannot be loaded, or a weight is not in it.
    """
    # Without dequantize=True the model counts as quantised: it can be neither saved nor trained.
    model, info = load_part(
        "model",
        path.parent,
        Gemma3ForCausalLM.from_pretrained,
        gguf_file=path.name,
        quantization_config=GgufConfig(dequantize=True),
        dtype=getattr(torch, dtype),
        output_loading_info=True,
    )
    missing = sorted({*info["missing_keys"], *info["unexpected_keys"]} - {"lm_head.weight"})
    if missing:
        raise PokegemmaError(f"{path}: {len(missing)} weights are missing or left over: {', '.join(missing[:3])}")
    vars(model.config).pop("_model_name_or_path", None)  # the file's title, which saving would keep
    return model.eval()


def write_gguf_tokenizer(
    fields: Mapping[str, Any], folder: Path, *, tokens: Mapping[str, str] | None = None
) -> GemmaTokenizer:
    """Write the tokenizer of a GGUF file to a folder, with tokenizer.model, and return it.

    Args:
        fields: what `read_gguf_fields` returned.
        tokens: further special tokens, as in `write_tokenizer_files`.
    """
    vocabulary = [
        # llama.cpp's converter writes "▁" of these entries as a space.
        (piece.replace(" ", "▁") if kind == USER_DEFINED else piece, score, kind)
        for piece, score, kind in zip(fields[_TOKENS], fields[_SCORES], fields[_TYPES], strict=True)
    ]
    write_tokenizer_model(folder / "tokenizer.model", vocabulary)
    control = {piece for piece, _, kind in vocabulary if kind == CONTROL} | set((tokens or {}).values())
    special = control | {piece for piece, _, _ in vocabulary[:4]}
    tokenizer = write_tokenizer_files(folder, is_text=lambda token: token not in special, tokens=tokens)
    write_added_tokens(folder)
    return tokenizer


def convert_gguf(path: Path, folder: Path, *, dtype: Dtype = "float32") -> Gemma3ForCausalLM:
    """Write the Gemma 3 in a GGUF file as a checkpoint to an existing folder, and return it.

    Raises:
        PokegemmaError: as `read_gguf_fields` and `load_gguf`.
    """
    fields = read_gguf_fields(path)
    model = load_gguf(path, dtype=dtype)
    model.save_pretrained(folder)
    write_gguf_tokenizer(fields, folder)
    return model
