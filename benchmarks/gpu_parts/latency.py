"""One decision in each way of decision_latency.py, with the checkpoint at its full picture size, and its floor."""

import functools
from dataclasses import replace
from typing import Any

import torch
from transformers import Gemma3Config

from benchmarks.decision_cost import Rates
from benchmarks.decision_latency import (
    SCORED,
    STOPPED,
    WHOLE,
    BenchmarkOptions,
    Meter,
    Setting,
    check_difference,
    choose_session,
    load_settings,
    summarise,
)
from benchmarks.gpu_parts.plan import DECISION, RATES, Run


def measure(unit: str, run: Run) -> dict[str, Any]:
    """Return the rows of a layout.

    Random weights write no answers, so generation writes as many tokens as the recorded answer has, and buttons are
    compared with those that are scored in one pass.

    Raises:
        CheckFailedError: in float32, a probability from a cache differs from that of the whole prompt.
    """
    options = BenchmarkOptions(dataset_path=str(run.dataset), num_decisions=2 if run.rehearse else 6)
    setting = settings_of(run)[unit.removeprefix(f"{DECISION} as ")]
    _, session = choose_session(options)
    tokenizer = setting.predictor.collator.processor.tokenizer
    options = replace(options, max_new_tokens=len(tokenizer(session[0].output, add_special_tokens=False)["input_ids"]))
    meter = Meter(options, setting)
    meter.run(session[:1], record=False)  # warm up
    meter.run(session, record=True)
    if setting.stock.dtype == torch.float32:
        check_difference(setting)
    rates = Rates(**{name: run.measured()[RATES][name] for name in ("flop_per_s", "bytes_per_s")})
    rows = summarise(setting, rates, compared_with=SCORED)
    for row in rows:
        if row["way"] in (WHOLE, STOPPED):
            row |= {"same_button": 0, "compared": 0}
    return {
        "rows": rows,
        "largest_difference": setting.largest_difference,
        "dtype": str(setting.stock.dtype),
        "num_decisions": options.num_decisions,
        "tokens_written": options.max_new_tokens,
    }


@functools.cache
def settings_of(run: Run) -> dict[str, Setting]:
    """Return the settings of all layouts, which share their models."""
    size_px = Gemma3Config.from_pretrained(run.checkpoint).vision_config.image_size
    options = BenchmarkOptions(dataset_path=str(run.dataset))
    return {setting.layout: setting for setting in load_settings(options, [(size_px, run.checkpoint)])}
