"""The collator of Gemma 3n and Gemma 4 against TRL's own, token by token and in loss."""

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from transformers.utils import is_timm_available
from trl.trainer.sft_trainer import DataCollatorForVisionLanguageModeling

from pokegemma.data.prompts import Layout, build_messages, build_output, sample_images
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.gemma import families
from pokegemma.gemma.batches.collator import Gemma3Collator
from pokegemma.gemma.batches.processor_collator import ProcessorCollator, make_collator
from pokegemma.gemma.loading import open_checkpoint
from pokegemma.gemma.processors import load_gemma3n_processor
from pokegemma.gemma.tiny import gemma3n_gemma4

FAMILIES = ["gemma3n", "gemma4", "gemma4_large"]
END = {"gemma3n": "<end_of_turn>\n", "gemma4": "<turn|>\n", "gemma4_large": "<turn|>\n"}


@pytest.fixture(scope="module")
def load_processor(other_models, tmp_path_factory: pytest.TempPathFactory) -> Callable:
    """Return a function that loads the processor of a family, for which Gemma 3n does not need timm."""

    def load(name: str):
        if name != "gemma3n":
            return open_checkpoint(other_models(name)).processor
        folder = tmp_path_factory.mktemp("gemma3n_processor")
        gemma3n_gemma4.write_gemma3n_processor(folder, image_size_px=64, num_image_tokens=16)
        return load_gemma3n_processor(str(folder))

    return load


@pytest.fixture
def mixed(samples: list[Sample], toy_dataset: Path, tmp_path: Path) -> list[Sample]:
    """Return samples with one, four and two pictures, one of them tall, and texts of different lengths."""
    first, second, third = (
        replace(s, frames=tuple(str(toy_dataset / f) for f in s.frames), image=str(toy_dataset / s.image))
        for s in (samples[3], samples[5], samples[7])
    )
    Image.new("RGB", (40, 90), (200, 10, 20)).save(tmp_path / "tall.png")
    long_answer = build_output(button="select", reasoning="a much longer reason than all the others", context="menu")
    return [
        replace(first, frames=first.frames[-1:]),
        replace(second, output=long_answer),
        replace(third, frames=(third.frames[0], str(tmp_path / "tall.png")), question="Next button?"),
    ]


def collator_of(processor, layout: Layout = "frames") -> ProcessorCollator:
    return make_collator(processor, layout=layout, dataset_folder=Path())


def trl_batch(samples: list[Sample], layout: Layout, processor) -> dict[str, torch.Tensor]:
    examples = []
    for sample in samples:
        user, assistant = build_messages(sample, layout)
        images = [Image.open(path).convert("RGB") for path in sample_images(sample, layout)]
        examples.append({"prompt": [user], "completion": [assistant], "images": images})
    collator = DataCollatorForVisionLanguageModeling(processor=processor, max_length=None, completion_only_loss=True)
    return dict(collator(examples))


@pytest.mark.parametrize("layout", ["grid", "frames"])
@pytest.mark.parametrize("name", FAMILIES)
def test_batches_equal_those_of_trl_token_by_token_and_in_loss(
    name: str, layout: Layout, mixed: list[Sample], load_processor, other_models
) -> None:
    processor = load_processor(name)
    ours, theirs = collator_of(processor, layout)(mixed), trl_batch(mixed, layout, processor)
    assert set(ours) == set(theirs)
    for key, tensor in theirs.items():
        assert torch.equal(ours[key], tensor), key
    if name == "gemma3n" and not is_timm_available():
        return  # no model to compute a loss with
    model = open_checkpoint(other_models(name)).load_model()
    with torch.no_grad():
        assert model(**ours).loss.item() == model(**theirs).loss.item()


@pytest.mark.parametrize("name", FAMILIES)
def test_loss_is_on_the_answer_and_its_end_of_turn_only(name: str, mixed: list[Sample], load_processor) -> None:
    processor = load_processor(name)
    batch = collator_of(processor)(mixed)
    for sample, ids, labels in zip(mixed, batch["input_ids"], batch["labels"], strict=True):
        places = (labels != -100).nonzero().squeeze(1).tolist()
        assert places == list(range(places[0], places[-1] + 1))
        assert processor.tokenizer.decode(labels[places]) == sample.output + END[name]
        assert processor.tokenizer.decode(ids[: places[0]]).endswith("model\n")
        assert (ids == processor.tokenizer.bos_token_id).sum() == 1


