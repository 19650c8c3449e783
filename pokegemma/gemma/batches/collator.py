"""Make batches of samples for Gemma 3: padded tensors, with labels on the answers only."""

import functools
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import Gemma3Processor, PreTrainedTokenizerBase

from pokegemma.data import prompts
from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample
from pokegemma.data.trajectories import Trajectory
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.attention_masks import TRUNK
from pokegemma.gemma.batches.augmentation import Augmentation
from pokegemma.gemma.batches.feature_cache import FeatureCache
from pokegemma.gemma.batches.picture_resize import read_pictures
from pokegemma.gemma.batches.shared_memory import share
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.image_attention import is_causal

IGNORED_LABEL = -100

Side = Literal["left", "right"]

Example = Sample | Trajectory
Row = dict[str, Any]
"""A row of the training dataset: {"sample": line of JSONL}, or {"samples": lines, "num_context": int}."""


@dataclass(frozen=True)
class TokenRow:
    """A tokenized conversation: `labelled` marks those of `ids` that are answers to learn.

    `answer_starts`: where answers begin, also those in the context of a trajectory, which are not learned.
    """

    ids: list[int]
    labelled: list[bool]
    answer_starts: list[int]

    @property
    def num_prompt(self) -> int:
        return self.answer_starts[0]


def read_example(example: Example | Row) -> Example:
    """Return the sample or the trajectory of a row of the training dataset."""
    if isinstance(example, Sample | Trajectory):
        return example
    if "sample" in example:
        return Sample.from_json(example["sample"])
    return Trajectory(tuple(map(Sample.from_json, example["samples"])), num_context=example["num_context"])


