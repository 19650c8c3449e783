"""The arena: each battle once, whatever interrupts it; results, standings and the page."""

import json
import os
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import psutil
import pytest

from pokegemma.provenance import PROJECT_ROOT
from tests.battles.simulated import TEAM
from tests.processes import call_script, killed_after, wait_until, wait_until_ended

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.arena import playing
from pokegemma.battles.arena.plan import list_battles, list_pairs
from pokegemma.battles.arena.replay import read_battle_log
from pokegemma.battles.arena.report import format_standings
from pokegemma.battles.arena.results import ArenaResult, append_result, mend_results, read_battles
from pokegemma.battles.arena.standings import make_standings
from pokegemma.battles.players.opening import PlayerSource, parse_players
from pokegemma.errors import PokegemmaError

FORMAT = "gen1randombattle"
COMMAND = ("--battle_format", FORMAT, "--num_resamples", 10)


def arena(folder: Path, *arguments: object) -> dict:
    done = call_script("battles_arena", "--output_dir", folder, *COMMAND, "--num_workers", 1, "--json", *arguments)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


@pytest.fixture(scope="module")
def played(simulator, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("arena")
    arena(folder, "--players", "random", "heuristic", "max-base-power", "--num_rounds", 2, "--baseline", "heuristic")
    return folder


def lines_of(folder: Path) -> list[str]:
    return (folder / "results.jsonl").read_text().splitlines()


def result(first: str, second: str, number: int, winner: str | None, *, swapped: bool = False) -> ArenaResult:
    return ArenaResult((first, second), number, swapped, winner, 20, False, (0, 0))


# --- which battles


def test_a_round_is_two_battles_of_each_pair_with_the_sides_swapped() -> None:
    battles = list(list_battles([("a", "b"), ("a", "c")], 2))
    assert [(battle.names, battle.round) for battle in battles] == [
        (("a", "b"), 0),
        (("b", "a"), 0),
        (("a", "c"), 0),
        (("c", "a"), 0),
        (("a", "b"), 1),
        (("b", "a"), 1),
        (("a", "c"), 1),
        (("c", "a"), 1),
    ]
    assert len({battle.battle_id for battle in battles}) == 8


def test_pairs_do_not_depend_on_the_order_of_players() -> None:
    players = [PlayerSource(name, "random") for name in ("c", "a", "b")]
    assert sorted(list_pairs(players)) == [("a", "b"), ("a", "c"), ("b", "c")]
    assert list_pairs(players, against=["b"]) == [("b", "c"), ("a", "b")]


@pytest.mark.parametrize(
    ("texts", "words"),
    [
        (["random", "random"], "two players are called 'random'"),
        (["a=nobody"], "'nobody' is not a player"),
        (["a_b=random"], "--players a_b=random"),
    ],
)
def test_players_that_cannot_play_are_refused(texts: list[str], words: str) -> None:
    with pytest.raises(PokegemmaError, match=words):
        parse_players(texts, flag="--players")


# --- results


def test_half_a_line_is_cut_off_and_what_follows_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    path = tmp_path / "results.jsonl"
    first, second = result("a", "b", 0, "a"), result("a", "b", 0, None, swapped=True)
    append_result(path, first)
    path.write_bytes(path.read_bytes() + b'{"pair": ["a", ')
    assert list(read_battles(path).values()) == [first]
    mend_results(path)
    assert "half a line" in caplog.text
    append_result(path, second)
    assert list(read_battles(path).values()) == [first, second]


def test_only_half_a_line_is_no_result(tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    path.write_bytes(b'{"pair"')
    mend_results(path)
    assert read_battles(path) == {} and path.read_bytes() == b""


def test_of_a_battle_that_is_there_twice_the_first_line_counts(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    path = tmp_path / "results.jsonl"
    lines = [result("a", "b", 0, "a"), result("a", "b", 0, "b"), result("a", "b", 1, "b")]
    for line in lines:
        append_result(path, line)
    mend_results(path)
    assert "1 lines repeat battles" in caplog.text
    assert list(read_battles(path).values()) == [lines[0], lines[2]]


@pytest.mark.parametrize("line", ["", "[]", '{"pair": 3}', '{"pair": ["a", "b"]}'])
def test_a_line_that_is_not_a_result_is_named(line: str, tmp_path: Path) -> None:
    path = tmp_path / "results.jsonl"
    append_result(path, result("a", "b", 0, "a"))
    path.write_text(f"{path.read_text()}{line}\n")
    with pytest.raises(PokegemmaError, match=r"results\.jsonl:2: not the result of a battle"):
        read_battles(path)


def test_decisions_that_are_not_a_players_own_are_counted_by_player() -> None:
    results = [
        ArenaResult(("a", "b"), 0, False, "a", 20, False, (2, 0), (0, 3)),
        ArenaResult(("b", "c"), 0, False, "b", 20, False, (1, 0), (4, 0)),
    ]
    standings = make_standings(results, num_resamples=10)
    counts = {player["name"]: (player["timeouts"], player["unanswered"]) for player in standings["players"]}
    assert counts == {"a": (2, 0), "b": (1, 7), "c": (0, 0)}
    lines = format_standings(standings).splitlines()
    assert "b: 1 decisions timed out, 7 answers named no legal action" in lines
    assert not any(line.startswith("c: ") for line in lines)


def test_standings_count_ties_as_no_wins() -> None:
    results = [
        result("a", "b", 0, "a"),
        result("a", "b", 0, None, swapped=True),
        result("a", "b", 1, "b"),
        result("a", "b", 1, "a", swapped=True),
        result("a", "c", 0, "a"),
    ]
    standings = make_standings(results, baseline="b", num_resamples=10)
    assert [player["name"] for player in standings["players"]] == ["a", "b", "c"]
    best = standings["players"][0]
    assert (best["wins"], best["losses"], best["ties"]) == (3, 1, 1)
    assert best["pool_win_rate"] == (2 / 4 + 1) / 2  # each opponent counts the same
    (against,) = standings["head_to_head"]
    assert (against["name"], against["wins"], against["losses"], against["ties"]) == ("a", 2, 1, 1)
    assert against["win_rate_interval"] == pytest.approx([0.150, 0.850], abs=0.001)  # Wilson's, of 2 in 4


# --- whole arenas


def test_an_arena_writes_its_report(played: Path) -> None:
    report = json.loads((played / "arena.json").read_text())
    assert report["num_battles"] == 12
    assert {player["name"] for player in report["players"]} == {"heuristic", "max-base-power", "random"}
    assert all(pair["wins"] + pair["losses"] + pair["ties"] == 4 for pair in report["pairs"])
    assert [row["baseline"] for row in report["head_to_head"]] == ["heuristic", "heuristic"]
    assert (played / "players.csv").read_text().startswith("name,rating,rating_interval_low,rating_interval_high,wins,")
    assert len((played / "pairs.csv").read_text().splitlines()) == 4


def test_the_page_needs_no_network_and_has_the_replays(played: Path) -> None:
    page = (played / "report.html").read_text(encoding="utf-8")
    links = []
    parser = HTMLParser()
    parser.handle_starttag = lambda tag, attributes: links.extend(
        value for name, value in attributes if name in ("src", "href") and not value.startswith("data:")
    )
    parser.feed(page)
    assert links == [] and "<script" not in page and "http" not in page
    assert page.count("<details>") == 6 == len(list((played / "replays").iterdir()))
    assert "uses" in page and "faints" in page and "wins." in page


@pytest.mark.slow(3)
def test_the_same_battles_at_any_concurrency_and_after_an_interruption(played: Path, tmp_path: Path) -> None:
    players = ("--players", "random", "heuristic", "max-base-power")
    arena(tmp_path / "again", *players, "--num_rounds", 1, "--concurrency", 1)
    path = tmp_path / "again" / "results.jsonl"
    path.write_text("".join(f"{line}\n" for line in lines_of(tmp_path / "again")[1:]))  # as if one were missing
    arena(tmp_path / "again", *players, "--num_rounds", 2)
    assert sorted(lines_of(tmp_path / "again")) == sorted(lines_of(played))


@pytest.mark.slow(3)
def test_an_arena_gets_more_rounds_and_players(played: Path, tmp_path: Path) -> None:
    folder = tmp_path / "arena"
    arena(folder, "--players", "random", "heuristic", "--num_rounds", 1)
    before = lines_of(folder)
    assert arena(folder, "--players", "random", "heuristic", "max-base-power", "--num_rounds", 2)["num_battles"] == 12
    assert lines_of(folder)[: len(before)] == before
    assert sorted(lines_of(folder)) == sorted(lines_of(played))


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("--players", "random", "heuristic", "--seed", 1), "--seed 0"),
        (("--players", "random", "heuristic=random"), "'heuristic'"),
        (("--players", "x=random", "y=random"), "x, y never met"),
        (("--players", "random"), "at least 2"),
        (("--players", "random", "heuristic", "--against", "nobody"), "--against nobody"),
        (("--players", "random", "heuristic", "--baseline", "nobody"), "--baseline nobody"),
    ],
)
def test_a_mistake_plays_nothing(played: Path, arguments: tuple, words: str) -> None:
    before = lines_of(played)
    done = call_script("battles_arena", "--output_dir", played, *COMMAND, *arguments)
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert done.returncode == 2 and len(errors) == 1 and words in errors[0]
    assert lines_of(played) == before


