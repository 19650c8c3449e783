"""Recorded battles: the files of both players, and continuing a run."""

import json
import shutil
from pathlib import Path

import pytest

from tests.processes import call_script

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
pytest.importorskip("lz4", reason="needs lz4 (./init.sh --with battles)")
from pokegemma.battles.trajectories.actions import legal_actions
from pokegemma.battles.trajectories.files import TrajectoryName, find_trajectory_files, read_trajectory

FORMAT = "gen1randombattle"


def record(folder: Path, *more: object) -> dict:
    done = call_script(
        "battles_record", "--output_dir", folder, "--battle_format", FORMAT, "--players", "heuristic", "random",
        "--num_workers", 1, "--date", "11-29-2026", "--json", *more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def recorded(simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("battles")
    report = record(folder, "--num_battles", 4)
    assert report["num_battles"] == 4 and report["problems"] == []
    return folder


def contents(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in find_trajectory_files(folder)}


def test_a_battle_has_a_file_of_each_player(recorded: Path) -> None:
    names = [TrajectoryName.parse(path.name) for path in find_trajectory_files(recorded)]
    assert len(names) == 8
    assert {(name.player, name.opponent) for name in names} == {("heuristic", "random"), ("random", "heuristic")}
    assert {name.battle_id for name in names} == {f"pokegemma-{FORMAT}-0-{index:07d}" for index in range(4)}
    for battle_id in {name.battle_id for name in names}:
        assert sum(name.won for name in names if name.battle_id == battle_id) <= 1


def test_every_recorded_action_is_legal_and_the_end_is_in_the_last_state(recorded: Path) -> None:
    for path in find_trajectory_files(recorded):
        trajectory, name = read_trajectory(path), TrajectoryName.parse(path.name)
        *states, last = trajectory.states
        assert trajectory.actions[-1] == -1 and len(trajectory.actions) == len(trajectory.states)
        for state, action in zip(states, trajectory.actions[:-1], strict=True):
            assert action in legal_actions(state)
            assert not state.battle_won and not state.battle_lost
        assert (last.battle_won, last.battle_lost) == (name.won, not name.won)


@pytest.mark.slow(3)
def test_a_run_continues_where_it_was_interrupted_and_adds_battles(recorded: Path, tmp_path: Path) -> None:
    expected = contents(recorded)
    assert record(tmp_path / "two", "--num_battles", 2)["played_now"]["battles"] == 2
    lost = find_trajectory_files(tmp_path / "two")[0]
    lost.unlink()
    report = record(tmp_path / "two", "--num_battles", 4, "--concurrency", 1)
    assert report["played_now"]["battles"] == 3
    assert contents(tmp_path / "two") == expected
    assert record(tmp_path / "two", "--num_battles", 4)["played_now"] == {}


@pytest.mark.slow(4)
def test_a_checkpoint_is_recorded_and_another_one_of_its_name_is_refused(
    simulator, tiny_policy: Path, tmp_path: Path
) -> None:
    policy, folder = tmp_path / "policy", tmp_path / "battles"
    shutil.copytree(tiny_policy, policy)
    players = ("--players", f"tiny={policy}@1.0", f"tiny={policy}@1.0")
    report = record(folder, *players, "--num_battles", 2)
    assert report["num_battles"] == 2 and set(report["wins"]) == {"tiny-1", "tiny-2"}
    assert record(folder, *players, "--num_battles", 2)["played_now"] == {}
    weights = policy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-1] + b"\1")
    done = call_script("battles_record", "--output_dir", folder, "--battle_format", FORMAT, *players)
    assert done.returncode == 2 and "which has changed" in done.stderr


def test_two_players_of_one_name_are_refused(simulator, tmp_path: Path) -> None:
    done = call_script("battles_record", "--output_dir", tmp_path / "out", "--players", "a=random", "a=heuristic")
    assert done.returncode == 2 and "two players are called 'a'" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--seed", 1), "--seed 0"),
        (("--battle_format", "gen9doublesou"), "doubles"),
        (("--battle_format", "gen2ou"), "--teams_file"),
    ],
)
def test_a_mistake_is_one_line(recorded: Path, arguments: tuple, words: str) -> None:
    before = contents(recorded)
    done = call_script(
        "battles_record", "--output_dir", recorded, "--num_battles", 5,
        *(("--battle_format", FORMAT) if "--battle_format" not in arguments else ()),
        "--players", "heuristic", "random", *arguments,
    )  # fmt: skip
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
    assert contents(recorded) == before
