"""Packed trajectories: the same tensors, the same files, resumed; also by battles_pack and battles_check."""

import functools
import importlib.util
import json
import pickle
import shutil

import numpy as np
import pytest

from pokegemma.battles.trajectories import packing
from pokegemma.battles.trajectories.checks.folders import check_packed
from pokegemma.battles.trajectories.files import read_trajectory, write_trajectory
from pokegemma.battles.trajectories.packed import PackedTrajectories, unpack_trajectories
from pokegemma.battles.trajectories.packing import encode_battle, pack_trajectories
from pokegemma.battles.trajectories.short_text import write_short_text
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.parallel.workers import map_items
from tests.battles.states import make_name, make_pokemon, make_trajectory
from tests.processes import call_script, run_in_new_process
from tests.toy_work import assert_done_by_ray, empty_folder, note_ray_worker

SPECIES = ("pikachu", "snorlax", "chansey", "tauros", "zapdos", "gengar", "mew")


@pytest.fixture
def files(tmp_path):
    """Write seven battles of different lengths, one of them not compressed; return their folder."""
    folder = tmp_path / "trajectories"
    for number, species in enumerate(SPECIES):
        won = number % 2 == 0
        trajectory = make_trajectory(2 + number, won=won, player_active_pokemon=make_pokemon(species))
        path = write_trajectory(folder, make_name(number, won=won), trajectory)
    path.with_name(path.name.removesuffix(".lz4")).write_bytes(trajectory.to_json())
    path.unlink()
    return folder


def contents(folder):
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_packed_battle_is_what_its_file_gives(files, tmp_path):
    pack_trajectories(files, tmp_path / "packed", battles_per_shard=3)
    battles = PackedTrajectories(tmp_path / "packed")
    paths = sorted((files / "gen1ou").iterdir())
    assert len(battles) == len(paths) == 7
    for index, path in enumerate(paths):
        trajectory = read_trajectory(path)
        encoded, packed = encode_battle(trajectory), battles[index]
        assert [[battles.words[number] for number in row] for row in packed.words] == encoded.words
        assert (packed.numbers.dtype, packed.actions.dtype, packed.legal.dtype) == (np.float32, np.int8, np.bool_)
        for column in ("numbers", "actions", "legal", "rewards"):
            np.testing.assert_array_equal(getattr(packed, column), getattr(encoded, column))
        assert battles.short_texts(index) == [write_short_text(state) for state in trajectory.states]
        assert battles.name(index) == f"gen1ou/{path.name}"
        assert battles.trajectory(index) == trajectory
    assert battles.words[0] == "<blank>" and battles.words[1:] == sorted(battles.words[1:])


def test_unpacking_returns_the_bytes_of_the_files(files, tmp_path):
    pack_trajectories(files, tmp_path / "packed", battles_per_shard=2)
    assert unpack_trajectories(tmp_path / "packed", tmp_path / "again") == 7
    assert contents(tmp_path / "again") == contents(files)


def test_the_bytes_do_not_depend_on_workers(files, tmp_path):
    pack_trajectories(files, tmp_path / "one", battles_per_shard=2)
    pack_trajectories(files, tmp_path / "two", battles_per_shard=2, num_workers=2)
    assert contents(tmp_path / "one") == contents(tmp_path / "two")
    assert len(contents(tmp_path / "one")) == 5


def pack_by_ray(folder, output, workers):
    """Pack on two Ray workers, each of which leaves a note; return what pack.json contains, and a check by Ray."""
    empty_folder(workers)
    note = lambda work, items, **options: map_items(  # noqa: E731
        functools.partial(note_ray_worker, work=work, folder=workers), items, **options
    )
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "map_items", note)
        record = pack_trajectories(folder, output, battles_per_shard=1, num_workers=2, ray_address="local")
    return record, [each.status for each in check_packed(output, num_workers=2, ray_address="local")]


@pytest.mark.slow(30)
@pytest.mark.skipif(importlib.util.find_spec("ray") is None, reason="needs ./init.sh --with ray")
def test_a_cluster_of_two_workers_packs_the_bytes_of_one_process(files, tmp_path):
    record = pack_trajectories(files, tmp_path / "one", battles_per_shard=1)
    workers = tmp_path / "workers"
    by_ray, checks = run_in_new_process(pack_by_ray, files, tmp_path / "ray", workers)
    assert_done_by_ray(workers, num_workers=2)
    assert by_ray == record and set(checks) == {"PASS"}
    assert contents(tmp_path / "ray") == contents(tmp_path / "one")


def test_an_interrupted_packing_is_refused_and_resumed(files, tmp_path):
    output = tmp_path / "packed"
    record = pack_trajectories(files, output, battles_per_shard=3)
    whole, shards = contents(output), [output / shard["name"] for shard in record["shards"]]
    (output / "pack.json").write_text('{"version": 1, "complete": false}')
    shards[1].write_bytes(shards[1].read_bytes()[:100])  # as a full disk may leave it
    shards[2].unlink()
    with pytest.raises(PokegemmaError, match="interrupted"):
        PackedTrajectories(output)
    before = shards[0].stat().st_ino
    pack_trajectories(files, output, battles_per_shard=3)
    assert contents(output) == whole
    assert shards[0].stat().st_ino == before  # it was not written again