def test_other_teams_in_the_same_file_are_refused(simulator, tmp_path: Path) -> None:
    teams, folder = tmp_path / "teams.txt", tmp_path / "arena"
    command = ("--players", "random", "max-base-power", "--battle_format", "gen1ou", "--teams_file", teams)
    teams.write_text(TEAM)
    arena(folder, *command, "--num_rounds", 1)
    teams.write_text(TEAM.replace("Blizzard", "Thunderbolt", 1))
    done = call_script("battles_arena", "--output_dir", folder, *command, "--num_rounds", 2)
    assert done.returncode == 2 and "other teams" in done.stderr
    assert len(lines_of(folder)) == 2


@pytest.mark.slow(8)
def test_nothing_is_played_twice_after_kills_of_the_arena_and_of_node(simulator, tmp_path: Path) -> None:
    """The same battles as without any kill: results of a killed run count, and battles in flight are played again."""
    rounds = ("--players", "random", "heuristic", "--num_rounds", 20)
    expected = tmp_path / "expected"
    arena(expected, *rounds)
    folder = tmp_path / "killed"
    options = [*map(str, ("--output_dir", folder, *COMMAND, *rounds, "--num_workers", 2))]
    family: list[psutil.Process] = []
    for num_before, start_method in ((1, "fork"), (15, "spawn")):  # workers that are not forked inherit no lock
        command = [sys.executable, "-c", STARTED.format(start_method), *options]
        process = subprocess.Popen(command, cwd=PROJECT_ROOT, stderr=subprocess.PIPE, text=True)
        with killed_after(process):
            wait_until(lambda least=num_before: count_lines(folder) >= least, process)
            family += psutil.Process(process.pid).children(recursive=True)
            for node in [each for each in family if each.is_running() and each.name() == "node"][:1]:
                node.kill()
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGKILL)
            process.stderr.close()  # its workers have it, too
    arena(folder, *rounds)
    assert sorted(lines_of(folder)) == sorted(lines_of(expected))
    wait_until_ended(family)


