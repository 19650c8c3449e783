"""The probabilities of the buttons from each fast way of deciding, next to plain passes of stock transformers."""

import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import Gemma3ForConditionalGeneration

from benchmarks.decision_latency import BenchmarkOptions, choose_session, prompt_batch
from benchmarks.gpu_parts.plan import Run
from benchmarks.play_path import play_recorded
from benchmarks.real_gemma_parts.training import DTYPES
from benchmarks.train_throughput import record_dataset
from pokegemma.data.prompts import BUTTONS, LAYOUTS, Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.collator import expand_pictures
from pokegemma.gemma.button_scores import score_buttons, score_by_rows
from pokegemma.gemma.loading import Dtype, open_checkpoint
from pokegemma.play.cached_player import CachedPlayer
from pokegemma.play.history import PlayView
from pokegemma.tables import format_markdown_table

NUM_DECISIONS = 3
PLAIN, ONE_PASS, BATCH = "plain passes of stock transformers", "one pass", "one pass for all, shared beginning"
CACHED, PREPARED = "session cache", "session cache, prepared"


Scores = dict[tuple[Layout, str, Dtype], np.ndarray]
"""Probabilities (decisions, 8) of the buttons, by layout, way and type."""


def measure(run: Run) -> dict[str, Any]:
    """Return, for each layout and way, the largest difference of a probability in each type, and equal buttons.

    The session is one of the toy game: in recorded ones the first turns are no samples, so that play would see others.
    """
    scores: Scores = {}
    tokens: dict[str, list[int]] = {}
    with tempfile.TemporaryDirectory(prefix="pokegemma_real_gemma_") as folder:
        dataset = record_dataset(Path(folder), num_sessions=2, num_turns=NUM_DECISIONS + 1)
        session = choose_session(BenchmarkOptions(dataset_path=str(dataset), num_decisions=NUM_DECISIONS))[1]
        for dtype in DTYPES:
            checkpoint = open_checkpoint(run.checkpoint)
            stock = Gemma3ForConditionalGeneration.from_pretrained(run.checkpoint, dtype=getattr(torch, dtype)).eval()
            ours = checkpoint.load_model(dtype=dtype)
            for layout in LAYOUTS:
                collator = checkpoint.collator(layout=layout, dataset_folder=dataset)
                batches = [prompt_batch(collator, example) for example in examples_of(session, layout)]
                tokens[layout] = [batch["input_ids"].shape[1] for batch in batches]
                rows = [score_by_rows(stock, expand_pictures(batch), collator.button_tokens) for batch in batches]
                scores[layout, PLAIN, dtype] = torch.cat(rows).double().numpy()
                for way, found in score_in_fast_ways(Predictor(ours, collator), session, batches).items():
                    scores[layout, way, dtype] = found
    return {
        "tokens": tokens,
        "probabilities": {layout: scores[layout, PLAIN, DTYPES[0]].tolist() for layout in LAYOUTS},
        "differences": [
            {"layout": layout, "way": way, "dtype": dtype, **compare(found, expected(scores, layout, way, dtype))}
            for (layout, way, dtype), found in scores.items()
        ],
    }


def examples_of(session: Sequence[Sample], layout: Layout) -> list[Sample | Trajectory]:
    """Return what each decision of a session is asked with: its sample, or the session up to it."""
    if layout != "trajectory":
        return list(session)
    return [Trajectory(tuple(session[:end])) for end in range(1, len(session) + 1)]


def expected(scores: Scores, layout: Layout, way: str, dtype: Dtype) -> np.ndarray:
    """Return what a way is compared with: plain passes in the same type; for these themselves in float32."""
    return scores[layout, PLAIN, DTYPES[0] if way == PLAIN else dtype]


def compare(found: np.ndarray, reference: np.ndarray) -> dict[str, Any]:
    return {
        "largest": float(np.abs(found - reference).max()),
        "same_button": int((found.argmax(1) == reference.argmax(1)).sum()),
        "decisions": len(found),
    }


def score_in_fast_ways(
    predictor: Predictor, session: Sequence[Sample], batches: Sequence[dict[str, torch.Tensor]]
) -> dict[str, np.ndarray]:
    """Return the probabilities (decisions, 8) of a session by each way.

    Args:
        batches: the whole prompts, one a decision.
    """
    collator = predictor.collator
    rows = [score_buttons(predictor.model, batch, collator.button_tokens) for batch in batches]
    found = {ONE_PASS: torch.cat(rows).double().numpy()}
    if collator.layout != "trajectory":
        found[BATCH] = predictor.score(session)
    player = new_player(predictor, session)
    decided = []
    for sample in session:
        decided.append(player.decide(collator.dataset_folder / sample.frames[-1]).probabilities)
        player.pressed(*sample.metadata["buttons"], answer=sample.output)
    found[CACHED] = np.stack(decided)
    played = play_recorded(new_player(predictor, session), session, collator.dataset_folder)
    return {**found, PREPARED: np.stack([decision.probabilities for decision in played])}


def new_player(predictor: Predictor, session: Sequence[Sample]) -> CachedPlayer:
    player = CachedPlayer(predictor, PlayView(predictor.collator.layout, max_decisions=len(session) + 1))
    player.start(session[0].metadata["goal"])
    return player


def table(record: dict[str, Any]) -> str:
    ways: dict[tuple[str, str], list[str]] = {}
    for row in record["differences"]:
        is_reference = row["way"] == PLAIN and row["dtype"] == DTYPES[0]
        cell = "" if is_reference else f"{row['largest']:.1e}, {row['same_button']} of {row['decisions']}"
        ways.setdefault((row["layout"], row["way"]), []).append(cell)
    rows = [(f"{layout}: {way}", *cells) for (layout, way), cells in ways.items()]
    lengths = "; ".join(f"{layout} {', '.join(map(str, tokens))}" for layout, tokens in record["tokens"].items())
    likeliest = ", ".join(
        f"{BUTTONS[int(np.argmax(probabilities))]} {max(probabilities):.2f}"
        for probabilities in record["probabilities"]["frames"]
    )
    note = (
        f"Largest difference of a probability, and equal buttons, in {NUM_DECISIONS} decisions of the toy game. "
        f"Prompts have these tokens: {lengths}. Fast ways are compared with plain passes in the same type, and plain "
        f"passes in bfloat16 with those in float32. As frames, the likeliest buttons are {likeliest}.\n\n"
    )
    return note + format_markdown_table(("", *(f"{dtype}: Δ probability, same button" for dtype in DTYPES)), rows)
