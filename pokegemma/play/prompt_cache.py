"""A prefix cache for the prompts of one player: a beginning shared with the last prompt is not computed again."""

import contextlib
import hashlib
from collections import OrderedDict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from PIL import Image
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.evaluation.predict import Predictor
from pokegemma.gemma.batches.picture_resize import to_pixels
from pokegemma.gemma.button_scores import checked_scores
from pokegemma.gemma.cached_conversation import Conversation
from pokegemma.gemma.families import require_exact, stop_tokens
from pokegemma.gemma.vision_tower import encode_pictures

MAX_PICTURES = 64
"""Pictures whose soft tokens are kept: 84 MB of a Gemma-3-4B in bfloat16."""


@dataclass
class PromptCache:
    """Score the buttons after prompts, with the keys and values of the last prompt (prefix caching).

    Soft tokens of the last `MAX_PICTURES` distinct pictures are kept as well, so that the tower does not encode a frame
    again that the next window repeats, or a screen that did not change. Pictures are compared by their pixels.

    Attributes:
        num_encoded: pictures that went through the tower so far.
        num_computed: tokens that went through the language model so far, without the buttons' own.
    """

    predictor: Predictor
    num_encoded: int = 0
    num_computed: int = 0
    _conversation: Conversation = field(init=False)
    _said: list[int | bytes] = field(default_factory=list)  # of all tokens in the cache: number, or picture's digest
    _soft_tokens: OrderedDict[bytes, torch.Tensor] = field(default_factory=OrderedDict)

    def __post_init__(self) -> None:
        require_exact(self.predictor.model.config, "a cache of prompts")
        self._conversation = Conversation(self.predictor.model)

    @property
    def num_tokens(self) -> int:
        """How many tokens the last prompt had, or what was prepared."""
        return len(self._said)

    def score(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> np.ndarray:
        """Return the probabilities (8,) of `BUTTONS` as the answer to a prompt; see `button_scores.score_buttons`.

        Args:
            ids: the prompt as `Gemma3Collator.tokenize` writes it, every picture with all its soft tokens.
            pictures: RGB, one for each picture of the prompt.

        Raises:
            CheckFailedError: they are NaN.
            ValueError: the prompt has another number of pictures.
        """
        with self._all_or_nothing():
            rest = self._keep_common(self._name_tokens(ids, pictures))
            new = list(ids[len(ids) - len(rest) :])
            said = self._conversation.say_and_score(
                new,
                self._types(new),
                self._encode(rest, pictures),
                self.predictor.collator.button_tokens,
            )
            self._remember(rest)
        return checked_scores(said)

    def write(
        self, ids: Sequence[int], pictures: Sequence[Image.Image], begun: Sequence[int], *, max_new_tokens: int
    ) -> list[int]:
        """Return the tokens of the greedy answer to a prompt that goes on after the tokens `begun`, with these.

        The answer stays in the cache, since the next prompt of a conversation contains it.
        """
        tokenizer = self.predictor.collator.processor.tokenizer
        with self._all_or_nothing():
            rest = self._keep_common([*self._name_tokens(ids, pictures), *begun])
            new = [*ids, *begun][-max(len(rest), 1) :]
            if not rest:  # the logits after the last token are not kept
                self._forget_after(len(self._said) - 1)
                rest = new
            self._conversation.say(new, self._types(new), self._encode(rest, pictures))
            self._remember(rest)
            written = self._conversation.write(stops=stop_tokens(tokenizer), max_new_tokens=max_new_tokens)
            self._remember(written[:-1])  # the model has not read the last one
        return [*begun, *written]

    def prepare(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> None:
        """Compute the beginning of the next prompts.

        Args: as in `score`; the beginning does not end inside a picture.
        """
        names = self._name_tokens(ids, pictures)
        if names == self._said[: len(names)]:
            return
        with self._all_or_nothing():
            rest = self._keep_common(names)
            new = list(ids[-len(rest) :])
            self._conversation.say(new, self._types(new), self._encode(rest, pictures))
            self._remember(rest)

    @contextlib.contextmanager
    def _all_or_nothing(self) -> Iterator[None]:
        """Empty the cache where a block is interrupted, since only some of its layers contain the new tokens then."""
        try:
            yield
        except BaseException:  # Ctrl-C, memory
            self._conversation, self._said = Conversation(self.predictor.model), []
            raise

    def _name_tokens(self, ids: Sequence[int], pictures: Sequence[Image.Image]) -> list[int | bytes]:
        """Return the identity of each token: its number, or for a soft token its picture."""
        processor = self.predictor.collator.processor
        image_token, per_picture = processor.tokenizer.image_token_id, processor.image_seq_length
        if ids.count(image_token) != len(pictures) * per_picture:
            raise ValueError(f"{ids.count(image_token)} soft tokens for {len(pictures)} pictures of {per_picture}")
        soft = iter([digest for picture in pictures for digest in [hash_picture(picture)] * per_picture])
        return [next(soft) if token == image_token else token for token in ids]

    def _keep_common(self, names: list[int | bytes]) -> list[int | bytes]:
        """Remove from the cache all that the prompt does not begin with, and return the rest of the prompt.

        The tokens of a picture see each other, also later ones; they share one name, so a picture is kept whole or not.
        """
        pairs = enumerate(zip(names, self._said, strict=False))
        common = next((at for at, (new, old) in pairs if new != old), min(len(names), len(self._said)))
        if common < len(self._said):
            self._forget_after(common)
        return names[common:]

    def _forget_after(self, num_tokens: int) -> None:
        self._conversation.forget_after(num_tokens)
        del self._said[num_tokens:]

    def _types(self, ids: list[int]) -> torch.Tensor:
        return self.predictor.collator.token_types(torch.tensor(ids, dtype=torch.long))

    def _remember(self, rest: list[int | bytes]) -> None:
        self._said += rest
        self.num_computed += len(rest)

    def _encode(self, rest: list[int | bytes], pictures: Sequence[Image.Image]) -> BaseModelOutputWithPooling | None:
        """Return the soft tokens of the pictures in the rest of a prompt, in order."""
        processor, model = self.predictor.collator.processor, self.predictor.model
        shown = [name for name in rest if isinstance(name, bytes)][:: processor.image_seq_length]
        if not shown:
            return None
        by_digest = dict(zip(shown, pictures[-len(shown) :], strict=True))
        new = [digest for digest in by_digest if digest not in self._soft_tokens]
        if new:
            pixels = to_pixels(processor, [by_digest[digest] for digest in new]).to(model.device, model.dtype)
            with torch.inference_mode():
                self._soft_tokens.update(zip(new, encode_pictures(model.model, pixels), strict=True))
            self.num_encoded += len(new)
        for digest in by_digest:
            self._soft_tokens.move_to_end(digest)
        features = torch.stack([self._soft_tokens[digest] for digest in shown])
        while len(self._soft_tokens) > MAX_PICTURES:
            self._soft_tokens.popitem(last=False)
        return BaseModelOutputWithPooling(pooler_output=features)


def hash_picture(picture: Image.Image) -> bytes:
    """Return a hash of a picture's mode, size and pixels."""
    return hashlib.sha256(f"{picture.mode} {picture.size} ".encode() + picture.tobytes()).digest()