@pytest.mark.parametrize("name", FAMILIES)
def test_prompts_are_the_batch_without_answers_padded_on_the_left(name, mixed, load_processor) -> None:
    collator = collator_of(load_processor(name))
    whole, prompts = collator(mixed), collator.prompts(mixed)
    for ids, labels, prompt, mask in zip(
        whole["input_ids"], whole["labels"], prompts["input_ids"], prompts["attention_mask"], strict=True
    ):
        length = int((labels != -100).nonzero()[0])
        assert prompt[-length:].tolist() == ids[:length].tolist()
        assert mask.tolist() == [0] * (len(prompt) - length) + [1] * length
    assert torch.equal(whole["pixel_values"], prompts["pixel_values"])
    assert [collator.count_tokens(s) for s in mixed] == whole["attention_mask"].sum(1).tolist()


def test_a_picture_of_gemma_4_has_the_tokens_of_its_shape(mixed: list[Sample], load_processor) -> None:
    collator = collator_of(load_processor("gemma4"))
    batch = collator(mixed)
    soft = batch["input_ids"] == collator.processor.tokenizer.image_token_id
    assert soft.sum(1).tolist() == [60, 4 * 60, 60 + 12 * 5]
    assert torch.equal(batch["mm_token_type_ids"], soft.long())


@pytest.mark.parametrize("name", FAMILIES)
def test_a_batch_says_what_its_samples_say_alone(name: str, mixed: list[Sample], other_models) -> None:
    folder = other_models(name)
    model, collator = open_checkpoint(folder).load_model(), collator_of(open_checkpoint(folder).processor)
    batch = collator(mixed)
    del batch["labels"]
    with torch.no_grad():
        together = model(**batch).logits
        for row, sample in enumerate(mixed):
            alone = collator([sample])
            length = alone["input_ids"].shape[1]
            torch.testing.assert_close(together[row, :length], model(**alone).logits[0], atol=2e-5, rtol=1e-5)


def test_an_empty_thought_that_is_asked_for_stands_before_the_answer(mixed: list[Sample], load_processor) -> None:
    """Templates of large Gemma 4 ask for an answer after an empty thought, and leave it out once it is given."""
    processor = load_processor("gemma4_large")
    thought = families.FAMILIES["gemma4"].empty_thought
    ask = "{{ '<|turn>model\\n' }}"
    assert ask in processor.chat_template
    processor.chat_template = processor.chat_template.replace(ask, ask + "{{ '<|channel>thought\\n<channel|>' }}")
    batch = collator_of(processor)(mixed[:1])
    text = processor.tokenizer.decode(batch["input_ids"][0])
    assert text.endswith(f"<|turn>model\n{thought}{mixed[0].output}<turn|>\n")
    labels = batch["labels"][0]
    assert processor.tokenizer.decode(labels[labels != -100]) == f"{mixed[0].output}<turn|>\n"


@pytest.mark.parametrize("name", ["gemma3n", "gemma4"])
def test_transparency_is_composited_as_the_image_processor_does(name, mixed, load_processor, tmp_path: Path) -> None:
    processor = load_processor(name)
    Image.new("RGBA", (64, 96), (200, 10, 20, 90)).save(tmp_path / "rgba.png")
    sample = replace(mixed[0], frames=(str(tmp_path / "rgba.png"),))
    pixels = collator_of(processor).pictures([sample])["pixel_values"]
    expected = processor.image_processor([Image.open(tmp_path / "rgba.png")], return_tensors="pt")["pixel_values"]
    assert torch.equal(pixels, expected)


@pytest.mark.parametrize(
    ("name", "symbol"),
    [("gemma3n", "<image_soft_token>"), ("gemma3n", "<end_of_turn>"), ("gemma4", "<|image|>"), ("gemma4", "<turn|>")],
)
def test_a_control_symbol_in_a_sample_is_refused(name, symbol, mixed: list[Sample], load_processor) -> None:
    sample = replace(mixed[0], question=f"{mixed[0].question} {symbol}")
    with pytest.raises(PokegemmaError, match=f"{sample.id}: its text contains .*, a control token"):
        collator_of(load_processor(name))([sample])


def test_a_picture_that_cannot_be_read_is_named(mixed: list[Sample], load_processor, tmp_path: Path) -> None:
    (tmp_path / "broken.png").write_bytes(b"no picture")
    sample = replace(mixed[0], frames=(str(tmp_path / "broken.png"),))
    with pytest.raises(PokegemmaError, match=r"broken\.png cannot be read as a picture"):
        collator_of(load_processor("gemma4"))([sample])


def test_trajectories_are_for_gemma_3(load_processor, processor) -> None:
    with pytest.raises(PokegemmaError, match=r"--layout trajectory .* not Gemma 4"):
        collator_of(load_processor("gemma4"), "trajectory")
    assert isinstance(make_collator(processor, layout="trajectory", dataset_folder=Path()), Gemma3Collator)
