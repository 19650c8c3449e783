"""The player of offline reinforcement learning: it remembers the states of each battle, and asks the actor."""

import collections
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from transformers import Gemma3ForCausalLM

from pokegemma.battles.offline_rl.model import ActorCritic
from pokegemma.battles.offline_rl.network_files import load_actor_critic
from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.players.policy_player import draw_gumbel
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint
from pokegemma.battles.policy.prompts import write_prompt
from pokegemma.battles.policy.scoring import encode_prompts
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.texts import list_numbers
from pokegemma.gemma.loading import default_device

_MAX_BATTLES = 4096
"""Battles remembered at once; nothing tells a player that one has ended, so the oldest are dropped."""

_History = list[tuple[tuple[int, bool, str], torch.Tensor, np.ndarray]]


class ActorCriticPlayer:
    """Play the action to which the actor of the last gamma gives the highest probability, or one drawn.

    Args:
        temperature: as of `PolicyPlayer`.
    """

    def __init__(
        self,
        network: ActorCritic,
        policy: PolicyCheckpoint,
        encoder: Gemma3ForCausalLM | PeftModel,
        name: str,
        *,
        temperature: float = 0.0,
    ) -> None:
        self.name = name
        self._network, self._policy, self._encoder = network, policy, encoder
        self._temperature = temperature
        self._histories: collections.OrderedDict[tuple[str, str], _History] = collections.OrderedDict()

    def score(self, decisions: Sequence[BattleDecision]) -> np.ndarray:
        states = [state_from_battle(decision.battle) for decision in decisions]
        prompts = [write_prompt(state, self._policy.text) for state in states]
        features = encode_prompts(self._encoder, self._policy.encode(prompts))
        for decision, prompt, feature, state in zip(decisions, prompts, features, states, strict=True):
            self._remember(decision, prompt, feature, list_numbers(state))
        scores = self._ask([self._histories[decision.battle_id, decision.role] for decision in decisions])
        if self._temperature:
            scores = scores / self._temperature + np.stack([draw_gumbel(decision) for decision in decisions])
        return scores

    def _remember(self, decision: BattleDecision, prompt: str, feature: torch.Tensor, numbers: np.ndarray) -> None:
        key = (decision.battle_id, decision.role)
        history = self._histories.setdefault(key, [])
        self._histories.move_to_end(key)
        if decision.number == 0:  # a battle that is played again
            history.clear()
        moment = (decision.battle.turn, bool(decision.battle.force_switch), prompt)
        if history and history[-1][0] == moment:  # the last choice did not happen
            history.pop()
        history.append((moment, feature, numbers))
        del history[: -self._network.shape.max_length]
        while len(self._histories) > _MAX_BATTLES:
            self._histories.popitem(last=False)

    @torch.inference_mode()
    def _ask(self, histories: Sequence[_History]) -> np.ndarray:
        """Return the log-probabilities of the 13 actions in the last state of each history, legal or not."""
        length = max(map(len, histories))
        features = torch.zeros(len(histories), length, self._network.shape.feature_width)
        numbers = torch.zeros(len(histories), length, len(histories[0][0][2]))
        for row, history in enumerate(histories):
            features[row, : len(history)] = torch.stack([feature for _, feature, _ in history])
            numbers[row, : len(history)] = torch.from_numpy(np.stack([each for _, _, each in history]))
        device = self._network.bins.device
        states = self._network.encode(features.to(device), numbers.to(device))
        last = states[torch.arange(len(histories)), torch.tensor([len(history) - 1 for history in histories])]
        return self._network.heads.actor_logits(last)[:, -1].log_softmax(-1).double().cpu().numpy()


def load_actor_critic_player(
    path: str | Path, name: str, *, temperature: float = 0.0, device: torch.device | str | None = None
) -> ActorCriticPlayer:
    """Return the player of a folder that scripts/rl_battles.py wrote.

    Raises:
        PokegemmaError: it cannot be loaded, or its encoder cannot.
    """
    device = default_device() if device is None else device
    network, policy = load_actor_critic(Path(path))
    encoder = policy.load_model(device=device)
    return ActorCriticPlayer(network.to(device), policy, encoder, name, temperature=temperature)
