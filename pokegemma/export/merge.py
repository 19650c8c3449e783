"""Merge a LoRA adapter into full-precision weights, and check that the logits stay the same."""

import logging
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import PreTrainedModel

from pokegemma.data.samples import read_samples
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.merge_check import check_merged_weights, require_weights, weight_names
from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.base import open_base
from pokegemma.gemma.adapters.reading import Adapter, read_adapter
from pokegemma.gemma.batches.collator import IGNORED_LABEL
from pokegemma.gemma.batches.processor_collator import Collator
from pokegemma.gemma.checkpoint_files import write_converter_files
from pokegemma.gemma.image_attention import attention_facts
from pokegemma.gemma.loading import Checkpoint, Dtype, open_checkpoint
from pokegemma.gemma.model_image_size import describe_image_size, picture_facts
from pokegemma.outputs import atomic_folder, refuse_to_replace, require_space
from pokegemma.provenance import write_run_record

logger = logging.getLogger(__name__)

_REMEDY = "free some or choose another --output_path"


@dataclass(frozen=True)
class Verification:
    """Relative differences of logits on real samples: root mean square of the difference over that of the logits."""

    num_samples: int
    adapter_effect: float  # adapter + base against base
    merged_error: float  # merged in memory against adapter + base, float32
    stored_error: float  # read back from disk against adapter + base
    dtype: Dtype


def _relative_rms(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.square().mean() / reference.square().mean()).sqrt().item()


class _AnswerLogits:
    """Logits of the answers to real samples, before, while and after an adapter is merged."""

    def __init__(self, collator: Collator, verify_on: Path | None, num_samples: int) -> None:
        self.collator, self.samples = collator, []
        self.logits: dict[str, torch.Tensor] = {}
        if verify_on is not None:
            collator.dataset_folder = verify_on.parent
            self.samples = list(islice(read_samples(verify_on), num_samples))

    @torch.no_grad()
    def record(self, name: str, model: torch.nn.Module) -> None:
        """Keep the logits of every answer token, (tokens, vocabulary) float32, on the CPU."""
        rows = []
        for sample in self.samples:
            batch = {key: tensor.to(model.device) for key, tensor in self.collator([sample]).items()}
            labels = batch.pop("labels")[0]
            places = (labels != IGNORED_LABEL).nonzero().squeeze(1) - 1
            rows.append(model(**batch, logits_to_keep=places).logits[0].float().cpu())
        self.logits[name] = torch.cat(rows) if rows else torch.empty(0)

    def verification(self, dtype: Dtype) -> Verification:
        """Compare what was recorded as base, adapter, merged and stored."""
        reference = self.logits["adapter"]
        return Verification(
            num_samples=len(self.samples),
            adapter_effect=_relative_rms(self.logits["base"] - reference, reference),
            merged_error=_relative_rms(self.logits["merged"] - reference, reference),
            stored_error=_relative_rms(self.logits["stored"] - reference, reference),
            dtype=dtype,
        )


def check_verification(verification: Verification, *, stored_tolerance: float | None = None) -> None:
    """Judge a verification; `stored_tolerance` replaces that of its type in `STORED_TOLERANCE`.

    Raises:
        CheckFailedError: the adapter changes nothing, or the logits of the merged weights differ from adapter + base.
    """
    v = verification
    if stored_tolerance is None:
        stored_tolerance = STORED_TOLERANCE[v.dtype]
    if not v.adapter_effect > 0:
        raise CheckFailedError("the adapter changes nothing; was it trained?")
    for name, error, tolerance in (
        ("merged", v.merged_error, MERGE_TOLERANCE),
        (f"stored {v.dtype}", v.stored_error, stored_tolerance),
    ):
        if math.isnan(error) or error > tolerance:
            raise CheckFailedError(
                f"{name} weights differ from adapter + base by {error:.2e} of the logits (at most {tolerance:.0e})"
            )
    if v.stored_error > v.adapter_effect:
        logger.warning(
            "rounding to %s moves the logits by %.1e, more than the adapter does (%.1e); --dtype float32 keeps it",
            v.dtype,
            v.stored_error,
            v.adapter_effect,
        )


