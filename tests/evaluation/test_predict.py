import dataclasses

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image
from safetensors.torch import load_file, save_file

from pokegemma.data import prompts
from pokegemma.data.samples import Sample
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.evaluation import predict
from pokegemma.gemma.button_scores import count_shared_tokens, score_buttons
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3

GOALS = ("leave", "read the sign, then open the menu and close it again", "go north")


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    make_tiny_gemma3(folder, seed=3, image_size_px=56, num_image_tokens=16)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    """Three samples of different length whose pictures are noise."""
    folder = tmp_path_factory.mktemp("dataset")
    generator = np.random.default_rng(0)
    for number in range(4):
        Image.fromarray(generator.integers(0, 255, (40, 60, 3), dtype=np.uint8)).save(folder / f"{number}.png")
    return folder, [
        Sample(
            id=f"s/{number}",
            frames=("3.png", f"{number}.png"),
            image=f"{number}.png",
            context=prompts.build_context(goal),
            question=prompts.build_question(["up", "a"] * number),
            output=prompts.build_output(button="up", reasoning="r", context="navigation"),
            metadata={"session": "s", "turn": number, "previous_buttons": ["up", "a"] * number},
        )
        for number, goal in enumerate(GOALS)
    ]


def load(checkpoint, dataset, layout="grid", **options):
    options = {"dtype": "float32", "device": "cpu", **options}
    return predict.load_predictor(checkpoint, dataset_folder=dataset[0], layout=layout, **options)


@pytest.fixture(scope="module")
def predictor(checkpoint, dataset):
    return load(checkpoint, dataset, max_new_tokens=12)


def score_plainly(model, collator, sample, tokens):
    """Write each branch out in a row of its own, padded on the right, and multiply its tokens' probabilities."""
    prompt = collator.prompts([sample])
    added = [torch.tensor([*tokens.prefix, *branch]) for branch in tokens.branches]
    added = torch.nn.utils.rnn.pad_sequence(added, batch_first=True, padding_value=0)
    row = {
        "input_ids": torch.cat([prompt["input_ids"].expand(8, -1), added], 1),
        "attention_mask": torch.nn.functional.pad(prompt["attention_mask"].expand(8, -1), (0, added.shape[1]), value=1),
        "token_type_ids": torch.nn.functional.pad(prompt["token_type_ids"].expand(8, -1), (0, added.shape[1])),
    }
    with torch.no_grad():
        logits = model(**row, pixel_values=prompt["pixel_values"].repeat(8, 1, 1, 1)).logits.log_softmax(-1)
    start = prompt["input_ids"].shape[1] + len(tokens.prefix) - 1
    scores = [
        sum(logits[row, start + at, token] for at, token in enumerate(branch))
        for row, branch in enumerate(tokens.branches)
    ]
    return torch.stack(scores).softmax(-1)


# No real tokenizer writes the buttons so, but every shape of tree is in it: one token, common beginnings, depth 4.
AWKWARD_BRANCHES = ((50,), (51, 60), (51, 61), (52, 60, 70), (52, 60, 71), (52, 61), (53, 60, 70, 80), (54, 60))


@pytest.mark.parametrize(
    ("layout", "window", "branches"),
    [
        ("grid", 512, None),
        ("grid", 24, AWKWARD_BRANCHES),  # shorter than the prompt, longer than a picture
        ("frames", 5, AWKWARD_BRANCHES),  # shorter than a picture
        ("frames", 512, AWKWARD_BRANCHES),
    ],
)
def test_scores_equal_those_of_eight_separate_rows(checkpoint, dataset, layout, window, branches):
    predictor = load(checkpoint, dataset, layout)
    model, collator = predictor.model, predictor.collator
    model.config.text_config.sliding_window = window
    tokens = collator.button_tokens
    if branches is not None:
        tokens = ButtonTokens(prefix=tokens.prefix, branches=branches)
    batch = collator.prompts(dataset[1])
    assert batch["attention_mask"].sum(1).unique().numel() == 3, "the prompts must differ in length"
    assert count_shared_tokens(batch, image_token=model.config.image_token_id) > 24, "more than a window"
    expected = torch.stack([score_plainly(model, collator, sample, tokens) for sample in dataset[1]])
    scores = score_buttons(model, batch, tokens)
    torch.testing.assert_close(scores, expected, atol=1e-5, rtol=1e-5)
    assert scores.std() > 1e-3, "equal scores would pass by chance"


