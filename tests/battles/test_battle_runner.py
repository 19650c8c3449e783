"""Whole battles: the same at any concurrency, also when the node process is killed or stops in between."""

import os
import signal
from typing import Any

import numpy as np
import pytest

from tests.battles.simulated import make_specs, play

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.players.scripted import HeuristicPlayer, MaxBasePowerPlayer, RandomBattlePlayer
from pokegemma.battles.simulator import Simulator
from pokegemma.battles.trajectories.actions import (
    FIRST_SWITCH,
    FIRST_TERA,
    legal_actions,
    sort_moves,
    sort_switches,
)
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.names import clean_move, clean_species

SKARMORY = """Skarmory
Ability: Sturdy
EVs: 252 HP / 252 Def / 4 SpD
Tera Type: Steel
- Roost
- Body Press
- Spikes
- Whirlwind

Corviknight
Ability: Pressure
EVs: 252 HP / 252 Def / 4 SpD
Tera Type: Steel
- Roost
- Body Press
- U-turn
- Defog
"""
MAGNEZONE = """Magnezone
Ability: Magnet Pull
EVs: 252 SpA / 4 SpD / 252 Spe
Tera Type: Steel
- Thunderbolt
- Flash Cannon
- Volt Switch
- Steel Beam
"""
MIMIC = """Chansey
- Mimic
- Thunderbolt
- Soft-Boiled
- Reflect
"""
THUNDERBOLT = """Jolteon
- Thunderbolt
"""
EXPLODING = """Electrode
- Explosion
"""


class SwitchPlayer:
    """Switches whenever that seems legal."""

    name = "switch"

    def score(self, decisions) -> np.ndarray:
        scores = np.zeros((len(decisions), 13))
        scores[:, 4:9] = 1.0
        return scores


def decisions_of(results: dict[str, Any]) -> dict[str, Any]:
    """Return all that must not depend on concurrency: the logs, and what both players decided."""
    return {
        battle_id: (result.log, [[step.action for step in seat.steps] for seat in result.seats])
        for battle_id, result in results.items()
    }


@pytest.mark.slow(6)
def test_the_same_seeds_give_the_same_battles_at_any_concurrency(simulator) -> None:
    specs = make_specs(12)
    players = RandomBattlePlayer(), HeuristicPlayer()
    runs = [decisions_of(play(simulator, specs, players, concurrency=concurrency)) for concurrency in (1, 8, 64)]
    assert runs[0] == runs[1] == runs[2]
    assert not any("|t:|" in log for log, _ in runs[0].values())
    assert len({log for log, _ in runs[0].values()}) == 12


@pytest.mark.slow(4)
@pytest.mark.parametrize("stop", [signal.SIGKILL, signal.SIGSTOP])
def test_battles_of_a_process_that_ends_are_played_again(simulator, stop: int) -> None:
    specs = make_specs(6)
    expected = decisions_of(play(simulator, specs, (HeuristicPlayer(), MaxBasePowerPlayer())))
    with Simulator() as fragile:
        fragile.describe_format("gen1ou")  # started
        num_observed = 0
        stopped = None

        def end_the_process(seat) -> None:
            nonlocal num_observed, stopped
            num_observed += 1
            (running,) = fragile.process_ids
            if num_observed in (20, 150):
                os.kill(running, stop)
                stopped = running
                fragile.timeout_s = 0.5 if stop is signal.SIGSTOP else 60.0
            elif running != stopped:  # a limit that ends a process that is only slow would be no test
                fragile.timeout_s = 60.0

        players = HeuristicPlayer(), MaxBasePowerPlayer()
        results = play(fragile, specs, players, concurrency=4, observer=end_the_process)
    assert num_observed > 150
    assert decisions_of(results) == expected


