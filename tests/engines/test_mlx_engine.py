"""mlx-vlm against transformers, token by token, on a tiny model that has all that mlx-vlm could get wrong."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

pytest.importorskip("mlx_vlm", reason="needs ./init.sh --with mlx")

import mlx.core as mx
from mlx.utils import tree_map
from transformers import AutoProcessor

from pokegemma.engines import mlx_engine
from pokegemma.engines.engine import SOFT_TOKEN
from pokegemma.engines.mlx_engine import MlxEngine
from pokegemma.engines.questions import Question
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.tokenizer import CHAT_TEMPLATE
from tests.export import mlx_cases

QUESTIONS = [mlx_cases.make_question(seed) for seed in range(2)]

TOLERANCE = 0.4
"""Of log-probabilities in bfloat16: 0.2 was measured; 1.1 for the other kind of attention, 6.8 for two swapped rows."""

EXACT_TOLERANCE = 2e-3
"""The same in float32, for which 5e-4 was measured: mlx-vlm rounds the embeddings' scale to bfloat16."""


@pytest.fixture(scope="module")
def engine(mlx_folder: Path) -> MlxEngine:
    return MlxEngine(mlx_folder)


@pytest.fixture(scope="module")
def exact_engine(mlx_folder: Path) -> MlxEngine:
    """Return the engine with its weights in float32, so that rounding hides nothing."""
    engine = MlxEngine(mlx_folder)
    engine._model.update(tree_map(lambda weight: weight.astype(mx.float32), engine._model.parameters()))
    return engine


@pytest.fixture(scope="module")
def expected(mlx_checkpoint: Path) -> Callable[..., list[np.ndarray]]:
    """Return a function that reads the eight answers to a question with transformers, in float32."""
    model = open_checkpoint(mlx_checkpoint).load_model(dtype="bfloat16").float()
    processor = open_checkpoint(mlx_checkpoint).processor
    return lambda question, causal=True: [
        mlx_cases.read_with_transformers(model, processor, question, tokens, causal=causal)
        for tokens in mlx_cases.answers(processor)
    ]


@pytest.fixture(scope="module")
def answers(mlx_checkpoint: Path) -> list[list[int]]:
    return mlx_cases.answers(open_checkpoint(mlx_checkpoint).processor)


@pytest.fixture
def folder(mlx_folder: Path, tmp_path: Path) -> Path:
    """Return a copy to break."""
    return Path(shutil.copytree(mlx_folder, tmp_path / "mlx"))


def largest_difference(ours: list[np.ndarray], theirs: list[np.ndarray]) -> float:
    return max(float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True))


def test_a_prompt_has_the_tokens_of_transformers(engine: MlxEngine, mlx_checkpoint: Path) -> None:
    processor = open_checkpoint(mlx_checkpoint).processor
    soft = processor.tokenizer.image_token_id
    for question in QUESTIONS:
        tokens = mlx_cases.prompt_inputs(processor, question)["input_ids"][0].tolist()
        assert engine.prompt_tokens(question) == [SOFT_TOKEN if token == soft else token for token in tokens]
        assert tokens.count(soft) == 3 * mlx_cases.IMAGE_TOKENS
        assert (tokens[0], tokens.count(2)) == (2, 1)  # its only BOS


def test_it_says_what_transformers_says_causally(
    exact_engine: MlxEngine, expected: Callable, answers: list[list[int]]
) -> None:
    for question in QUESTIONS:
        read, reference = exact_engine.read(question, answers), expected(question)
        assert [rows.shape[0] for rows in read] == [len(tokens) for tokens in answers]
        assert {rows.dtype for rows in read} == {np.dtype("float32")}
        assert largest_difference(read, reference) < EXACT_TOLERANCE
        ours, theirs = (mlx_cases.scores_of(rows, answers) for rows in (read, reference))
        assert ours.argsort().tolist() == theirs.argsort().tolist()  # the buttons, best first
        assert largest_difference(read, expected(question, causal=False)) > 100 * EXACT_TOLERANCE


def test_bfloat16_says_nearly_the_same(engine: MlxEngine, expected: Callable, answers: list[list[int]]) -> None:
    for question in QUESTIONS:
        assert largest_difference(engine.read(question, answers), expected(question)) < TOLERANCE


