"""Merge a LoRA adapter into full-precision weights, and show that the merged checkpoint says the same."""

import logging
import math
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from safetensors import SafetensorError, safe_open
from transformers import PreTrainedModel

from pokegemma.data.samples import Sample, read_samples
from pokegemma.deploy.tolerances import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.outputs import atomic_folder, require_space
from pokegemma.provenance import read_run_record, write_run_record
from pokegemma.training.collator import IGNORED_LABEL
from pokegemma.training.converter_files import write_converter_files
from pokegemma.training.image_attention import adapter_image_attention, attention_facts
from pokegemma.training.image_size import adapter_image_size, describe_image_size, picture_facts
from pokegemma.training.models import (
    Dtype,
    copy_tokenizer_model,
    load_config,
    load_model,
    load_processor,
    weights_fingerprint,
)
from pokegemma.training.processor_collator import Collator, make_collator

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


def read_adapter(path: Path) -> tuple[PeftConfig, dict[str, Any]]:
    """Return an adapter's config and the run.json of its training, empty where there is none.

    A checkpoint-N folder of a run that has not finished will do, when it is named.

    Raises:
        PokegemmaError: there is no whole adapter at `path`.
    """
    if not path.is_dir():
        raise PokegemmaError(f"{path}: no such folder")
    run = read_run_record(path) or {}
    if (path / "config.json").is_file():
        raise PokegemmaError(f"{path}: a whole model, nothing to merge")
    checkpoints = sorted(checkpoint.name for checkpoint in path.glob("checkpoint-*"))
    unfinished = run.get("status") in ("running", "interrupted") and not path.name.startswith("checkpoint-")
    if unfinished or (checkpoints and not (path / "adapter_config.json").is_file()):
        raise PokegemmaError(
            f"{path}: training did not finish ({', '.join(checkpoints) or 'no checkpoint'}); continue it with "
            "--resume_from_checkpoint, or name one of its checkpoints"
        )
    if not (path / "adapter_config.json").is_file():
        raise PokegemmaError(f"{path}: holds no adapter (adapter_config.json not found)")
    try:
        with safe_open(path / "adapter_model.safetensors", framework="pt") as weights:
            num_weights = len(weights.keys())
        config = PeftConfig.from_pretrained(path)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PokegemmaError(f"{path}: the adapter is incomplete or damaged: {error}") from error
    if not num_weights:
        raise PokegemmaError(f"{path}: the adapter has no weights")
    return config, run


def check_base(base: str, run: dict[str, Any]) -> None:
    """Refuse a quantised base, and one whose weights are not those that the adapter was trained on.

    Raises:
        PokegemmaError: it is either.
    """
    if getattr(load_config(base), "quantization_config", None):
        raise PokegemmaError(f"{base}: its weights are quantised; name the full-precision checkpoint as --base_model")
    trained_on = run.get("base_fingerprint")
    if trained_on and weights_fingerprint(base) != trained_on:
        raise PokegemmaError(f"{base} is not the base of this adapter, which was trained on {run.get('base_model')}")


def _attach(model: PreTrainedModel, base: str, adapter: Path) -> PeftModel:
    try:
        return PeftModel.from_pretrained(model, adapter)
    except (RuntimeError, ValueError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:200]
        raise PokegemmaError(f"{adapter} does not fit {base}, is it the wrong base? {reason}") from error


@torch.no_grad()
def _answer_logits(model: torch.nn.Module, collator: Collator, samples: list[Sample]) -> torch.Tensor:
    """Return the logits of every answer token, (tokens, vocabulary) float32, on the CPU."""
    rows = []
    for sample in samples:
        batch = {name: tensor.to(model.device) for name, tensor in collator([sample]).items()}
        labels = batch.pop("labels")[0]
        places = (labels != IGNORED_LABEL).nonzero().squeeze(1) - 1
        rows.append(model(**batch, logits_to_keep=places).logits[0].float().cpu())
    return torch.cat(rows)


