"""Windows of battles as a dataset for offline reinforcement learning, and their batches."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from pokegemma.battles.offline_rl.features import StateFeatures
from pokegemma.battles.offline_rl.trained_encoder import StateTokens
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.records import NO_ACTION
from pokegemma.battles.trajectories.rewards import REWARDS

Window = dict[str, np.ndarray]


@dataclass(frozen=True)
class _Place:
    """T transitions of a battle, from a state on."""

    battle: int
    start: int
    end: int


class BattleWindows(torch.utils.data.Dataset):
    """Windows of at most `length` - 1 transitions, which no two share; each has one state more than transitions.

    Args:
        states: features of all states, or their tokens for an encoder that is trained.
        indices: of the battles.
        reward: one of `REWARDS`.
    """

    def __init__(
        self,
        battles: PackedTrajectories,
        states: StateFeatures | StateTokens,
        indices: Sequence[int],
        *,
        length: int,
        reward: str,
    ) -> None:
        self._battles, self._states = battles, states
        self._reward = list(REWARDS).index(reward)
        self._places = [
            _Place(index, start, min(start + length - 1, num_states - 1))
            for index in indices
            for num_states in [len(battles[index].actions)]
            for start in range(0, num_states - 1, length - 1)
        ]

    def __len__(self) -> int:
        return len(self._places)

    def __getitem__(self, number: int) -> Window:
        place = self._places[number]
        battle = self._battles[place.battle]
        states, moves = slice(place.start, place.end + 1), slice(place.start, place.end)
        actions = battle.actions[moves].astype(np.int64)
        done = np.zeros(len(actions), dtype=bool)
        done[-1] = place.end == len(battle.actions) - 1  # a turn limit ends a battle, too
        return {
            **{name: array[states] for name, array in self._states[place.battle].items()},
            "numbers": np.array(battle.numbers[states]),
            "legal": np.array(battle.legal[states]),
            "actions": np.where(actions == NO_ACTION, 0, actions),
            "rewards": np.array(battle.rewards[moves, self._reward]),
            "done": done,
            "used": actions != NO_ACTION,
        }


def collate_windows(windows: Sequence[Window]) -> dict[str, torch.Tensor]:
    """Return the fields of a `BattleBatch`, or tokens and lengths instead of features.

    They are padded at their ends with zeros: such transitions are not used.
    """
    batch = {}
    for name in windows[0]:
        arrays = [window[name] for window in windows]
        shape = np.max([array.shape for array in arrays], axis=0)
        padded = np.zeros((len(arrays), *shape), dtype=arrays[0].dtype)
        for row, array in zip(padded, arrays, strict=True):
            row[tuple(map(slice, array.shape))] = array
        batch[name] = torch.from_numpy(padded)
    return batch
