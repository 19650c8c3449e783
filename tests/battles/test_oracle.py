"""Texts, numbers, rewards and legal actions are metamon's own, on every transition of the oracle."""

import json

import numpy as np
import pytest

from pokegemma.battles.trajectories.actions import legal_actions
from pokegemma.battles.trajectories.records import BattleTrajectory
from pokegemma.battles.trajectories.rewards import REWARDS, compute_rewards
from pokegemma.battles.trajectories.texts import list_numbers, list_words

NAMES = {
    "default_shaped": "DefaultShapedReward",
    "aggressive_shaped": "AggressiveShapedReward",
    "binary": "BinaryReward",
}


@pytest.fixture(scope="module")
def transitions(golden):
    """Return the rows of the oracle, each with its two states."""
    data = [{"states": [row["state"], row["next"]], "actions": [row["action"], -1]} for row in golden]
    return [
        (BattleTrajectory.from_json(json.dumps(each).encode()).states, row)
        for each, row in zip(data, golden, strict=True)
    ]


def test_the_texts_are_metamons(transitions):
    expected = [row["DefaultObservationSpace"]["text"] for _, row in transitions]
    assert [" ".join(list_words(states[0])) for states, _ in transitions] == expected
    assert len(expected) == 60


def test_the_numbers_are_metamons(transitions):
    for states, row in transitions:
        numbers = list_numbers(states[0])
        assert numbers.dtype == np.float32
        assert [round(float(number), 6) for number in numbers] == row["DefaultObservationSpace"]["numbers"]


def test_the_rewards_are_metamons(transitions):
    for states, row in transitions:
        for name, theirs in NAMES.items():
            assert REWARDS[name](*states) == row["rewards"][theirs], (name, states)


def test_the_legal_actions_are_metamons(transitions):
    assert [list(legal_actions(states[0])) for states, _ in transitions] == [row["legal"] for _, row in transitions]
    assert all(row["action"] in row["legal"] for _, row in transitions)


def test_a_battle_of_t_states_has_one_reward_less(transitions):
    states, row = transitions[0]
    rewards = compute_rewards(states, REWARDS["binary"])
    assert (rewards.dtype, rewards.tolist()) == (np.float32, [row["rewards"]["BinaryReward"]])
