"""Self-play: what is learned from, when a candidate is accepted, and a run that is continued."""

import dataclasses
import json
from pathlib import Path

import pytest

from tests.processes import call_script, fork_server

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.offline_rl.model import ActorCritic
from pokegemma.battles.offline_rl.network_files import save_actor_critic
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.selfplay.learner import LEARNER, SCRIPTS_IMPORT, Learner, link_trajectories, parse_others
from pokegemma.battles.selfplay.options import SelfPlayOptions
from pokegemma.battles.selfplay.progress import describe_final, format_progress, plot_progress
from pokegemma.battles.selfplay.rounds import copy_policy, is_accepted
from pokegemma.errors import PokegemmaError
from tests.battles.small_game import SHAPE


def record(wins: int, losses: int, ties: int, low: float, high: float) -> dict:
    rate = wins / (wins + losses + ties)
    return {"wins": wins, "losses": losses, "ties": ties, "win_rate": rate, "win_rate_interval": [low, high]}


def make_results() -> dict:
    """Return the results of two rounds, of which the first one was accepted."""
    other, rounds = {"heuristic": record(4, 6, 0, 0.17, 0.69)}, []
    for number, best, wins in ((1, "start", 8), (2, "round1", 5)):
        rounds.append(
            {
                "round": number,
                "candidate": f"round{number}",
                "best": best,
                "accepted": number == 1,
                "against_best": record(wins, 10 - wins, 0, 0.49, 0.94),
                "against": other,
            }
        )
    best = {"name": "round1", "path": "round1/trained"}
    return {"start": other, "rounds": rounds, "best": best, "final": {"against_start": rounds[0]["against_best"]}}


@pytest.mark.parametrize(
    ("accept", "above", "expected"),
    [("interval", 0.5, False), ("interval", 0.48, True), ("share", 0.5, True), ("share", 0.8, False)],
)
def test_a_candidate_is_accepted_by_the_rule(accept: str, above: float, expected: bool) -> None:
    assert is_accepted(record(8, 2, 0, 0.49, 0.94), accept=accept, above=above) is expected


def test_a_candidate_of_the_bests_strength_is_not_accepted_whatever_is_tied() -> None:
    assert not is_accepted(record(5, 1, 4, 0.24, 0.76), accept="share", above=0.5)


def test_results_are_a_table_a_sentence_and_a_plot(tmp_path: Path) -> None:
    results = make_results()
    lines = format_progress(results).splitlines()
    assert [line.split()[0] for line in lines[1:]] == ["start", "round1", "round2"]
    assert "8-2-0" in lines[2] and "yes" in lines[2] and "no" in lines[3].split() and "40.0 % (17.0–69.0)" in lines[1]
    assert "round1 against start in new battles: 8 won" in describe_final(results)
    assert "the first one" in describe_final({**results, "final": None})
    plot_progress(tmp_path / "plot.png", results)
    assert (tmp_path / "plot.png").read_bytes()[:4] == b"\x89PNG"


def write_files(folder: Path, *names: str) -> Path:
    for name in names:
        path = folder / "gen1ou" / f"{name}.json.lz4"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(f"{folder.name}/{name}")
    return folder


FIRST, SECOND = "gen1ou-1_Unrated_learner_vs_b_11-30-2026_WIN", "gen1ou-1_Unrated_b_vs_learner_11-30-2026_LOSS"


def test_files_of_several_recordings_are_joined_or_those_of_one_player(tmp_path: Path) -> None:
    one, two = write_files(tmp_path / "one", FIRST, SECOND), write_files(tmp_path / "two", FIRST.replace("-1_", "-2_"))
    for _ in range(2):
        link_trajectories(one, tmp_path / "mine", player=LEARNER)
        link_trajectories(two, tmp_path / "mine")
    files = {path.name: path.read_text() for path in (tmp_path / "mine" / "gen1ou").iterdir()}
    assert set(files) == {f"{FIRST}.json.lz4", f"{FIRST.replace('-1_', '-2_')}.json.lz4"}
    assert files[f"{FIRST}.json.lz4"] == f"one/{FIRST}"


def test_two_files_of_one_name_are_refused(tmp_path: Path) -> None:
    link_trajectories(write_files(tmp_path / "one", FIRST), tmp_path / "all")
    with pytest.raises(PokegemmaError, match="have one name"):
        link_trajectories(write_files(tmp_path / "two", FIRST), tmp_path / "all")


def test_a_name_that_the_run_gives_is_refused() -> None:
    assert parse_others(["random", "a=heuristic"], reserved=["start"], flag="--compare_with") == (
        PlayerSource("random", "random"),
        PlayerSource("a", "heuristic"),
    )
    with pytest.raises(PokegemmaError, match="'round1'"):
        parse_others(["round1=random"], reserved=["start", "round1"], flag="--compare_with")


