import dataclasses
import json
import re
import shutil

import numpy as np
import pytest
from PIL import Image

from pokegemma.data import prompts
from pokegemma.data.convert import WindowOptions
from pokegemma.data.samples import Sample
from pokegemma.evaluation import metrics, report
from pokegemma.evaluation.predict import GeneratedAnswer, Predictions
from pokegemma.evaluation.view import View, resolve_view, resolve_window
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from tests.processes import call_script

HOSTILE_GOAL = '<script>alert("x")</script> \ud83d'


def make_sample(number, button, *, session, previous=(), **metadata):
    return Sample(
        id=f"{session}/{number}",
        frames=("p.png",) * 4,
        image="p.png",
        context=prompts.build_context("go"),
        question=prompts.build_question(previous),
        output=prompts.build_output(button=button, reasoning="r", context="navigation"),
        metadata={"session": session, "turn": number, "previous_buttons": list(previous), **metadata},
    )


EVAL = [
    make_sample(1, "up", session="e1", situation="navigation", goal=HOSTILE_GOAL),
    make_sample(2, "up", session="e1", previous=["up"], situation="navigation"),
    make_sample(3, "a", session="e2", previous=["up"], situation="sign"),
    make_sample(4, "b", session="e2", previous=["up", "a"], situation="sign"),
]
TRAIN = [make_sample(1, "up", session="t1"), *(make_sample(n, "up", session="t1", previous=["up"]) for n in (2, 3))]
ANSWERS = [
    GeneratedAnswer(EVAL[0].output, "up", True),
    GeneratedAnswer(EVAL[1].output, "up", True),
    GeneratedAnswer(EVAL[2].output, "a", True),
    GeneratedAnswer("</code><b>cut \ud83d", None, False),
]
# Scored: right on all but the last, where "a" has 0.65.
SCORES = np.full((4, 8), 0.05)
SCORES[[0, 1, 2, 3], [0, 0, 4, 4]] = 0.65


def build(samples=EVAL, train=TRAIN, answers=ANSWERS, latency_s=None):
    return report.build_metrics(
        metrics.read_decisions(samples),
        metrics.read_decisions(train),
        Predictions(answers, SCORES, latency_s or {"generated": [0.2], "scored": [0.01]}),
    )


@pytest.fixture
def folder(tmp_path):
    Image.new("RGB", (480, 320), "green").save(tmp_path / "p.png")
    return tmp_path


def render(folder, answers=ANSWERS, samples=EVAL):
    result = build(samples, answers=answers)
    lines = report.prediction_lines(samples, metrics.read_decisions(samples), Predictions(answers, SCORES, {}))
    examples = report.pick_examples(samples, lines, layout="grid", folder=folder)
    return result, lines, report.render_html(result, facts={"model": "a & b"}, examples=examples)


def test_headline_is_the_generated_answer_against_the_best_baseline():
    headline = build()["headline"]
    # majority (up): 2 of 4; repeat: up, up, up, a: 2 of 4; Markov as majority. The first of the tie is named.
    assert headline["model"] == "generated"
    assert headline["model_accuracy"] == 0.75
    assert headline["best_baseline"] == "majority"
    assert headline["best_baseline_accuracy"] == 0.5
    assert headline["points_above_baseline"] == 25.0


def test_best_baseline_is_the_most_accurate_one():
    # majority (select): 0 of 4; repeat: select, up, up, a: 1; Markov: select, up, up, b: 2.
    train = [make_sample(n, "select", session="t") for n in range(5)]
    train += [make_sample(n, "up", session="t", previous=["up"]) for n in range(2)]
    train += [make_sample(9, "b", session="t", previous=["a"])]
    result = build(train=train)
    assert [row["accuracy"] for row in result["rows"][2:]] == [0.0, 0.25, 0.5]
    assert result["headline"]["best_baseline"] == "markov"
    assert [(d["of"], d["minus"], d["accuracy"]) for d in result["differences"]] == [
        ("generated", "markov", 0.25),
        ("scored", "markov", 0.25),
    ]


