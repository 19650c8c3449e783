"""The player that asks a checkpoint: all waiting battles in one batch."""

import math
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import Gemma3ForCausalLM

from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.policy.prompts import write_prompt
from pokegemma.battles.policy.scoring import DEFAULT_BATCH_SIZE, score_actions
from pokegemma.battles.trajectories.actions import NUM_ACTIONS
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.gemma.loading import Dtype, default_device


class PolicyPlayer:
    """Play the action to which a policy gives the highest probability, or one drawn by the probabilities.

    A model's scores differ in the last digits with the other rows of a batch. Where two actions are as likely to
    within 1e-6, a battle may so depend on which others run next to it.

    Args:
        temperature: 0 plays the likeliest action. Above, the log-probabilities are divided by it, and actions are drawn
            from the decision's own random numbers.
        batch_size: decisions in a forward pass.
    """

    def __init__(
        self,
        policy: PolicyCheckpoint,
        model: Gemma3ForCausalLM | PeftModel,
        name: str,
        *,
        temperature: float = 0.0,
        batch_size: int = DEFAULT_BATCH_SIZE,
    ) -> None:
        self.name = name
        self._policy, self._model = policy, model
        self._temperature, self._batch_size = temperature, batch_size

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        texts = [write_prompt(state_from_battle(decision.battle), self._policy.text) for decision in decisions]
        prompts = self._policy.encode(texts)
        scores = score_actions(self._model, prompts, self._policy.action_tokens, batch_size=self._batch_size)
        scores = scores.double().numpy()
        if self._temperature:
            scores = scores / self._temperature + np.stack([draw_gumbel(decision) for decision in decisions])
        return scores


def draw_gumbel(decision: BattleDecision) -> np.ndarray:
    """Return (13,) noise with which the highest score is a draw from the softmax of the scores.

    See Gumbel 1954; of the legal actions, too, because each has noise of its own.
    """
    draws = decision.random()
    return np.array([-math.log(-math.log(draws.random() or 0.5)) for _ in range(NUM_ACTIONS)])


def load_policy_player(
    path: str | Path,
    name: str,
    *,
    temperature: float = 0.0,
    dtype: Dtype = "float32",
    device: torch.device | str | None = None,
) -> PolicyPlayer:
    """Return the player of a checkpoint or adapter, on `device` (None: the best of this machine).

    Raises:
        PokegemmaError: the checkpoint cannot be opened or loaded.
    """
    policy = open_policy(path)
    model = policy.load_model(dtype=dtype, device=default_device() if device is None else device)
    return PolicyPlayer(policy, model, name, temperature=temperature)