def _relative_rms(difference: torch.Tensor, reference: torch.Tensor) -> float:
    return (difference.square().mean() / reference.square().mean()).sqrt().item()


def check(verification: Verification, *, stored_tolerance: float | None = None) -> None:
    """Judge a verification; `stored_tolerance` replaces that of its type in `STORED_TOLERANCE`.

    Raises:
        CheckFailedError: the adapter changes nothing, or the merged weights do not say what adapter + base say.
    """
    v = verification
    if stored_tolerance is None:
        stored_tolerance = STORED_TOLERANCE[v.dtype]
    if not v.adapter_effect > 0:
        raise CheckFailedError("the adapter changes nothing: was it trained?")
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
            v.dtype, v.stored_error, v.adapter_effect,
        )  # fmt: skip


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
        verify_on: JSONL file whose first `num_samples` samples are put to base, adapter + base, merged and stored.
        stored_tolerance: as in `check`.

    Raises:
        PokegemmaError: the adapter, the base or the disk is at fault.
        CheckFailedError: the verification failed; nothing is left at `output`.
    """
    config, run = read_adapter(adapter)
    base = base or config.base_model_name_or_path
    for source in (adapter, Path(base)):
        if source.resolve().is_relative_to(output.resolve()):
            raise PokegemmaError(f"--output_path {output} holds {source}, which merging needs; choose another")
    check_base(base, run)
    layout = run.get("options", {}).get("layout", "grid")
    with atomic_folder(output, stage="merge", overwrite=overwrite) as folder:
        image_size, attention = adapter_image_size(adapter), adapter_image_attention(adapter)
        processor = load_processor(base, image_size, attention)
        model: Any = load_model(base, image_size_px=image_size, attention=attention, dtype="float32", device=device)
        logger.info("image size: %s", describe_image_size(model.config))
        num_bytes = sum(weight.numel() for weight in model.parameters()) * torch.finfo(getattr(torch, dtype)).bits // 8
        require_space(output, int(1.02 * num_bytes) + 64 * 2**20, remedy=_REMEDY)
        logits: dict[str, torch.Tensor] = {}
        samples: list[Sample] = []
        collator = make_collator(processor, layout=layout, dataset_folder=Path())
        if verify_on is not None:
            collator.dataset_folder = verify_on.parent
            samples = list(islice(read_samples(verify_on), num_samples))
            logits["base"] = _answer_logits(model, collator, samples)
        model = _attach(model, base, adapter)
        if samples:
            logits["adapter"] = _answer_logits(model, collator, samples)
        model = model.merge_and_unload(safe_merge=True)
        if samples:
            logits["merged"] = _answer_logits(model, collator, samples)
        model = model.to(getattr(torch, dtype))
        model.config.use_cache = True
        try:
            model.save_pretrained(folder)
        except SafetensorError as error:
            raise PokegemmaError(f"{output} could not be written: {error}") from error
        processor.save_pretrained(folder)
        copy_tokenizer_model(base, folder)
        write_converter_files(processor, folder)
        facts = {"image_size_px": picture_facts(model.config)["image_size_px"], **attention_facts(model.config)}
        del model
        verification = None
        if samples:
            logits["stored"] = _answer_logits(load_model(folder, dtype="float32", device=device), collator, samples)
            reference = logits["adapter"]
            verification = Verification(
                num_samples=len(samples),
                adapter_effect=_relative_rms(logits["base"] - reference, reference),
                merged_error=_relative_rms(logits["merged"] - reference, reference),
                stored_error=_relative_rms(logits["stored"] - reference, reference),
                dtype=dtype,
            )
            check(verification, stored_tolerance=stored_tolerance)
        options = {"lora_path": str(adapter), "base_model": base, "dtype": dtype, "layout": layout}
        write_run_record(
            folder, stage="merge", options=options, **facts,
            training=run or None, verification=verification and vars(verification),
        )  # fmt: skip
    return verification
