import hashlib
import json
import shutil

import pytest

from pokegemma.data.checks.leakage import check_history
from pokegemma.data.checks.records import Split
from pokegemma.data.convert import WindowOptions
from pokegemma.data.corpus import convert_corpus
from pokegemma.data.decisions import read_decision
from pokegemma.data.prompts import parse_answer
from pokegemma.data.recordings.corrections import Correction, read_correction, read_corrections
from pokegemma.data.samples import read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import CheckFailedError, PokegemmaError
from tests.conftest import failed_turn, turn_record
from tests.processes import call_script


def convert(tmp_path, name="out", **options):
    report = convert_corpus(
        tmp_path / "runs", tmp_path / name, window=WindowOptions(), eval_fraction=0.0, num_workers=1, **options
    )
    return report, {
        sample.metadata["turn"]: sample for file in (tmp_path / name / "train.jsonl",) for sample in read_samples(file)
    }


def write_corrections(path, *records):
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def file_hashes(folder):
    files = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.name != "run.json"]
    return {str(path.relative_to(folder)): hashlib.sha256(path.read_bytes()).hexdigest() for path in files}


# What a correction is


@pytest.mark.parametrize(
    "value",
    [
        {"button": "left", "by": "human"},
        {"button": "left", "by": "human:anna"},
        {"button": "select", "by": "expert"},
        {"button": None, "by": "human"},
        {"button": "a", "by": "model:outputs/merged", "reasoning": "a sign"},
    ],
)
def test_a_correction_has_a_button_and_who_says_so(value):
    assert read_correction(value).to_record() == value


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("left", "not an object"),
        ({"button": "left"}, "without by"),
        ({"by": "human"}, "without button"),
        ({}, "without button and by"),
        ({"button": "jump", "by": "human"}, "correction.button 'jump' is not one of up, "),
        ({"button": "LEFT", "by": "human"}, "correction.button 'LEFT' is not one of up, "),
        ({"button": ["left"], "by": "human"}, r"correction.button \['left'\] is not one of up, "),
        ({"button": "left", "by": ""}, "correction.by '' is not human, expert, model "),
        ({"button": "left", "by": "anna"}, "correction.by 'anna' is not human, expert, model "),
        ({"button": "left", "by": None}, "correction.by None is not"),
        ({"button": "left", "by": "human", "reason": "x"}, "unknown key 'reason'"),
        ({"button": "left", "by": "human", "reasoning": 3}, "correction.reasoning is not a text: '3'"),
    ],
)
def test_a_wrong_correction_is_named(value, problem):
    with pytest.raises(ValueError, match=problem):
        read_correction(value)


# What it does to a turn


def test_the_correction_is_the_label_and_what_was_pressed_stays():
    decision = read_decision(turn_record(1, "up", correction={"button": "left", "by": "human:anna"}))
    assert (decision.status, decision.label, decision.label_by, decision.pressed) == (
        "decision",
        "left",
        "human:anna",
        ("up",),
    )


def test_the_reasoning_stays_only_with_the_button_that_it_argues_for():
    def reasoning(button, **more):
        return read_decision(turn_record(1, "up", correction={"button": button, "by": "expert", **more})).reasoning

    assert reasoning("up") == "secret-reasoning-1"
    assert reasoning("left") == ""
    assert reasoning("left", reasoning="a wall") == "a wall"
    assert reasoning("up", reasoning="") == ""
    noisy = turn_record(
        1, "up", button_presses=["down"], decided_by="noise", correction={"button": "up", "by": "expert"}
    )
    assert read_decision(noisy).reasoning == "secret-reasoning-1"


@pytest.mark.parametrize("decided_by", ["random", "repeat", "noise", "stuck", "noise:0.2"])
def test_a_blind_press_is_a_sample_only_with_a_correction(decided_by):
    turn = turn_record(1, "up", decided_by=decided_by)
    assert read_decision(turn).status == "blind_press"
    assert read_decision(turn).pressed == ("up",)
    corrected = read_decision(turn | {"correction": {"button": "down", "by": "expert"}})
    assert (corrected.status, corrected.label, corrected.pressed) == ("decision", "down", ("up",))


def test_a_recording_of_blind_presses_alone_says_what_to_do(make_session, tmp_path):
    make_session("s", [turn_record(1, decided_by="random")])
    with pytest.raises(CheckFailedError, match="session_s: 1 presses at random or by noise; correct them"):
        convert(tmp_path)


@pytest.mark.parametrize("decided_by", ["model", "human:anna", "expert"])
def test_who_decided_is_who_labels(decided_by):
    decision = read_decision(turn_record(1, "up", decided_by=decided_by))
    assert (decision.status, decision.label, decision.label_by) == ("decision", "up", decided_by)


@pytest.mark.parametrize("decided_by", ["somebody", "", 3, ["human"]])
def test_an_unknown_player_is_named(decided_by):
    decision = read_decision(turn_record(1, "up", decided_by=decided_by))
    assert decision.status == "malformed_turn"
    assert "decided_by" in decision.problem


