"""run.json says how a result was made, and no secret."""

import json
from pathlib import Path

import pytest

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import git_commit, package_versions, read_run_record, write_run_record


def test_a_record_holds_stage_options_versions_and_facts(tmp_path: Path) -> None:
    write_run_record(tmp_path, stage="merge", options={"dtype": "bfloat16"}, seed=7)
    record = read_run_record(tmp_path)
    assert (record["stage"], record["options"], record["seed"]) == ("merge", {"dtype": "bfloat16"}, 7)
    assert record["versions"] == package_versions() and "torch" in record["versions"]


def test_secrets_are_left_out(tmp_path: Path) -> None:
    options = {"hub_token": "hf_1", "WANDB_API_KEY": "w_2", "token": "t_3", "num_tokens": 4, "pad_token": None}
    write_run_record(tmp_path, stage="train", options=options)
    text = (tmp_path / "run.json").read_text()
    assert not any(secret in text for secret in ("hf_1", "w_2", "t_3"))
    assert read_run_record(tmp_path)["options"] == {"num_tokens": 4, "pad_token": None}


def test_a_folder_without_a_record_gives_none(tmp_path: Path) -> None:
    assert read_run_record(tmp_path) is None


@pytest.mark.parametrize("text", ["{", "[1]", "\ud800".encode("utf-8", "surrogatepass")])
def test_a_damaged_record_is_one_line(text: str | bytes, tmp_path: Path) -> None:
    (tmp_path / "run.json").write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(PokegemmaError, match="is damaged"):
        read_run_record(tmp_path)


def test_the_commit_is_that_of_the_checkout() -> None:
    commit = git_commit()
    assert commit is None or len(commit.removesuffix("+changes")) == 40


def test_a_record_is_json_that_any_reader_takes(tmp_path: Path) -> None:
    write_run_record(tmp_path, stage="train", options={"path": tmp_path, "goal": "Pokémon"})
    json.loads((tmp_path / "run.json").read_text(encoding="utf-8"))
