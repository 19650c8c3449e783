"""The dataset of another tool is named in the one line that refuses it."""

import json

import pytest

from pokegemma.data.checks.foreign_datasets import refuse_foreign_dataset
from pokegemma.data.checks.records import find_splits
from pokegemma.data.samples import dataset_files, read_samples
from pokegemma.errors import PokegemmaError

MESSAGES = {"images": ["1.png"], "messages": [{"role": "user", "content": "<image>Next?"}]}
SHAREGPT = {"image": "1.png", "conversations": [{"from": "human", "value": "<image>Next?"}]}
COMPLETION = {"prompt": "Next?", "completion": "a", "images": ["1.png"]}


def refusal(path):
    with pytest.raises(PokegemmaError) as error:
        dataset_files(path)
    assert error.value.exit_code == 2
    message = str(error.value)
    assert "\n" not in message
    assert message.startswith(f"{path}: ")
    assert "scripts/convert_eevee_data_v2.py" in message
    return message


@pytest.mark.parametrize(
    ("record", "says"),
    [
        (MESSAGES, "TRL or LLaMA-Factory (keys images, messages)"),
        (SHAREGPT, "ShareGPT dataset of LLaMA-Factory or LLaVA (keys conversations, image)"),
        (COMPLETION, "prompt-completion dataset of TRL (keys completion, images, prompt)"),
        ({"instruction": "", "input": "", "output": "a"}, "Alpaca dataset"),
    ],
)
def test_a_dataset_of_another_trainer_is_named(tmp_path, record, says):
    (tmp_path / "train.jsonl").write_text(json.dumps(record) + "\n")
    (tmp_path / "demo.json").write_text(json.dumps([record, record], indent=2))
    for path in (tmp_path, tmp_path / "train.jsonl", tmp_path / "demo.json"):
        assert says in refusal(path)
    with pytest.raises(PokegemmaError, match="lines are not samples: line 1: of a"):
        list(read_samples(tmp_path / "train.jsonl"))
    with pytest.raises(PokegemmaError, match="convert_eevee_data_v2"):
        find_splits(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("data/train-00000-of-00001.parquet", b"PAR1", "Parquet"),
        ("train/data-00000-of-00001.arrow", b"", "Arrow"),
        ("dataset_info.json", b"{}", "JSON"),
        ("plays.csv", b"", "CSV"),
    ],
)
def test_a_folder_of_another_tool_is_named_by_its_first_file(tmp_path, name, content, says):
    (tmp_path / name).parent.mkdir(exist_ok=True)
    (tmp_path / name).write_bytes(content)
    message = refusal(tmp_path)
    assert name in message
    assert says in message


def test_a_parquet_file_is_named(tmp_path):
    (tmp_path / "train.parquet").write_bytes(b"PAR1\x15\x04")
    assert "Parquet" in refusal(tmp_path / "train.parquet")


def test_a_dataset_of_the_hub_is_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PokegemmaError, match=r"^someone/pokemon-play: .*Hugging Face Hub are not read"):
        dataset_files("someone/pokemon-play")


@pytest.mark.parametrize("path", ["training_data", "outputs/toy/dataset", "outputs/x"])
def test_a_folder_that_does_not_exist_yet_is_to_be_converted(tmp_path, monkeypatch, path):
    (tmp_path / "outputs").mkdir()
    monkeypatch.chdir(tmp_path)
    with pytest.raises(PokegemmaError, match="not found; convert sessions first"):
        dataset_files(path)


def test_a_dataset_to_evaluate_on_may_have_other_files_beside_it(tmp_path):
    (tmp_path / "parity.json").write_text("[]")
    (tmp_path / "eval.jsonl").write_text("")
    refuse_foreign_dataset(tmp_path)
