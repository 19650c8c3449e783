"""The checker names every bad file with what is wrong, in one pass; nothing but pads fails loudly."""

import dataclasses
import json

import lz4.frame
import pytest

from pokegemma.battles.trajectories.checks.folders import check_packed, check_trajectories
from pokegemma.battles.trajectories.files import write_trajectory
from pokegemma.battles.trajectories.packing import pack_trajectories
from pokegemma.battles.trajectories.records import BattleTrajectory
from tests.battles.states import make_move, make_name, make_pokemon, make_state, make_trajectory


def check(folder, **options):
    return {each.name: each for each in check_trajectories(folder, **options)}


def failed(checks):
    return {name for name, each in checks.items() if each.status == "FAIL"}


def write(folder, number=0, *, actions=None, **changes):
    trajectory = make_trajectory(**changes)
    if actions is not None:
        trajectory = dataclasses.replace(trajectory, actions=actions)
    return write_trajectory(folder, make_name(number), trajectory)


def test_right_files_pass(tmp_path):
    for number in range(3):
        write(tmp_path, number)
    checks = check(tmp_path)
    assert failed(checks) == set()
    assert checks["legality"].summary == "6 revealed actions"
    assert checks["words"].summary.startswith("0.0 %")


def test_states_of_the_oracle_pass(golden, tmp_path):
    for number, row in enumerate(golden):
        state, after = row["state"], row["next"]
        won = after["battle_won"]
        data = {"states": [state, after], "actions": [row["action"], -1]}
        folder = tmp_path / state["format"]
        folder.mkdir(exist_ok=True)
        name = make_name(number, won=won, battle_format=state["format"])
        (folder / f"{name}.json.lz4").write_bytes(lz4.frame.compress(json.dumps(data).encode()))
    checks = check(tmp_path)
    assert failed(checks) == set(), [each.details for each in checks.values()]
    assert checks["names"].summary == "60 files"


def test_every_bad_file_is_named_in_one_pass(tmp_path):
    write(tmp_path, 0)
    write(tmp_path, 1).rename(tmp_path / "gen1ou" / "gen1ou-1_1500_a_b_vs_c_11-29-2026_WIN.json.lz4")
    damaged = write(tmp_path, 2)
    damaged.write_bytes(damaged.read_bytes()[:-10])
    write(tmp_path, 3, actions=(0, -1))
    write(tmp_path, 4, actions=(0, 3, -1))
    write(tmp_path, 5, actions=(0, 0, 0))
    checks = check(tmp_path, num_workers=1)
    assert failed(checks) == {"names", "records", "alignment", "legality"}
    assert checks["names"].details == (
        "gen1ou/gen1ou-1_1500_a_b_vs_c_11-29-2026_WIN.json.lz4: 8 parts between underscores instead of 7",
    )
    assert [detail.partition(": ")[0] for detail in checks["records"].details] == [f"gen1ou/{damaged.name}"]
    assert [detail.partition(": ")[2] for detail in checks["alignment"].details] == [
        "3 states, 2 actions: must be as many",
        "the last action is 0: must be the filler -1",
    ]
    assert checks["legality"].details == (f"gen1ou/{make_name(4)}.json.lz4: actions[1] is 3, legal are 0, 1, 4, 5",)
    assert "1 of 6 files are bad" in checks["legality"].summary


@pytest.mark.parametrize(
    ("changes", "kind", "message"),
    [
        ({"player_active_pokemon": make_pokemon(hp_pct=1.5)}, "values", "hp_pct 1.5"),
        ({"player_active_pokemon": make_pokemon(types="notype electric")}, "values", "'notype electric'"),
        ({"opponents_remaining": 7}, "values", "opponents_remaining 7"),
        ({"player_active_pokemon": make_pokemon("{'text': array}")}, "words", "not one word"),
        ({"player_active_pokemon": make_pokemon("missingmon", moves=(make_move("x"),))}, "words", "'missingmon'"),
        ({"can_tera": True}, "tera", "can terastallize in gen1ou"),
        ({"format": "gen1uu"}, "alignment", "not the folder's"),
    ],
)
def test_what_is_wrong_in_a_state_is_found(tmp_path, changes, kind, message):
    trajectory = BattleTrajectory((make_state(**changes), make_state(battle_won=True)), (0, -1))
    path = tmp_path / "gen1ou" / f"{make_name()}.json"
    path.parent.mkdir()
    path.write_bytes(trajectory.to_json())
    checks = check(tmp_path)
    assert kind in failed(checks)
    assert message in checks[kind].details[0]