def test_without_generation_the_headline_is_the_scored_answer():
    result = build(answers=None)
    assert result["headline"]["model"] == "scored"
    assert [row["key"] for row in result["rows"]] == ["scored", "majority", "repeat_previous", "markov"]
    assert result["valid_json_rate"] is None and "generated" not in result


def test_rows_hold_every_figure_of_the_two_ways():
    rows = {row["key"]: row for row in build()["rows"]}
    assert list(rows) == ["generated", "scored", "majority", "repeat_previous", "markov"]
    # F1 of up, a, b: generated 1, 1, 0; scored 1, 2/3, 0. Changes: the turns of a and b.
    assert rows["generated"]["macro_f1"] == pytest.approx(2 / 3)
    assert rows["scored"]["macro_f1"] == pytest.approx(5 / 9)
    assert rows["generated"]["change_accuracy"] == 0.5
    assert rows["scored"]["nll"] == pytest.approx(-(3 * np.log(0.65) + np.log(0.05)) / 4)
    assert rows["generated"]["nll"] is None and rows["repeat_previous"]["nll"] is None
    assert rows["repeat_previous"]["change_accuracy"] == 0.0


def test_json_rate_cut_off_answers_and_agreement_are_counted():
    result = build()
    assert result["valid_json_rate"] == 0.75
    assert result["num_cut_off"] == 1
    assert result["agreement"] == 0.75
    assert result["generated"]["confusion"][5] == [0, 0, 0, 0, 0, 0, 0, 0, 1]  # b: no button
    assert result["num_change_decisions"] == 2 and result["num_first_decisions"] == 1


def test_few_sessions_are_said_to_make_rough_intervals():
    assert build()["intervals"]["note"] == "intervals are rough: there are only 2 sessions to resample"


def test_one_session_gives_no_interval_and_says_so(folder):
    samples = [dataclasses.replace(s, metadata={**s.metadata, "session": "e1"}) for s in EVAL]
    result, _, page = render(folder, samples=samples)
    assert result["headline"]["model_accuracy_interval"] is None
    assert result["intervals"]["note"].startswith("no intervals: there is one session")
    assert "No intervals: there is one session" in page
    assert "95 % interval" not in report.headline_sentence(result)


def test_sessions_shared_with_training_are_not_called_unseen(folder):
    result = build(train=[*TRAIN, make_sample(9, "up", session="e2")])
    assert result["num_sessions_shared_with_train"] == 1
    assert "of turns" in report.headline_sentence(result)
    assert "are in the" in report.render_html(result, facts={}, examples=[])
    assert "of unseen turns" in report.headline_sentence(build())


def test_headline_sentence():
    assert report.headline_sentence(build()) == (
        "The model presses the right button on 75.0 % of unseen turns (95 % interval 50.0–100.0); "
        "the best baseline that sees no picture (majority) reaches 50.0 %."
    )


def test_table_is_aligned_and_short():
    lines = report.metrics_table(build()).splitlines()
    assert lines[0].split() == ["accuracy", "95", "%", "interval", "macro-F1", "on", "changes", "NLL"]
    assert lines[1] == "model (generated)      75.0 %     50.0–100.0     0.667      50.0 %      –"
    assert lines[4] == "repeat previous        50.0 %      0.0–100.0     0.267       0.0 %      –"
    assert len(lines) == 6


def test_page_loads_nothing_from_anywhere(folder):
    page = render(folder)[2]
    sources = re.findall(r'(?:src|href)="([^"]*)"', page)
    assert len(sources) == 3 + 4 + 1  # plots, examples, no icon
    assert all(source.startswith("data:") for source in sources)
    assert not re.search(r"https?://|url\(|@import|<script|<link rel=\"style", page)


def test_text_of_samples_and_answers_is_escaped(folder):
    page = render(folder)[2]
    assert "&lt;script&gt;alert" in page and "<script" not in page
    assert "&lt;/code&gt;&lt;b&gt;cut" in page
    assert "a &amp; b" in page