@pytest.mark.slow(4)
@pytest.mark.parametrize("battle_format", ["gen1randombattle", "gen9randombattle"])
def test_legal_actions_are_among_those_of_the_state_and_mean_the_same(simulator, battle_format: str) -> None:
    num_seen = 0

    def compare(seat) -> None:
        nonlocal num_seen
        if seat.battle.finished:
            return
        num_seen += 1
        state, legal = state_from_battle(seat.battle), find_legal_actions(seat.battle)
        assert set(legal) <= set(legal_actions(state))
        moves, switches = sort_moves(state.player_active_pokemon), sort_switches(state)
        for number, action in legal.items():
            if FIRST_SWITCH <= number < FIRST_TERA:
                assert clean_species(action.subject.species) == switches[number - FIRST_SWITCH].name
            elif action.subject.id not in ("struggle", "recharge", "fight"):
                assert clean_move(action.subject.id) == moves[number % FIRST_TERA].name

    specs = make_specs(8, battle_format=battle_format)
    results = play(simulator, specs, (RandomBattlePlayer(), HeuristicPlayer()), observer=compare)
    assert num_seen > 200 and not any(result.problem for result in results.values())


def test_a_move_that_mimic_copied_and_that_was_known_has_one_number(simulator) -> None:
    """The request lists it twice, poke-env and the state once."""
    num_twice = 0

    def compare(seat) -> None:
        nonlocal num_twice
        if seat.battle.finished:
            return
        listed = [move["id"] for move in (seat.battle.last_request.get("active") or [{}])[0].get("moves", [])]
        num_twice += len(set(listed)) < len(listed)
        assert set(find_legal_actions(seat.battle)) <= set(legal_actions(state_from_battle(seat.battle)))

    teams = tuple(simulator.validate_team("gen1ou", team) for team in (MIMIC, THUNDERBOLT))
    specs = make_specs(2, battle_format="gen1ou", teams=teams)
    results = play(simulator, specs, (RandomBattlePlayer(), RandomBattlePlayer()), observer=compare)
    assert num_twice > 0 and not any(result.problem for result in results.values())


def test_a_battle_that_kills_every_process_is_reported(simulator) -> None:
    specs = make_specs(3)
    with Simulator() as fragile:

        def end_the_process(seat) -> None:
            if seat.battle.battle_tag.endswith("battle-1"):
                os.kill(fragile.process_ids[0], signal.SIGKILL)

        players = HeuristicPlayer(), MaxBasePowerPlayer()
        results = play(fragile, specs, players, observer=end_the_process)
    assert "died" in results["battle-1"].problem
    assert [results[f"battle-{number}"].problem for number in (0, 2)] == ["", ""]


def test_a_decision_that_did_not_happen_is_dropped(simulator) -> None:
    teams = tuple(simulator.validate_team("gen9ou", team) for team in (SKARMORY, MAGNEZONE))
    specs = make_specs(1, battle_format="gen9ou", teams=teams)
    (result,) = play(simulator, specs, (SwitchPlayer(), HeuristicPlayer())).values()
    assert result.problem == ""
    assert result.seats[0].num_unavailable > 0
    # Magnet Pull holds both, so that the only switch is to the second after the first has fainted.
    assert [step.action for step in result.seats[0].steps].count(4) == 1
    assert result.seats[1].num_unavailable == 0


def test_both_players_may_faint_at_once(simulator) -> None:
    team = simulator.validate_team("gen1ou", EXPLODING)
    specs = make_specs(20, battle_format="gen1ou", teams=(team, team))
    results = play(simulator, specs, (RandomBattlePlayer(), RandomBattlePlayer()))
    ends = {name: result.log.splitlines()[-1] for name, result in results.items()}
    winners = {name: result.winner for name, result in results.items()}
    assert "|tie" in ends.values()
    assert {name for name, winner in winners.items() if winner is None} == {
        name for name, line in ends.items() if line == "|tie"
    }


def test_a_long_battle_is_ended_without_a_winner(simulator) -> None:
    (result,) = play(simulator, make_specs(1), (RandomBattlePlayer(), RandomBattlePlayer()), max_turns=3).values()
    assert (result.winner, result.turn_limit_reached, result.num_turns) == (None, True, 3)
    assert len(result.seats[0].steps) >= 3
