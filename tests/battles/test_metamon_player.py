"""Policies that take metamon's observation: what they get, whole battles, mistakes, and the example of the docs."""

import dataclasses
import json
import re
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.battles.simulated import make_specs, open_seat, play
from tests.processes import call_script

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.players.metamon_player import MetamonPlayer
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.records import BattleTrajectory
from pokegemma.battles.trajectories.texts import list_numbers, list_words
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.battles.metamon_policies import StrongestMove, terastallize

POLICIES = "tests.battles.metamon_policies"
FORMAT = "gen1randombattle"


@pytest.fixture
def decision(simulator) -> BattleDecision:
    seat = open_seat(simulator)
    return BattleDecision("battle-0", "p1", 3, "0", seat.battle, find_legal_actions(seat.battle))


def test_a_policy_gets_metamons_observation(decision: BattleDecision) -> None:
    seen = []
    scores = MetamonPlayer("policy", lambda observations: seen.extend(observations) or [2, np.int64(4)]).score(
        [decision, dataclasses.replace(decision, role="p2", number=0)]
    )
    state = state_from_battle(decision.battle)
    first, second = seen
    assert first.text == " ".join(list_words(state)) and len(first.text.split(" ")) == 87
    assert first.numbers.shape == (48,) and np.array_equal(first.numbers, list_numbers(state))
    assert first.legal_actions == (0, 1, 2, 3, 4)
    assert (first.battle, first.number) == ("battle-0 p1", 3)
    assert (second.battle, second.number) == ("battle-0 p2", 0)
    assert scores.argmax(1).tolist() == [2, 4] and np.isneginf(scores).sum() == 2 * 12


def test_the_state_is_what_trajectory_files_have(decision: BattleDecision) -> None:
    """By metamon's names, as its UniversalState.from_dict takes them."""
    seen = []
    MetamonPlayer("policy", lambda observations: seen.extend(observations) or [0]).score([decision])
    data = json.loads(json.dumps(dataclasses.asdict(seen[0].state)))
    assert BattleTrajectory.from_data({"states": [data], "actions": [-1]}).states == (seen[0].state,)


def test_a_policy_plays_whole_battles_and_remembers_them(simulator) -> None:
    policy = StrongestMove()
    results = play(simulator, make_specs(3), (MetamonPlayer("policy", policy), RandomBattlePlayer()), concurrency=3)
    assert [result.problem for result in results.values()] == [""] * 3
    assert policy.counts == {
        f"{battle_id} p1": len(result.seats[0].steps) + result.seats[0].num_unavailable
        for battle_id, result in results.items()
    }
    assert sum(result.seats[0].num_unanswered for result in results.values()) == 0


def test_illegal_answers_are_counted_and_the_lowest_legal_action_is_played(simulator) -> None:
    players = (MetamonPlayer("policy", terastallize), RandomBattlePlayer())
    (result,) = play(simulator, make_specs(1), players, max_turns=5).values()
    seat = result.seats[0]
    assert result.problem == "" and seat.num_unanswered == len(seat.steps) > 3
    assert {step.action for step in seat.steps} <= {0, 4}


@pytest.mark.parametrize(
    ("name", "words"),
    [("answer_in_words", "'<0>' is not the number of an action"), ("answer_nothing", "0 answers to 1 observations")],
)
def test_answers_of_another_kind_are_one_line(decision: BattleDecision, name: str, words: str) -> None:
    player = PlayerSource.parse(f"policy={POLICIES}:{name}").open()
    with pytest.raises(PokegemmaError, match=f"player 'policy': {words}"):
        player.score([decision])


@pytest.mark.parametrize(
    ("source", "words"),
    [
        ("nowhere.policies:act", "no module 'nowhere.policies'"),
        (f"{POLICIES}:nothing", "no callable 'nothing'"),
        (f"{POLICIES}:NOT_CALLABLE", "no callable 'NOT_CALLABLE'"),
    ],
)
def test_a_policy_that_does_not_exist_is_refused(source: str, words: str) -> None:
    with pytest.raises(PokegemmaError, match=words):
        PlayerSource.parse(f"policy={source}").open()


def test_a_changed_module_is_another_player(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which gets the folder
    source = PlayerSource.parse("policy=policy_of_a_test:act")
    fingerprints = []
    for text in ("def act(observations): return [0]", "def act(observations): return [1]"):
        (tmp_path / "policy_of_a_test.py").write_text(text)
        fingerprints.append(source.fingerprint())
    assert len(set(fingerprints)) == 2


def test_a_callable_has_no_temperature() -> None:
    with pytest.raises(PokegemmaError, match="has no temperature"):
        PlayerSource.parse(f"policy={POLICIES}:terastallize@1.0")


@pytest.mark.slow(8)
def test_the_arena_and_recordings_take_a_policy_and_count_by_player(simulator, tmp_path: Path) -> None:
    players = ("--players", f"bad={POLICIES}:terastallize", f"slow={POLICIES}:sleep")
    limits = ("--battle_format", FORMAT, "--num_workers", 1, "--max_turns", 2, "--timeout_s", 0.01)
    done = call_script(
        "battles_arena", "--output_dir", tmp_path / "arena", *players, *limits, "--num_rounds", 1,
        "--num_resamples", 5,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    line = re.search(r"^slow: (\d+) decisions timed out, 0 answers named no legal action$", done.stdout, re.MULTILINE)
    assert line is not None and int(line[1]) > 0
    record = ("battles_record", "--output_dir", tmp_path / "recorded", *players, *limits, "--num_battles", 1)
    done = call_script(*record, "--json")
    assert done.returncode == 0, done.stderr
    played = json.loads(done.stdout)["played_now"]
    assert played["timeouts"]["slow"] > 0 and played["unanswered"]["slow"] == 0
    assert played["unanswered"]["bad"] + played["timeouts"]["bad"] > 0
    assert call_script(*record, "--seed", 1).returncode == 2


def test_the_example_of_the_docs_asks_a_process_of_another_environment(
    simulator, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The process itself, which needs metamon, is another one here: it plays the last legal action."""
    blocks = re.findall(r"```python\n(.*?)```", (PROJECT_ROOT / "docs" / "battles.md").read_text(), re.DOTALL)
    (player,) = (block for block in blocks if block.startswith("# metamon_player.py"))
    (tmp_path / "metamon_player.py").write_text(player)
    (tmp_path / "metamon_agent.py").write_text(
        "import json, sys\nfor line in sys.stdin:\n"
        "    print(json.dumps([question['legal_actions'][-1] for question in json.loads(line)]), flush=True)\n"
    )
    python = tmp_path / "metamon" / ".venv" / "bin" / "python"
    python.parent.mkdir(parents=True)
    python.symlink_to(sys.executable)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path])  # which gets the folder
    player = PlayerSource.parse("metamon=metamon_player:Agent").open()
    (result,) = play(simulator, make_specs(1), (player, RandomBattlePlayer()), max_turns=3).values()
    player._policy.process.stdin.close()
    assert player._policy.process.wait(60) == 0
    assert result.problem == "" and result.seats[0].num_unanswered == 0
    assert result.seats[0].steps[0].action > 3