def test_half_a_surrogate_pair_and_nan_do_not_break_the_files(folder):
    samples = [
        dataclasses.replace(s, metadata={**s.metadata, "situation": "\udc00", "session": "\ud800"}) for s in EVAL
    ]
    result, lines, page = render(folder, samples=samples)
    report.write_report(folder, result, lines, page)

    def refuse(constant):
        raise AssertionError(constant)

    written = json.loads((folder / "metrics.json").read_text(encoding="utf-8"), parse_constant=refuse)
    assert written == result
    assert written["scored"]["per_button"][1]["recall"] is None  # "down" never occurs: 0 / 0
    predictions = (folder / "predictions.jsonl").read_text(encoding="utf-8").splitlines()
    assert [json.loads(line, parse_constant=refuse) for line in predictions] == lines
    assert (folder / "report.html").read_text(encoding="utf-8") == page


def test_predictions_hold_truth_text_button_and_scores(folder):
    lines = render(folder)[1]
    assert {**lines[2], "scores": None} == {
        "id": "e2/3",
        "truth": "a",
        "text": EVAL[2].output,
        "button": "a",
        "complete": True,
        "scored_button": "a",
        "scores": None,
    }
    assert lines[2]["scores"]["a"] == 0.65 and list(lines[2]["scores"]) == list(prompts.BUTTONS)


def test_examples_show_wrong_and_right_answers(folder):
    page = render(folder)[2]
    assert "no valid button" in page and "Wrong, for example" in page and "Right, for example" in page


def test_same_results_give_the_same_page(folder):
    assert render(folder)[2] == render(folder)[2]


def test_page_without_generation_renders(folder):
    page = render(folder, answers=None)[2]
    assert "model (generated)" not in page and "valid JSON" not in page


def test_spread_is_even_and_in_order():
    assert report.evenly_spread(list(range(10)), 4) == [0, 2, 5, 7]
    assert report.evenly_spread([1, 2], 4) == [1, 2]


@pytest.fixture(scope="module")
def workspace(tmp_path_factory):
    """A dataset of four noisy pictures, and a tiny checkpoint that says it was trained on frames."""
    folder = tmp_path_factory.mktemp("workspace")
    generator = np.random.default_rng(0)
    Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / "p.png")
    for name, samples in (("train", TRAIN), ("eval", EVAL)):
        plain = [dataclasses.replace(sample, image=None) for sample in samples]
        lines = "".join(json.dumps(dataclasses.asdict(sample)) + "\n" for sample in plain)
        # In a file, half a surrogate pair is no sample.
        (folder / f"{name}.jsonl").write_text(lines.replace("\\ud83d", ""))
    model = folder / "model"
    model.mkdir()
    make_tiny_gemma3(model, image_size_px=56, num_image_tokens=16)
    (model / "run.json").write_text('{"options": {"layout": "frames"}}')
    return folder


