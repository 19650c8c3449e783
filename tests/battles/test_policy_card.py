"""The model card of a policy."""

import json

import pytest

from tests.processes import call_script

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.errors import PokegemmaError

PAIRS = [
    {"players": ["heuristic", "policy"], "wins": 90, "losses": 100, "ties": 10, "win_rate": 0.45},
    {"players": ["policy", "random"], "wins": 199, "losses": 1, "ties": 0, "win_rate": 0.995},
    {"players": ["heuristic", "random"], "wins": 1, "losses": 0, "ties": 0, "win_rate": 1.0},
]


@pytest.fixture
def folders(tmp_path):
    policy, arena = tmp_path / "policy", tmp_path / "arena"
    policy.mkdir(), arena.mkdir()
    record = {
        "stage": "train",
        "base_model": "/home/somebody/outputs/base_model",
        "options": {"text": "short", "won_only": False, "learning_rate": 0.003, "num_train_epochs": 2, "max_steps": -1},
        "dataset": {"path": "/home/somebody/packed", "sha256": "abc", "num_battles": 1000},
        "accuracy": {"action_accuracy": 0.938, "switch_accuracy": 0.98, "loss": 0.1},
        "baselines": {"uniform_legal": 0.195, "majority": 0.534},
        "num_eval_decisions": 1133,
    }
    (policy / "run.json").write_text(json.dumps(record))
    (policy / "model.safetensors").write_bytes(b"weights")
    pairs = [{**pair, "win_rate_interval": [0.4, 0.6]} for pair in PAIRS]
    (arena / "arena.json").write_text(json.dumps({"battle_format": "gen1ou", "pairs": pairs}))
    known = {"policy": [str(policy), PlayerSource("policy", str(policy)).fingerprint()], "random": ["random", "random"]}
    (arena / "run.json").write_text(json.dumps({"stage": "battles_arena", "options": {"players": known}}))
    return policy, arena


def test_a_card_has_figures_and_no_path(folders) -> None:
    policy, arena = folders
    done = call_script("battles_card", "--policy_path", policy, "--arena_dir", arena)
    assert done.returncode == 0, done.stderr
    card = (policy / "README.md").read_text()
    assert "| heuristic | 50.0 % | 43.1–56.9 | 100, 90, 10 |" in card
    assert "| random | 99.5 % | 40.0–60.0 | 199, 1, 0 |" in card
    assert card.index("| random") < card.index("| heuristic")
    assert "93.8 %" in card and "19.5 %" in card
    assert "| base | base_model |" in card
    assert "somebody" not in card
    assert "`max_steps`" not in card
    assert "the likeliest legal one is played" in card


def write_card(policy, arena):
    return call_script("battles_card", "--policy_path", policy, "--arena_dir", arena)


def test_a_result_of_reinforcement_learning_gets_no_card(folders) -> None:
    policy, arena = folders
    (policy / "actor_critic.json").write_text("{}")
    done = write_card(policy, arena)
    assert done.returncode == 2 and "is a result of scripts/rl_battles.py" in done.stderr


def test_a_policy_that_was_trained_on_after_its_battles_gets_no_card(folders) -> None:
    policy, arena = folders
    (policy / "model.safetensors").write_bytes(b"other weights")
    done = write_card(policy, arena)
    assert done.returncode == 2 and "other weights" in done.stderr and done.stderr.count("\n") == 1
    assert not (policy / "README.md").exists()


def test_an_arena_that_does_not_tell_its_weights_gives_no_card(folders) -> None:
    policy, arena = folders
    (arena / "run.json").unlink()
    done = write_card(policy, arena)
    assert done.returncode == 2 and "does not tell with which weights 'policy' played" in done.stderr


def test_a_card_tells_that_actions_were_drawn(folders) -> None:
    policy, arena = folders
    known = {"policy": [str(policy), PlayerSource("policy", str(policy), 1.5).fingerprint()]}
    (arena / "run.json").write_text(json.dumps({"stage": "battles_arena", "options": {"players": known}}))
    assert write_card(policy, arena).returncode == 0
    assert "drawn by the probabilities, at a temperature of 1.5" in (policy / "README.md").read_text()


def test_a_player_that_did_not_play_is_refused(folders) -> None:
    policy, arena = folders
    done = call_script("battles_card", "--policy_path", policy, "--arena_dir", arena, "--player", "nobody")
    assert done.returncode == 2
    assert "'nobody'" in done.stderr


@pytest.mark.slow(6)
def test_a_policy_has_versions_in_the_registry(folders, tmp_path) -> None:
    pytest.importorskip("pokegemma.release.registry", exc_type=PokegemmaError)
    policy, arena = folders
    (policy / "config.json").write_text("{}")
    assert write_card(policy, arena).returncode == 0
    registry = ("--registry_uri", tmp_path / "registry.db", "--name", "battles")
    for words in (
        ("register", "--model_path", policy),
        ("promote", 1, "--alias", "champion"),
        ("export", "champion", "--output_dir", tmp_path / "out"),
    ):
        done = call_script("model_registry", *words, *registry)
        assert done.returncode == 0, done.stderr
    for name in ("README.md", "model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (policy / name).read_bytes()
