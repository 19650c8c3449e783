"""A game with two states and known values, as battles for the offline actor-critic, and a network of its size."""

import numpy as np
import torch

from pokegemma.battles.offline_rl.losses import BattleBatch
from pokegemma.battles.offline_rl.model import ActorCriticShape

SHAPE = ActorCriticShape(
    feature_width=3,
    width=16,
    num_layers=1,
    num_heads=2,
    max_length=4,
    gammas=(0.5, 0.9),
    num_critics=3,
    num_bins=41,
    max_return=20.0,
)


def play_game(draws: np.random.Generator, num_battles: int) -> BattleBatch:
    """Return battles of a game with two states and two legal actions, played at random.

    First state: action 0 leads to the second one, action 1 ends the game with a reward of 0.3. Second state: action 0
    ends it with a reward of 1, action 1 with 0.
    """
    actions = torch.from_numpy(draws.integers(0, 2, size=(num_battles, 2)))
    goes_on = actions[:, 0] == 0
    features = torch.zeros(num_battles, 3, 3)
    features[:, 0, 0], features[:, 2, 2] = 1, 1
    features[:, 1, 1] = goes_on.float()
    features[:, 1, 2] = (~goes_on).float()
    rewards = torch.stack([0.3 * (~goes_on), (goes_on & (actions[:, 1] == 0)).float()], 1)
    legal = torch.zeros(num_battles, 3, 13, dtype=torch.bool)
    legal[..., :2] = True
    return BattleBatch(
        features=features,
        numbers=torch.zeros(num_battles, 3, 48),
        legal=legal,
        actions=actions,
        rewards=rewards,
        done=torch.stack([~goes_on, torch.ones_like(goes_on)], 1),
        used=torch.stack([torch.ones_like(goes_on), goes_on], 1),
    )
