"""Policies that take metamon's observation, for tests: as a user would write them."""

import time
from collections.abc import Sequence

from pokegemma.battles.players.metamon_player import MetamonObservation

POWERS = (16, 19, 22, 25)
"""Where the base powers of the four moves are among the 48 numbers."""


class StrongestMove:
    """Plays the legal move of the highest power, and remembers how many decisions each battle had."""

    def __init__(self) -> None:
        self.counts: dict[str, int] = {}

    def __call__(self, observations: Sequence[MetamonObservation]) -> list[int]:
        return [self.decide(observation) for observation in observations]

    def decide(self, observation: MetamonObservation) -> int:
        self.counts[observation.battle] = observation.number + 1
        powers = {action: observation.numbers[POWERS[action]] for action in observation.legal_actions if action < 4}
        return max(powers, key=powers.__getitem__) if powers else observation.legal_actions[0]


def play_first_legal(observations: Sequence[MetamonObservation]) -> list[int]:
    return [observation.legal_actions[0] for observation in observations]


def terastallize(observations: Sequence[MetamonObservation]) -> list[int]:
    return [12 for _ in observations]


def sleep(observations: Sequence[MetamonObservation]) -> list[int]:
    time.sleep(0.05)
    return play_first_legal(observations)


def answer_in_words(observations: Sequence[MetamonObservation]) -> list[str]:
    return ["<0>" for _ in observations]


def answer_nothing(observations: Sequence[MetamonObservation]) -> list[int]:
    return []


NOT_CALLABLE = 3
