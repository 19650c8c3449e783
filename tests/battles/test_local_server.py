"""Pokémon Showdown's own server, started and ended here."""

import socket
import subprocess
import sys
import threading

import psutil
import pytest

from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.provenance import PROJECT_ROOT
from tests.processes import free_port, is_listening, killed_after, wait_until, wait_until_ended

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.online.connection import ShowdownConnection
from pokegemma.battles.online.local_server import SHOWDOWN_FOLDER, LocalServer
from pokegemma.battles.online.matches import MatchPlayer
from pokegemma.battles.players.player import Decider
from pokegemma.battles.players.scripted import MaxBasePowerPlayer, RandomBattlePlayer

FORMAT = "gen1randombattle"

if not SHOWDOWN_FOLDER.is_dir():
    pytest.skip("needs Pokémon Showdown's server (./init.sh --with showdown)", allow_module_level=True)


@pytest.mark.slow(10)
def test_two_users_play_a_battle_on_a_server_of_this_machine(simulator) -> None:
    """One challenges, the other accepts; both are ours, with the protocol of the real server between them."""
    battle_format = simulator.describe_format(FORMAT)
    results = []

    def play(connection: ShowdownConnection, player: object) -> None:
        matches = MatchPlayer(
            connection, Decider(player), battle_format, draw_team=lambda: None, observer=lambda seat: seat.role
        )
        results.extend(matches.play(1, "challenges"))

    port = free_port()
    with LocalServer(port) as server:
        ours = [each for each in psutil.net_connections("tcp") if each.laddr and each.laddr.port == port]
        assert {each.laddr.ip for each in ours if each.status == psutil.CONN_LISTEN} == {"127.0.0.1"}
        with (
            ShowdownConnection(server.url, user_name="Ann 1") as ann,
            ShowdownConnection(server.url, user_name="bob") as bob,
        ):
            players = [(ann, RandomBattlePlayer()), (bob, MaxBasePowerPlayer())]
            threads = [threading.Thread(target=play, args=each, daemon=True) for each in players]
            for thread in threads:
                thread.start()
            ann.send("/utm null")
            ann.send(f"/challenge bob, {FORMAT}")
            for thread in threads:
                thread.join(120)
        process_id = server.pid
    wait_until_ended([process_id])
    assert not is_listening(port)
    first, second = results
    assert first.room == second.room and {first.opponent, second.opponent} == {"Ann 1", "bob"}
    assert (first.won, second.won) in {(True, False), (False, True), (None, None)}
    assert min(len(first.steps), len(second.steps)) > 3
    assert {first.last_record, second.last_record} == {"p1", "p2"}


@pytest.mark.slow(5)
def test_the_server_ends_with_a_process_that_is_killed() -> None:
    port = free_port()
    code = (
        f"import time\nfrom pokegemma.battles.online.local_server import LocalServer\n"
        f"with LocalServer({port}) as server:\n    print(server.pid, flush=True)\n    time.sleep(600)\n"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code], cwd=PROJECT_ROOT, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    with killed_after(process):
        server_id = int(process.stdout.readline())
        process.kill()
        process.communicate()
        wait_until_ended([server_id])
    wait_until(lambda: not is_listening(port))


def test_a_port_that_is_taken_is_refused() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(PokegemmaError, match=f"--port {port}"), LocalServer(port):
            pass


def test_a_server_that_cannot_start_is_one_line() -> None:
    server = LocalServer(free_port())
    server._command[2] = "/nowhere"
    with pytest.raises(CheckFailedError, match="Error"), server:
        pass
