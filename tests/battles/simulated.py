"""Battles in the real simulator, for tests; skipped where ./init.sh --with battles has not installed it."""

from collections.abc import Iterator
from typing import Any

import pytest

TEAM = """Tauros
- Body Slam
- Earthquake
- Hyper Beam
- Blizzard

Starmie
- Blizzard
- Thunderbolt
- Recover
- Thunder Wave
"""


@pytest.fixture(scope="module")
def simulator() -> Iterator[Any]:
    """Return a simulator with one node process, which has no battles in flight between tests."""
    pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
    from pokegemma.battles.node_process import MODULES_FOLDER
    from pokegemma.battles.simulator import Simulator

    if not MODULES_FOLDER.is_dir():
        pytest.skip("needs Pokémon Showdown's simulator (./init.sh --with battles)")
    with Simulator() as simulator:
        yield simulator


def make_specs(num_battles: int, *, battle_format: str = "gen1randombattle", **changes: Any) -> list[Any]:
    """Return battles of the players "ann" and "bob", with the seeds "0", "1", ..."""
    from pokegemma.battles.simulated_battle import BattleSpec

    return [
        BattleSpec(f"battle-{number}", battle_format, ("ann", "bob"), **{"seed": str(number), **changes})
        for number in range(num_battles)
    ]


def play(simulator: Any, specs: list[Any], players: tuple[Any, Any], **options: Any) -> dict[str, Any]:
    """Return the results of battles of one format by their ids."""
    from pokegemma.battles.players.player import Decider
    from pokegemma.battles.runner import BattleRunner

    battle_format = simulator.describe_format(specs[0].battle_format)
    deciders = dict(zip(("ann", "bob"), map(Decider, players), strict=True))
    runner = BattleRunner(simulator, battle_format, deciders, **options)
    return {result.spec.battle_id: result for result in runner.play(specs)}


def open_seat(simulator: Any, *, battle_format: str = "gen1ou", team: str | None = TEAM, role: str = "p1") -> Any:
    """Return a player's seat after the first lines of a battle in which both have the same team."""
    from pokegemma.battles.seat import Seat

    packed = None if team is None else simulator.validate_team(battle_format, team)
    (spec,) = make_specs(1, battle_format=battle_format, teams=(packed, packed))
    simulator.start(spec)
    (news,) = simulator.receive()
    simulator.stop(spec.battle_id)
    generation = simulator.describe_format(battle_format).generation
    name = {"p1": "ann", "p2": "bob"}[role]
    seat = Seat(battle_id="0", battle_format=battle_format, role=role, name=name, generation=generation)
    seat.read({"p1": news.lines[0], "p2": news.lines[1]}[role])
    return seat


def change_request(seat: Any, **active: Any) -> None:
    """Send a seat its last request again, with changes to what it says of the active Pokémon."""
    import json

    request = json.loads(json.dumps(seat.battle.last_request))
    request["active"][0].update(active)
    seat.read(f"|request|{json.dumps(request)}")
