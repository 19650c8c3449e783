"""Battles on a server: the protocol with a stand-in whose battles are real ones."""

import contextlib
import datetime
from collections.abc import Iterator
from pathlib import Path

import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from tests.processes import call_script, free_port, wait_until

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
pytest.importorskip("lz4", reason="needs lz4 (./init.sh --with battles)")
from pokegemma.battles.online.connection import ShowdownConnection, simplify_name
from pokegemma.battles.online.matches import MatchPlayer, MatchResult
from pokegemma.battles.online.recorded import write_match
from pokegemma.battles.players.player import Decider
from pokegemma.battles.players.scripted import HeuristicPlayer
from pokegemma.battles.trajectories.actions import legal_actions
from pokegemma.battles.trajectories.files import read_trajectory
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.battles.trajectories.records import NO_ACTION
from tests.battles.showdown_stand_in import StandIn, run_stand_in

FORMAT = "gen1randombattle"


def make_player(simulator, connection: ShowdownConnection, **changes) -> MatchPlayer:
    options = {
        "draw_team": lambda: None,
        "observer": lambda seat: state_from_battle(seat.battle),
    }
    decider = Decider(HeuristicPlayer())
    return MatchPlayer(connection, decider, simulator.describe_format(FORMAT), **{**options, **changes})


@contextlib.contextmanager
def connected(user_name: str = "bot", **options) -> Iterator[tuple[StandIn, ShowdownConnection]]:
    with run_stand_in(FORMAT, **options) as server, ShowdownConnection(server.url, user_name=user_name) as connection:
        yield server, connection


def test_a_challenge_is_played_to_its_end_and_recorded(simulator, tmp_path: Path) -> None:
    with connected("My Bot 1", challenges=(FORMAT,)) as (server, connection):
        (match,) = make_player(simulator, connection).play(1, "challenges")
    assert server.received[:3] == ["/trn My Bot 1,0,", "/utm null", "/accept ann"]
    assert match.room == f"battle-{FORMAT}-1" and match.opponent == "ann"
    choices = [command for command in server.received if command.startswith("/choose")]
    assert len(choices) == len(match.steps) > 5
    path = write_match(tmp_path, match, player="My Bot 1", moment=datetime.datetime(2026, 11, 30, 1, 2, 3))
    result = "WIN" if match.won else "LOSS"
    assert path.name == f"battle-{FORMAT}-1_Unrated_mybot1_vs_ann_11-30-2026-01:02:03_{result}.json.lz4"
    trajectory = read_trajectory(path)
    assert trajectory.states[-1].battle_won is match.won
    pairs = zip(trajectory.states, trajectory.actions, strict=True)
    assert all(action in legal_actions(state) for state, action in pairs if action != NO_ACTION)


def test_challenges_to_another_format_and_of_others_are_refused(simulator) -> None:
    with connected(challenges=("gen9ou", FORMAT)) as (server, connection):
        next(make_player(simulator, connection).play(1, "challenges"))
    assert server.received[1] == "/reject ann" and "/accept ann" in server.received
    with connected(challenges=(FORMAT,)) as (server, connection):
        make_player(simulator, connection, opponents=("bob",))._step()
        wait_until(lambda: len(server.received) == 2)
    assert server.received == ["/trn bot,0,", "/reject ann"]


def test_the_ladder_is_searched_once_a_battle(simulator) -> None:
    with connected() as (server, connection):
        matches = list(make_player(simulator, connection).play(2, "ladder"))
    assert [match.room for match in matches] == [f"battle-{FORMAT}-1", f"battle-{FORMAT}-2"]
    assert server.received.count(f"/search {FORMAT}") == 2
    assert server.received.count(f"/noreply /leave battle-{FORMAT}-1") == 1


def test_a_choice_that_the_server_refuses_is_an_error_and_a_forfeit(simulator) -> None:
    with connected(challenges=(FORMAT,), refuses_choices=True) as (server, connection):
        with pytest.raises(CheckFailedError, match="illegal choice"):
            next(make_player(simulator, connection).play(1, "challenges"))
        wait_until(lambda: "/forfeit" in server.received)


def test_a_server_that_is_not_there_is_one_line() -> None:
    port = free_port()
    with pytest.raises(PokegemmaError, match=f"127.0.0.1:{port}.* cannot be reached"):
        ShowdownConnection(f"ws://127.0.0.1:{port}/showdown/websocket", user_name="bot")


def test_a_lost_connection_is_one_line(simulator) -> None:
    with run_stand_in(FORMAT) as server:
        connection = ShowdownConnection(server.url, user_name="bot")
    with pytest.raises(PokegemmaError, match="was lost"):
        next(make_player(simulator, connection).play(1, "challenges"))


def test_a_battle_left_before_its_first_decision_is_not_written(tmp_path: Path) -> None:
    match = MatchResult("battle-gen1ou-1", "ann", "", True, 0, (), None, 0)
    assert write_match(tmp_path, match, player="bot", moment=datetime.datetime(2026, 11, 30)) is None
    assert list(tmp_path.iterdir()) == []


def test_a_name_is_compared_as_showdown_does() -> None:
    assert simplify_name("Bot #1 é_X") == "bot1x"


def test_the_script_plays_on_a_given_server(simulator, tmp_path: Path) -> None:
    with run_stand_in(FORMAT, challenges=(FORMAT,)) as server:
        done = call_script(
            "battles_online", "--server", server.url, "--user_name", "bot", "--output_dir", tmp_path / "out",
            "--battle_format", FORMAT,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith(f"battle-{FORMAT}-1: ")
    assert len(list((tmp_path / "out" / FORMAT).iterdir())) == 1


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--ladder",), "--server"),
        (("--server", "ws://127.0.0.1:1/x"), "--user_name"),
        (("--server", "http://127.0.0.1:1/x", "--user_name", "bot"), "http://127.0.0.1:1/x"),
    ],
)
def test_a_mistake_of_the_command_is_one_line(arguments: tuple, words: str) -> None:
    done = call_script("battles_online", *arguments)
    assert done.returncode == 2 and words in done.stderr and done.stderr.count("\n") == 1