def test_script_evaluates_with_the_layout_of_the_model(workspace, tmp_path):
    output = tmp_path / "evaluation"
    paths = ["--model_path", workspace / "model", "--dataset_path", workspace, "--output_dir", output]
    done = call_script("evaluate", *paths, "--max_new_tokens", 4, "--max_samples", 3, "--device", "cpu", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout) == json.loads((output / "metrics.json").read_text())
    result = json.loads(done.stdout)
    assert result["num_decisions"] == 3 and result["num_available"] == 4
    assert result["latency_ms"]["scored"]["num_decisions"] == 3
    assert sorted(path.name for path in output.iterdir()) == [
        "metrics.json",
        "predictions.jsonl",
        "report.html",
        "run.json",
    ]
    record = json.loads((output / "run.json").read_text())
    assert (
        record["stage"] == "evaluate" and record["options"]["layout"] == "frames" and len(record["dataset_hash"]) == 64
    )
    assert "3 decisions of 4" in (output / "report.html").read_text(encoding="utf-8")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"--dataset_path": "missing"}, r"eval\.jsonl not found"),
        ({"--layout": "grid"}, r"e1/1 has no grid picture .* use --layout frames"),
        ({"--batch_size": "0"}, "--batch_size 0"),
        ({"--model_path": "./nothing", "--layout": "frames"}, "nothing: no such folder"),
        ({"--output_dir": "."}, "exists; choose another path or pass --overwrite"),
        ({"--output_dir": "{workspace}", "--overwrite": "true"}, "--output_dir .* contains the input"),
        ({"--output_dir": "{workspace}/model", "--overwrite": "true"}, "--output_dir .* contains the input .*model"),
        ({"--output_dir": "{workspace}/..", "--overwrite": "true"}, "--output_dir .* contains the input"),
        ({"--vision_features": "out/features"}, "--output_dir out contains the input out/features"),
    ],
)
def test_mistake_of_the_user_is_one_line(workspace, tmp_path, monkeypatch, options, message):
    (tmp_path / "something").touch()
    monkeypatch.chdir(tmp_path)
    given = {
        "--model_path": str(workspace / "model"),
        "--dataset_path": str(workspace),
        "--output_dir": "out",
        **{name: value.replace("{workspace}", str(workspace)) for name, value in options.items()},
    }
    done = call_script("evaluate", *(word for pair in given.items() for word in pair))
    assert done.returncode == 2
    (line,) = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert re.search(message, line)
    assert not (tmp_path / "out").exists()
    assert (workspace / "eval.jsonl").is_file() and (workspace / "model" / "run.json").is_file()


def test_a_merged_model_is_shown_what_its_training_was(tmp_path):
    training = {"options": {"layout": "trajectory", "max_decisions": 5, "overlap_decisions": 1}}
    record = {"stage": "merge", "options": {"layout": "trajectory"}, "training": training}
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert resolve_view(tmp_path) == View("trajectory", 5, 1)
    assert resolve_view(tmp_path, layout="grid", max_decisions=1) == View("grid", 1, 0)


@pytest.mark.parametrize("stage", ["train", "merge", "gguf"])
def test_a_model_is_shown_the_frames_of_its_training(stage, tmp_path, caplog):
    training = {"stage": "train", "options": {}, "window": {"num_frames": 2, "min_frames": 1, "max_gap_s": 7.5}}
    merged = {"stage": "merge", "training": training}
    record = {"train": training, "merge": merged, "gguf": {"stage": "gguf", "model": merged}}[stage]
    (tmp_path / "run.json").write_text(json.dumps(record))
    assert resolve_window(tmp_path) == WindowOptions(num_frames=2, min_frames=1, max_gap_s=7.5)
    assert resolve_window(tmp_path, num_frames=3) == WindowOptions(num_frames=3, min_frames=1, max_gap_s=7.5)
    assert not caplog.records


def test_an_old_model_is_shown_the_frames_of_the_converter_s_default_with_a_warning(tmp_path, caplog):
    (tmp_path / "run.json").write_text(json.dumps({"stage": "merge", "training": {"options": {}}}))
    assert resolve_window(tmp_path) == WindowOptions(num_frames=4, min_frames=4, max_gap_s=30.0)
    assert "4 frames and a pause of 30 s" in caplog.text


def test_a_dataset_of_one_session_has_nothing_to_evaluate_on_and_says_so(workspace, tmp_path):
    shutil.copy(workspace / "train.jsonl", tmp_path / "train.jsonl")
    paths = ["--model_path", workspace / "model", "--dataset_path", tmp_path, "--output_dir", tmp_path / "out"]
    done = call_script("evaluate", *paths)
    assert done.returncode == 2
    (line,) = done.stderr.splitlines()
    assert line.startswith(f"error: {tmp_path}/eval.jsonl not found")
    assert line.endswith(f"--dataset_path {tmp_path}/train.jsonl")
