"""Samples to Gemma 3 batches: text and pictures in, padded tensors with answer-only labels out."""

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from PIL import Image
from transformers import Gemma3Processor, PreTrainedTokenizerBase

from pokegemma.data import prompts
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError

IGNORED_LABEL = -100


@dataclass(frozen=True)
class ButtonTokens:
    """How a tokenizer writes the eight buttons at the beginning of an answer.

    `prefix`: the tokens that all answers begin with. `branches`: for each of `prompts.BUTTONS`, in order, the
    tokens that follow until no other button is possible; no branch is the beginning of another.
    """

    prefix: tuple[int, ...]
    branches: tuple[tuple[int, ...], ...]

    @classmethod
    def of(cls, tokenizer: PreTrainedTokenizerBase) -> "ButtonTokens":
        answers = [prompts.build_output(button=button, reasoning="", context="") for button in prompts.BUTTONS]
        rows = [tuple(ids) for ids in tokenizer(answers, add_special_tokens=False)["input_ids"]]
        start = next(at for at, column in enumerate(zip(*rows, strict=False)) if len(set(column)) > 1)

        def branch(row: tuple[int, ...]) -> tuple[int, ...]:
            others = [other for other in rows if other != row]
            end = next(at for at in range(start + 1, len(row) + 1) if all(row[:at] != other[:at] for other in others))
            return row[start:end]

        return cls(prefix=rows[0][:start], branches=tuple(branch(row) for row in rows))

    def locate(self, answer: Sequence[int]) -> tuple[int, int, int]:
        """Return (button index, start, end): which button the tokens of an answer name, and where in them.

        Raises:
            ValueError: the answer does not begin as all do, or names none of the buttons.
        """
        start = len(self.prefix)
        if tuple(answer[:start]) == self.prefix:
            for index, branch in enumerate(self.branches):
                if tuple(answer[start : start + len(branch)]) == branch:
                    return index, start, start + len(branch)
        raise ValueError(f"not an answer: {list(answer[: start + 4])}")


@dataclass
class Gemma3Collator:
    """Make batches of samples for `Gemma3ForConditionalGeneration`.

    Called with a list of `Sample`s, or of rows {"sample": line of JSONL}, it returns, padded on the right:

    - `input_ids` (batch, length) int64: the chat template's conversation, one BOS, every picture as
      <start_of_image>, `processor.image_seq_length` soft tokens, <end_of_image>;
    - `attention_mask` (batch, length) int64: 0 at padding;
    - `token_type_ids` (batch, length) int64: 1 at soft tokens, which makes attention inside a picture
      bidirectional (without it transformers trains causal attention there);
    - `pixel_values` (pictures of the batch, 3, height, width) float32, in the order of their tokens;
    - `labels` (batch, length) int64: the answer and its end of turn (`<end_of_turn>` and the newline that the
      template writes after it), -100 elsewhere.

    Equal to TRL's DataCollatorForVisionLanguageModeling on a prompt-completion conversation with
    `completion_only_loss=True`. Nothing is truncated.
    """

    processor: Gemma3Processor
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
        return {**batch, "pixel_values": self._pixel_values(samples), "labels": labels}

    def prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the same batch without answers and labels, padded on the left, for generation."""
        rows = [self._tokenize(sample)[0] for sample in samples]
        return {**self._pad(rows, side="left"), "pixel_values": self._pixel_values(samples)}

    def count_tokens(self, sample: Sample) -> int:
        """Return the length of a sample in tokens, soft tokens included; reads no picture."""
        prompt, answer = self._tokenize(sample)
        return len(prompt) + len(answer)

    @functools.cached_property
    def button_tokens(self) -> ButtonTokens:
        return ButtonTokens.of(self.processor.tokenizer)

    def _tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt (what generation starts from) and of the answer with its end of turn."""
        tokenizer, processor = self.processor.tokenizer, self.processor
        try:
            num_images = len(prompts.sample_images(sample, self.layout))
        except ValueError as error:
            raise PokegemmaError(str(error)) from error
        messages = prompts.build_messages(sample, self.layout)
        prompt = processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole = processor.apply_chat_template(messages, tokenize=False)
        if not whole.startswith(prompt):
            raise PokegemmaError("the chat template writes a prompt differently when an answer follows")
        expanded = prompt.replace(processor.boi_token, processor.full_image_sequence)
        # The template has written the BOS already.
        ids, answer = tokenizer([expanded, whole[len(prompt) :]], add_special_tokens=False)["input_ids"]
        if ids.count(tokenizer.bos_token_id) != 1:
            raise PokegemmaError(f"{sample.id}: the prompt has {ids.count(tokenizer.bos_token_id)} BOS tokens, not one")
        num_soft = (ids + answer).count(tokenizer.image_token_id)
        if num_soft != num_images * processor.image_seq_length:
            raise PokegemmaError(
                f"{sample.id}: {num_soft} image tokens for {num_images} pictures of {processor.image_seq_length}; "
                "its text holds one of the model's control symbols"
            )
        return ids, answer

    def _pad(self, rows: list[list[int]], *, side: Literal["left", "right"]) -> dict[str, torch.Tensor]:
        tokenizer, length = self.processor.tokenizer, max(map(len, rows))
        input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
        attention_mask = torch.zeros_like(input_ids)
        for at, row in enumerate(rows):
            place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
            input_ids[at, place] = torch.tensor(row)
            attention_mask[at, place] = 1
        token_type_ids = (input_ids == tokenizer.image_token_id).long()
        return {"input_ids": input_ids, "attention_mask": attention_mask, "token_type_ids": token_type_ids}

    def _pixel_values(self, samples: Sequence[Sample]) -> torch.Tensor:
        paths = [path for sample in samples for path in prompts.sample_images(sample, self.layout)]
        distinct = list(dict.fromkeys(paths))  # neighbouring windows share frames
        images = [self._open(path) for path in distinct]
        # Pan-and-scan would add crops that the prompt has no tokens for.
        pixels = self.processor.image_processor(images, return_tensors="pt", do_pan_and_scan=False)["pixel_values"]
        return pixels[[distinct.index(path) for path in paths]]

    def _open(self, path: str) -> Image.Image:
        try:
            with Image.open(self.dataset_folder / path) as image:
                return image.convert("RGB")
        except (OSError, SyntaxError) as error:
            raise PokegemmaError(f"{self.dataset_folder / path} cannot be read as a picture: {error}") from error
