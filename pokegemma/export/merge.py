"""Merge a LoRA adapter into full-precision weights, and check that the logits stay the same."""

import logging
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedConfig, PreTrainedModel

from pokegemma.errors import PokegemmaError
from pokegemma.export.merge_check import check_merged_weights, require_weights, weight_names
from pokegemma.export.merge_logits import (
    AnswerLogits,
    Verification,
    VerificationExamples,
    check_verification,
    find_examples,
)
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.base import open_base
from pokegemma.gemma.adapters.reading import Adapter, read_adapter
from pokegemma.gemma.image_attention import attention_facts
from pokegemma.gemma.loading import Checkpoint, Dtype
from pokegemma.gemma.model_image_size import describe_image_size, picture_facts
from pokegemma.gemma.text.checkpoint import TextCheckpoint, open_gemma
from pokegemma.outputs import atomic_folder, refuse_to_replace, require_space
from pokegemma.provenance import write_run_record

logger = logging.getLogger(__name__)

_REMEDY = "free some or choose another --output_path"


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: Dtype = "bfloat16",
    verify_on: Path | VerificationExamples | None = None,
    num_samples: int = 8,
    stored_tolerance: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Verification | None:
    """Write base + adapter as one checkpoint with the published layout: weights, processor, tokenizer.model.

    Merging is done in float32, whatever the adapter was trained on; only the result is rounded to `dtype`.

    Args:
        base: folder or Hub id; None: the one that the adapter names.
        verify_on: JSONL file whose first `num_samples` samples are shown to base, adapter + base, merged and stored;
            for a Gemma 3 for text alone, examples.
        stored_tolerance: as in `check_verification`.

    Raises:
        PokegemmaError: the adapter or the base cannot be read, or the disk is full.
        CheckFailedError: the verification failed; nothing is left at `output`.
    """
    source = read_adapter(adapter)
    checkpoint = open_base(source, base, opener=open_gemma)
    base = checkpoint.path
    refuse_to_replace(output, adapter, base, flag="--output_path")
    if checkpoint.is_quantised:
        raise PokegemmaError(f"{base}: its weights are quantised; name the full-precision checkpoint as --base_model")
    read_as = _training_format(source, checkpoint)
    with atomic_folder(output, stage="merge", overwrite=overwrite) as folder:
        logits = AnswerLogits(find_examples(checkpoint, verify_on, num_samples, layout=read_as.get("layout")))
        model = _load_base(checkpoint, output, dtype=dtype, device=device)
        model = _merge_adapter(model, source, base, logits).to(getattr(torch, dtype))
        _write_checkpoint(folder, model, checkpoint, output)
        names, config = weight_names(model), model.config
        del model
        weights = check_merged_weights(folder, base, source, names)
        logger.info("weights compared: %d changed by the adapter, %d as in the base", *vars(weights).values())
        verification = None
        if logits.shown.examples:
            logits.record("stored", open_gemma(folder).load_model(device=device))
            verification = logits.verification(dtype)
            check_verification(verification, stored_tolerance=stored_tolerance)
        write_run_record(
            folder,
            stage="merge",
            options={"lora_path": str(adapter), "base_model": base, "dtype": dtype, **read_as},
            **_picture_facts(checkpoint, config),
            training=source.run or None,
            weights=vars(weights),
            verification=verification and vars(verification),
        )
    return verification


def _training_format(source: Adapter, checkpoint: Checkpoint | TextCheckpoint) -> dict[str, str]:
    """Return the options of training by which the merged model must be asked: its layout, or the text of states."""
    options = source.run.get("options") or {}
    if isinstance(checkpoint, Checkpoint):
        return {"layout": options.get("layout", "grid")}
    return {"text": options["text"]} if "text" in options else {}


def _picture_facts(checkpoint: Checkpoint | TextCheckpoint, config: PreTrainedConfig) -> dict[str, Any]:
    if isinstance(checkpoint, TextCheckpoint):
        return {}
    return {"image_size_px": picture_facts(config)["image_size_px"], **attention_facts(config)}


def _load_base(checkpoint: Checkpoint | TextCheckpoint, output: Path, *, dtype: Dtype, device: str) -> PreTrainedModel:
    """Load the base in float32, if all its weights are there and its size in `dtype` fits on the disk of `output`."""
    model = checkpoint.load_model(device=device)
    require_weights(checkpoint.path, weight_names(model))
    if isinstance(checkpoint, Checkpoint):
        logger.info("image size: %s", describe_image_size(**picture_facts(model.config)))
    num_bytes = sum(weight.numel() for weight in model.parameters()) * torch.finfo(getattr(torch, dtype)).bits // 8
    require_space(output, int(1.02 * num_bytes) + 64 * 2**20, remedy=_REMEDY)
    return model


def _merge_adapter(model: PreTrainedModel, source: Adapter, base: str, logits: AnswerLogits) -> PreTrainedModel:
    """Merge the adapter into the base in memory, and record the logits before, with and after it."""
    logits.record("base", model)
    attached: Any = attach_adapter(model, source, base)
    logits.record("adapter", attached)
    merged = attached.merge_and_unload()
    logits.record("merged", merged)
    return merged


def _write_checkpoint(
    folder: Path, model: PreTrainedModel, checkpoint: Checkpoint | TextCheckpoint, output: Path
) -> None:
    """Write the weights and all that is needed to load them; `output`: the folder's name in messages."""
    model.config.use_cache = True
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise PokegemmaError(f"{output} could not be written: {error}") from error
    checkpoint.save_files(folder)
