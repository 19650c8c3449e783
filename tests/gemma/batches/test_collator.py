"""The collator against TRL's own, token by token and in loss, and the traps of Gemma 3."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers import Gemma3ForConditionalGeneration, Gemma3Processor
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pokegemma.data.prompts import Layout, build_messages, build_output, sample_images
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.collator import Gemma3Collator, expand_pictures
from pokegemma.gemma.loading import open_checkpoint

MakeCollator = Callable[[str], Gemma3Collator]


@pytest.fixture(scope="module")
def model(tiny_model: Path) -> Gemma3ForConditionalGeneration:
    return open_checkpoint(tiny_model).load_model()


@pytest.fixture
def mixed(samples: list[Sample]) -> list[Sample]:
    """Return samples with one, four and two pictures and prompts and answers of different lengths."""
    first, second, third = samples[3], samples[5], samples[7]
    long_answer = build_output(button="select", reasoning="a much longer reason than all the others", context="menu")
    return [
        replace(first, frames=first.frames[-1:]),
        replace(second, output=long_answer),
        replace(third, frames=third.frames[-2:], question="Next button?"),
    ]


def trl_batch(
    samples: list[Sample], layout: Layout, processor: Gemma3Processor, folder: Path
) -> dict[str, torch.Tensor]:
    """Return what TRL's collator makes of the same conversations."""
    examples = []
    for sample in samples:
        user, assistant = build_messages(sample, layout)
        images = [Image.open(folder / path).convert("RGB") for path in sample_images(sample, layout)]
        examples.append({"prompt": [user], "completion": [assistant], "images": images})
    return DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, completion_only_loss=True)(
        examples
    )


@pytest.mark.parametrize("layout", ["grid", "frames"])
def test_batches_equal_those_of_trl_token_by_token_and_in_loss(
    layout: Layout,
    mixed: list[Sample],
    make_collator: MakeCollator,
    processor: Gemma3Processor,
    toy_dataset: Path,
    model: Gemma3ForConditionalGeneration,
) -> None:
    compact = make_collator(layout)(mixed)
    ours, theirs = expand_pictures(compact), trl_batch(mixed, layout, processor, toy_dataset)
    for key in ("input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"):
        assert torch.equal(ours[key], theirs[key]), key
    assert set(ours) == {"input_ids", "attention_mask", "token_type_ids", "labels", "pixel_values"}
    with torch.no_grad():
        assert model(**ours).loss.item() == model(**theirs).loss.item() == model(**compact).loss.item()


def test_loss_is_on_the_answer_and_its_end_of_turn_only(
    samples: list[Sample], make_collator: MakeCollator, processor: Gemma3Processor
) -> None:
    batch = make_collator("grid")(samples[:3])
    for sample, ids, labels in zip(samples, batch["input_ids"], batch["labels"], strict=False):
        places = (labels != -100).nonzero().squeeze(1).tolist()
        assert places == list(range(places[0], places[-1] + 1))  # one run of labels
        assert labels[places].tolist() == ids[places].tolist()
        assert processor.tokenizer.decode(labels[places]) == sample.output + "<end_of_turn>\n"
        assert processor.tokenizer.decode(ids[: places[0]]).endswith("<start_of_turn>model\n")


@pytest.mark.parametrize(("layout", "samples_per_row"), [("grid", 1), ("frames", 1), ("grid", 2), ("trajectory", 1)])
def test_every_row_begins_with_its_only_bos(
    layout: Layout, samples_per_row: int, samples: list[Sample], make_collator: MakeCollator
) -> None:
    collator = replace(make_collator(layout), samples_per_row=samples_per_row)
    trajectories = list(cut_trajectories(samples, max_decisions=4, overlap=1))
    batches = [collator((trajectories if layout == "trajectory" else samples)[:4])["input_ids"]]
    if layout != "trajectory":
        prompts = collator.prompts(samples[:4])
        assert prompts["input_ids"][torch.arange(4), prompts["attention_mask"].argmax(1)].tolist() == [2, 2, 2, 2]
        batches.append(prompts["input_ids"])
    assert batches[0][:, 0].tolist() == [2] * len(batches[0])
    assert all((ids == 2).sum(1).tolist() == [1] * len(ids) for ids in batches)


