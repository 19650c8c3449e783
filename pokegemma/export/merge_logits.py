"""Compare the logits of base, adapter + base, merged and stored weights on examples of what the adapter learned."""

import logging
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from pokegemma.data.samples import read_samples
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE
from pokegemma.gemma.batches.collator import IGNORED_LABEL
from pokegemma.gemma.loading import Checkpoint, Dtype
from pokegemma.gemma.text.checkpoint import TextCheckpoint

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Verification:
    """Relative differences of logits on real samples: root mean square of the difference over that of the logits."""

    num_samples: int
    adapter_effect: float  # adapter + base against base
    merged_error: float  # merged in memory against adapter + base, float32
    stored_error: float  # read back from disk against adapter + base
    dtype: Dtype


def relative_rms(difference: torch.Tensor, reference: torch.Tensor) -> float:
    """Return the root mean square of a difference over that of what it differs from."""
    return (difference.square().mean() / reference.square().mean()).sqrt().item()


@dataclass(frozen=True)
class VerificationExamples:
    """Examples on which logits are compared; `collate` makes of a list of one the model's inputs and its labels."""

    examples: Sequence[Any]
    collate: Callable[[list[Any]], dict[str, torch.Tensor]]


class AnswerLogits:
    """Logits of the answers to real samples, before, while and after an adapter is merged."""

    def __init__(self, shown: VerificationExamples) -> None:
        self.shown = shown
        self.logits: dict[str, torch.Tensor] = {}

    @torch.no_grad()
    def record(self, name: str, model: torch.nn.Module) -> None:
        """Keep the logits of every answer token, (tokens, vocabulary) float32, on the CPU."""
        rows = []
        for example in self.shown.examples:
            batch = {key: tensor.to(model.device) for key, tensor in self.shown.collate([example]).items()}
            labels = batch.pop("labels")[0]
            places = (labels != IGNORED_LABEL).nonzero().squeeze(1) - 1
            rows.append(model(**batch, logits_to_keep=places).logits[0].float().cpu())
        self.logits[name] = torch.cat(rows) if rows else torch.empty(0)

    def verification(self, dtype: Dtype) -> Verification:
        """Compare what was recorded as base, adapter, merged and stored."""
        reference = self.logits["adapter"]
        return Verification(
            num_samples=len(self.shown.examples),
            adapter_effect=relative_rms(self.logits["base"] - reference, reference),
            merged_error=relative_rms(self.logits["merged"] - reference, reference),
            stored_error=relative_rms(self.logits["stored"] - reference, reference),
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
    advice = "" if v.dtype == "float32" else "; --dtype float32 keeps them"
    for name, error, tolerance, remedy in (
        ("merged", v.merged_error, MERGE_TOLERANCE, ""),
        (f"stored {v.dtype}", v.stored_error, stored_tolerance, advice),
    ):
        if math.isnan(error) or error > tolerance:
            limit = f"(at most {tolerance:.0e}){remedy}"
            raise CheckFailedError(f"{name} weights differ from adapter + base by {error:.2e} of the logits {limit}")
    if v.stored_error > v.adapter_effect:
        logger.warning(
            "rounding to %s moves the logits by %.1e, more than the adapter does (%.1e); --dtype float32 keeps it",
            v.dtype,
            v.stored_error,
            v.adapter_effect,
        )


def find_examples(
    checkpoint: Checkpoint | TextCheckpoint,
    verify_on: Path | VerificationExamples | None,
    num_samples: int,
    *,
    layout: str | None,
) -> VerificationExamples:
    """Return what logits are compared on; nothing without `verify_on`.

    Raises:
        PokegemmaError: samples with pictures for a model without vision, or the other way round; or there are none.
    """
    if isinstance(checkpoint, TextCheckpoint) and isinstance(verify_on, Path):
        raise PokegemmaError(
            f"{verify_on}: samples with pictures; {checkpoint.path} reads battles (see docs/battles.md)"
        )
    if isinstance(checkpoint, Checkpoint) and isinstance(verify_on, VerificationExamples):
        raise PokegemmaError(f"{checkpoint.path} is not a Gemma 3 for text alone, and cannot be verified on battles")
    if isinstance(checkpoint, TextCheckpoint):
        return verify_on or VerificationExamples((), dict)
    collator = checkpoint.collator(layout=layout, dataset_folder=Path() if verify_on is None else verify_on.parent)
    samples = [] if verify_on is None else list(islice(read_samples(verify_on), num_samples))
    return VerificationExamples(samples, collator)