def test_a_changed_file_is_packed_again(files, tmp_path):
    output = tmp_path / "packed"
    pack_trajectories(files, output)
    write_trajectory(files, make_name(0), make_trajectory(9))
    pack_trajectories(files, output)
    assert PackedTrajectories(output)[0].actions.shape == (9,)


def test_shards_of_more_files_are_removed(files, tmp_path):
    pack_trajectories(files, tmp_path / "packed", battles_per_shard=1)
    pack_trajectories(files, tmp_path / "packed", battles_per_shard=7)
    assert sorted(contents(tmp_path / "packed")) == ["pack.json", "shard-00000.safetensors"]


def test_bad_files_are_all_named_and_nothing_counts_as_packed(files, tmp_path):
    paths = sorted((files / "gen1ou").iterdir())
    paths[1].write_bytes(b"no LZ4")
    paths[6].write_bytes(make_trajectory().to_json().replace(b"[0, 0, -1]", b"[0, 7, -1]"))
    with pytest.raises(CheckFailedError, match="2 of 7") as raised:
        pack_trajectories(files, tmp_path / "packed", battles_per_shard=2)
    assert paths[1].name in str(raised.value) and paths[6].name in str(raised.value)
    with pytest.raises(PokegemmaError, match="interrupted"):
        PackedTrajectories(tmp_path / "packed")


def test_nothing_but_pads_is_not_packed(tmp_path):
    empty = make_pokemon("<blank>", types="<blank> <blank>", item="<blank>", ability="<blank>", moves=())
    changes = {"player_active_pokemon": empty, "opponent_active_pokemon": empty, "available_switches": ()}
    trajectory = make_trajectory(3, **changes)
    actions = type(trajectory)(trajectory.states, (-1, -1, -1))
    write_trajectory(tmp_path / "files", make_name(), actions)
    with pytest.raises(CheckFailedError, match="nothing to learn from"):
        pack_trajectories(tmp_path / "files", tmp_path / "packed")


def test_folders_that_would_be_mixed_up_are_refused(files, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").touch()
    for output in (tmp_path / "mine", files / "packed", tmp_path):
        with pytest.raises(PokegemmaError, match=str(output)):
            pack_trajectories(files, output)
    assert sorted(path.name for path in (tmp_path / "mine").iterdir()) == ["notes.txt"]


def test_a_reader_in_a_worker_has_no_copy_of_the_data(files, tmp_path):
    pack_trajectories(files, tmp_path / "packed")
    battles = PackedTrajectories(tmp_path / "packed")
    assert battles[6].words.shape == (8, 87)
    copied = pickle.loads(pickle.dumps(battles))
    assert copied._open == {}
    np.testing.assert_array_equal(copied[6].words, battles[6].words)
    with pytest.raises(IndexError):
        battles[7]


def test_a_changed_column_is_found(files, tmp_path):
    pack_trajectories(files, tmp_path / "packed")
    assert {each.status for each in check_packed(tmp_path / "packed")} == {"PASS"}
    shard = tmp_path / "packed" / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    battles = PackedTrajectories(tmp_path / "packed")
    hp = battles[2].numbers[0, 1].tobytes()
    place = content.index(battles[2].numbers.tobytes()[:64]) + 4
    assert content[place : place + 4] == hp
    content[place] ^= 1
    del battles
    shard.unlink()
    shard.write_bytes(content)
    checks = check_packed(tmp_path / "packed")
    assert [each.name for each in checks if each.status == "FAIL"] == ["columns"]
    assert checks[-1].details == (f"{PackedTrajectories(tmp_path / 'packed').name(0)}: numbers",)


def test_the_scripts_pack_check_and_unpack(files, tmp_path):
    packed, again = tmp_path / "packed", tmp_path / "again"
    done = call_script(
        "battles_pack", "--trajectories_dir", files, "--output_dir", packed, "--num_workers", 1, "--json"
    )
    assert (done.returncode, json.loads(done.stdout)["battles"]) == (0, 7), done.stderr
    for folder, num_checks in ((files, 8), (packed, 9)):
        done = call_script("battles_check", "--trajectories_dir", folder, "--num_workers", 1)
        assert (done.returncode, done.stdout.count("PASS")) == (0, num_checks), done.stdout
    done = call_script("battles_pack", "--trajectories_dir", packed, "--output_dir", again, "--unpack")
    assert (done.returncode, contents(again)) == (0, contents(files)), done.stderr


def test_the_check_exits_with_1_and_names_the_file(files):
    bad = shutil.copy(next((files / "gen1ou").iterdir()), files / "gen1ou" / "wrong.json.lz4")
    done = call_script("battles_check", "--trajectories_dir", files, "--num_workers", 1)
    assert done.returncode == 1
    assert f"gen1ou/{bad.name}: 1 parts" in done.stdout
    done = call_script("battles_check", "--trajectories_dir", files, "--num_workers", 1, "--json")
    assert json.loads(done.stdout)["failed"] == 1
