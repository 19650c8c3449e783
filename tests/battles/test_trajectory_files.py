"""Trajectory files: the bytes, the names, and what is refused."""

import json

import lz4.frame
import pytest

from pokegemma.battles.cloning.selection import BattleFilter
from pokegemma.battles.trajectories.checks.folders import check_trajectories
from pokegemma.battles.trajectories.files import (
    TrajectoryName,
    find_trajectory_files,
    format_of,
    read_trajectory,
    write_trajectory,
)
from pokegemma.battles.trajectories.packed import PackedTrajectories, unpack_trajectories
from pokegemma.battles.trajectories.packing import pack_trajectories
from pokegemma.battles.trajectories.records import NO_MOVE, BattleTrajectory, TrajectoryError
from tests.battles.states import make_name, make_pokemon, make_state, make_trajectory

NAME = "metamon-gen1ou-0000000007_Unrated_MM-1_vs_Other_11-29-2026-08:05:00_LOSS"


def in_order(data, *last):
    """Return a JSON object with some of its keys moved to the end, in every object within it."""
    if isinstance(data, list):
        return [in_order(each, *last) for each in data]
    if not isinstance(data, dict):
        return data
    keys = [key for key in data if key not in last] + [key for key in last if key in data]
    return {key: in_order(data[key], *last) for key in keys}


def test_the_oracle_is_read_and_written_as_the_same_bytes(golden_text):
    for line in golden_text:
        states = [line.partition('"state":')[2].partition(',"next":')[0]]
        states.append(line.partition(',"next":')[2].partition(',"action":')[0])
        text = f'{{"states":[{",".join(states)}],"actions":[0,-1]}}'.encode()
        assert BattleTrajectory.from_json(text).to_json() == text


def test_a_new_trajectory_has_the_bytes_of_metamon(golden):
    """metamon writes json.dumps of its dataclasses, whose order is another than that of the oracle."""
    moved = ("tera_type", "base_species")
    data = {"states": in_order([golden[0]["state"], golden[0]["next"]], *moved), "actions": [golden[0]["action"], -1]}
    text = json.dumps(data).encode()
    read = BattleTrajectory.from_json(text)
    assert BattleTrajectory(read.states, read.actions).to_json() == text


def test_an_old_file_keeps_its_bytes_and_gets_metamons_defaults():
    lacking = ("can_tera", "opponent_teampreview", "tera_type", "base_species")
    data = json.loads(make_trajectory(player_active_pokemon=make_pokemon("rotom-wash")).to_json())
    drop = lambda each: (  # noqa: E731
        {key: drop(value) for key, value in each.items() if key not in lacking}
        if isinstance(each, dict)
        else [drop(value) for value in each]
        if isinstance(each, list)
        else each
    )
    text = json.dumps(drop(data)).encode()
    read = BattleTrajectory.from_json(text)
    assert read.to_json() == text
    state = read.states[0]
    assert (state.can_tera, state.opponent_teampreview) == (False, ())
    assert (state.player_active_pokemon.tera_type, state.player_active_pokemon.base_species) == ("notype", "rotom")


def test_whole_numbers_and_fractions_stay_what_they_are():
    trajectory = make_trajectory(player_active_pokemon=make_pokemon(hp_pct=1))
    text = trajectory.to_json()
    assert b'"hp_pct": 1,' in text and b'"hp_pct": 1.0,' in text
    assert BattleTrajectory.from_json(text).to_json() == text


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda data: data["states"][1].pop("weather"), r"states\[1\]: no 'weather'"),
        (lambda data: data["states"][0].update(extra=1), r"states\[0\]: unknown key 'extra'"),
        (lambda data: data["states"][1]["player_active_pokemon"].update(hp_pct=None), "player_active_pokemon: hp_pct"),
        (lambda data: data["states"][1]["player_prev_move"].update(name=3), "player_prev_move: name is of type int"),
        (lambda data: data["states"][1]["player_active_pokemon"]["moves"].append(3), r"moves\[2\]: not an object"),
        (lambda data: data["states"][1].update(opponent_teampreview=[1]), "opponent_teampreview"),
        (lambda data: data["states"][1].pop("can_tera"), r"states\[1\]: other keys than in states\[0\]"),
        (lambda data: data.update(actions=[0, True, -1]), "actions"),
        (lambda data: data.update(states={}), "states"),
        (lambda data: data.pop("actions"), '"states" and "actions"'),
        (lambda data: data["states"][0].update(forced_switch=0), "forced_switch is of type int"),
    ],
)
def test_a_file_with_other_keys_or_types_is_refused_by_place(change, message):
    data = json.loads(make_trajectory().to_json())
    change(data)
    with pytest.raises(TrajectoryError, match=message):
        BattleTrajectory.from_json(json.dumps(data).encode())


@pytest.mark.parametrize("text", [b"", b"{", b"[]", b'{"states": [], "actions": [NaN]}', b"\xff"])
def test_what_is_no_trajectory_is_refused(text):
    with pytest.raises(TrajectoryError):
        BattleTrajectory.from_json(text)


