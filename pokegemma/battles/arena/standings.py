"""What the results of an arena say: ratings, wins by pair, and wins against the pool, with their intervals."""

from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np

from pokegemma.battles.arena.plan import Pair
from pokegemma.battles.arena.ratings import PRIOR, rate_players, resample_rounds
from pokegemma.battles.arena.results import ArenaResult
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.metrics import wilson_interval


def count_rounds(results: Iterable[ArenaResult]) -> dict[Pair, np.ndarray]:
    """Return for each pair (R, 3): the wins of its first player and of its second, and the ties, round by round."""
    counts: dict[Pair, dict[int, np.ndarray]] = {}
    for result in results:
        row = counts.setdefault(result.pair, {}).setdefault(result.round, np.zeros(3, dtype=np.int64))
        row[2 if result.winner is None else result.pair.index(result.winner)] += 1
    return {pair: np.stack([rows[number] for number in sorted(rows)]) for pair, rows in sorted(counts.items())}


def make_standings(
    results: Iterable[ArenaResult], *, baseline: str | None = None, num_resamples: int = 1000, seed: int = 0
) -> dict[str, Any]:
    """Return ratings and shares, as JSON takes them.

    A tie is not a win in any share. Each opponent counts the same in the share against the pool. A rating's and the
    pool's intervals are the bootstrap's over rounds, a pair's is Wilson's; all are 95 %.

    Args:
        baseline: a player; `head_to_head` has the others' battles against it.

    Returns:
        players: by rating, the best first; pairs; head_to_head; tie_parameter; prior.

    Raises:
        PokegemmaError: there is no result, `baseline` has none, or some players never met the others.
    """
    results = list(results)
    if not results:
        raise PokegemmaError("no battle has been played")
    rounds = count_rounds(results)
    ratings = rate_players(rounds, num_resamples=num_resamples, seed=seed)
    if baseline is not None and baseline not in ratings.names:
        raise PokegemmaError(f"--baseline {baseline}: must be among the players {', '.join(ratings.names)}")
    shares = _pool_shares(rounds, ratings.names, num_resamples=num_resamples, seed=seed)
    players = [
        {
            "name": name,
            "rating": float(rating),
            "rating_interval": [float(bound) for bound in bounds],
            **_count_player(name, rounds, results),
            **shares[name],
        }
        for name, rating, bounds in zip(ratings.names, ratings.ratings, ratings.intervals, strict=True)
    ]
    pairs = [_describe_pair(pair, counts, results) for pair, counts in rounds.items()]
    return {
        "num_battles": len(results),
        "players": sorted(players, key=lambda player: -player["rating"]),
        "pairs": pairs,
        "head_to_head": [] if baseline is None else results_against(baseline, rounds),
        "tie_parameter": ratings.tie_parameter,
        "prior": PRIOR,
        "num_turn_limits": sum(result.turn_limit_reached for result in results),
    }


def view_from(name: str, pair: Pair, counts: np.ndarray) -> tuple[str, np.ndarray]:
    """Return a player's opponent in a pair, and (..., 3) its own wins, its losses and ties."""
    place = pair.index(name)
    return pair[1 - place], counts[..., [place, 1 - place, 2]]


def results_against(baseline: str, rounds: Mapping[Pair, np.ndarray]) -> list[dict[str, Any]]:
    """Return each other player's battles against the baseline, for those that met it: name, wins, win rate ..."""
    rows = []
    for pair, counts in rounds.items():
        if baseline in pair:
            (name,) = set(pair) - {baseline}
            wins, losses, ties = (int(number) for number in view_from(name, pair, counts)[1].sum(axis=0))
            total = wins + losses + ties
            row = {"name": name, "baseline": baseline, "wins": wins, "losses": losses, "ties": ties}
            rows.append({**row, "win_rate": wins / total, "win_rate_interval": wilson_interval(wins, total)})
    return rows


def _count_player(name: str, rounds: dict[Pair, np.ndarray], results: list[ArenaResult]) -> dict[str, int]:
    views = [view_from(name, pair, counts)[1].sum(axis=0) for pair, counts in rounds.items() if name in pair]
    wins, losses, ties = (int(number) for number in sum(views))
    places = [(result, result.pair.index(name)) for result in results if name in result.pair]
    timeouts = sum(result.num_timeouts[place] for result, place in places)
    unanswered = sum(result.num_unanswered[place] for result, place in places)
    return {"wins": wins, "losses": losses, "ties": ties, "timeouts": timeouts, "unanswered": unanswered}


def _pool_shares(
    rounds: dict[Pair, np.ndarray], names: tuple[str, ...], *, num_resamples: int, seed: int
) -> dict[str, dict[str, Any]]:
    """Return each player's share of wins, the mean over its opponents."""
    drawn = resample_rounds(list(rounds.values()), num_resamples=num_resamples, seed=seed)
    resampled = {pair: drawn[:, place] for place, pair in enumerate(rounds)}
    shares = {}
    for name in names:
        mine = [pair for pair in rounds if name in pair]
        once = np.mean([_win_share(name, pair, rounds[pair].sum(axis=0)) for pair in mine])
        often = np.mean([_win_share(name, pair, resampled[pair]) for pair in mine], axis=0)
        bounds = [float(bound) for bound in np.percentile(often, (2.5, 97.5))]
        shares[name] = {"pool_win_rate": float(once), "pool_win_rate_interval": bounds}
    return shares


def _win_share(name: str, pair: Pair, counts: np.ndarray) -> np.ndarray:
    own = view_from(name, pair, counts)[1]
    return own[..., 0] / own.sum(axis=-1)


def _describe_pair(pair: Pair, counts: np.ndarray, results: list[ArenaResult]) -> dict[str, Any]:
    wins, losses, ties = (int(number) for number in counts.sum(axis=0))
    total = wins + losses + ties
    turns = [result.num_turns for result in results if result.pair == pair]
    return {
        "players": list(pair),
        "wins": wins,
        "losses": losses,
        "ties": ties,
        "win_rate": wins / total,
        "win_rate_interval": wilson_interval(wins, total),
        "mean_turns": float(np.mean(turns)),
    }