def test_a_wrong_correction_is_no_label_and_is_reported(make_session, tmp_path):
    turns = [turn_record(1), turn_record(2, correction={"button": "left"}), turn_record(3)]
    make_session("s", turns)
    report, samples = convert(tmp_path)
    assert report["turns_without_sample"]["invalid_correction"] == 1
    assert report["problems"] == ["session_s turn 2: correction without by"]
    assert sorted(samples) == [1, 3]


def test_recordings_without_corrections_have_reports_as_before(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    report, samples = convert(tmp_path)
    assert not {"blind_press", "invalid_correction"} & set(report["turns_without_sample"])
    assert "labels_by" not in report
    assert not {"label_by", "corrected", "start_turn"} & set(samples[1].metadata)


def test_a_turn_whose_answer_failed_can_be_corrected(make_session, tmp_path):
    make_session("s", [failed_turn(1, correction={"button": "up", "by": "human"}), turn_record(2)])
    _, samples = convert(tmp_path)
    assert parse_answer(samples[1].output).button == "up"
    assert samples[1].metadata["buttons"] == ["b"]
    assert samples[2].previous_buttons == ["b"]


def test_a_rejected_turn_is_no_sample_and_is_shown_later(make_session, tmp_path):
    rejected = {"button": None, "by": "human"}
    make_session("s", [turn_record(1), turn_record(2, "a", correction=rejected), turn_record(3)])
    report, samples = convert(tmp_path)
    assert (report["turns_without_sample"]["rejected"], sorted(samples)) == (1, [1, 3])
    assert samples[3].previous_buttons == ["up", "a"]
    assert len(set(samples[3].frames)) == 3


def test_a_corrected_turn_without_a_picture_is_no_sample(make_session, tmp_path):
    make_session("s", [turn_record(1), turn_record(2, correction={"button": "a", "by": "human"})], steps=[1])
    report, _ = convert(tmp_path)
    assert report["turns_without_sample"]["frame_missing"] == 1


def test_a_new_start_forgets_frames_and_buttons(make_session, tmp_path):
    turns = [turn_record(turn) for turn in (1, 2, 3, 4, 5)]
    turns[3]["new_start"] = True
    make_session("s", turns)
    _, samples = convert(tmp_path)
    assert samples[4].metadata["frame_turns"] == [4, 4, 4, 4]
    assert (samples[4].previous_buttons, samples[5].previous_buttons) == ([], ["up"])
    assert [samples[turn].metadata.get("start_turn") for turn in range(1, 6)] == [None, None, None, 4, 4]
    conversations = cut_trajectories(samples.values(), max_decisions=16, overlap=2)
    assert [[sample.id for sample in one.samples] for one in conversations] == [["s/1", "s/2", "s/3"], ["s/4", "s/5"]]
    check = check_history([Split("train", tmp_path / "out" / "train.jsonl")])
    assert (check.status, check.summary) == ("PASS", "0 of 3 samples disagree with the turn before them")


# A file of corrections


def test_corrections_change_exactly_the_corrected_labels(make_session, tmp_path):
    for name in ("one", "two"):
        turns = [turn_record(turn, ["up", "a"], decided_by="model:tiny") for turn in range(1, 8)]
        make_session(name, [turn | {"timestamp": f"{name} {turn['turn']}"} for turn in turns])
    before_report, _ = convert(tmp_path, "before")
    file = write_corrections(
        tmp_path / "corrections.jsonl",
        {"session": "session_one", "turn": 3, "button": "left", "by": "human:anna"},
        {"session": "two", "turn": 5, "button": "down", "by": "expert", "reasoning": "a wall"},
        {"session": "two", "turn": 6, "button": "left", "by": "human"},
        {"session": "two", "turn": 6, "button": "up", "by": "human"},
    )
    report, _ = convert(tmp_path, "after", corrections=file)
    before, after = tmp_path / "before", tmp_path / "after"
    changed = {name for name, digest in file_hashes(before).items() if file_hashes(after)[name] != digest}
    assert changed == {"train.jsonl", "conversion_report.json"}
    assert file_hashes(before).keys() == file_hashes(after).keys()
    lines = zip((before / "train.jsonl").open(), (after / "train.jsonl").open(), strict=True)
    differences = {}
    for old, new in lines:
        old, new = json.loads(old), json.loads(new)
        if old != new:
            differences[new["id"]] = new
            assert {key for key in old if old[key] != new[key]} <= {"output", "metadata"}
            assert new["metadata"].pop("corrected") is True
            assert old["metadata"].pop("label_by") == "model:tiny"
            label_by = new["metadata"].pop("label_by")
            assert old["metadata"] == new["metadata"]
            new["by"] = label_by
    assert {sample: (line["output"], line["by"]) for sample, line in differences.items()} == {
        "one/3": ('{"button": "left", "reasoning": "", "context": "navigation"}', "human:anna"),
        "two/5": ('{"button": "down", "reasoning": "a wall", "context": "navigation"}', "expert"),
        "two/6": ('{"button": "up", "reasoning": "secret-reasoning-6", "context": "navigation"}', "human"),
    }
    assert before_report["labels_by"] == {"model:tiny": 14}
    assert report["labels_by"] == {"expert": 1, "human": 1, "human:anna": 1, "model:tiny": 11}


def test_a_correction_of_a_turn_that_does_not_exist_is_reported(make_session, tmp_path):
    make_session("s", [turn_record(1)])
    file = write_corrections(tmp_path / "c.jsonl", {"session": "s", "turn": 9, "button": "a", "by": "human"})
    report, _ = convert(tmp_path, corrections=file)
    assert report["problems"] == ["session_s turn 9: corrected, but there is no such turn"]


@pytest.mark.parametrize(
    ("lines", "problem"),
    [
        ('{"session": "s", "turn": 1, "button": "left"}', "1 lines are not corrections: line 1: correction without by"),
        ('\n{"session": "s", "turn": "1", "button": "left", "by": "human"}', "line 2: turn '1' is not a whole number"),
        ('{"turn": 1, "button": "left", "by": "human"}', "line 1: it does not name a session"),
        ("left\n[]", "2 lines are not corrections: line 1: .*; line 2: it does not name a session"),
        ('{"session": "x", "turn": 1, "button": "left", "by": "human"}', "0 of 1 sessions are called 'x'"),
    ],
)
def test_a_wrong_file_of_corrections_is_one_line(make_session, tmp_path, lines, problem):
    make_session("s", [turn_record(1)])
    (tmp_path / "c.jsonl").write_text(lines)
    with pytest.raises(PokegemmaError, match=f"c.jsonl: .*{problem}|c.jsonl: {problem}"):
        convert(tmp_path, corrections=tmp_path / "c.jsonl")
    assert not (tmp_path / "out").exists()


def test_the_last_correction_of_a_turn_counts(tmp_path):
    record = {"session": "s", "turn": 1, "by": "human"}
    file = write_corrections(tmp_path / "c.jsonl", record | {"button": "left"}, record | {"button": "a"})
    assert read_corrections(file) == {"s": {1: Correction("a", "human")}}


def test_the_script_takes_a_file_of_corrections(make_session, tmp_path):
    make_session("s", [turn_record(1), turn_record(2)])
    file = write_corrections(tmp_path / "c.jsonl", {"session": "s", "turn": 2, "button": "a", "by": "human"})
    folders = ("--eevee_data_dir", tmp_path / "runs", "--output_dir", tmp_path / "out")
    done = call_script("convert_eevee_data_v2", *folders, "--num_workers", 1, "--corrections", file)
    assert done.returncode == 0
    assert "labels by human" in done.stdout
    missing = call_script("convert_eevee_data_v2", *folders, "--corrections", tmp_path / "no", "--overwrite")
    assert missing.returncode == 2
    assert missing.stderr.endswith(f"{tmp_path}/no cannot be read: No such file or directory\n")


def test_only_labels_by_some_can_be_kept(make_session, tmp_path):
    turns = [
        turn_record(1, decided_by="model:tiny"),
        turn_record(2, decided_by="model:tiny", correction={"button": "a", "by": "human:anna"}),
        turn_record(3, "down", decided_by="expert"),
        turn_record(4),
    ]
    make_session("s", turns)
    folders = ("--eevee_data_dir", tmp_path / "runs", "--output_dir", tmp_path / "out", "--num_workers", 1)
    done = call_script("convert_eevee_data_v2", *folders, "--label_by", "human", "expert")
    assert done.returncode == 0, done.stderr
    samples = list(read_samples(tmp_path / "out" / "train.jsonl"))
    assert [sample.metadata["label_by"] for sample in samples] == ["human:anna", "expert"]
    assert samples[1].metadata["frame_turns"] == [1, 1, 2, 3]
    assert samples[1].previous_buttons == ["up", "up"]
    report = json.loads((tmp_path / "out" / "conversion_report.json").read_text())
    assert report["turns_without_sample"]["other_label"] == 2
    wrong = call_script("convert_eevee_data_v2", *folders, "--label_by", "anna")
    assert (wrong.returncode, "--label_by anna" in wrong.stderr) == (2, True)


def test_of_two_copies_the_corrected_one_is_kept(make_session, tmp_path):
    turns = [turn_record(1), turn_record(2)]
    make_session("a", turns)
    make_session("b", turns)
    for name in ("a", "b"):
        shutil.rmtree(tmp_path / "out", ignore_errors=True)
        file = write_corrections(tmp_path / "c.jsonl", {"session": name, "turn": 2, "button": "a", "by": "human"})
        report, samples = convert(tmp_path, corrections=file)
        assert parse_answer(samples[2].output).button == "a"
        assert report["sessions"]["unreadable"] == 1
