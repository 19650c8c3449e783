"""Compare a folder for MLX with the checkpoint that it was made from: every tensor, the config, a prompt."""

from collections import defaultdict
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers import Gemma3Config, Gemma3Processor

from pokegemma.engines.mlx_engine import mx, open_model, open_processor, prepare
from pokegemma.engines.questions import Question
from pokegemma.errors import CheckFailedError
from pokegemma.export.source import PUBLISHED_EMBEDDINGS, PUBLISHED_HEAD, exported_tensors

_ERROR_LIMIT = {4: 0.2, 8: 0.02}
"""Largest error of a quantised matrix, as a share of its root mean square; 0.09 and 0.008 are usual."""


@dataclass(frozen=True)
class MlxPart:
    """A part of a model as it was written.

    `stored` is how, such as "bfloat16" or "4 bits". `error` is the root mean square of what rounding changed, as a
    share of that of the weights.
    """

    name: str
    stored: str
    num_weights: int
    num_bytes: int
    error: float


def _part(name: str) -> str:
    top, _, rest = name.partition(".")
    if top != "language_model":
        return {"vision_tower": "vision tower", "multi_modal_projector": "projector"}.get(top, top)
    if name == PUBLISHED_HEAD:
        return "LM head"
    return "embeddings" if rest.startswith("model.embed_tokens") else "language model"


def _restore(written: dict[str, mx.array], name: str, bits: int) -> tuple[mx.array, int, bool]:
    """Return a tensor as MLX computes with it, the bytes it takes, and whether it was quantised."""
    weight, stem = written[name], name.removesuffix(".weight")
    if f"{stem}.scales" not in written:
        return weight, weight.nbytes, False
    scales, biases = written[f"{stem}.scales"], written[f"{stem}.biases"]
    group = 32 // bits * weight.shape[-1] // scales.shape[-1]
    restored = mx.dequantize(weight, scales, biases, group_size=group, bits=bits)
    return restored, weight.nbytes + scales.nbytes + biases.nbytes, True


def _compare(name: str, tensor: torch.Tensor, restored: mx.array) -> tuple[bool, float, float]:
    """Return whether a tensor is the checkpoint's in bfloat16, and the sums of squares of the difference and of it."""
    if name.endswith("patch_embedding.weight"):
        tensor = tensor.permute(0, 2, 3, 1)  # MLX keeps channels last
    if tuple(tensor.shape) != restored.shape:
        raise CheckFailedError(f"{name}: written as {restored.shape}, the checkpoint has {tuple(tensor.shape)}")
    reference, restored = mx.array(tensor.float().numpy()), restored.astype(mx.float32)
    exact = mx.array_equal(restored, reference.astype(mx.bfloat16).astype(mx.float32)).item()
    return exact, mx.square(restored - reference).sum().item(), mx.square(reference).sum().item()


def check_mlx_weights(checkpoint: Path, folder: Path, *, bits: int) -> list[MlxPart]:
    """Compare each tensor with the checkpoint's.

    Raises:
        CheckFailedError: one is missing or superfluous, has another shape, or differs: at all from the checkpoint's
            in bfloat16, or, where it is quantised, by more than rounding does.
    """
    written: dict[str, mx.array] = {}
    for file in sorted(folder.glob("*.safetensors")):
        written |= mx.load(str(file))  # lazily: nothing is in memory until it is compared
    sums: dict[tuple[str, str], np.ndarray] = defaultdict(lambda: np.zeros(4))
    left = {name for name in written if not name.endswith((".scales", ".biases"))} - {PUBLISHED_HEAD}
    for name, stored_tensor in exported_tensors(checkpoint).items():
        if name not in left:
            raise CheckFailedError(f"{folder}: {name} was not written")
        left.remove(name)
        tensor = stored_tensor.read()
        for target in (name, PUBLISHED_HEAD) if name == PUBLISHED_EMBEDDINGS else (name,):
            if target not in written:
                raise CheckFailedError(f"{folder}: {target} was not written")
            restored, num_bytes, quantised = _restore(written, target, bits)
            exact, error, square = _compare(target, tensor, restored)
            if not (error <= _ERROR_LIMIT[bits] ** 2 * square if quantised else exact):
                share = (error / square) ** 0.5 if square else float("inf")
                raise CheckFailedError(f"{folder}: {target} differs from the checkpoint by {share:.2g} of its size")
            stored = f"{bits} bits" if quantised else "bfloat16"
            sums[_part(target), stored] += tensor.numel(), num_bytes, error, square
            written.pop(target)  # frees it
    if left:
        raise CheckFailedError(f"{folder}: {', '.join(sorted(left)[:3])} is not in the checkpoint")
    return [
        MlxPart(
            name=name, stored=stored, num_weights=int(count), num_bytes=int(size), error=float((error / square) ** 0.5)
        )
        for (name, stored), (count, size, error, square) in sorted(sums.items())
    ]


def check_config(folder: Path, config: dict[str, Any]) -> None:
    """Load the folder as mlx-vlm does, and compare what it understood with `config`, as `mlx_config` gave it.

    Raises:
        CheckFailedError: mlx-vlm took something else.
    """
    understood = open_model(folder, lazy=True).config
    for section, values in (
        (understood, config),
        (understood.text_config, config["text_config"]),
        (understood.vision_config, config["vision_config"]),
    ):
        for name, value in vars(section).items():
            if name in values and not isinstance(values[name], dict | None) and value != values[name]:
                raise CheckFailedError(f"{folder}: mlx-vlm takes {name} for {value!r}, it is {values[name]!r}")
    if understood.text_config.rope_scaling != config["text_config"]["rope_scaling"]:
        raise CheckFailedError(f"{folder}: mlx-vlm takes rope_scaling for {understood.text_config.rope_scaling}")


def check_processor(processor: Gemma3Processor, folder: Path, config: Gemma3Config) -> None:
    """Compare a prompt with a picture as the folder's files make it with the checkpoint's.

    Raises:
        CheckFailedError: tokens or pixels differ, or the tokenizer adds a BOS to that of the chat template.
    """
    size = config.vision_config.image_size
    noise = np.random.default_rng(0).integers(0, 256, (size, size, 3), dtype=np.uint8)
    content = [{"type": "text", "text": "You see: "}, {"type": "image"}, {"type": "text", "text": "Next\n\nbutton?"}]
    messages = (
        {"role": "user", "content": content},
        {"role": "assistant", "content": content[:1]},
        {"role": "user", "content": content[::-1]},
    )
    question = Question(id="check", messages=messages, pictures=(Image.fromarray(noise),) * 2)
    written = open_processor(folder)
    tokens, pixels = prepare(written, question)
    text = processor.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False)
    expected = processor(text=[text], images=[list(question.pictures)], add_special_tokens=False, return_tensors="pt")
    if tokens.tolist() != expected["input_ids"].tolist() or written.tokenizer("").input_ids:
        raise CheckFailedError(f"{folder}: its chat template or tokenizer gives another prompt than the checkpoint's")
    if not np.array_equal(np.array(pixels), expected["pixel_values"].numpy()):
        raise CheckFailedError(f"{folder}: its image processor gives other pixels than the checkpoint's")
    num_soft = tokens.tolist()[0].count(config.image_token_index)
    if num_soft != 2 * config.mm_tokens_per_image:
        raise CheckFailedError(f"{folder}: {num_soft / 2:g} tokens a picture, not {config.mm_tokens_per_image}")
