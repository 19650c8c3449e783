"""Describe a search for the batch size: each trial, the reason for the chosen size, what to change if none fits."""

from collections.abc import Sequence

from pokegemma.environment import GIB, default_finetuning
from pokegemma.training.batch_search.attempts import Attempt
from pokegemma.training.options import RunOptions


def gib(num_bytes: int) -> str:
    return f"{num_bytes / GIB:.2f}"


def _on_off(attempt: Attempt) -> str:
    return "on" if attempt.gradient_checkpointing else "off"


def describe_attempt(attempt: Attempt, *, limit_bytes: int) -> str:
    """Return an attempt as a line of the log: its memory and speed, or why it does not fit."""
    trial = attempt.trial
    what = f"batch {attempt.batch_size}, gradient checkpointing {_on_off(attempt)}"
    if not trial.fits:
        return f"{what}: does not fit ({trial.reason})"
    used = f"{gib(trial.peak_bytes)} of {gib(limit_bytes)} GiB"
    return f"{what}: fits ({used}), {trial.decisions_per_second:.3g} decisions/s"


def explain_attempts(attempts: Sequence[Attempt], *, limit_bytes: int) -> list[str]:
    """Return what fits, with and without gradient checkpointing, and how fast it is, the fastest first."""
    lines = []
    for checkpointing in (True, False):
        tried = [attempt for attempt in attempts if attempt.gradient_checkpointing == checkpointing]
        fitting = max((a for a in tried if a.trial.fits), key=lambda a: a.batch_size, default=None)
        failing = min((a for a in tried if not a.trial.fits), key=lambda a: a.batch_size, default=None)
        if not tried:
            continue
        line = f"gradient checkpointing {_on_off(tried[0])}: "
        if fitting:
            line += f"batch {fitting.batch_size} fits ({gib(fitting.trial.peak_bytes)} of {gib(limit_bytes)} GiB), "
        line += f"{failing.batch_size} does not ({failing.trial.reason})" if failing else "none larger was tried"
        lines.append(line)
    fitting = sorted((a for a in attempts if a.trial.fits), key=lambda a: -a.trial.decisions_per_second)
    speeds = [f"{a.trial.decisions_per_second:.3g} (batch {a.batch_size}, {_on_off(a)})" for a in fitting]
    return [*lines, f"decisions/s by batch and checkpointing: {', '.join(speeds)}"] if speeds else lines


def suggest_changes(options: RunOptions) -> list[str]:
    """Return options that need less memory and are not set already."""
    data, training, model = options.data, options.training, options.model
    changes = [
        (not training.gradient_checkpointing, "--gradient_checkpointing true"),
        (model.finetuning == "full", "--finetuning lora"),
        (model.finetuning != "qlora" and default_finetuning() == "qlora", "--finetuning qlora"),
        (data.layout != "grid", "--layout grid"),
        (data.layout == "trajectory" and data.max_decisions > 1, f"--max_decisions {data.max_decisions // 2}"),
        (
            data.vision_features is None and not (model.train_vision_tower or model.train_projector),
            "--vision_features DIR",
        ),
        (model.image_size is None, "--image_size 448"),
        (model.train_vision_tower, "leave out --train_vision_tower"),
        (model.attn_implementation == "eager", "--attn_implementation sdpa"),
        (training.dataloader_num_workers > 0 and training.device.type == "cpu", "--dataloader_num_workers 0"),
        (True, "a smaller model, or more memory"),
    ]
    return [change for applies, change in changes if applies]