def test_image_tokens_and_types_follow_the_number_of_pictures(mixed: list[Sample], make_collator: MakeCollator) -> None:
    """Regression test of https://github.com/huggingface/trl/issues/3121: pictures that differ in number a sample."""
    collator = make_collator("frames")
    batch = collator(mixed)
    soft = batch["input_ids"] == collator.processor.tokenizer.image_token_id
    assert soft.sum(dim=1).tolist() == [1 * 4, 4 * 4, 2 * 4]
    assert torch.equal(batch["token_type_ids"], soft.long())
    assert expand_pictures(batch)["pixel_values"].shape == (7, 3, 56, 56)


@pytest.mark.parametrize("layout", ["grid", "frames"])
def test_a_batch_says_what_its_samples_say_alone(
    layout: Layout, mixed: list[Sample], make_collator: MakeCollator, model: Gemma3ForConditionalGeneration
) -> None:
    collator = make_collator(layout)
    batch = collator(mixed)
    labels = batch.pop("labels")
    with torch.no_grad():
        together = model(**batch).logits
        for row, sample in enumerate(mixed):
            alone = collator([sample])
            length = alone["input_ids"].shape[1]
            assert torch.equal(labels[row, :length], alone.pop("labels")[0])
            assert (labels[row, length:] == -100).all()  # padding is excluded from loss
            torch.testing.assert_close(together[row, :length], model(**alone).logits[0], atol=1e-5, rtol=1e-6)


def test_attention_inside_a_picture_is_bidirectional(
    samples: list[Sample], make_collator: MakeCollator, model: Gemma3ForConditionalGeneration
) -> None:
    batch = make_collator("grid")(samples[:1])
    del batch["labels"]
    with torch.no_grad():
        logits = model(**batch).logits
        causal = model(**{key: value for key, value in batch.items() if key != "token_type_ids"}).logits
    assert (logits - causal).abs().max() > 1e-4


def test_prompts_are_the_training_rows_up_to_the_answer_padded_on_the_left(
    mixed: list[Sample], make_collator: MakeCollator
) -> None:
    collator = make_collator("frames")
    training, prompts = collator(mixed), collator.prompts(mixed)
    assert set(prompts) == {"input_ids", "attention_mask", "token_type_ids", "pixel_values", "image_index"}
    assert torch.equal(prompts["pixel_values"], training["pixel_values"])
    for row, labels, prompt, mask in zip(
        training["input_ids"], training["labels"], prompts["input_ids"], prompts["attention_mask"], strict=True
    ):
        start = (labels != -100).nonzero()[0].item()
        assert prompt[mask == 1].tolist() == row[:start].tolist()
        assert mask.tolist() == sorted(mask.tolist())


def test_count_tokens_is_the_length_of_the_row(mixed: list[Sample], make_collator: MakeCollator) -> None:
    collator = make_collator("frames")
    lengths = collator(mixed)["attention_mask"].sum(dim=1).tolist()
    assert [collator.count_tokens(sample) for sample in mixed] == lengths


def test_rows_of_jsonl_make_the_same_batch(samples: list[Sample], make_collator: MakeCollator) -> None:
    collator = make_collator("grid")
    rows, batch = [{"sample": sample.to_json()} for sample in samples[:2]], collator(samples[:2])
    assert all(torch.equal(value, batch[key]) for key, value in collator(rows).items())


@pytest.mark.parametrize("field", ["context", "question", "output"])
@pytest.mark.parametrize(
    "symbol", ["<start_of_image>", "<image_soft_token>", "<bos>", "<end_of_turn>", "<eos>", "<pad>"]
)
def test_control_symbols_in_a_text_are_refused(
    symbol: str, field: str, samples: list[Sample], make_collator: MakeCollator
) -> None:
    sample = replace(samples[0], **{field: f"{getattr(samples[0], field)} find {symbol}"})
    for layout, example in (("grid", sample), ("trajectory", Trajectory((samples[1], sample)))):
        with pytest.raises(PokegemmaError, match=f"{sample.id}: its text contains {symbol}"):
            make_collator(layout)([example])


def test_a_missing_picture_is_named(samples: list[Sample], make_collator: MakeCollator) -> None:
    with pytest.raises(PokegemmaError, match=r"grid_images/nowhere\.png"):
        make_collator("grid")([replace(samples[0], image="grid_images/nowhere.png")])


def test_a_sample_without_a_grid_picture_is_refused_in_grid(samples: list[Sample], make_collator: MakeCollator) -> None:
    with pytest.raises(PokegemmaError, match="use --layout frames"):
        make_collator("grid")([replace(samples[0], image=None)])