@dataclass
class Gemma3Collator:
    """Make batches for a `Gemma3ForConditionalGeneration` that `accept_compact_batches` has prepared.

    Called with a list of samples, of trajectories, or of rows of the training dataset, it returns, padded on the right:

    - `input_ids` (rows, length) int64: the chat template's conversation, one BOS, every picture as
      <start_of_image>, `processor.image_seq_length` soft tokens, <end_of_image>;
    - `attention_mask` (rows, length) int64: 0 at padding;
    - `token_type_ids` (rows, length) int64: 1 at soft tokens, which makes attention inside a picture
      bidirectional (without it transformers trains causal attention there); 0 everywhere for a model that is causal
      there, see `image_attention`;
    - `pixel_values` (distinct pictures of the batch, 3, height, width) float32, or with a feature cache
      `image_features` (distinct pictures, tokens, width);
    - `image_index` (pictures in the text) int64: which of these each is;
    - `labels` (rows, length) int64: the answers, each with its end of turn (`<end_of_turn>` and the newline that the
      template writes after it), -100 elsewhere;
    - where a row contains several samples or a trajectory, `branches` and `position_ids` (rows, length) int64: see
      `attention_masks`.

    With one sample a row, and `expand_pictures`, equal to TRL's DataCollatorForVisionLanguageModeling on a
    prompt-completion conversation with `completion_only_loss=True`. Nothing is truncated.

    Attributes:
        dataset_folder: what the samples' paths are relative to.
        samples_per_row: how many samples share a row and the beginning of their conversations.
        features: the cache of the pictures' soft tokens; None: pictures are decoded.
        augmentation: of the pictures; only for training, and not with `features`.
    """

    processor: Gemma3Processor
    layout: Layout
    dataset_folder: Path
    samples_per_row: int = 1
    features: FeatureCache | None = None
    augmentation: Augmentation | None = None

    def __call__(self, examples: Sequence[Example | Row]) -> dict[str, torch.Tensor]:
        parsed = [read_example(example) for example in examples]
        rows = [self.tokenize(example) for example in parsed]
        plain = self.samples_per_row == 1 and self.layout != "trajectory"
        batch = self._rows(rows) if plain else self._shared_rows(rows)
        return share({**batch, **self._pictures(parsed)})

    def prompts(self, samples: Sequence[Sample]) -> dict[str, torch.Tensor]:
        """Return a row a sample without answer and labels, padded on the left, for generation."""
        rows = [self.tokenize(sample) for sample in samples]
        batch = self._batch([row.ids[: row.num_prompt] for row in rows], side="left")
        return {**batch, **self._pictures(samples)}

    def count_tokens(self, example: Example) -> int:
        """Return the length of a sample or trajectory in tokens, soft tokens included; reads no picture."""
        return len(self.tokenize(example).ids)

    @functools.cached_property
    def button_tokens(self) -> ButtonTokens:
        return ButtonTokens.of(self.processor.tokenizer)

    def picture_paths(self, example: Example) -> tuple[str, ...]:
        """Return the pictures of a conversation in the order of its text.

        Raises:
            PokegemmaError: the layout is grid, and the sample has no grid picture.
        """
        if isinstance(example, Trajectory):
            return prompts.trajectory_images(example)
        return prompts.sample_images(example, self.layout)

    def tokenize(self, example: Example) -> TokenRow:
        """Return the tokens of a conversation.

        Raises:
            PokegemmaError: its text contains control symbols, or the chat template is not one of Gemma 3's.
        """
        tokenizer, processor = self.processor.tokenizer, self.processor
        num_images = len(self.picture_paths(example))
        ids: list[int] = []
        labelled: list[bool] = []
        starts: list[int] = []
        num_context = example.num_context if isinstance(example, Trajectory) else 0
        tokenized = self.tokenize_pieces(list(self.text_pieces(example)))
        for number, piece in enumerate(tokenized):  # prompt, answer, prompt, answer ...
            starts += [len(ids)] * (number % 2)
            ids += piece
            labelled += [number % 2 == 1 and number // 2 >= num_context] * len(piece)
        if ids.count(tokenizer.bos_token_id) != 1:
            raise PokegemmaError(
                f"{example.id}: the prompt has {ids.count(tokenizer.bos_token_id)} BOS tokens, not one"
            )
        num_soft = ids.count(tokenizer.image_token_id)
        if num_soft != num_images * processor.image_seq_length:
            raise PokegemmaError(
                f"{example.id}: {num_soft} image tokens for {num_images} pictures of {processor.image_seq_length}; "
                "its text contains one of the model's control symbols"
            )
        return TokenRow(ids, labelled, starts)

    def tokenize_pieces(self, pieces: list[str]) -> list[list[int]]:
        """Return the tokens of pieces of the chat template's text, every mark of a picture with its soft tokens."""
        processor, soft = self.processor, self.processor.tokenizer.image_token_id
        image_token, num_soft = processor.tokenizer.image_token, processor.image_seq_length
        # One soft token for all of a picture's: special tokens divide the text, and reading 256 takes milliseconds.
        mark = processor.full_image_sequence.replace(image_token * num_soft, image_token)
        texts = [piece.replace(processor.boi_token, mark) for piece in pieces]
        rows = processor.tokenizer(texts, add_special_tokens=False)["input_ids"]  # the template has written the BOS
        return [[copy for token in row for copy in [token] * (num_soft if token == soft else 1)] for row in rows]

    def text_pieces(self, example: Example) -> Iterator[str]:
        """Yield the chat template's text in pieces: what comes before an answer, the answer, what comes before ..."""
        if isinstance(example, Trajectory):
            messages = prompts.build_trajectory_messages(example)
        else:
            messages = prompts.build_messages(example, self.layout)
        done = ""
        for end in range(1, len(messages) + 1):
            is_prompt = messages[end - 1]["role"] == "user"
            text = self.processor.apply_chat_template(messages[:end], tokenize=False, add_generation_prompt=is_prompt)
            if not text.startswith(done):
                raise PokegemmaError("the chat template writes a turn differently when others follow")
            yield text[len(done) :]
            done = text

    def _rows(self, rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        batch = self._batch([row.ids for row in rows], side="right")
        return {**batch, "labels": _labels(batch["input_ids"], [row.labelled for row in rows])}

    def _shared_rows(self, rows: list[TokenRow]) -> dict[str, torch.Tensor]:
        """Return rows of `samples_per_row` samples: what they have in common, then the rest of each as a branch."""
        all_ids, all_labelled, all_branches, all_positions = [], [], [], []
        for start in range(0, len(rows), self.samples_per_row):
            members = rows[start : start + self.samples_per_row]
            shared = self._num_shared(members) if len(members) > 1 else len(members[0].ids)
            ids, labelled = members[0].ids[:shared], members[0].labelled[:shared]
            branches, positions = [TRUNK] * shared, [*range(shared)]
            for number, row in enumerate(members, start=TRUNK + 1):
                ids = ids + row.ids[shared:]
                labelled = labelled + row.labelled[shared:]
                branches += [number] * (len(row.ids) - shared)
                positions += range(shared, len(row.ids))
            all_ids.append(ids)
            all_labelled.append(labelled)
            all_branches.append(branches)
            all_positions.append(positions)
        batch = self._batch(all_ids, side="right")
        shape = batch["input_ids"].shape
        batch["labels"] = _labels(batch["input_ids"], all_labelled)
        for name, values in (("branches", all_branches), ("position_ids", all_positions)):
            batch[name] = torch.zeros(shape, dtype=torch.long)
            for row, value in zip(batch[name], values, strict=True):
                row[: len(value)] = torch.tensor(value)
        return batch

    def _num_shared(self, rows: list[TokenRow]) -> int:
        """Return how many tokens rows begin with in common: text only, since other pictures have the same tokens."""
        columns = zip(*(row.ids[: row.num_prompt] for row in rows), strict=False)
        picture = self.processor.tokenizer.boi_token_id
        first = ((at, set(column)) for at, column in enumerate(columns))
        return next((at for at, tokens in first if len(tokens) > 1 or picture in tokens), rows[0].num_prompt)

    def _batch(self, rows: list[list[int]], *, side: Side) -> dict[str, torch.Tensor]:
        batch = pad_rows(rows, self.processor.tokenizer, side=side)
        return {**batch, "token_type_ids": self.token_types(batch["input_ids"])}

    def token_types(self, ids: torch.Tensor) -> torch.Tensor:
        """Return 1, in the shape of `ids`, at tokens that see all of their picture."""
        if is_causal(self.processor):
            return torch.zeros_like(ids)
        return (ids == self.processor.tokenizer.image_token_id).long()

    def _pictures(self, examples: Sequence[Example]) -> dict[str, torch.Tensor]:
        return self.read_paths([path for example in examples for path in self.picture_paths(example)])

    def read_paths(self, paths: Sequence[str]) -> dict[str, torch.Tensor]:
        """Return `pixel_values` or `image_features`, and `image_index`, of pictures in the order of a text.

        Raises:
            PokegemmaError: a picture cannot be read, or is not in the feature cache.
        """
        places: dict[str, int] = {}  # neighbouring windows share frames
        full = (os.path.normpath(self.dataset_folder / path) for path in paths)
        index = torch.tensor([places.setdefault(path, len(places)) for path in full])
        if self.features is not None:
            return {"image_features": self.features.read(list(places)), "image_index": index}
        pixels = read_pictures(self.processor, list(places), augmentation=self.augmentation)
        return {"pixel_values": pixels, "image_index": index}


def pad_rows(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, *, side: Side) -> dict[str, torch.Tensor]:
    """Return `input_ids` and `attention_mask`, (rows, length)."""
    length = max(map(len, rows))
    input_ids = torch.full((len(rows), length), tokenizer.pad_token_id)
    attention_mask = torch.zeros_like(input_ids)
    for at, row in enumerate(rows):
        place = slice(length - len(row), length) if side == "left" else slice(0, len(row))
        input_ids[at, place] = torch.tensor(row)
        attention_mask[at, place] = 1
    return {"input_ids": input_ids, "attention_mask": attention_mask}


def expand_pictures(batch: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Return a batch with `pixel_values` of every picture of the text, as Gemma 3's own forward takes it."""
    rest = {name: tensor for name, tensor in batch.items() if name != "image_index"}
    return {**rest, "pixel_values": batch["pixel_values"][batch["image_index"]]}


def _labels(input_ids: torch.Tensor, labelled: list[list[bool]]) -> torch.Tensor:
    labels = torch.full_like(input_ids, IGNORED_LABEL)
    for row, ids, mask in zip(labels, input_ids, labelled, strict=True):
        places = torch.tensor(mask).nonzero().squeeze(1)
        row[places] = ids[places]
    return labels