STARTED = """
import multiprocessing, runpy
multiprocessing.set_start_method({!r})
runpy.run_path("scripts/battles_arena.py", run_name="__main__")
"""


def may_play(folder: Path) -> bool:
    """Return whether an arena could play in a folder now."""
    try:
        with playing._only_one_arena(folder):
            return True
    except PokegemmaError as error:
        assert "another arena plays" in str(error)
        return False


def test_an_arena_waits_for_another_one_and_for_the_workers_of_one_that_was_killed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(playing, "_WAIT_FOR_LOCK_S", 0.2)
    with playing._hold_workers_lock(tmp_path), playing._hold_workers_lock(tmp_path):  # as many as there are
        assert not may_play(tmp_path)
    with playing._only_one_arena(tmp_path), playing._hold_workers_lock(tmp_path):
        assert not may_play(tmp_path)
    assert may_play(tmp_path)


def count_lines(folder: Path) -> int:
    path = folder / "results.jsonl"
    return path.read_bytes().count(b"\n") if path.is_file() else 0


# --- replays


def test_a_replay_is_a_battle_in_plain_words() -> None:
    log = """|player|p1|ann|1|
|player|p2|bob|2|
|tier|[Gen 1] OU
|start
|switch|p1a: Tauros|Tauros|100/100
|switch|p2a: Starmie|Starmie|100/100
|turn|1
|
|move|p2a: Starmie|Thunder Wave|p1a: Tauros
|-status|p1a: Tauros|par
|cant|p1a: Tauros|par
|
|turn|2
|move|p1a: Tauros|Hyper Beam|p2a: Starmie
|-crit|p2a: Starmie
|-damage|p2a: Starmie|0 fnt
|faint|p2a: Starmie
|
|win|ann"""
    start, first, last = read_battle_log(log)
    assert (start.number, first.number, last.number) == (0, 1, 2)
    assert start.events == ("ann's Tauros comes in", "bob's Starmie comes in")
    assert first.events == (
        "bob's Starmie uses Thunder Wave",
        "ann's Tauros is paralyzed",
        "ann's Tauros cannot move (par)",
    )
    assert last.events == (
        "ann's Tauros uses Hyper Beam",
        "A critical hit",
        "bob's Starmie: 0 %",
        "bob's Starmie faints",
        "ann wins.",
    )
    assert [active.hp_percent for active in last.actives] == [100.0, 0.0]


def test_a_tie_and_an_explosion_are_shown() -> None:
    turns = read_battle_log("|switch|p1a: Electrode|Electrode|50/100\n|turn|1\n|faint|p1a: Electrode\n|tie")
    assert turns[1].events == ("p1's Electrode faints", "The battle is a tie.")
    assert turns[1].actives[0].hp_percent == 0.0
