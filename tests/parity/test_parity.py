"""Exports against the checkpoint they come from: the same is the same, and every planted fault is named."""

import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import psutil
import pytest
import torch
from safetensors.torch import load_file, save_file

from pokegemma.data.samples import read_samples
from pokegemma.data.trajectories import Trajectory
from pokegemma.engines.questions import build_questions
from pokegemma.engines.transformers_engine import TransformersEngine
from pokegemma.errors import PokegemmaError
from pokegemma.evaluation.predict import load_predictor
from pokegemma.evaluation.view import View
from pokegemma.parity.compare import asked_sample, choose_examples, compare, summarize_engine
from pokegemma.parity.engine_spec import EngineFailedError, EngineSpec, check_loaded, weights_type
from pokegemma.parity.limits import ParityLimits, find_failures
from pokegemma.parity.remote import read_reply
from pokegemma.parity.task import Measured, Reading, Task, context_for
from pokegemma.parity.worker import measure
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.serving.client import Reply, Token
from tests.conftest import MakeOnce
from tests.processes import WAIT_S, call_script, free_port, is_running, killed_after
from tests.serving.served import SIZE_PX, write_colour_model

CLOSED_URL = "http://127.0.0.1:1"
"""Where no server is: the port is reserved."""
PROJECTION = "multi_modal_projector.mm_input_projection_weight"