def test_a_prompt_in_steps_that_cut_a_picture_is_the_same(
    exact_engine: MlxEngine, answers: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = exact_engine.read(QUESTIONS[0], answers[:1])
    tokens = exact_engine.prompt_tokens(QUESTIONS[0])
    step = tokens.index(SOFT_TOKEN) + 5
    assert tokens[step - 1] == tokens[step] == SOFT_TOKEN
    monkeypatch.setattr(mlx_engine, "DEFAULT_PREFILL_STEP_SIZE", step)
    lengths = []
    language_model = exact_engine._model.language_model
    original = type(language_model).__call__

    def spy(self: object, inputs: mx.array, **options: object) -> object:
        lengths.append(inputs.shape[1])
        return original(self, inputs, **options)

    monkeypatch.setattr(type(language_model), "__call__", spy)
    assert largest_difference(exact_engine.read(QUESTIONS[0], answers[:1]), whole) < 1e-4
    assert lengths[0] == step and len(lengths) > 3


def test_a_continuation_is_read_the_same_whatever_was_read_before(
    exact_engine: MlxEngine, answers: list[list[int]]
) -> None:
    alone = exact_engine.read(QUESTIONS[1], [answers[3]])[0]
    together = exact_engine.read(QUESTIONS[1], [answers[0], answers[3], answers[3][:1], [], answers[3]])
    assert np.array_equal(together[1], alone)
    assert np.array_equal(together[4], alone)
    assert np.array_equal(together[2], alone[:1])
    assert together[3].shape == (0, alone.shape[1])
    assert np.allclose(np.exp(alone).sum(1), 1, atol=1e-5)


def test_the_written_answer_takes_the_likeliest_token_each_time(exact_engine: MlxEngine) -> None:
    tokens = exact_engine.write(QUESTIONS[0], max_new_tokens=6)
    rows = exact_engine.read(QUESTIONS[0], [tokens])[0]
    assert len(tokens) == 6
    assert rows.argmax(1).tolist() == tokens
    assert isinstance(exact_engine.text(tokens), str)


def test_writing_stops_at_the_end_of_the_turn(mlx_folder: Path) -> None:
    engine = MlxEngine(mlx_folder)
    first, *_ = engine.write(QUESTIONS[0], max_new_tokens=1)
    engine._stops = {first}
    assert engine.write(QUESTIONS[0], max_new_tokens=5) == []


def test_the_ends_of_an_answer_come_from_the_folder(engine: MlxEngine, mlx_checkpoint: Path) -> None:
    tokenizer = open_checkpoint(mlx_checkpoint).processor.tokenizer
    assert engine._stops == {tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids("<end_of_turn>")}


def test_text_is_that_of_the_tokens(engine: MlxEngine, answers: list[list[int]]) -> None:
    assert engine.text(answers[0]) == '{"button": "up", "reasoning": "so", "context": "menu"}'


def test_a_question_without_pictures_is_answered(engine: MlxEngine) -> None:
    question = Question(
        id="text", messages=({"role": "user", "content": [{"type": "text", "text": "go"}]},), pictures=()
    )
    assert SOFT_TOKEN not in engine.prompt_tokens(question)
    assert len(engine.write(question, max_new_tokens=2)) <= 2


# --- planted faults


def test_two_swapped_rows_of_the_projector_show(folder: Path, expected: Callable, answers: list[list[int]]) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    name = "multi_modal_projector.mm_input_projection_weight"
    weights[name] = mx.concatenate([weights[name][1::-1], weights[name][2:]])
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "mlx"})
    read = MlxEngine(folder).read(QUESTIONS[0], answers[:1])
    assert largest_difference(read, expected(QUESTIONS[0])[:1]) > TOLERANCE


def test_another_chat_template_gives_another_prompt(folder: Path, engine: MlxEngine) -> None:
    template = (folder / "chat_template.jinja").read_text(encoding="utf-8")
    assert "'<start_of_turn>'" in template
    (folder / "chat_template.jinja").write_text(template.replace("'<start_of_turn>'", "'<turn>'"), encoding="utf-8")
    assert MlxEngine(folder).prompt_tokens(QUESTIONS[0]) != engine.prompt_tokens(QUESTIONS[0])


@pytest.mark.parametrize(("key", "value"), [("hidden_size", 2048), ("rope_scaling", None)])
def test_what_mlx_vlm_would_take_by_itself_shows(
    key: str, value: object, folder: Path, expected: Callable, answers: list[list[int]]
) -> None:
    """Each of the facts that converting adds to config.json is needed; one that is not should go."""
    config = json.loads((folder / "config.json").read_text(encoding="utf-8"))
    section = config if key == "hidden_size" else config["text_config"]
    assert section[key] != value
    section[key] = value
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    read = MlxEngine(folder).read(QUESTIONS[0], answers[:1])
    assert largest_difference(read, expected(QUESTIONS[0])[:1]) > TOLERANCE


@pytest.mark.parametrize(
    ("missing", "says"),
    [
        ("model.safetensors", "no *.safetensors in it"),
        ("config.json", "no config.json in it"),
        ("chat_template.jinja", "no chat template in it"),
    ],
)
def test_a_missing_file_is_one_clear_line(missing: str, says: str, folder: Path) -> None:
    (folder / missing).unlink()
    with pytest.raises(PokegemmaError, match=says.replace("*", r"\*")) as error:
        MlxEngine(folder)
    assert "\n" not in str(error.value)
    assert str(folder) in str(error.value)


def test_a_damaged_file_of_weights_is_one_clear_line(folder: Path) -> None:
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:5000])
    with pytest.raises(PokegemmaError, match="mlx-vlm cannot load it") as error:
        MlxEngine(folder)
    assert "\n" not in str(error.value)


def test_a_folder_that_lost_its_vision_tower_is_refused(folder: Path) -> None:
    weights = mx.load(str(folder / "model.safetensors"))
    kept = {name: weight for name, weight in weights.items() if name.startswith("language_model.")}
    mx.eval(kept)
    (folder / "model.safetensors.index.json").unlink()
    mx.save_safetensors(str(folder / "model.safetensors"), kept, metadata={"format": "mlx"})
    with pytest.raises(PokegemmaError, match="not a Gemma 3 with its vision tower"):
        MlxEngine(folder)


def test_no_folder_is_one_clear_line(tmp_path: Path) -> None:
    with pytest.raises(PokegemmaError, match="missing: no such folder"):
        MlxEngine(tmp_path / "missing")


def test_transformers_own_processors_stay_what_they_were(mlx_checkpoint: Path, mlx_folder: Path) -> None:
    mlx_engine.open_processor(mlx_folder)
    assert AutoProcessor.from_pretrained(mlx_checkpoint).chat_template == CHAT_TEMPLATE
