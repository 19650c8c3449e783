"""llama.cpp against transformers on the same questions: the same prompts, the same probabilities, the same buttons."""

import json
import pickle
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from pokegemma.data import prompts
from pokegemma.data.samples import read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.engines import llama_cpp_log
from pokegemma.engines.engine import SOFT_TOKEN
from pokegemma.engines.llama_cpp_engine import LlamaCppEngine
from pokegemma.engines.questions import Question, build_questions
from pokegemma.errors import PokegemmaError
from pokegemma.export.gguf import MMPROJ, run_converter
from pokegemma.export.llama_cpp_converter import find_converter
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.loading import open_checkpoint

F16_TOLERANCE = 0.05
"""Largest difference of a log-probability that float16 weights and cache may make; 0.025 was seen, at -17."""


class Reference:
    """transformers in float32, asked as an engine is."""

    def __init__(self, folder: Path) -> None:
        self.model: Any = open_checkpoint(folder).load_model()
        self.processor = open_checkpoint(folder).processor

    def inputs(self, question: Question) -> dict[str, torch.Tensor]:
        text = self.processor.apply_chat_template(list(question.messages), tokenize=False, add_generation_prompt=True)
        return dict(
            self.processor(text=[text], images=[list(question.pictures)], return_tensors="pt", add_special_tokens=False)
        )

    def prompt_tokens(self, question: Question) -> list[int]:
        soft = self.processor.tokenizer.image_token_id
        return [SOFT_TOKEN if token == soft else token for token in self.inputs(question)["input_ids"][0].tolist()]

    @torch.no_grad()
    def read(self, question: Question, continuation: Sequence[int]) -> np.ndarray:
        inputs = self.inputs(question)
        more = torch.tensor([list(continuation)])
        inputs["input_ids"] = torch.cat([inputs["input_ids"], more], dim=1)
        inputs["attention_mask"] = torch.ones_like(inputs["input_ids"])
        inputs["token_type_ids"] = torch.cat([inputs["token_type_ids"], torch.zeros_like(more)], dim=1)
        logits = self.model(**inputs).logits[0, -len(continuation) - 1 : -1]
        return logits.log_softmax(-1).numpy()


@pytest.fixture(scope="module")
def reference(tiny_model: Path) -> Reference:
    return Reference(tiny_model)


@pytest.fixture(scope="module")
def answers(reference: Reference) -> list[list[int]]:
    """Return the tokens of an answer with each button."""
    return [
        reference.processor.tokenizer(
            prompts.build_output(button=button, reasoning="the path is clear", context="navigation"),
            add_special_tokens=False,
        )["input_ids"]
        for button in prompts.BUTTONS
    ]


@pytest.fixture(scope="module")
def buttons(reference: Reference) -> list[list[int]]:
    """Return the tokens up to where an answer names its button."""
    tokens = ButtonTokens.of(reference.processor.tokenizer)
    return [[*tokens.prefix, *branch] for branch in tokens.branches]


@pytest.fixture(scope="module")
def engine(gguf_folder: Path) -> Iterator[LlamaCppEngine]:
    with LlamaCppEngine(gguf_folder / "model-f16.gguf", gguf_folder / MMPROJ, num_context=2048) as engine:
        yield engine


def chosen(log_probabilities: Sequence[np.ndarray], answers: Sequence[Sequence[int]]) -> int:
    scores = [
        rows[np.arange(len(tokens)), tokens].sum() for rows, tokens in zip(log_probabilities, answers, strict=True)
    ]
    return int(np.argmax(scores))


def test_a_prompt_begins_with_its_only_bos(engine: LlamaCppEngine, questions: list[Question]) -> None:
    tokens = engine.prompt_tokens(questions[0])
    assert (tokens[0], tokens.count(2)) == (2, 1)


# --- against transformers


@pytest.mark.parametrize("layout", prompts.LAYOUTS)
def test_prompts_and_log_probabilities_are_those_of_transformers(
    engine: LlamaCppEngine, reference: Reference, answers: list[list[int]], toy_dataset: Path, layout: Any
) -> None:
    examples: Any = list(read_samples(toy_dataset / "eval.jsonl"))[:4]
    if layout == "trajectory":
        examples = list(cut_trajectories(examples, max_decisions=4, overlap=0))
    for question in build_questions(examples, layout=layout, dataset_folder=toy_dataset, size_px=56):
        tokens = engine.prompt_tokens(question)
        assert tokens == reference.prompt_tokens(question)
        assert tokens.count(SOFT_TOKEN) == 4 * len(question.pictures) > 0
        expected = reference.read(question, answers[0])
        (found,) = engine.read(question, answers[:1])
        assert found.shape == expected.shape and found.dtype == np.float32
        assert np.abs(found - expected).max() < F16_TOLERANCE


def test_the_same_buttons_are_chosen(
    engine: LlamaCppEngine, reference: Reference, buttons: list[list[int]], questions: list[Question]
) -> None:
    for question in questions[:3]:
        expected = chosen([reference.read(question, tokens) for tokens in buttons], buttons)
        assert chosen(engine.read(question, buttons), buttons) == expected