def merge(
    adapter: Path,
    output: Path,
    *,
    base: str | None = None,
    dtype: Dtype = "bfloat16",
    verify_on: Path | None = None,
    num_samples: int = 8,
    stored_tolerance: float | None = None,
    device: str = "cpu",
    overwrite: bool = False,
) -> Verification | None:
    """Write base + adapter as one checkpoint with the published layout: weights, processor, tokenizer.model.

    Merging is done in float32, whatever the adapter was trained on; only the result is rounded to `dtype`.

    Args:
        base: folder or Hub id; None: the one that the adapter names.
        verify_on: JSONL file whose first `num_samples` samples are shown to base, adapter + base, merged and stored.
        stored_tolerance: as in `check_verification`.

    Raises:
        PokegemmaError: the adapter or the base cannot be read, or the disk is full.
        CheckFailedError: the verification failed; nothing is left at `output`.
    """
    source = read_adapter(adapter)
    checkpoint = open_base(source, base)
    base = checkpoint.path
    refuse_to_replace(output, adapter, base, flag="--output_path")
    if checkpoint.is_quantised:
        raise PokegemmaError(f"{base}: its weights are quantised; name the full-precision checkpoint as --base_model")
    layout = (source.run.get("options") or {}).get("layout", "grid")
    with atomic_folder(output, stage="merge", overwrite=overwrite) as folder:
        logits = _AnswerLogits(checkpoint.collator(layout=layout, dataset_folder=Path()), verify_on, num_samples)
        model = _load_base(checkpoint, output, dtype=dtype, device=device)
        model = _merge_adapter(model, source, base, logits).to(getattr(torch, dtype))
        _write_checkpoint(folder, model, checkpoint, output)
        names, config = weight_names(model), model.config
        del model
        weights = check_merged_weights(folder, base, source, names)
        logger.info("weights compared: %d changed by the adapter, %d as in the base", *vars(weights).values())
        verification = None
        if logits.samples:
            logits.record("stored", open_checkpoint(folder).load_model(device=device))
            verification = logits.verification(dtype)
            check_verification(verification, stored_tolerance=stored_tolerance)
        write_run_record(
            folder,
            stage="merge",
            options={"lora_path": str(adapter), "base_model": base, "dtype": dtype, "layout": layout},
            image_size_px=picture_facts(config)["image_size_px"],
            **attention_facts(config),
            training=source.run or None,
            weights=vars(weights),
            verification=verification and vars(verification),
        )
    return verification


def _load_base(checkpoint: Checkpoint, output: Path, *, dtype: Dtype, device: str) -> PreTrainedModel:
    """Load the base in float32, if all its weights are there and its size in `dtype` fits on the disk of `output`."""
    model = checkpoint.load_model(device=device)
    require_weights(checkpoint.path, weight_names(model))
    logger.info("image size: %s", describe_image_size(**picture_facts(model.config)))
    num_bytes = sum(weight.numel() for weight in model.parameters()) * torch.finfo(getattr(torch, dtype)).bits // 8
    require_space(output, int(1.02 * num_bytes) + 64 * 2**20, remedy=_REMEDY)
    return model


def _merge_adapter(model: PreTrainedModel, source: Adapter, base: str, logits: _AnswerLogits) -> PreTrainedModel:
    """Merge the adapter into the base in memory, and record the logits before, with and after it."""
    logits.record("base", model)
    attached: Any = attach_adapter(model, source, base)
    logits.record("adapter", attached)
    merged = attached.merge_and_unload()
    logits.record("merged", merged)
    return merged


def _write_checkpoint(folder: Path, model: PreTrainedModel, checkpoint: Checkpoint, output: Path) -> None:
    """Write the weights and all that is needed to load them; `output`: the folder's name in messages."""
    model.config.use_cache = True
    try:
        model.save_pretrained(folder)
    except SafetensorError as error:
        raise PokegemmaError(f"{output} could not be written: {error}") from error
    checkpoint.processor.save_pretrained(folder)
    checkpoint.copy_tokenizer_model(folder)
    write_converter_files(checkpoint.processor, folder)
