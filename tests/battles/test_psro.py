"""PSRO over battles: a whole run of tiny sizes, and one that is continued. The game itself: test_matrix_game.py."""

import json
from pathlib import Path

import pytest

from tests.processes import call_script, fork_server

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.selfplay.equilibrium_tables import format_payoffs, format_responses
from pokegemma.battles.selfplay.learner import SCRIPTS_IMPORT
from pokegemma.battles.trajectories.files import TrajectoryName
from pokegemma.battles.trajectories.packed import PackedTrajectories


def test_tables_have_a_line_for_each_player_and_population() -> None:
    estimate = {"value": 0.0, "mean": 0.02, "interval": [0.001, 0.05]}
    first = {"population": ["a", "b"], "payoffs": [[0.5, 0.7], [0.3, 0.5]], "mixture": {"a": 1.0, "b": 0.0}}
    first |= {"exploitability": estimate, "response": "response1", "response_payoff": {**estimate, "value": 0.6}}
    first["later_exploitability"] = {**estimate, "value": 0.1}
    last = {"population": ["a", "b", "response1"], "exploitability": estimate}
    assert format_payoffs(first).splitlines()[1].split() == ["a", "–", "70.0", "%", "100.0", "%"]
    lines = format_responses({"equilibria": [first, last]}).splitlines()
    assert len(lines) == 3 and "response1" in lines[1] and "60.0 %" in lines[1] and "10.0 %" in lines[1]


@pytest.mark.slow(15)
def test_a_response_is_trained_against_the_mixture_and_joins_the_population(
    simulator, tiny_policy: Path, tmp_path: Path
) -> None:
    fork_server(list(SCRIPTS_IMPORT))
    config, output = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text(
        "max_steps: 2\neval_fraction: 0\nreport_to: none\nwidth: 16\nnum_heads: 2\nnum_layers: 1\ngammas: [0.9]\n"
    )
    sizes = ("--num_battles", 4, "--arena_rounds", 1, "--num_workers", 1, "--num_resamples", 20)
    command = ("--policy_path", tiny_policy, "--output_dir", output, "--battle_format", "gen1randombattle", *sizes)
    command += ("--population", "random", "--trainer", "rl", "--training_config", config, "--won_only", "false")
    answer = call_script("battles_psro", *command, "--num_responses", 0)
    assert answer.returncode == 0, answer.stderr
    assert not (output / "response1").exists()
    before = (output / "arena" / "results.jsonl").read_text()
    answer = call_script("battles_psro", *command, "--num_responses", 1, "--json")
    assert answer.returncode == 0, answer.stderr
    results = json.loads(answer.stdout)
    first, last = results["equilibria"]
    assert list(results["players"]) == ["random", "policy", "response1"] == last["population"]
    assert first["response"] == "response1"
    assert sum(first["mixture"].values()) == pytest.approx(1)
    assert first["exploitability"]["value"] == pytest.approx(0, abs=1e-6)
    assert "outside of the population" in results["note"]
    assert (output / "arena" / "results.jsonl").read_text().startswith(before)
    packed = PackedTrajectories(output / "response1" / "packed")
    views = [TrajectoryName.parse(packed.name(index).rpartition("/")[2]) for index in range(len(packed))]
    assert len(views) == 4 and {view.player for view in views} == {"learner"}
    assert {view.opponent for view in views} <= {name for name, share in first["mixture"].items() if share}
    files = {path: path.stat().st_mtime_ns for path in output.rglob("run.json")}
    again = call_script("battles_psro", *command, "--num_responses", 1, "--json")
    assert json.loads(again.stdout) == results
    assert files == {path: path.stat().st_mtime_ns for path in output.rglob("run.json")}