def test_the_window_matters_in_these_samples(checkpoint, dataset):
    predictor = load(checkpoint, dataset)
    wide = predictor.score(dataset[1])
    predictor.model.config.text_config.sliding_window = 24
    assert not np.allclose(predictor.score(dataset[1]), wide, atol=1e-4)


def test_scores_are_probabilities_in_the_order_of_the_buttons(predictor, dataset):
    scores = predictor.score(dataset[1])
    assert scores.shape == (3, 8)
    assert scores.sum(1) == pytest.approx(np.ones(3))


def test_the_picture_changes_the_score(predictor, dataset):
    sample = dataset[1][0]
    first, second = predictor.score([sample, dataclasses.replace(sample, image="2.png")])
    assert not np.allclose(first, second, atol=1e-5)


def test_a_batch_generates_what_single_samples_do(predictor, dataset):
    together = predictor.generate(dataset[1])
    assert together == [predictor.generate([sample])[0] for sample in dataset[1]]
    assert all(answer.text for answer in together)


def test_generation_is_greedy_step_by_step(predictor, dataset):
    """The cache, and the masks with it, change nothing: the same tokens as one whole forward pass a token."""
    batch = predictor.collator.prompts(dataset[1][:1])
    ids = batch["input_ids"]
    for _ in range(12):
        types = torch.nn.functional.pad(batch["token_type_ids"], (0, ids.shape[1] - batch["token_type_ids"].shape[1]))
        with torch.no_grad():
            logits = predictor.model(input_ids=ids, token_type_ids=types, pixel_values=batch["pixel_values"]).logits
        ids = torch.cat([ids, logits[:, -1:].argmax(-1)], 1)
    text = predictor.collator.processor.tokenizer.decode(ids[0, -12:], skip_special_tokens=True)
    assert predictor.generate(dataset[1][:1])[0].text == text


class _Scripted:
    """Stands for a model that writes given texts: generation stops where it stops, whatever the weights say."""

    def __init__(self, tokenizer, texts):
        rows = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in texts]
        self.rows = [row + [tokenizer.pad_token_id] * (max(map(len, rows)) - len(row)) for row in rows]
        self.dtype = torch.float32

    def generate(self, input_ids, **_):
        return torch.cat([input_ids, torch.tensor(self.rows)], 1)


def test_answers_are_parsed_and_cut_off_ones_are_marked(predictor, dataset):
    tokenizer = predictor.collator.processor.tokenizer
    whole = prompts.build_output(button="left", reasoning="a path", context="navigation")
    scripted = _Scripted(tokenizer, [whole + "<end_of_turn>", "up<end_of_turn>", whole[:-4]])
    batch = predictor.collator.prompts(dataset[1])
    batch["image_features"] = torch.zeros(len(batch.pop("pixel_values")), 4, 128)
    answers = predict.generate_answers(scripted, batch, tokenizer, max_new_tokens=64)
    assert [(answer.button, answer.complete) for answer in answers] == [("left", True), (None, True), (None, False)]
    assert answers[0].text == whole


def test_sampling_defaults_of_a_checkpoint_are_not_used(checkpoint, dataset):
    predictor = load(checkpoint, dataset, max_new_tokens=8)
    greedy = predictor.generate(dataset[1])
    predictor.model.generation_config.update(do_sample=True, temperature=50.0, top_k=0)
    assert predictor.generate(dataset[1]) == greedy


def test_an_adapter_folder_is_loaded_onto_its_base(checkpoint, dataset, predictor, tmp_path):
    model = open_checkpoint(checkpoint).load_model(dtype="float32", device="cpu")
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.(q|v)_proj"))
    for name, weight in adapted.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(weight, std=0.3)
    adapted.save_pretrained(tmp_path)
    expected = score_buttons(
        adapted.get_base_model().eval(), predictor.collator.prompts(dataset[1]), predictor.collator.button_tokens
    )
    scores = load(tmp_path, dataset).score(dataset[1])
    assert scores == pytest.approx(expected.numpy(), abs=1e-6)
    assert not np.allclose(scores, predictor.score(dataset[1]), atol=1e-4)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("what", ["checkpoint", "adapter"])
