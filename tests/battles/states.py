"""Made-up records, whose fields a test can change."""

from typing import Any

from pokegemma.battles.trajectories.files import TrajectoryName
from pokegemma.battles.trajectories.records import (
    NO_MOVE,
    BattleTrajectory,
    TrajectoryMove,
    TrajectoryPokemon,
    TrajectoryState,
)

STATS = ("atk", "spa", "def", "spd", "spe", "hp")
BOOSTS = ("atk", "spa", "def", "spd", "spe", "accuracy", "evasion")


def make_move(name: str = "tackle", **changes: Any) -> TrajectoryMove:
    values = {"move_type": "normal", "category": "physical", "base_power": 40, "accuracy": 1.0, "priority": 0}
    return TrajectoryMove(name, **{**values, "current_pp": 35, "max_pp": 56, **changes})


def make_pokemon(name: str = "pikachu", **changes: Any) -> TrajectoryPokemon:
    values: dict[str, Any] = {
        "hp_pct": 1.0,
        "types": "electric notype",
        "item": "noitem",
        "ability": "noability",
        "lvl": 100,
        "status": "nostatus",
        "effect": "noeffect",
        "moves": (make_move("thunderbolt", move_type="electric", category="special", base_power=95), make_move()),
        "tera_type": "notype",
        "base_species": name,
        **{f"{stat}_boost": 0 for stat in BOOSTS},
        **{f"base_{stat}": 60 for stat in STATS},
    }
    return TrajectoryPokemon(name=name, **{**values, **changes})


def make_state(**changes: Any) -> TrajectoryState:
    values: dict[str, Any] = {
        "format": "gen1ou",
        "player_active_pokemon": make_pokemon(),
        "opponent_active_pokemon": make_pokemon("starmie", types="psychic water", moves=()),
        "available_switches": (make_pokemon("snorlax", types="normal notype"), make_pokemon("chansey")),
        "player_prev_move": NO_MOVE,
        "opponent_prev_move": NO_MOVE,
        "opponents_remaining": 6,
        "player_conditions": "noconditions",
        "opponent_conditions": "noconditions",
        "weather": "noweather",
        "battle_field": "nofield",
        "forced_switch": False,
        "battle_won": False,
        "battle_lost": False,
        "can_tera": False,
        "opponent_teampreview": (),
    }
    return TrajectoryState(**{**values, **changes})


def make_trajectory(num_states: int = 3, *, won: bool = True, **changes: Any) -> BattleTrajectory:
    """Return a battle whose last state is won or lost; `changes` are those of every state."""
    states = [make_state(opponents_remaining=6 - min(5, index), **changes) for index in range(num_states - 1)]
    end = make_state(battle_won=won, battle_lost=not won, **changes)
    return BattleTrajectory((*states, end), (*[0] * (num_states - 1), -1))


def make_name(number: int = 0, *, won: bool = True, battle_format: str = "gen1ou") -> TrajectoryName:
    return TrajectoryName(f"metamon-{battle_format}-{number:010d}", "Unrated", "MM-1", "Other", "11-29-2026", won)