def test_fewer_bits_are_further_from_transformers_but_not_far(
    engine: LlamaCppEngine,
    gguf_folder: Path,
    reference: Reference,
    answers: list[list[int]],
    questions: list[Question],
) -> None:
    expected = reference.read(questions[0], answers[0])
    errors = [np.abs(engine.read(questions[0], answers[:1])[0] - expected).mean()]
    assert engine.weights == "F16"
    for name, weights in (("model-q8_0.gguf", "Q8_0"), ("model-q4_k_m.gguf", "Q4_K_M")):
        with LlamaCppEngine(gguf_folder / name, gguf_folder / MMPROJ, num_context=512) as other:
            assert other.weights == weights
            errors.append(np.abs(other.read(questions[0], answers[:1])[0] - expected).mean())
    assert errors[0] < 0.016 < errors[1] < 0.16 < errors[2] < 1  # 0.0035, 0.073 and 0.35 were measured


def test_pictures_change_what_is_read(
    engine: LlamaCppEngine, answers: list[list[int]], questions: list[Question]
) -> None:
    black = Question(questions[0].id, questions[0].messages, (Image.new("RGB", (56, 56)),))
    seen, unseen = (engine.read(question, answers[:1])[0] for question in (questions[0], black))
    assert np.abs(seen - unseen).max() > 4 * F16_TOLERANCE


# --- as an engine


def test_what_was_read_before_changes_nothing(
    engine: LlamaCppEngine, answers: list[list[int]], questions: list[Question]
) -> None:
    several = engine.read(questions[0], [*answers, answers[3][:1]])
    assert [len(rows) for rows in several] == [*map(len, answers), 1]
    assert np.allclose(np.exp(several[0]).sum(axis=-1), 1, atol=1e-5)
    engine.read(questions[1], answers[:1])
    assert np.abs(engine.read(questions[0], [answers[3]])[0] - several[3]).max() < 1e-3
    assert np.abs(several[-1][0] - several[3][0]).max() == 0


def test_it_writes_the_likeliest_token_each_time_and_stops_at_the_limit(
    engine: LlamaCppEngine, questions: list[Question]
) -> None:
    written = engine.write(questions[0], max_new_tokens=12)
    assert len(written) == 12
    (rows,) = engine.read(questions[0], [written])
    assert rows.argmax(axis=-1).tolist() == written


def test_it_stops_at_the_end_of_a_turn_and_does_not_return_it(
    engine: LlamaCppEngine, questions: list[Question], reference: Reference, monkeypatch: pytest.MonkeyPatch
) -> None:
    end = reference.processor.tokenizer.convert_tokens_to_ids("<end_of_turn>")
    likeliest = iter([70, 71, end, 72])

    def logits(place: int) -> np.ndarray:
        row = np.zeros(1088, dtype=np.float32)
        row[next(likeliest)] = 1
        return row

    monkeypatch.setattr(engine, "_logits", logits)
    assert engine.write(questions[0], max_new_tokens=12) == [70, 71]


def test_text_is_what_the_tokenizer_of_the_checkpoint_says(
    engine: LlamaCppEngine, answers: list[list[int]], reference: Reference
) -> None:
    for answer in answers:
        assert engine.text(answer) == reference.processor.tokenizer.decode(answer)
    assert prompts.parse_answer(engine.text(answers[4])).button == "a"


def test_an_answer_longer_than_a_batch_is_read_in_several(
    engine: LlamaCppEngine, reference: Reference, questions: list[Question]
) -> None:
    answer = [5, 6, 7] * 400  # llama.cpp ends the whole process at more than 1024 at once
    (rows,) = engine.read(questions[0], [answer])
    assert rows.shape[0] == len(answer)
    assert np.abs(rows - reference.read(questions[0], answer)).max() < F16_TOLERANCE


def test_a_prompt_that_does_not_fit_is_refused(gguf_folder: Path, questions: list[Question]) -> None:
    with (
        LlamaCppEngine(gguf_folder / "model-q8_0.gguf", gguf_folder / MMPROJ, num_context=256) as engine,
        pytest.raises(PokegemmaError, match=r"tokens and 300 more do not fit into 256"),
    ):
        engine.write(questions[0], max_new_tokens=300)


def test_a_question_whose_pictures_do_not_fill_its_slots_is_refused(
    engine: LlamaCppEngine, questions: list[Question]
) -> None:
    for pictures in ((), questions[0].pictures * 2):
        with pytest.raises(PokegemmaError, match=f"1 slots for {len(pictures)} pictures"):
            engine.prompt_tokens(Question("x", questions[0].messages, pictures))


MANY_ENGINES = """
import pickle, sys
from pathlib import Path

import psutil

from pokegemma.engines.llama_cpp_engine import LlamaCppEngine

model, mmproj, question = map(Path, sys.argv[1:])
for _ in range(40):
    with LlamaCppEngine(model, mmproj, num_context=512) as engine:
        engine.read(pickle.loads(question.read_bytes()), [[5]])
    engine.close()  # again: nothing happens
    print(psutil.Process().memory_info().rss)
"""


