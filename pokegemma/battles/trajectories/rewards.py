"""metamon's rewards of a transition R(s_t, s_t+1); the formulas are those of its interface.py, nothing annealed."""

import itertools
from collections.abc import Callable

import numpy as np

from pokegemma.battles.trajectories.records import TrajectoryPokemon, TrajectoryState

Reward = Callable[[TrajectoryState, TrajectoryState], float]


def default_shaped_reward(before: TrajectoryState, after: TrajectoryState) -> float:
    """Return damage + healing + 0.5 (status given - taken) + (fainted theirs - ours), and 100 or -100 at the end."""
    damage, given = _harm(before.opponent_active_pokemon, after.opponent_active_pokemon)
    lost_hp, taken = _harm(_find_before(before, after), after.player_active_pokemon)
    end = 1.0 if after.battle_won else -1.0 if after.battle_lost else 0.0
    return (damage - lost_hp) + 0.5 * (given - taken) + _faints(before, after) + 100.0 * end


def aggressive_shaped_reward(before: TrajectoryState, after: TrajectoryState) -> float:
    """Return damage + healing + 2 (fainted theirs - ours) + 200 for a win; a loss costs nothing more."""
    damage, _ = _harm(before.opponent_active_pokemon, after.opponent_active_pokemon)
    lost_hp, _ = _harm(_find_before(before, after), after.player_active_pokemon)
    return (damage - lost_hp) + 2.0 * _faints(before, after) + 200.0 * float(after.battle_won)


def binary_reward(before: TrajectoryState, after: TrajectoryState) -> float:
    """Return 100 for a win, -100 for a loss, 0 otherwise."""
    return 100.0 if after.battle_won else -100.0 if after.battle_lost else 0.0


REWARDS: dict[str, Reward] = {
    "default_shaped": default_shaped_reward,
    "aggressive_shaped": aggressive_shaped_reward,
    "binary": binary_reward,
}


def compute_rewards(states: tuple[TrajectoryState, ...], reward: Reward) -> np.ndarray:
    """Return the rewards of a battle: T states give T - 1, float32."""
    return np.array([reward(before, after) for before, after in itertools.pairwise(states)], dtype=np.float32)


def _find_before(before: TrajectoryState, after: TrajectoryState) -> TrajectoryPokemon | None:
    """Return our active Pokémon as it was: it may have been on the bench; None after Revival Blessing."""
    species = after.player_active_pokemon.base_species
    team = (before.player_active_pokemon, *before.available_switches)
    return next((pokemon for pokemon in team if pokemon.base_species == species), None)


def _harm(before: TrajectoryPokemon | None, after: TrajectoryPokemon) -> tuple[float, float]:
    """Return the share of hp lost and whether a status was got; 0 and 0 for another Pokémon than before."""
    if before is None or before.base_species != after.base_species:
        return 0.0, 0.0
    got_status = after.status != "nostatus" and before.status == "nostatus"
    return before.hp_pct - after.hp_pct, float(got_status)


def _faints(before: TrajectoryState, after: TrajectoryState) -> float:
    removed = before.opponents_remaining > after.opponents_remaining
    return float(removed) - float(len(before.available_switches) > len(after.available_switches))