def test_a_written_file_has_metamons_place_name_and_content(tmp_path):
    trajectory = make_trajectory()
    path = write_trajectory(tmp_path, TrajectoryName.parse(NAME), trajectory)
    assert path == tmp_path / "gen1ou" / f"{NAME}.json.lz4"
    assert [each.name for each in path.parent.iterdir()] == [path.name]
    assert json.loads(lz4.frame.decompress(path.read_bytes()))["actions"] == [0, 0, -1]
    assert read_trajectory(path) == trajectory


def test_a_plain_file_is_read_too(tmp_path):
    path = tmp_path / f"{NAME}.json"
    path.write_bytes(make_trajectory().to_json())
    assert read_trajectory(path) == make_trajectory()


def test_one_changed_bit_is_found(tmp_path):
    path = write_trajectory(tmp_path, make_name(), make_trajectory())
    content = bytearray(path.read_bytes())
    for place in (40, len(content) // 2, len(content) - 1):
        damaged = bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        path.write_bytes(damaged)
        with pytest.raises(TrajectoryError, match="LZ4"):
            read_trajectory(path)


def test_a_name_is_read_and_written_again():
    name = TrajectoryName.parse(f"{NAME}.json.lz4")
    assert str(name) == NAME
    assert (name.player, name.opponent, name.won, name.rating_points) == ("MM-1", "Other", False, 1000)
    assert (name.played_at.year, name.played_at.month, name.played_at.hour) == (2026, 11, 8)
    assert TrajectoryName.parse("gen1ou-1_1543_a_vs_b_11-29-2026_WIN").rating_points == 1543


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("gen1ou-1_1500_a_b_vs_c_11-29-2026_WIN", "8 parts"),
        ("gen1ou-1_a_vs_c_11-29-2026_WIN", "6 parts"),
        ("gen1ou-1_1500_a_against_c_11-29-2026_WIN", "part 4 is 'against'"),
        ("gen1ou-1_1500_a_vs_c_11-29-2026_TIE", "part 7 is 'TIE'"),
        ("gen1ou-1_1500_a_vs_c_2026-11-29_WIN", "date '2026-11-29'"),
        ("gen1ou-1__a_vs_c_11-29-2026_WIN", "rating ''"),
    ],
)
def test_a_name_that_metamon_skips_is_refused(name, message):
    with pytest.raises(TrajectoryError, match=message):
        TrajectoryName.parse(name)


def test_a_user_name_with_an_underscore_is_refused():
    with pytest.raises(TrajectoryError, match="player 'a_b'"):
        TrajectoryName("gen1ou-1", "1500", "a_b", "c", "11-29-2026", True)


def test_a_battle_id_without_the_format_is_refused(tmp_path):
    with pytest.raises(TrajectoryError, match="'gen2ou'"):
        write_trajectory(tmp_path, make_name(), make_trajectory(format="gen2ou"))
    with pytest.raises(TrajectoryError, match="at least one state"):
        write_trajectory(tmp_path, make_name(), BattleTrajectory((), ()))
    assert list(tmp_path.iterdir()) == []


def test_files_are_found_in_a_fixed_order_without_unfinished_ones(tmp_path):
    names = [make_name(number) for number in (3, 1, 2)]
    for name in names:
        write_trajectory(tmp_path, name, make_trajectory())
    (tmp_path / "gen1ou" / ".x.json.lz4.1.part").touch()
    (tmp_path / "gen1ou" / "notes.txt").touch()
    found = [path.name for path in find_trajectory_files(tmp_path)]
    assert found == [f"{name}.json.lz4" for name in sorted(names, key=str)]


def test_recordings_in_a_folder_are_read_together(tmp_path):
    folder, packed, again = (tmp_path / name for name in ("recordings", "packed", "again"))
    for number in (1, 2):
        write_trajectory(folder / str(number), make_name(number), make_trajectory())
    (folder / "1" / "run.json").write_text("{}")
    write_trajectory(folder, make_name(3), make_trajectory())
    expected = [f"{start}gen1ou/{make_name(n)}.json.lz4" for start, n in (("1/", 1), ("2/", 2), ("", 3))]
    found = [path.relative_to(folder).as_posix() for path in find_trajectory_files(folder)]
    assert found == expected
    assert {format_of(path) for path in found} == {"gen1ou"}
    assert all(check.status == "PASS" for check in check_trajectories(folder) if check.name in ("names", "alignment"))
    pack_trajectories(folder, packed)
    assert all(BattleFilter(formats=("gen1ou",)).accepts(PackedTrajectories(packed).name(n)) for n in range(3))
    unpack_trajectories(packed, again)
    assert [path.relative_to(again).as_posix() for path in find_trajectory_files(again)] == expected


def test_a_folder_with_other_json_files_is_no_recording(tmp_path):
    write_trajectory(tmp_path, make_name(), make_trajectory())
    (tmp_path / "policy" / "checkpoint-2").mkdir(parents=True)
    (tmp_path / "policy" / "checkpoint-2" / "trainer_state.json").write_text("{}")
    (tmp_path / "policy" / "config.json").write_text("{}")
    found = [path.relative_to(tmp_path).as_posix() for path in find_trajectory_files(tmp_path)]
    assert found == [f"gen1ou/{make_name()}.json.lz4", "policy/config.json"]


def test_no_move_is_metamons():
    assert make_state().player_prev_move is NO_MOVE
    assert (NO_MOVE.name, NO_MOVE.accuracy, NO_MOVE.max_pp) == ("nomove", 1.0, 0)