def test_every_linear_layer_computes_in_the_type_that_was_asked_for(what, dtype, checkpoint, dataset, tmp_path):
    if what == "adapter":
        model = open_checkpoint(checkpoint).load_model()
        get_peft_model(model, LoraConfig(target_modules=r".*language_model.*\.q_proj")).save_pretrained(tmp_path)
    predictor = load(checkpoint if what == "checkpoint" else tmp_path, dataset, dtype=dtype, max_new_tokens=2)
    seen = set()
    for name, layer in predictor.model.named_modules():
        if isinstance(layer, torch.nn.Linear) and "lora_" not in name:  # PEFT keeps an adapter in float32
            layer.register_forward_hook(lambda layer, inputs, output: seen.add(output.dtype))
    _, scores = predictor.predict(dataset[1], batch_size=2)
    assert scores.sum(1) == pytest.approx(1, abs=1e-2)
    assert seen == {getattr(torch, dtype)}


def test_latency_counts_every_sample_once_after_a_warm_up(dataset):
    seen = []
    durations = predict.measure_latency(lambda samples: seen.append(samples[0].id), dataset[1])
    assert seen == ["s/0", "s/1", "s/0", "s/1", "s/2"]
    assert len(durations) == 3 and all(duration >= 0 for duration in durations)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"device": "cuda:99"}, "--device cuda:99"), ({"device": "gameboy"}, "--device gameboy")],
)
def test_a_device_that_is_not_there_is_one_line(checkpoint, dataset, options, message):
    with pytest.raises(PokegemmaError, match=message):
        load(checkpoint, dataset, **options)


def test_a_broken_adapter_is_one_line(dataset, tmp_path):
    (tmp_path / "adapter_config.json").write_text("{}")
    with pytest.raises(PokegemmaError, match="adapter is incomplete or damaged"):
        load(tmp_path, dataset)


def test_an_adapter_that_was_cut_off_is_one_line(checkpoint, dataset, tmp_path):
    model = open_checkpoint(checkpoint).load_model()
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")).save_pretrained(tmp_path)
    weights = (tmp_path / "adapter_model.safetensors").read_bytes()
    (tmp_path / "adapter_model.safetensors").write_bytes(weights[: len(weights) // 2])
    with pytest.raises(PokegemmaError, match=r"adapter is incomplete or damaged: .* incomplete"):
        load(tmp_path, dataset)


def test_an_adapter_that_is_not_whole_is_not_evaluated(checkpoint, dataset, tmp_path):
    model = open_checkpoint(checkpoint).load_model()
    get_peft_model(model, LoraConfig(r=2, target_modules=r".*language_model.*\.q_proj")).save_pretrained(tmp_path)
    tensors = load_file(tmp_path / "adapter_model.safetensors")
    half = {name: tensor for name, tensor in tensors.items() if "layers.5." not in name}
    save_file(half, tmp_path / "adapter_model.safetensors")
    with pytest.raises(PokegemmaError, match=r"1 of the 6 layers .*layers\.5\.self_attn\.q_proj"):
        load(tmp_path, dataset)


def test_prediction_in_batches_equals_prediction_one_by_one(predictor, dataset):
    answers, scores = predictor.predict(dataset[1], batch_size=2)
    assert answers == predictor.generate(dataset[1])
    assert scores == pytest.approx(np.concatenate([predictor.score([sample]) for sample in dataset[1]]), abs=1e-5)
    only_scored, same = predictor.predict(dataset[1], batch_size=3, generate=False)
    assert only_scored is None and same == pytest.approx(scores, abs=1e-5)


def test_a_diverged_model_fails_the_check(checkpoint, dataset):
    predictor = load(checkpoint, dataset)
    predictor.model.lm_head.weight.data.fill_(float("nan"))
    with pytest.raises(CheckFailedError, match="NaN"):
        predictor.score(dataset[1])


def test_missing_pictures_are_named_before_a_model_is_loaded(dataset):
    folder, samples = dataset
    predict.require_pictures(samples, layout="grid", dataset_folder=folder)
    gone = dataclasses.replace(samples[0], frames=("3.png", "gone.png"))
    with pytest.raises(PokegemmaError, match=r"1 of 4 pictures not found: gone\.png"):
        predict.require_pictures([gone, *samples[1:]], layout="frames", dataset_folder=folder)
    with pytest.raises(PokegemmaError, match="s/0 has no grid picture"):
        predict.require_pictures([dataclasses.replace(samples[0], image=None)], layout="grid", dataset_folder=folder)
