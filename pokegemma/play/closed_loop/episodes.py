"""What happened in an episode of play, and what many episodes show together."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pokegemma.evaluation.metrics import wilson_interval

_NUM_LAST_TURNS = 10
_SLOW = ("out of turns", None, None)


@dataclass(frozen=True)
class ObservedTurn:
    """One turn of an episode.

    Attributes:
        situation: what the screen showed.
        expert: the right button.
        chosen: the player's button, None where its answer named none.
        pressed: what was pressed, which noise or a way out of a loop may have replaced.
        changed: whether the screen was another one afterwards.
    """

    situation: str
    expert: str
    chosen: str | None
    pressed: str
    changed: bool

    @property
    def is_right(self) -> bool:
        return self.chosen == self.expert


@dataclass(frozen=True)
class Episode:
    """One room, played until it was solved or `max_turns` were used up.

    Attributes:
        num_expert_turns: how many turns the expert needs without noise.
    """

    seed: int
    num_expert_turns: int
    max_turns: int
    is_solved: bool
    turns: tuple[ObservedTurn, ...]

    @property
    def failure(self) -> tuple[str, str, str | None] | None:
        """The wrong decision that an unsolved episode ended with: situation, right button, chosen button.

        It is the most frequent one of the last ten turns, since most failures are loops; None where all ten were right,
        or the episode was solved.
        """
        wrong = [turn for turn in self.turns[-_NUM_LAST_TURNS:] if not turn.is_right]
        if self.is_solved or not wrong:
            return None
        return Counter((turn.situation, turn.expert, turn.chosen) for turn in wrong).most_common(1)[0][0]


def summarize_episodes(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Return what `episodes` of one player show, ready for JSON."""
    solved, turns = (
        [episode for episode in episodes if episode.is_solved],
        [turn for episode in episodes for turn in episode.turns],
    )
    failures = Counter(episode.failure or _SLOW for episode in episodes if not episode.is_solved)
    ratios = [len(episode.turns) / episode.num_expert_turns for episode in solved]
    return {
        "num_episodes": len(episodes),
        "num_solved": len(solved),
        "success": len(solved) / len(episodes),
        "success_interval": wilson_interval(len(solved), len(episodes)),
        "num_turns": len(turns),
        "turns_over_expert": float(np.mean(ratios)) if ratios else None,
        "useless_presses": sum(not turn.changed for turn in turns) / len(turns),
        "right_buttons": sum(turn.is_right for turn in turns) / len(turns),
        "situations": _situation_rows(turns),
        "failures": [
            {
                "count": count,
                **dict(zip(("situation", "expert", "chosen"), where or ("none wrong", None, None), strict=True)),
            }
            for where, count in sorted(failures.items(), key=lambda item: (-item[1], str(item[0])))
        ],
    }


def _situation_rows(turns: Sequence[ObservedTurn]) -> list[dict[str, Any]]:
    """Return, for each situation, its turns, the share of right buttons, and the most frequent confusions."""
    rows = []
    for situation, count in Counter(turn.situation for turn in turns).most_common():
        wrong = Counter(
            (turn.expert, turn.chosen) for turn in turns if turn.situation == situation and not turn.is_right
        )
        confusions = [{"expert": pair[0], "chosen": pair[1], "count": number} for pair, number in wrong.most_common(3)]
        rows.append(
            {
                "situation": situation,
                "num_turns": count,
                "right_buttons": 1 - wrong.total() / count,
                "confusions": confusions,
            }
        )
    return rows


def pool_success(summaries: Sequence[Mapping[str, Any]]) -> tuple[float, list[float]]:
    """Return the success of several runs together with its Wilson interval."""
    solved, total = (sum(summary[name] for summary in summaries) for name in ("num_solved", "num_episodes"))
    return solved / total, wilson_interval(solved, total)
