"""Samples to batches of Gemma 3n and Gemma 4, with the expansion of pictures that their own processors do."""

import functools
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image
from transformers import Gemma3Processor, ProcessorMixin

from pokegemma.data import prompts
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.training.collator import IGNORED_LABEL, ButtonTokens, Gemma3Collator
from pokegemma.training.families import FAMILIES, Family


@dataclass
class ProcessorCollator:
    """Make batches of samples for Gemma 3n or Gemma 4, by the contract of `Gemma3Collator`.

    Called with a list of `Sample`s, or of rows {"sample": line of JSONL}, it returns, padded on the right:

    - `input_ids`, `attention_mask`, `labels` (batch, length) int64, as `Gemma3Collator`'s;
    - `token_type_ids` (Gemma 3n) or `mm_token_type_ids` (Gemma 4) (batch, length) int64: 1 at soft tokens of pictures;
    - what the image processor makes of the pictures, in the order of their tokens: `pixel_values`, for Gemma 3n
      (pictures, 3, height, width), for Gemma 4 (pictures, patches, patch's values) float32, with
      `image_position_ids` (pictures, patches, 2) int64, -1 at padding.

    Equal to TRL's DataCollatorForVisionLanguageModeling on a prompt-completion conversation with
    `completion_only_loss=True`. Nothing is truncated.
    """

    processor: ProcessorMixin
    layout: Layout
    dataset_folder: Path

    def __call__(self, examples: Sequence[Sample | dict[str, str]]) -> dict[str, torch.Tensor]:
        samples = [
            example if isinstance(example, Sample) else Sample.from_json(example["sample"]) for example in examples
        ]
        rows = [self._tokenize(sample) for sample in samples]
        batch = self._pad([prompt + answer for prompt, answer in rows], side="right")
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        for row, (prompt, answer) in zip(labels, rows, strict=True):
            row[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return {**batch, **self._pictures(samples), "labels": labels}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the same batch without answers and labels, padded on the left, for generation."""
        rows = [self._tokenize(sample)[0] for sample in samples]
        return {**self._pad(rows, side="left"), **self._pictures(samples)}

    def count_tokens(self, sample: Sample) -> int:
        """Return the length of a sample in tokens, soft tokens included; of pictures, reads the sizes alone."""
        prompt, answer = self._tokenize(sample)
        return len(prompt) + len(answer)

    @functools.cached_property
    def button_tokens(self) -> ButtonTokens:
        return ButtonTokens.of(self.processor.tokenizer)

    @functools.cached_property
    def _family(self) -> Family:
        names = {cls.__name__ for cls in type(self.processor).__mro__}
        return next(family for family in FAMILIES.values() if family.processor in names)

    def _paths(self, sample: Sample) -> list[str]:
        try:
            return list(prompts.sample_images(sample, self.layout))
        except ValueError as error:
            raise PokegemmaError(str(error)) from error

    def _split(self, sample: Sample) -> tuple[str, str]:
        """Return the text of the prompt, which generation starts from, and of the answer with its end of turn."""
        messages = prompts.build_messages(sample, self.layout)
        prompt = self.processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = self.processor.apply_chat_template(messages, tokenize=False)
        common = os.path.commonprefix([prompt, whole])
        # Large Gemma 4 are asked for an answer after an empty thought, which their template leaves out once it is
        # given: the answer is trained where generation will write it.
        if prompt[len(common) :] not in ("", self._family.empty_thought):
            raise PokegemmaError("the chat template writes a prompt differently when an answer follows")
        return prompt, whole[len(common) :]

    def _tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        processor, tokenizer = self.processor, self.processor.tokenizer
        prompt, answer = self._split(sample)
        texts, counts = prompt.split(processor.image_token), self._count_soft_tokens(sample)
        if len(texts) != len(counts) + 1 or processor.image_token in answer:
            raise PokegemmaError(f"{sample.id}: its text holds one of the model's control symbols")
        sizes = {"num_soft_tokens_per_image": counts}
        pictures = [processor.replace_image_token(sizes, image_idx=number) for number in range(len(counts))]
        expanded = "".join(text + picture for text, picture in zip(texts, [*pictures, ""], strict=True))
        # The template has written the BOS already.
        ids, answer_ids = tokenizer([expanded, answer], add_special_tokens=False)["input_ids"]
        if ids.count(tokenizer.bos_token_id) != 1:
            raise PokegemmaError(f"{sample.id}: the prompt has {ids.count(tokenizer.bos_token_id)} BOS tokens, not one")
        if ids.count(tokenizer.image_token_id) != sum(counts):
            raise PokegemmaError(
                f"{sample.id}: {ids.count(tokenizer.image_token_id)} image tokens for pictures of {counts}"
            )
        return ids, answer_ids

    def _count_soft_tokens(self, sample: Sample) -> list[int]:
        sizes = []
        for path in self._paths(sample):
            with self._opened(path) as image:
                sizes.append((image.height, image.width))
        return self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens

    def _pad(self, rows: list[list[int]], *, side: Literal["left", "right"]) -> dict[str, torch.Tensor]:
        tokenizer, length = self.processor.tokenizer, max(map(len, rows))
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for at, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            input_ids[at, place] = torch.tensor(row)
            attention_mask[at, place] = 1
        types = (input_ids == tokenizer.image_token_id).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, self._family.token_types: types}

    def _pictures(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        paths = [path for sample in samples for path in self._paths(sample)]
        distinct = list(dict.fromkeys(paths))  # neighbouring windows share frames
        images = []
        for path in distinct:
            with self._opened(path) as image:
                images.append(image.convert("RGB"))
        made = self.processor.image_processor(images, return_tensors="pt")
        places = [distinct.index(path) for path in paths]
        return {name: values[places] for name, values in made.items() if name != "num_soft_tokens_per_image"}

    @contextmanager
    def _opened(self, path: str) -> Iterator[Image.Image]:
        try:
            with Image.open(self.dataset_folder / path) as image:
                yield image
        except (OSError, SyntaxError) as error:
            raise PokegemmaError(f"{self.dataset_folder / path} cannot be read as a picture: {error}") from error


Collator = Gemma3Collator | ProcessorCollator


def make_collator(processor: ProcessorMixin, *, layout: Layout, dataset_folder: Path, **options: Any) -> Collator:
    """Return the collator of the processor's family.

    `options` are `Gemma3Collator`'s own; other families have none.
    """
    if isinstance(processor, Gemma3Processor):
        return Gemma3Collator(processor=processor, layout=layout, dataset_folder=dataset_folder, **options)
    return ProcessorCollator(processor=processor, layout=layout, dataset_folder=dataset_folder)
