"""Loss and gradients of the fast ways of training next to stock transformers and TRL, in float32 and bfloat16."""

from collections.abc import Iterator, Sequence
from itertools import groupby
from typing import Any

import torch
from peft import get_peft_model
from transformers import Gemma3ForConditionalGeneration

from benchmarks.gpu_parts.plan import Run
from benchmarks.train_throughput import stock_batch
from pokegemma.data.samples import Sample, read_samples
from pokegemma.data.trajectories import Trajectory
from pokegemma.engines.questions import shown
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import IGNORED_LABEL
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.families import FAMILIES
from pokegemma.gemma.loading import Dtype, open_checkpoint
from pokegemma.tables import format_markdown_table
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.options import ModelOptions

NUM_SAMPLES, NUM_DECISIONS = 2, 3
DTYPES: tuple[Dtype, ...] = ("float32", "bfloat16")
STOCK_FRAMES, STOCK_TRAJECTORY = "stock, frames", "stock, a row a decision"
WAYS = {
    "frames": STOCK_FRAMES,
    "frames, cached features": STOCK_FRAMES,
    "frames, shared row": STOCK_FRAMES,
    "trajectory": STOCK_TRAJECTORY,
    "trajectory, cached features": STOCK_TRAJECTORY,
}
"""Our ways of training, and the stock way that must have the same loss and gradients."""

Batch = dict[str, torch.Tensor]
Step = tuple[float, torch.Tensor]
"""A loss, and the gradient (weights,) of an adapter."""


def measure(run: Run) -> dict[str, Any]:
    """Return how far each way is from stock training in the same type, and stock in bfloat16 from itself in float32."""
    session = first_session(run, num_samples=NUM_SAMPLES + NUM_DECISIONS)
    samples, trajectory = session[-NUM_SAMPLES:], Trajectory(tuple(session[-NUM_DECISIONS:]))
    steps: dict[tuple[str, Dtype], Step] = {}
    tokens: dict[str, int] = {}
    for dtype in DTYPES:
        for name, model, batches in ways_of(run, samples, trajectory, dtype):
            steps[name, dtype] = loss_and_gradient(model, batches)
            tokens[name] = sum(int(batch["attention_mask"].sum()) for batch in batches)
    return {
        "losses": {name: loss for (name, dtype), (loss, _) in steps.items() if dtype == DTYPES[0]},
        "tokens": tokens,
        "differences": {
            name: {dtype: difference(steps[name, dtype], reference(steps, name, dtype)) for dtype in DTYPES}
            for name in tokens
        },
    }


def first_session(run: Run, *, num_samples: int) -> list[Sample]:
    """Return the first samples of the first session that has enough.

    Raises:
        PokegemmaError: none has.
    """
    for _, group in groupby(read_samples(run.dataset / "train.jsonl"), key=lambda sample: sample.session):
        session = list(group)[:num_samples]
        if len(session) == num_samples:
            return session
    raise PokegemmaError(f"{run.dataset}: no session has {num_samples} samples")


def reference(steps: dict[tuple[str, Dtype], Step], name: str, dtype: Dtype) -> Step:
    """Return what a way is compared with: stock in the same type; for stock itself in float32."""
    return steps[WAYS[name], dtype] if name in WAYS else steps[name, DTYPES[0]]


def difference(found: Step, expected: Step) -> dict[str, float]:
    """Return how far a loss is off, and a gradient relative to the norm of the expected one."""
    gradient = float((found[1] - expected[1]).norm() / expected[1].norm())
    return {"loss": abs(found[0] - expected[0]), "gradient": gradient}


