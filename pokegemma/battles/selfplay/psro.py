"""Policy-space response oracles (Lanctot et al. 2017, https://arxiv.org/abs/1711.00832) over players of battles.

The population's players meet each other in an arena. A Nash mixture of the measured matrix is found, a best response is
trained in battles against opponents drawn by the mixture, and joins the population.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np

from pokegemma.battles.arena.plan import Pair
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.selfplay.learner import LEARNER, Learner, parse_others, start_run
from pokegemma.battles.selfplay.matrix_game import (
    Estimate,
    estimate_exploitability,
    estimate_payoff,
    find_nash,
    payoff_matrix,
)
from pokegemma.battles.selfplay.options import PSROOptions
from pokegemma.outputs import write_if_changed
from pokegemma.tables import format_percent

logger = logging.getLogger(__name__)

EQUILIBRIUM_FILE = "results.json"
POLICY = "policy"
"""The name of `--policy_path` in the population."""

RESTRICTED_GAME_NOTE = (
    "Exploitability counts the players of the population only. In its own measured matrix that of the mixture is 0 by "
    "construction; its mean and interval over resampled battles tell how well the matrix is known. Neither tells "
    "anything of players outside of the population: what a trained best response gains is a lower bound of what such a "
    "player can gain, and a response that gains nothing may only have been trained badly."
)
_SEEDS_A_RUN, _SEEDS_A_RESPONSE = 1_000_000, 1000


@dataclass(frozen=True)
class Equilibrium:
    """The mixture of one population.

    Attributes:
        names: the population, in the order of `payoffs` (N, N) and `mixture` (N,).
        rounds: the battles that `payoffs` are from, of each pair (R, 3), as `count_rounds` returns them.
    """

    names: tuple[str, ...]
    rounds: Mapping[Pair, np.ndarray]
    payoffs: np.ndarray
    mixture: np.ndarray


def find_equilibria(
    names: Sequence[str],
    *,
    num_responses: int,
    measure: Callable[[Sequence[str]], Mapping[Pair, np.ndarray]],
    respond: Callable[[int, Equilibrium], str],
) -> list[Equilibrium]:
    """Return the equilibrium of the first population, and that with each best response.

    Args:
        names: the first population.
        measure: plays all pairs of a population, and returns of each pair (R, 3), as `count_rounds`.
        respond: makes a best response to a mixture, given its number from 1 on, and returns its name.

    Raises:
        PokegemmaError: a pair was not played.
    """
    names, equilibria = list(names), []
    for number in range(num_responses + 1):
        rounds = measure(names)
        payoffs = payoff_matrix({pair: each.sum(0) for pair, each in rounds.items()}, names)
        mixture = find_nash(payoffs)
        equilibria.append(Equilibrium(tuple(names), rounds, payoffs, mixture))
        shares = (f"{name} {format_percent(share)}" for name, share in zip(names, mixture, strict=True) if share)
        logger.info("mixture of %d players: %s", len(names), ", ".join(shares))
        if number < num_responses:
            names.append(respond(number + 1, equilibria[-1]))
    return equilibria


def describe_equilibria(equilibria: Sequence[Equilibrium], *, num_resamples: int, seed: int) -> list[dict[str, Any]]:
    """Return a record of each equilibrium, as JSON takes it.

    Returns:
        population; payoffs; mixture, by player; exploitability within the population; and, but for the last one,
        response (the player that was trained against the mixture), response_payoff (its share of wins against the
        mixture), and later_exploitability, the mixture's within the last population.
    """
    last, records = equilibria[-1], []
    how = {"num_resamples": num_resamples, "seed": seed}
    for equilibrium in equilibria:
        names, mixture = equilibrium.names, equilibrium.mixture
        within = estimate_exploitability(equilibrium.rounds, names, mixture, **how)
        record = {
            "population": list(names),
            "payoffs": equilibrium.payoffs.tolist(),
            "mixture": dict(zip(names, mixture.tolist(), strict=True)),
            "exploitability": _as_json(within),
        }
        if equilibrium is not last:
            response = last.names[len(names)]
            padded = np.pad(mixture, (0, len(last.names) - len(names)))
            payoff = estimate_payoff(last.rounds, last.names, response, padded, **how)
            later = estimate_exploitability(last.rounds, last.names, padded, **how)
            record |= {"response": response, "response_payoff": _as_json(payoff)}
            record |= {"later_exploitability": _as_json(later)}
        records.append(record)
    return records


def _as_json(estimate: Estimate) -> dict[str, Any]:
    return {**asdict(estimate), "interval": list(estimate.interval)}


def run_psro(options: PSROOptions) -> dict[str, Any]:
    """Train the best responses, and return what results.json contains: players, equilibria, and a note on them.

    Raises:
        PokegemmaError: the folder contains a run with other options, or a player does not exist.
        CheckFailedError: a script failed.
    """
    reserved = (POLICY, LEARNER, *(f"response{number}" for number in range(1, options.num_responses + 1)))
    population = parse_others(options.population, reserved=reserved, flag="--population")
    players = [*population, PlayerSource(POLICY, options.policy_path)]
    results: dict[str, Any] = {}
    start_run(options, lambda learner: results.update(_PSRO(options, learner, players).run()))
    return results


@dataclass(frozen=True)
class _PSRO:
    """A run; `players` gets the best responses."""

    options: PSROOptions
    learner: Learner
    players: list[PlayerSource]

    def run(self) -> dict[str, Any]:
        options = self.options
        equilibria = find_equilibria(
            [player.name for player in self.players],
            num_responses=options.num_responses,
            measure=self._measure,
            respond=self._respond,
        )
        results = {
            "players": {player.name: player.source for player in self.players},
            "equilibria": describe_equilibria(equilibria, num_resamples=options.num_resamples, seed=options.seed),
            "note": RESTRICTED_GAME_NOTE,
        }
        write_if_changed(options.folder / EQUILIBRIUM_FILE, json.dumps(results, indent=2) + "\n")
        return results

    def _measure(self, names: Sequence[str]) -> Mapping[Pair, np.ndarray]:
        """Play the pairs that have not met."""
        chosen = [player for player in self.players if player.name in names]
        rounds = self.learner.compare(self.options.folder / "arena", chosen, seed=self.options.seed)
        return {pair: each for pair, each in rounds.items() if set(pair) <= set(names)}

    def _respond(self, number: int, equilibrium: Equilibrium) -> str:
        """Record the best of the trained players against opponents drawn by the mixture, and train it on its views."""
        options, place = self.options, self.options.folder / f"response{number}"
        start = self._choose_start(equilibrium)
        drawing = replace(start, name=LEARNER, temperature=options.temperature)
        draws = np.random.default_rng((options.seed, number))
        counts = draws.multinomial(options.num_battles, equilibrium.mixture)
        opponents = {player.name: player for player in self.players}
        seed = options.seed * _SEEDS_A_RUN + number * _SEEDS_A_RESPONSE
        recordings = [
            self.learner.record(
                place / "recorded" / name, (drawing, opponents[name]), num_battles=int(count), seed=seed + index
            )
            for index, (name, count) in enumerate(zip(equilibrium.names, counts, strict=True))
            if count
        ]
        trained = self.learner.train(place, recordings, start.folder, player=LEARNER)
        self.players.append(PlayerSource(place.name, str(trained)))
        return place.name

    def _choose_start(self, equilibrium: Equilibrium) -> PlayerSource:
        """Return the player that can be trained and wins most against the mixture, the newest of several."""
        payoffs = dict(zip(equilibrium.names, equilibrium.payoffs @ equilibrium.mixture, strict=True))
        place = next(index for index, player in enumerate(self.players) if player.name == POLICY)
        return max(reversed(self.players[place:]), key=lambda player: payoffs[player.name])