def test_close_gives_the_memory_back(gguf_folder: Path, questions: list[Question], tmp_path: Path) -> None:
    (tmp_path / "question.pickle").write_bytes(pickle.dumps(questions[0]))
    files = gguf_folder / "model-q8_0.gguf", gguf_folder / MMPROJ, tmp_path / "question.pickle"
    # In a process of its own: what other tests left behind is freed at any time.
    done = subprocess.run([sys.executable, "-c", MANY_ENGINES, *files], capture_output=True, text=True, check=True)
    sizes = [int(line) for line in done.stdout.split()]
    # The first twenty fill the allocator's pools; of the others not even half of what the smaller file takes stays.
    assert sizes[39] - sizes[19] < 10 * min(file.stat().st_size for file in files[:2])


# --- files that do not belong together


def test_its_prompts_come_from_the_chat_template_in_the_file(
    engine: LlamaCppEngine, gguf_folder: Path, tmp_path: Path, questions: list[Question]
) -> None:
    whole = (gguf_folder / "model-q8_0.gguf").read_bytes()
    wrong = whole.replace(b"{{ '<start_of_turn>model\\n' }}", b"{{ '<start_of_turn>modex\\n' }}")
    assert wrong != whole
    (tmp_path / "wrong.gguf").write_bytes(wrong)
    with LlamaCppEngine(tmp_path / "wrong.gguf", gguf_folder / MMPROJ, num_context=512) as other:
        assert other.prompt_tokens(questions[0]) != engine.prompt_tokens(questions[0])


@pytest.mark.parametrize("fault", [b"{{ nobody() }}", b"{{ 1 + bos_token }}"])
def test_a_chat_template_that_fails_is_told_in_a_line(
    fault: bytes, gguf_folder: Path, tmp_path: Path, questions: list[Question]
) -> None:
    whole, turn = (gguf_folder / "model-q8_0.gguf").read_bytes(), b"{{ '<start_of_turn>model\\n' }}"
    (tmp_path / "wrong.gguf").write_bytes(whole.replace(turn, fault.ljust(len(turn))))
    with (
        LlamaCppEngine(tmp_path / "wrong.gguf", gguf_folder / MMPROJ, num_context=512) as other,
        pytest.raises(PokegemmaError, match="the chat template in the GGUF file fails: "),
    ):
        other.prompt_tokens(questions[0])


@pytest.mark.parametrize("missing", ["model-f16.gguf", MMPROJ])
def test_a_missing_file_is_named(gguf_folder: Path, tmp_path: Path, missing: str) -> None:
    files = {name: gguf_folder / name for name in ("model-f16.gguf", MMPROJ)} | {missing: tmp_path / missing}
    with pytest.raises(PokegemmaError, match=f"{missing} not found: "):
        LlamaCppEngine(*files.values())


@pytest.mark.parametrize("damaged", ["model-f16.gguf", MMPROJ])
@pytest.mark.parametrize("share", [0.0, 0.05, 0.6])
def test_a_truncated_file_is_refused(gguf_folder: Path, tmp_path: Path, damaged: str, share: float) -> None:
    whole = (gguf_folder / damaged).read_bytes()
    (tmp_path / damaged).write_bytes(whole[: int(share * len(whole))])
    files = {name: gguf_folder / name for name in ("model-f16.gguf", MMPROJ)} | {damaged: tmp_path / damaged}
    with pytest.raises(PokegemmaError) as caught:
        LlamaCppEngine(*files.values(), num_context=256)
    assert str(caught.value).startswith(f"{tmp_path / damaged}: llama.cpp cannot load it")


def test_files_that_were_swapped_are_refused(gguf_folder: Path) -> None:
    model, mmproj = gguf_folder / "model-f16.gguf", gguf_folder / MMPROJ
    for first, second in ((mmproj, model), (model, model)):
        with pytest.raises(PokegemmaError, match=r"llama\.cpp cannot load it"):
            LlamaCppEngine(first, second, num_context=256)


@pytest.mark.slow(4)
def test_a_mmproj_of_another_language_model_is_refused(gguf_folder: Path, tiny_model: Path, tmp_path: Path) -> None:
    other = Path(shutil.copytree(tiny_model, tmp_path / "other"))
    weights = load_file(other / "model.safetensors")
    name = next(name for name in weights if name.endswith("mm_input_projection_weight"))
    weights[name] = weights[name][:, :64].contiguous()
    save_file(weights, other / "model.safetensors")
    config = json.loads((other / "config.json").read_text())
    config["text_config"]["hidden_size"] = 64
    (other / "config.json").write_text(json.dumps(config))
    run_converter(find_converter(None), other, tmp_path / MMPROJ, "--mmproj", "--outtype", "f16")
    with pytest.raises(PokegemmaError, match=r"cannot load it for this language model: .*64"):
        LlamaCppEngine(gguf_folder / "model-f16.gguf", tmp_path / MMPROJ, num_context=256)


def test_who_waits_for_an_error_goes_on_when_another_has_ceased() -> None:
    with llama_cpp_log.captured_log() as first:
        with llama_cpp_log.captured_log():
            pass
        assert any(one is first for one in llama_cpp_log._waiting)
