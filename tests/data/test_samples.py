import json

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pokegemma.data.samples import Sample, check_record, dataset_files, held_out_file, read_samples, scan_samples
from pokegemma.errors import PokegemmaError

METADATA = {"session": "s1", "turn": 4, "previous_buttons": ["a"]}
RECORD = {
    "id": "s1/4",
    "frames": ["frames/s1/0004.png"],
    "image": "grid_images/s1_0004.png",
    "context": "rules",
    "question": "next?",
    "output": "answer",
    "metadata": METADATA,
}
JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)


def test_a_sample_survives_a_round_trip(tmp_path):
    sample = Sample(**{**RECORD, "frames": tuple(RECORD["frames"]), "context": "Pokémon 😀\n\u2028"})
    (tmp_path / "train.jsonl").write_text(sample.to_json() + "\n", encoding="utf-8")
    assert list(read_samples(tmp_path / "train.jsonl")) == [sample]


@pytest.mark.parametrize("key", RECORD)
def test_a_missing_key_is_named(key):
    assert check_record({name: value for name, value in RECORD.items() if name != key}) == [f"{key!r} is missing"]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        ({"frames": []}, "'frames' is not a list of paths"),
        ({"frames": ["/home/ash/0001.png"]}, "'/home/ash/0001.png' is not a relative path"),
        ({"frames": ["C:/0001.png"]}, "'C:/0001.png' is not a relative path"),
        ({"frames": ["frames/../../0001.png"]}, "'frames/../../0001.png' leads out of the dataset folder"),
        ({"frames": [3]}, "3 is not a path"),
        ({"image": ""}, "'' is not a path"),
        ({"output": None}, "'output' is not a text"),
        ({"extra": 1}, "unknown key 'extra'"),
        ({"metadata": {**METADATA, "turn": True}}, "'metadata.turn' is not a whole number"),
        ({"metadata": {**METADATA, "previous_buttons": "a"}}, "'metadata.previous_buttons' is not a list of buttons"),
        ({"metadata": {**METADATA, "session": ""}}, "'metadata.session' is not a text"),
        ({"metadata": {**METADATA, "buttons": 5}}, "'metadata.buttons' is not a list of buttons"),
        ({"metadata": {**METADATA, "buttons": ["a", 5]}}, "'metadata.buttons' is not a list of buttons"),
        ({"metadata": {**METADATA, "goal": "\ud800"}}, "'metadata' contains text that UTF-8 cannot encode"),
        ({"id": "\ud800"}, "'id' contains text that UTF-8 cannot encode"),
        ({"context": "\ud800"}, "'context' contains text that UTF-8 cannot encode"),
        ({"question": "\ud800"}, "'question' contains text that UTF-8 cannot encode"),
        ({"context": "Goal: <bos>"}, "'context' contains <bos>"),
        ({"question": "a <unused12> b"}, "'question' contains <unused12>"),
        ({"output": "a <end_of_turn> b"}, "'output' contains <end_of_turn>"),
        ({"output": "\ud800"}, "'output' contains text that UTF-8 cannot encode"),
        ({"frames": ["\ud800.png"]}, "'\\ud800.png' is not a path"),
        ({"image": "\udfff.png"}, "'\\udfff.png' is not a path"),
        ({"image": "."}, "'.' is not a path"),
    ],
)
def test_a_wrong_value_is_named(change, problem):
    problems = check_record({**RECORD, **change})
    assert len(problems) == 1
    assert problems[0].startswith(problem)


@settings(max_examples=500)
@given(JSON | st.fixed_dictionaries({}, optional={key: JSON | st.just(value) for key, value in RECORD.items()}))
def test_no_record_makes_the_check_fail_otherwise(record):
    problems = check_record(record)
    assert all(isinstance(problem, str) for problem in problems)
    if not problems:
        Sample(**{**record, "frames": tuple(record["frames"])})


LINE = (
    st.binary(max_size=60)
    | JSON.map(lambda value: json.dumps(value).encode())
    | st.integers(0, 400).map(lambda cut: json.dumps(RECORD).encode()[:cut])
    | st.just(json.dumps(RECORD).encode())
    | st.just(b"[" * 50_000)
)


@settings(max_examples=500, deadline=None)
@given(lines=st.lists(LINE.map(lambda line: line.replace(b"\n", b" ")), max_size=6))
def test_any_jsonl_file_is_read_or_reported_and_no_line_is_lost(lines, tmp_path_factory):
    path = tmp_path_factory.getbasetemp() / "malformed.jsonl"
    path.write_bytes(b"\n".join(lines))
    scanned = list(scan_samples(path))
    assert [number for number, _, _ in scanned] == [number for number, line in enumerate(lines, 1) if line.strip()]
    assert all((sample is None) == bool(problems) for _, sample, problems in scanned)


@pytest.mark.parametrize("text", ["<b>bold</b>", "a < b > c", "<-- left", "x|>y", "<end_of_turn", "<unused>", "[a|b]"])
def test_text_that_is_no_control_token_is_a_sample(text):
    assert check_record({**RECORD, "context": text, "output": text}) == []


def test_bad_lines_are_counted_and_named(tmp_path):
    path = tmp_path / "train.jsonl"
    path.write_text("\n".join([json.dumps(RECORD), "{", "", "[]"]))
    samples = []
    with pytest.raises(PokegemmaError, match=r"2 of 3 lines are not samples: line 2: not JSON; line 4: not a JSON"):
        samples.extend(read_samples(path))


def test_a_missing_and_an_empty_file_are_user_errors(tmp_path):
    (tmp_path / "empty.jsonl").write_text("\n")
    for name, problem in (("nowhere.jsonl", "cannot be read"), ("empty.jsonl", "contains no samples")):
        with pytest.raises(PokegemmaError, match=problem):
            list(read_samples(tmp_path / name))


def test_a_dataset_is_a_folder_or_a_file(tmp_path):
    with pytest.raises(PokegemmaError, match=r"convert sessions first"):
        dataset_files(tmp_path)
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    train.touch()
    assert dataset_files(tmp_path) == (train, None)
    held_out.touch()
    assert dataset_files(tmp_path) == (train, held_out)
    assert dataset_files(held_out) == (held_out, None)


def test_a_model_is_measured_on_the_held_out_file_or_on_the_named_one(tmp_path):
    train, held_out = tmp_path / "train.jsonl", tmp_path / "eval.jsonl"
    with pytest.raises(PokegemmaError, match=rf"^{held_out} not found; .* --output_dir {tmp_path}$"):
        held_out_file(tmp_path)
    train.touch()
    with pytest.raises(PokegemmaError, match=rf"^{held_out} not found: .*two sessions.* --dataset_path {train}$"):
        held_out_file(tmp_path)
    assert held_out_file(train) == train
    held_out.touch()
    assert held_out_file(tmp_path) == held_out
