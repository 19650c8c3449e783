"""Compare GGUF files with the checkpoint that they were made from: tensors and their types, chat template, pictures."""

from collections import Counter
from typing import Any

from pokegemma.errors import CheckFailedError
from pokegemma.export.gguf_reader import GgufFile
from pokegemma.export.gguf_source import GgufSource

_K_BLOCK = 256
"""Weights that k-quants scale together: the rows of a matrix have to be multiples of it."""

_MATRIX_TYPES = {
    "f16": {"F16"},
    "bf16": {"BF16"},
    "q8_0": {"Q8_0"},
    "q5_k_m": {"Q5_K", "Q6_K"},
    "q4_k_m": {"Q4_K", "Q5_K", "Q6_K"},
}
"""Types of the matrices in a file: "m" mixes in some of more bits. Vectors are float32 in all of them."""


def _is_k_quant(quantization: str) -> bool:
    return "_k" in quantization


def wrong_types(file: GgufFile, quantization: str) -> dict[str, int]:
    """Return how many matrices of a file have types that its quantization has not; empty where all are as they should.

    Matrices that k-quants cannot store may have any type, see `fallback_note`.
    """
    counts = Counter(
        file.types[name]
        for name, shape in file.shapes.items()
        if len(shape) > 1 and not (_is_k_quant(quantization) and shape[0] % _K_BLOCK)
    )
    named = {"q5_k_m": "Q5_K", "q4_k_m": "Q4_K"}.get(quantization)
    if named in counts or named is None:  # mixtures of more bits alone would be another quantization
        counts = Counter({kind: n for kind, n in counts.items() if kind not in _MATRIX_TYPES[quantization]})
    return dict(counts)


def check_gguf_files(checkpoint: GgufSource, models: dict[str, GgufFile], mmproj: GgufFile | None) -> None:
    """Check that the files contain what the checkpoint contains.

    Args:
        models: by quantization.
        mmproj: None for a model for text alone.

    Raises:
        CheckFailedError: tensors, their types, the chat template or the pictures differ; the message names all of it.
    """
    wrong = []

    def expect(file: GgufFile, what: str, found: Any, expected: Any) -> None:
        if found != expected:
            wrong.append(f"{file.path.name}: {what}: {found}, the checkpoint has {expected}")

    if mmproj is not None:
        expect(mmproj, "tensors of the vision tower and projector", len(mmproj.shapes), checkpoint.num_vision_tensors)
        if not set(mmproj.types.values()) <= {"F16", "F32"} or "F16" not in mmproj.types.values():
            wrong.append(f"{mmproj.path.name}: its tensors are {', '.join(mmproj.type_counts)}, not F16")
        expect(mmproj, "image size", mmproj.image_size_px, checkpoint.image_size_px)
        expect(mmproj, "tokens a picture", mmproj.image_tokens, checkpoint.image_tokens)
    first = next(iter(models.values()))
    for quantization, model in models.items():
        if types := wrong_types(model, quantization):
            found = ", ".join(f"{count} {kind}" for kind, count in sorted(types.items()))
            wrong.append(f"{model.path.name}: {found} are not what {quantization} has")
        expect(model, "tensors of the language model", len(model.shapes), checkpoint.num_text_tensors)
        template = model.fields.get("tokenizer.chat_template")
        if template != checkpoint.chat_template:
            wrong.append(f"{model.path.name}: its chat template is not the checkpoint's")
        if text := [token for token in checkpoint.control_tokens if token not in model.control_tokens]:
            wrong.append(f"{model.path.name}: {', '.join(text)} would be read as text")
        if model.shapes != first.shapes:
            wrong.append(f"{model.path.name}: its tensors are not those of {first.path.name}")
    if wrong:
        raise CheckFailedError(f"{checkpoint.path} was not converted whole: {'; '.join(wrong)}")


def fallback_note(file: GgufFile) -> str | None:
    """Return a note on tensors that k-quants cannot store, whose rows are not multiples of 256; None without any.

    llama.cpp stores them in another type of about the same size, which the name of the file does not show.
    """
    if not any(name.endswith("_K") for name in file.types.values()) and not _is_k_quant(file.path.stem):
        return None
    odd = {name: shape[0] for name, shape in file.shapes.items() if len(shape) > 1 and shape[0] % _K_BLOCK}
    if not odd:
        return None
    rows = ", ".join(str(length) for length in sorted(set(odd.values())))
    types = ", ".join(sorted({file.types[name].lower() for name in odd}))
    return f"{len(odd)} tensors with rows of {rows} are {types}: k-quants need multiples of {_K_BLOCK}"
