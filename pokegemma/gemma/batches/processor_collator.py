"""Make batches of samples for Gemma 3n and Gemma 4, whose own processors expand the pictures."""

import functools
import itertools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from PIL import Image
from transformers import Gemma3Processor, ProcessorMixin

from pokegemma.data import prompts
from pokegemma.data.frame_pictures import UNREADABLE, to_rgb
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.augmentation import Augmentation
from pokegemma.gemma.batches.collator import IGNORED_LABEL, Gemma3Collator, Row, Side, pad_rows, read_example
from pokegemma.gemma.batches.shared_memory import share
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.families import FAMILIES, Family


@dataclass
class ProcessorCollator:
    """Make batches of samples for Gemma 3n or Gemma 4, by the contract of `Gemma3Collator`.

    Called with a list of samples, or of rows of the training dataset, it returns, padded on the right:

    - `input_ids`, `attention_mask`, `labels` (rows, length) int64, as `Gemma3Collator`'s;
    - `token_type_ids` (Gemma 3n) or `mm_token_type_ids` (Gemma 4) (rows, length) int64: 1 at soft tokens of pictures;
    - what the image processor makes of the pictures, in the order of their tokens: `pixel_values`, for Gemma 3n
      (pictures, 3, height, width), for Gemma 4 (pictures, patches, patch's values) float32, with
      `image_position_ids` (pictures, patches, 2) int64, -1 at padding.

    Equal to TRL's DataCollatorForVisionLanguageModeling on a prompt-completion conversation with
    `completion_only_loss=True`. Nothing is truncated.
    """

    processor: ProcessorMixin
    layout: Layout
    dataset_folder: Path
    augmentation: Augmentation | None = None

    def __call__(self, examples: Sequence[Sample | Row]) -> dict[str, torch.Tensor]:
        samples = [read_example(example) for example in examples]
        rows = [self.tokenize(sample) for sample in samples]
        batch = self._batch([prompt + answer for prompt, answer in rows], side="right")
        labels = torch.full_like(batch["input_ids"], IGNORED_LABEL)
        for row, (prompt, answer) in zip(labels, rows, strict=True):
            row[len(prompt) : len(prompt) + len(answer)] = torch.tensor(answer)
        return share({**batch, **self.pictures(samples), "labels": labels})

    def prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return a row for each sample, without answer and labels and padded on the left, for generation."""
        rows = [self.tokenize(sample) for sample in samples]
        batch = self._batch([prompt for prompt, _ in rows], side="left")
        return {**batch, **self.pictures(samples)}

    def count_tokens(self, sample: Sample) -> int:
        """Return the length of a conversation in tokens; only the sizes of its pictures are read."""
        return sum(map(len, self.tokenize(sample)))

    @functools.cached_property
    def button_tokens(self) -> ButtonTokens:
        return ButtonTokens.of(self.processor.tokenizer)

    @functools.cached_property
    def family(self) -> Family:
        names = {cls.__name__ for cls in type(self.processor).__mro__}
        return next(family for family in FAMILIES.values() if family.processor in names)

    def picture_paths(self, sample: Sample) -> tuple[str, ...]:
        """Return the pictures of a conversation in the order of its text.

        Raises:
            PokegemmaError: the layout is grid, and the sample has no grid picture.
        """
        return prompts.sample_images(sample, self.layout)

    def tokenize(self, sample: Sample) -> tuple[list[int], list[int]]:
        """Return the tokens of the prompt, and of the answer with its end of turn.

        Raises:
            PokegemmaError: its text contains control symbols, a picture cannot be read, or the chat template does not
                belong to the family.
        """
        tokenizer = self.processor.tokenizer
        counts = self._count_soft_tokens(sample)
        pieces = self._expand(self.text_pieces(sample), counts, name=sample.id)
        # The template has written the BOS already.
        prompt, answer = tokenizer(pieces, add_special_tokens=False)["input_ids"]
        ids = [*prompt, *answer]
        for token, expected in ((tokenizer.bos_token, 1), (tokenizer.image_token, sum(counts))):
            found = ids.count(tokenizer.convert_tokens_to_ids(token))
            if found != expected:
                raise PokegemmaError(f"{sample.id}: {token} is there {found} times, not {expected}")
        return prompt, answer

    def text_pieces(self, sample: Sample) -> tuple[str, str]:
        """Return the text of the prompt, and of the answer with its end of turn."""
        messages = prompts.build_messages(sample, self.layout)
        prompt = self.processor.apply_chat_template(messages[:1], tokenize=False, add_generation_prompt=True)
        whole, given = self.processor.apply_chat_template(messages, tokenize=False), prompt
        if not whole.startswith(given):
            # The prompt of a large Gemma 4 ends with an empty thought, which the template leaves out before a given
            # answer. The answer is trained after the thought, since generation writes it there.
            given = prompt.removesuffix(self.family.empty_thought)
        if not whole.startswith(given):
            raise PokegemmaError("the chat template writes a prompt differently when an answer follows")
        return prompt, whole[len(given) :]

    def _expand(self, pieces: Sequence[str], counts: list[int], *, name: str) -> list[str]:
        """Replace the token that the template writes for a picture by the picture's soft tokens."""
        processor = self.processor
        if sum(piece.count(processor.image_token) for piece in pieces) != len(counts):
            raise PokegemmaError(f"{name}: its text contains one of the model's control symbols")
        sizes, number = {"num_soft_tokens_per_image": counts}, itertools.count()
        token = re.compile(re.escape(processor.image_token))
        return [token.sub(lambda _: processor.replace_image_token(sizes, image_idx=next(number)), p) for p in pieces]

    def _count_soft_tokens(self, sample: Sample) -> list[int]:
        sizes = []
        for path in self.picture_paths(sample):
            with self._opened(path) as image:
                sizes.append((image.height, image.width))
        return self.processor._get_num_multimodal_tokens(image_sizes=sizes).num_image_tokens

    def _batch(self, rows: list[list[int]], *, side: Side) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, self.processor.tokenizer, side=side)
        soft = batch["input_ids"] == self.processor.tokenizer.image_token_id
        return {**batch, self.family.token_types: soft.long()}

    def pictures(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return the image processor's tensors for every picture in the text of a batch."""
        paths = [path for sample in samples for path in self.picture_paths(sample)]
        distinct = list(dict.fromkeys(paths))  # neighbouring windows share frames
        images = []
        for path in distinct:
            with self._opened(path) as image:
                rgb = to_rgb(image)
            images.append(rgb if self.augmentation is None else self.augmentation.apply(rgb, path))
        made = self.processor.image_processor(images, return_tensors="pt")
        places = [distinct.index(path) for path in paths]
        return {name: values[places] for name, values in made.items() if name != "num_soft_tokens_per_image"}

    @contextmanager
    def _opened(self, path: str) -> Iterator[Image.Image]:
        try:
            with Image.open(self.dataset_folder / path) as image:
                yield image
        except UNREADABLE as error:
            raise PokegemmaError(f"{self.dataset_folder / path} cannot be read as a picture: {error}") from error


Collator = Gemma3Collator | ProcessorCollator


def make_collator(processor: ProcessorMixin, *, layout: Layout, dataset_folder: Path, **options: Any) -> Collator:
    """Return the collator of the processor's family.

    `options` are those of `Gemma3Collator`; other families have none.

    Raises:
        PokegemmaError: the layout is trajectory, whose masks are those of Gemma 3, and the family is another one.
    """
    if isinstance(processor, Gemma3Processor):
        return Gemma3Collator(processor=processor, layout=layout, dataset_folder=dataset_folder, **options)
    collator = ProcessorCollator(processor=processor, layout=layout, dataset_folder=dataset_folder)
    if layout == "trajectory":
        raise PokegemmaError(f"--layout trajectory is for Gemma 3 only, not {collator.family.name}; use grid or frames")
    return collator