def ways_of(
    run: Run, samples: Sequence[Sample], trajectory: Trajectory, dtype: Dtype
) -> Iterator[tuple[str, Gemma3ForConditionalGeneration, list[Batch]]]:
    """Yield (name, model with an adapter, batches) of each way; the loss of a way is that of all its batches."""
    checkpoint, folder = open_checkpoint(run.checkpoint), run.dataset
    stock = with_adapter(Gemma3ForConditionalGeneration.from_pretrained(run.checkpoint, dtype=getattr(torch, dtype)))
    parts = [Trajectory(trajectory.samples[:end]) for end in range(1, NUM_DECISIONS + 1)]
    for name, examples in ((STOCK_FRAMES, samples), (STOCK_TRAJECTORY, parts)):
        conversations = [shown(example, "frames") for example in examples]
        rows = [(messages, [folder / path for path in paths]) for messages, paths in conversations]
        yield name, stock, [stock_batch(stock, checkpoint.processor, [row]) for row in rows]
    del stock
    model = checkpoint.load_model(dtype=dtype)
    paths = sorted({str(folder / path) for sample in (*samples, *trajectory.samples) for path in sample.frames})
    features = prepare_cache(run.folder / f"features_{dtype}", model, checkpoint.processor, paths, device=model.device)
    model = with_adapter(model)
    for name in WAYS:
        layout = "trajectory" if name.startswith("trajectory") else "frames"
        collator = checkpoint.collator(
            layout=layout,
            dataset_folder=folder,
            samples_per_row=NUM_SAMPLES if "shared" in name else 1,
            features=features if "cached" in name else None,
        )
        yield name, model, [collator([trajectory] if layout == "trajectory" else samples)]


def with_adapter(model: Gemma3ForConditionalGeneration) -> Gemma3ForConditionalGeneration:
    """Return the model with LoRA on its language model: weights that have an effect, the same for each call."""
    options = ModelOptions(finetuning="lora", lora_dropout=0.0)
    adapted = get_peft_model(model, lora_config(options, FAMILIES["gemma3"]))
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, weight in adapted.named_parameters():
            if "lora_" in name:
                weight.copy_(torch.randn(weight.shape, generator=generator) * 0.01)
    return adapted.get_base_model().eval()


def answer_loss(model: Gemma3ForConditionalGeneration, batch: Batch) -> tuple[torch.Tensor, int]:
    """Return the summed loss of the labelled tokens, and their number.

    The LM head runs on these alone, as in training: the logits of 1,024 tokens take 1 GiB.
    """
    inputs = dict(batch)
    labels = inputs.pop("labels")
    hidden = model.model(**inputs, use_cache=False).last_hidden_state
    rows, places = (labels[:, 1:] != IGNORED_LABEL).nonzero(as_tuple=True)
    logits = model.lm_head(hidden[rows, places]).float()
    return torch.nn.functional.cross_entropy(logits, labels[rows, places + 1], reduction="sum"), len(rows)


def loss_and_gradient(model: Gemma3ForConditionalGeneration, batches: Sequence[Batch]) -> Step:
    """Return the mean loss of all labelled tokens of batches, and the adapter's gradient (weights,) in float32."""
    model.zero_grad()
    total, number = 0.0, 0
    for batch in batches:
        loss, num_tokens = answer_loss(model, batch)
        loss.backward()
        total, number = total + loss.item(), number + num_tokens
    gradients = [weight.grad.float().flatten() for weight in model.parameters() if weight.grad is not None]
    return total / number, torch.cat(gradients) / number


def table(record: dict[str, Any]) -> str:
    columns = ["", "tokens", "loss", "next to", *(f"{dtype}: Δ loss, Δ gradient" for dtype in DTYPES)]
    rows = []
    for name, found in record["differences"].items():
        cells = [f"{one['loss']:.1e}, {one['gradient']:.1e}" for one in found.values()]
        if name not in WAYS:
            cells[0] = ""
        next_to = WAYS.get(name, "itself in float32")
        rows.append((name, f"{record['tokens'][name]:,}", f"{record['losses'][name]:.4f}", next_to, *cells))
    note = (
        f"Loss of the answers, and the gradient of a LoRA adapter as one vector, relative to its norm. "
        f"{NUM_SAMPLES} neighbouring samples as frames; {NUM_DECISIONS} decisions as a conversation.\n\n"
    )
    return note + format_markdown_table(columns, rows)