@dataclasses.dataclass
class Calls:
    """Stands for a `ScriptRunner`: keeps what would be run."""

    made: list = dataclasses.field(default_factory=list)

    def run(self, script: str, output: Path, *, is_complete=None, **options: object) -> None:
        self.made.append((script, options))


@pytest.mark.parametrize("trainer", ["sft", "rl"])
def test_training_starts_from_the_best_policy(trainer: str, tiny_policy: Path, tmp_path: Path) -> None:
    options = SelfPlayOptions(
        policy_path=str(tiny_policy), output_dir=str(tmp_path), trainer=trainer, training_config=None
    )
    calls, recording = Calls(), write_files(tmp_path / "recorded", FIRST)
    Learner(options, calls).train(tmp_path / "round1", [recording], tiny_policy)
    (pack, packing), (train, training) = calls.made
    assert (pack, train) == ("battles_pack", f"{trainer}_battles")
    assert training["trajectories_dir"] == packing["output_dir"] == tmp_path / "round1" / "packed"
    assert training["won_only"] is (trainer == "sft")  # critics learn from lost battles, too
    if trainer == "sft":
        assert (training["model_name_or_path"], training["text"]) == (str(tiny_policy), "short")
        assert "encoder" not in training and training["config"].name == "battles.yaml"
    else:
        assert training["encoder"] == tiny_policy and "reference" not in training and training["config"] is None


def test_an_actor_critic_is_its_candidates_reference(tiny_policy: Path, tmp_path: Path) -> None:
    best = tmp_path / "best"
    save_actor_critic(best, ActorCritic(dataclasses.replace(SHAPE, feature_width=64)), encoder=str(tiny_policy))
    options = SelfPlayOptions(policy_path=str(best), output_dir=str(tmp_path), trainer="rl")
    calls, recording = Calls(), write_files(tmp_path / "recorded", FIRST)
    Learner(options, calls).train(tmp_path / "round1", [recording], best)
    assert (calls.made[1][1]["encoder"], calls.made[1][1]["reference"]) == (str(tiny_policy), best)
    with pytest.raises(PokegemmaError, match="--trainer rl"):
        Learner(dataclasses.replace(options, trainer="sft"), calls).train(tmp_path / "round2", [recording], best)


def test_the_best_policy_is_copied_without_its_checkpoints(tmp_path: Path) -> None:
    for name, text in (("one", "1"), ("two", "2")):
        (tmp_path / name / "checkpoint-3").mkdir(parents=True)
        (tmp_path / name / "model.safetensors").write_text(text)
        copy_policy(tmp_path / name, tmp_path / "best")
    assert [path.name for path in (tmp_path / "best").iterdir()] == ["model.safetensors"]
    assert (tmp_path / "best" / "model.safetensors").read_text() == "2"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["best", "one", "two"]


@pytest.mark.slow(15)
def test_a_round_is_played_learned_from_and_judged_and_a_second_call_repeats_nothing(
    simulator, tiny_policy: Path, tmp_path: Path
) -> None:
    fork_server(list(SCRIPTS_IMPORT))
    config, output = tmp_path / "config.yaml", tmp_path / "out"
    config.write_text("finetuning: full\nmax_steps: 2\neval_fraction: 0\nreport_to: none\nlearning_rate: 1.0e-3\n")
    sizes = ("--num_battles", 2, "--arena_rounds", 1, "--num_workers", 1, "--rounds", 1, "--compare_with", "random")
    command = ("--policy_path", tiny_policy, "--output_dir", output, "--battle_format", "gen1randombattle", *sizes)
    command += ("--training_config", config, "--accept", "share", "--accept_above", 0, "--won_only", "false")
    answer = call_script("battles_selfplay", *command)
    assert answer.returncode == 0, answer.stderr
    results = json.loads((output / "results.json").read_text())
    (row,) = results["rounds"]
    assert row["accepted"] == (row["against_best"]["wins"] > 0)
    for met in (row["against_best"], row["against"]["random"]):
        assert met["wins"] + met["losses"] + met["ties"] == 2
    assert (output / "best" / "model.safetensors").is_file() and (output / "selfplay.png").is_file()
    best = tiny_policy if results["best"]["name"] == "start" else output / "round1" / "trained"
    assert (output / "best" / "model.safetensors").read_bytes() == (best / "model.safetensors").read_bytes()
    before = {path: path.stat().st_mtime_ns for path in output.rglob("run.json") if "best" not in path.parts}
    again = call_script("battles_selfplay", *command)
    assert again.stdout == answer.stdout
    assert before == {path: path.stat().st_mtime_ns for path in output.rglob("run.json") if "best" not in path.parts}
    other = call_script("battles_selfplay", *command, "--num_battles", 3)
    assert other.returncode == 2 and "--num_battles was 2, is 3" in other.stderr
    config.write_text("max_steps: 3\n")
    other = call_script("battles_selfplay", *command)
    assert other.returncode == 2 and "--training_config" in other.stderr
