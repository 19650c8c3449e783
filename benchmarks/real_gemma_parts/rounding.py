"""What rounding weights to bfloat16 costs the logits of the checkpoint, before anything is trained."""

from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_parts.plan import Run
from pokegemma.export.merge_logits import AnswerLogits, find_examples, relative_rms
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.tables import format_markdown_table

NUM_SAMPLES = 3
PARTS: dict[str, Callable[[str], bool]] = {
    "all": lambda name: True,
    "vision tower and projector": lambda name: "language_model" not in name,
    "language model": lambda name: "language_model" in name,
}
"""Whether a weight is rounded, by its name."""


@torch.no_grad()
def measure(run: Run) -> dict[str, Any]:
    """Round the weights of each part, the others as they are, and return the relative difference of the logits."""
    checkpoint = open_checkpoint(run.checkpoint)
    model = checkpoint.load_model()
    logits = AnswerLogits(find_examples(checkpoint, run.dataset / "eval.jsonl", NUM_SAMPLES, layout="grid"))
    logits.record("exact", model)
    exact = {name: weight.clone() for name, weight in model.named_parameters()}
    differences = {}
    for part, is_rounded in PARTS.items():
        for name, weight in model.named_parameters():
            weight.copy_(exact[name].bfloat16() if is_rounded(name) else exact[name])
        logits.record(part, model)
        differences[part] = relative_rms(logits.logits[part] - logits.logits["exact"], logits.logits["exact"])
    return {"differences": differences}


def table(record: dict[str, Any]) -> str:
    rows = [(part, f"{difference:.1e}") for part, difference in record["differences"].items()]
    return (
        f"The relative difference of the logits of the answers to {NUM_SAMPLES} held-out samples as grids, root mean "
        f"square.\n\n{format_markdown_table(('rounded to bfloat16', 'difference'), rows)}"
    )