def test_a_second_terastallization_is_found(tmp_path):
    states = [make_state(format="gen9ou", can_tera=True) for _ in range(2)]
    states.append(make_state(format="gen9ou", battle_won=True))
    name = make_name(battle_format="gen9ou")
    write_trajectory(tmp_path, name, BattleTrajectory(tuple(states), (9, 10, -1)))
    checks = check(tmp_path)
    assert failed(checks) == {"tera"}
    assert "2 terastallizations (actions 0, 1)" in checks["tera"].details[0]
    assert "states[1] can terastallize after actions[0] did" in checks["tera"].details[1]


def test_actions_of_the_state_before_are_found(tmp_path):
    """The actions of a battle of switches, moved by one place."""
    names = ["chansey", "snorlax", "pikachu", "chansey", "snorlax", "pikachu", "chansey"]
    team = {name: make_pokemon(name) for name in ("chansey", "pikachu", "snorlax")}
    states = [
        make_state(
            player_active_pokemon=team[name],
            available_switches=tuple(each for other, each in team.items() if other != name),
            battle_won=index == len(names) - 1,
        )
        for index, name in enumerate(names)
    ]
    right = (5, 5, 4, 5, 5, 4, -1)
    write_trajectory(tmp_path, make_name(0), BattleTrajectory(tuple(states), right))
    assert failed(check(tmp_path)) == set()
    write_trajectory(tmp_path, make_name(1), BattleTrajectory(tuple(states), (4, *right[:5], -1)))
    checks = check(tmp_path)
    assert failed(checks) == {"alignment"}
    assert "switches bring in another Pokémon" in checks["alignment"].details[0]


def test_packed_files_are_checked_as_files_are(tmp_path):
    """What packing does not refuse is found in the packed folder, too, with the same words."""
    write(tmp_path / "files", 0)
    write(
        tmp_path / "files",
        1,
        player_active_pokemon=make_pokemon("missingmon", hp_pct=1.5, moves=(make_move("x"),)),
        can_tera=True,
    )
    write(tmp_path / "files", 2).rename(tmp_path / "files" / "gen1ou" / f"{make_name(2, won=False)}.json.lz4")
    pack_trajectories(tmp_path / "files", tmp_path / "packed")
    *of_files, columns = check_packed(tmp_path / "packed")
    assert of_files == check_trajectories(tmp_path / "files")
    assert {each.name for each in of_files if each.status == "FAIL"} == {"names", "tera", "values", "words"}
    assert (columns.name, columns.status) == ("columns", "PASS")


def test_a_result_that_is_not_that_of_the_last_state_is_found(tmp_path):
    write_trajectory(tmp_path, make_name(won=False), make_trajectory(won=True))
    assert failed(check(tmp_path)) == {"names"}


def test_a_set_of_nothing_but_pads_fails(tmp_path):
    empty = make_pokemon("<blank>", types="<blank> <blank>", item="<blank>", ability="<blank>", moves=())
    for number in range(3):
        write(
            tmp_path,
            number,
            actions=(-1, -1, -1),
            player_active_pokemon=empty,
            opponent_active_pokemon=empty,
            available_switches=(),
        )
    checks = check(tmp_path)
    assert {"words", "pads"} <= failed(checks)
    assert checks["pads"].summary.startswith("nothing to learn from: 7")
    assert len(checks["pads"].details) == 3