def check_parity(
    model: Path, dataset: Path, output: Path, *arguments: object
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Run the script; return the process and parity.json."""
    words = ["--model_path", model, "--dataset_path", dataset / "train.jsonl", "--output_dir", output]
    done = call_script("check_parity", *words, "--max_new_tokens", 24, "--device", "cpu", *arguments)
    assert (output / "parity.json").is_file(), done.stderr
    return done, json.loads((output / "parity.json").read_text(encoding="utf-8"))


def gates_failed(result: dict[str, Any], name: str) -> list[str]:
    engine = next(engine for engine in result["engines"] if engine["name"] == name)
    assert engine["passed"] == (not engine["failures"])
    return [failure["gate"] for failure in engine["failures"]]


# --- the reference


def test_the_transformers_engine_agrees_with_evaluation(colour_model: Path, colour_dataset: Path) -> None:
    samples = list(read_samples(colour_dataset / "train.jsonl"))
    questions = build_questions(samples, layout="grid", dataset_folder=colour_dataset, size_px=SIZE_PX)
    predictor = load_predictor(
        colour_model, dataset_folder=colour_dataset, layout="grid", dtype="float32", device="cpu", max_new_tokens=24
    )
    engine = TransformersEngine(colour_model, device="cpu")
    answers, scores = predictor.predict(samples, batch_size=1)
    tokens = predictor.collator.button_tokens
    for place, (sample, question) in enumerate(zip(samples, questions, strict=True)):
        batch = predictor.collator.prompts([sample])
        assert torch.equal(engine.pixels(question), batch["pixel_values"])
        soft = predictor.collator.processor.tokenizer.image_token_id
        assert engine.prompt_tokens(question) == [-1 if one == soft else one for one in batch["input_ids"][0].tolist()]
        assert engine.prompt_tokens(question).count(2) == 1  # its only BOS
        assert engine.text(engine.write(question, max_new_tokens=24)) == answers[place].text
        rows = engine.read(question, [(*tokens.prefix, *branch) for branch in tokens.branches])
        start = len(tokens.prefix)
        said = [
            sum(row[start + at, token] for at, token in enumerate(branch))
            for row, branch in zip(rows, tokens.branches, strict=True)
        ]
        np.testing.assert_allclose(np.exp(said) / np.exp(said).sum(), scores[place], atol=1e-5)


def test_frames_of_any_shape_become_the_pixels_that_evaluation_reads(tiny_model: Path, toy_dataset: Path) -> None:
    samples = list(read_samples(toy_dataset / "eval.jsonl"))[:1]  # 240 x 160 pixels
    questions = build_questions(samples, layout="frames", dataset_folder=toy_dataset, size_px=56)
    predictor = load_predictor(tiny_model, dataset_folder=toy_dataset, layout="frames", dtype="float32", device="cpu")
    batch = predictor.collator.prompts(samples)
    pixels = TransformersEngine(tiny_model, device="cpu").pixels(questions[0])
    assert torch.equal(pixels, batch["pixel_values"][batch["image_index"]])


def test_an_adapter_is_refused_as_the_reference(tmp_path: Path) -> None:
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PokegemmaError, match="is an adapter; merge it first"):
        TransformersEngine(tmp_path)


# --- planted faults, all in one run of the script


def swap_rows(weights: torch.Tensor) -> None:
    weights[[0, 1]] = weights[[1, 0]]


def swap_rows_of_mmproj(file: Path, checkpoint: Path) -> None:
    """Swap the first two rows of the projector within a mmproj file, found by their bytes."""
    weight = load_file(checkpoint / "model.safetensors")[
        next(
            name for name in load_file(checkpoint / "model.safetensors") if name.endswith("mm_input_projection_weight")
        )
    ].float()
    data = bytearray(file.read_bytes())
    for stored in (weight, weight.T):
        for dtype in (np.float16, np.float32):
            rows = [row.tobytes() for row in stored.contiguous().numpy().astype(dtype)[:2]]
            if (place := data.find(b"".join(rows))) >= 0:
                data[place : place + 2 * len(rows[0])] = rows[1] + rows[0]
                file.write_bytes(data)
                return
    raise AssertionError("the projector is not in the file")


@pytest.fixture(scope="module")
def faulty(
    colour_model: Path,
    colour_dataset: Path,
    colour_gguf: Path,
    colour_mlx: Path,
    make_once: MakeOnce,
) -> tuple[subprocess.CompletedProcess[str], dict[str, Any]]:
    """Return one run over right exports, one with each fault, and a server that is not there."""

    def make(folder: Path) -> None:
        done = check_faulty_exports(folder, colour_model, colour_dataset, gguf=colour_gguf, mlx=colour_mlx)
        printed = {"returncode": done.returncode, "stdout": done.stdout, "stderr": done.stderr}
        (folder / "done.json").write_text(json.dumps(printed), encoding="utf-8")

    folder = make_once("faulty_exports", make)
    done = json.loads((folder / "done.json").read_text(encoding="utf-8"))
    result = json.loads((folder / "out" / "parity.json").read_text(encoding="utf-8"))
    return subprocess.CompletedProcess("check_parity", **done), result


def check_faulty_exports(
    folder: Path, colour_model: Path, colour_dataset: Path, *, gguf: Path, mlx: Path
) -> subprocess.CompletedProcess[str]:
    """Write a copy of each export with each fault, and check all of them and the right ones in one run."""
    swapped = folder / "swapped" / "model-swapped-f16.gguf"
    template = folder / "template" / "model-template-f16.gguf"
    blind = folder / "blind" / "model-blind-f16.gguf"
    for file in (swapped, template, blind):
        file.parent.mkdir()
        shutil.copy(gguf / "model-f16.gguf", file)
        if file != blind:
            shutil.copy(gguf / "mmproj-f16.gguf", file.parent)
    swap_rows_of_mmproj(swapped.parent / "mmproj-f16.gguf", colour_model)
    whole = template.read_bytes()
    assert whole.count(b"<start_of_turn>model") == 1  # the template; in the vocabulary they are two tokens
    template.write_bytes(whole.replace(b"<start_of_turn>model", b"<start_of_turn>human"))
    mlx_swapped = Path(shutil.copytree(mlx, folder / "mlx-swapped"))
    weights = load_file(mlx_swapped / "model.safetensors")
    swap_rows(weights[PROJECTION])
    save_file(weights, mlx_swapped / "model.safetensors", metadata={"format": "mlx"})
    mlx_template = Path(shutil.copytree(mlx, folder / "mlx-template"))
    text = (mlx_template / "chat_template.jinja").read_text(encoding="utf-8")
    (mlx_template / "chat_template.jinja").write_text(text.replace("<start_of_turn>model", "<start_of_turn>human"))
    same = Path(shutil.copytree(colour_model, folder / "same"))
    done, _ = check_parity(
        colour_model,
        colour_dataset,
        folder / "out",
        "--gguf",
        gguf,
        swapped,
        template,
        blind,
        "--mlx",
        mlx,
        mlx_swapped,
        mlx_template,
        "--transformers",
        same,
        "--server",
        CLOSED_URL,
    )
    return done


@pytest.mark.slow(40)
def test_right_exports_pass_next_to_faulty_ones(faulty: tuple) -> None:
    done, result = faulty
    assert done.returncode == 1
    assert gates_failed(result, "llama.cpp f16") == []
    right = next(engine for engine in result["engines"] if engine["name"] == "llama.cpp f16")
    assert (right["button_agreement"], right["written_agreement"], right["top1_agreement"]) == (1.0, 1.0, 1.0)
    assert right["button_log_probability_difference"]["mean"] < 0.02
    assert right["prompts_equal"] is True
    assert right["peak_memory_bytes"] > 2**20


@pytest.mark.slow(40)
def test_the_same_checkpoint_agrees_in_everything(faulty: tuple, colour_model: Path) -> None:
    _, result = faulty
    (same,) = (engine for engine in result["engines"] if engine["kind"] == "transformers")
    assert same["passed"]
    assert (same["button_agreement"], same["written_agreement"], same["top1_agreement"]) == (1.0, 1.0, 1.0)
    assert same["log_probability_difference"] == same["button_log_probability_difference"] == {"mean": 0.0, "max": 0.0}
    assert same["valid_json_rate"] == result["reference"]["valid_json_rate"] == 1.0
    assert same["worst"] == []


@pytest.mark.slow(40)
def test_a_missing_mmproj_is_named(faulty: tuple) -> None:
    done, result = faulty
    assert gates_failed(result, "llama.cpp blind-f16") == ["runs"]
    assert "mmproj-f16.gguf not found" in done.stdout


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", ["llama.cpp swapped-f16", "mlx mlx-swapped"])
def test_a_swapped_row_of_the_projector_is_caught(faulty: tuple, name: str) -> None:
    assert "button_log_probability_difference" in gates_failed(faulty[1], name)


@pytest.mark.slow(40)
@pytest.mark.parametrize("name", ["llama.cpp template-f16", "mlx mlx-template"])
def test_a_wrong_chat_template_is_caught(faulty: tuple, name: str) -> None:
    assert "prompts_equal" in gates_failed(faulty[1], name)


@pytest.mark.slow(40)
def test_mlx_differs_by_its_attention_inside_pictures(faulty: tuple) -> None:
    _, result = faulty
    right = next(engine for engine in result["engines"] if engine["name"] == "mlx mlx")
    causal = right["against_causal_reference"]["button_log_probability_difference"]["mean"]
    assert any(variant["name"] == "reference, causal pictures" for variant in result["variants"])
    assert causal < right["button_log_probability_difference"]["mean"]


@pytest.mark.slow(40)
def test_stdout_names_engine_gate_value_limit_and_sample(faulty: tuple) -> None:
    done, result = faulty
    for engine in result["engines"]:
        for failure in engine["failures"]:
            assert f"FAIL  {engine['name']}: {failure['message']}" in done.stdout
            assert failure["gate"] == "runs" or failure["sample"] in failure["message"]
    assert done.stderr.splitlines()[-1].startswith("error: ")


@pytest.mark.slow(40)
def test_a_server_that_does_not_exist_fails_and_the_others_are_compared(faulty: tuple) -> None:
    _, result = faulty
    assert [(engine["name"], engine["passed"]) for engine in result["engines"]][-2:] == [
        ("transformers same", True),
        (f"server {CLOSED_URL}", False),
    ]
    assert gates_failed(result, f"server {CLOSED_URL}") == ["runs"]


@pytest.mark.parametrize("flag", ["--max_log_probability_difference", "--timeout_s"])
def test_an_infinite_limit_is_refused_before_any_work(flag: str, tmp_path: Path) -> None:
    words = ["--model_path", "m", "--dataset_path", "d", "--output_dir", tmp_path / "out", "--gguf", "g"]
    done = call_script("check_parity", *words, flag, "inf")
    assert done.returncode == 2
    assert f"error: {flag} inf: " in done.stderr


# --- servers


@pytest.fixture(scope="module")
def opposite_model(colour_dataset: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a model that has learned the other button for each colour."""
    tmp_path = tmp_path_factory.mktemp("opposite")
    dataset = Path(shutil.copytree(colour_dataset, tmp_path / "opposite_dataset"))
    (dataset / "red.png").write_bytes((colour_dataset / "blue.png").read_bytes())
    (dataset / "blue.png").write_bytes((colour_dataset / "red.png").read_bytes())
    folder = tmp_path / "opposite"
    folder.mkdir()
    write_colour_model(folder, dataset)
    return folder


@pytest.fixture
def server(request: pytest.FixtureRequest, colour_gguf: Path, tmp_path: Path) -> Iterator[str]:
    """Return the URL of llama.cpp's server of the colour model; the parameter: how many likeliest tokens it tells."""
    url = f"http://127.0.0.1:{(port := free_port())}"
    command = [
        sys.executable,
        PROJECT_ROOT / "scripts/serve.py",
        "--engine",
        "llama.cpp",
        "--model_path",
        colour_gguf,
        "--port",
        port,
        "--log_probabilities",
        request.param,
    ]
    with (tmp_path / "server.log").open("w") as log:
        process = subprocess.Popen(list(map(str, command)), stdout=subprocess.PIPE, stderr=log, text=True)
    with killed_after(process):
        assert process.stdout.readline().startswith(f"ready: {url}"), (tmp_path / "server.log").read_text()
        yield url
        family = psutil.Process(process.pid).children(recursive=True)
        process.terminate()
        assert process.wait(WAIT_S) == 0, (tmp_path / "server.log").read_text()
        assert family
        assert not any(map(is_running, family))
    process.stdout.close()


@pytest.mark.slow
@pytest.mark.parametrize("server", [0], indirect=True)
def test_a_wrong_model_behind_a_server_is_caught(
    server: str, opposite_model: Path, colour_dataset: Path, tmp_path: Path
) -> None:
    done, result = check_parity(opposite_model, colour_dataset, tmp_path / "out", "--server", server)
    (engine,) = result["engines"]
    assert done.returncode == 1
    assert gates_failed(result, engine["name"]) == ["button_agreement", "written_agreement"]
    assert engine["button_agreement"] == 0.0
    assert (engine["prompts_equal"], engine["peak_memory_bytes"], engine["file_bytes"]) == (None, None, None)
    assert (engine["top1_agreement"], engine["log_probability_difference"]) == (None, None)  # it was not started so
    assert "not reported" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize("server", [5], indirect=True)
def test_the_right_model_behind_a_server_passes_with_its_log_probabilities(
    server: str, colour_model: Path, colour_dataset: Path, tmp_path: Path
) -> None:
    done, result = check_parity(colour_model, colour_dataset, tmp_path / "out", "--server", server)
    assert done.returncode == 0, done.stderr
    (engine,) = result["engines"]
    assert (engine["button_agreement"], engine["top1_agreement"], engine["valid_json_rate"]) == (1.0, 1.0, 1.0)
    assert engine["log_probability_difference"]["mean"] < 0.02


# --- parts


def reading(**changes: Any) -> Reading:
    values = {
        "text": '{"button": "up"}',
        "seconds": 1.0,
        "prompt": (2, -1, 5),
        "tokens": (7, 8),
        "log_probabilities": np.array([-0.1, -0.2], np.float32),
        "likeliest": np.array([7, 8]),
        "buttons": np.array([-0.1, *[-5.0] * 7], np.float32),
    }
    return Reading(**{**values, **changes})


LIMITS = ParityLimits(min_agreement=0.98, max_difference=0.1, max_invalid_json=0.02)


@pytest.mark.parametrize(
    ("changes", "gate"),
    [
        ({"prompt": (2, -1, 6)}, "prompts_equal"),
        ({"prompt": (2, -1)}, "prompts_equal"),
        ({"buttons": np.array([-5.0, -0.1, *[-5.0] * 6], np.float32)}, "button_agreement"),
        ({"text": '{"button": "down"}'}, "written_agreement"),
        ({"text": "up"}, "valid_json_rate"),
        ({"log_probabilities": np.array([-0.1, -0.6], np.float32)}, "log_probability_difference"),
        ({"buttons": np.array([-2.9, *[-5.0] * 7], np.float32)}, "button_log_probability_difference"),
    ],
)
def test_every_limit_can_be_missed_and_names_the_first_sample(
    changes: dict[str, Any], gate: str, toy_dataset: Path
) -> None:
    examples = list(read_samples(toy_dataset / "eval.jsonl"))[:2]
    reference = Measured((reading(), reading()))
    other = Measured((reading(), reading(**changes)))
    record = {**summarize_engine(other, examples), **compare(reference, other)}
    failures = find_failures(record, reference, other, limits=LIMITS, reference_rate=1.0, examples=examples)
    assert gate in [failure["gate"] for failure in failures]
    assert {failure["sample"] for failure in failures} == {examples[1].id}
    record = {**summarize_engine(reference, examples), **compare(reference, reference)}
    assert find_failures(record, reference, reference, limits=LIMITS, reference_rate=1.0, examples=examples) == []


def test_a_server_without_log_probabilities_fails_where_they_have_a_limit(toy_dataset: Path) -> None:
    examples = list(read_samples(toy_dataset / "eval.jsonl"))[:2]
    reference = Measured((reading(), reading()))
    silent = Measured((Reading(text='{"button": "up"}', seconds=1.0),) * 2)
    record = {**summarize_engine(silent, examples), **compare(reference, silent)}
    for limit, failed in ((0.1, ["log_probability_difference"]), (None, [])):
        limits = replace(LIMITS, max_difference=limit)
        failures = find_failures(record, reference, silent, limits=limits, reference_rate=1.0, examples=examples)
        assert [failure["gate"] for failure in failures] == failed


def test_two_answers_without_a_button_agree_only_where_they_are_the_same() -> None:
    said = [reading(text=text, buttons=None) for text in ("I press up!", "I press up!", "no idea")]
    measured = Measured(tuple(said[1:]))
    result = compare(Measured((said[0], said[0])), measured)
    assert (result["button_agreement"], result["written_agreement"]) == (0.5, None)


@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
def test_a_log_probability_that_is_not_finite_is_refused(value: float) -> None:
    reply = Reply(text="up", complete=True, seconds=1.0, tokens=(Token("up", value, ()),))
    with pytest.raises(EngineFailedError, match="NaN or infinity instead of log-probabilities"):
        read_reply(reply, (7,), ("up",))


def test_trajectories_end_with_the_decision_that_is_asked(toy_dataset: Path) -> None:
    samples = list(read_samples(toy_dataset / "eval.jsonl"))
    chosen = choose_examples(samples, View("trajectory", 4, 1), count=1000)
    assert [asked_sample(example).id for example in chosen] == [sample.id for sample in samples]
    assert all(isinstance(example, Trajectory) and len(example.samples) <= 4 for example in chosen)


@pytest.mark.parametrize(
    ("name", "expected"),
    [("model-f16", "f16"), ("model-bf16", "bf16"), ("model-q8_0", "8 bits"), ("gemma-3-4b-it-Q4_K_M", "4 bits")],
)
def test_the_type_of_a_gguf_file_is_in_its_name(name: str, expected: str) -> None:
    assert weights_type(EngineSpec("llama.cpp", "", Path(f"{name}.gguf"))) == expected


@pytest.mark.parametrize(
    ("kind", "name", "engine", "weights", "message"),
    [
        ("llama.cpp", "model-q8_0.gguf", "llama.cpp", "F16", "named after 8 bits, and the loaded weights are F16"),
        ("llama.cpp", "model-f16.gguf", "llama.cpp", "Q4_K_M", "named after f16, and the loaded weights are Q4_K_M"),
        ("llama.cpp", "model-f16.gguf", "transformers float32", "f32", "transformers float32 answered instead of"),
        ("transformers", "model", "mlx", "bf16", "mlx answered instead of transformers"),
    ],
)
def test_an_engine_that_loaded_something_else_is_refused(
    kind: Any, name: str, engine: str, weights: str, message: str
) -> None:
    with pytest.raises(EngineFailedError, match=message):
        check_loaded(EngineSpec(kind, "x", Path(name)), engine=engine, weights=weights)


@pytest.mark.parametrize(
    ("name", "weights"),
    [("model-q8_0", "Q8_0"), ("a-Q4_K_M", "Q4_K_M"), ("model-bf16", "BF16"), ("mine", "Q4_0"), ("model-f16", "")],
)
def test_an_engine_that_loaded_the_type_in_its_file_name_is_accepted(name: str, weights: str) -> None:
    check_loaded(EngineSpec("llama.cpp", "x", Path(f"{name}.gguf")), engine="llama.cpp", weights=weights)


@pytest.mark.slow(40)
def test_the_report_names_engine_and_weights(faulty: tuple) -> None:
    loaded = {engine["name"]: (engine.get("engine"), engine.get("weights")) for engine in faulty[1]["engines"]}
    assert loaded["llama.cpp f16"] == ("llama.cpp", "F16")
    assert loaded["mlx mlx"] == ("mlx", "bf16")
    assert loaded["transformers same"] == ("transformers float32", "f32")


def test_the_transformers_engine_reports_the_type_it_computes_in(tiny_model: Path) -> None:
    engine = TransformersEngine(tiny_model, dtype="bfloat16", device="cpu")
    assert (engine.name, engine.weights) == ("transformers bfloat16", "bf16")


@pytest.mark.slow(5)
def test_an_engine_that_fails_is_reported_with_its_last_words(
    gguf_folder: Path, toy_dataset: Path, tmp_path: Path
) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "gemma3"')
    samples = tuple(read_samples(toy_dataset / "eval.jsonl"))[:1]
    task = Task(samples, "grid", toy_dataset, 56, (1,), ((2,),) * 8, max_new_tokens=4)
    with pytest.raises(EngineFailedError, match="config could not be loaded"):
        measure(EngineSpec("transformers", "x", tmp_path), task, timeout_s=300)
    quick = EngineSpec("llama.cpp", "x", gguf_folder / "model-q8_0.gguf", mmproj=gguf_folder / "mmproj-f16.gguf")
    crashing = replace(task, branches=None)  # a bug of ours, as far as the process can tell
    with pytest.raises(EngineFailedError, match="exit 1: TypeError: 'NoneType' object is not iterable"):
        measure(quick, crashing, timeout_s=300)
    with pytest.raises(EngineFailedError, match="no answer within"):  # Python itself has not started then
        measure(quick, task, timeout_s=0.001)


def test_image_attention_of_the_config_is_used(colour_model: Path, colour_dataset: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(colour_model, tmp_path / "causal"))
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    (folder / "config.json").write_text(json.dumps({**config, "image_attention": "causal"}), encoding="utf-8")
    samples = list(read_samples(colour_dataset / "train.jsonl"))[:1]
    (question,) = build_questions(samples, layout="grid", dataset_folder=colour_dataset, size_px=SIZE_PX)
    plain, asked, own = (
        TransformersEngine(path, device="cpu", image_attention=attention).read(question, [(5, 6)])[0]
        for path, attention in ((colour_model, None), (colour_model, "causal"), (folder, None))
    )
    assert np.array_equal(asked, own)
    assert not np.allclose(plain, own, atol=1e-4)


# --- the context of llama.cpp


@pytest.mark.parametrize(("lengths", "max_new_tokens", "expected"), [((300, 700), 128, 1280), ((9000,), 24, 9472)])
def test_the_context_has_room_for_prompt_answer_and_spare_tokens(
    lengths: tuple[int, ...], max_new_tokens: int, expected: int, toy_dataset: Path
) -> None:
    task = Task((), "grid", toy_dataset, 56, (1,), ((2,),) * 8, max_new_tokens=max_new_tokens)
    said = Measured(tuple(reading(prompt=(-1,) * length) for length in lengths))
    assert context_for(task, said) == expected


@pytest.mark.slow
def test_a_conversation_longer_than_8192_tokens_is_compared(
    colour_model: Path, colour_dataset: Path, colour_gguf: Path, tmp_path: Path
) -> None:
    model, dataset = tmp_path / "model", Path(shutil.copytree(colour_dataset, tmp_path / "dataset"))
    shutil.copytree(colour_model, model)
    options = {"layout": "trajectory", "max_decisions": 170, "overlap_decisions": 0}
    (model / "run.json").write_text(json.dumps({"stage": "train", "options": options}), encoding="utf-8")
    pair = [sample.to_json() for sample in read_samples(dataset / "train.jsonl")]
    session = [json.loads(line) for line in pair * 85]
    for turn, sample in enumerate(session, start=1):
        sample["id"], sample["metadata"]["turn"] = f"session/{turn}", turn
    (dataset / "train.jsonl").write_text("".join(json.dumps(sample) + "\n" for sample in session), encoding="utf-8")
    done, result = check_parity(
        model,
        dataset,
        tmp_path / "out",
        "--gguf",
        colour_gguf,
        "--num_samples",
        "2",
        "--max_new_tokens",
        "2",
        "--max_log_probability_difference",
        "1",
    )
    (engine,) = result["engines"]
    assert (done.returncode, engine["failures"]) == (0, [])
    assert engine["prompts_equal"] is True
