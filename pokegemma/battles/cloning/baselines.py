"""How well the recorded actions are guessed without a model."""

import numpy as np
from datasets import Dataset

from pokegemma.battles.cloning.rows import unpack_legal
from pokegemma.battles.trajectories.actions import NUM_ACTIONS


def count_actions(dataset: Dataset) -> np.ndarray:
    """Return how often each action was played, (13,) int64."""
    return np.bincount(np.asarray(dataset["action"]), minlength=NUM_ACTIONS)


def measure_baselines(train: Dataset, held_out: Dataset) -> dict[str, float]:
    """Return the accuracy of two guesses on held-out decisions.

    uniform_legal: any legal action, each as often as the others. majority: of the legal actions the one that was played
    most often in training.
    """
    legal = np.stack([unpack_legal(number) for number in held_out["legal"]])
    actions = np.asarray(held_out["action"])
    counts = np.where(legal, count_actions(train), -1)
    return {
        "uniform_legal": float((1 / legal.sum(1)).mean()),
        "majority": float((counts.argmax(1) == actions).mean()),
    }
