"""A conversation whose beginning is in the model's cache of keys and values."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import torch
from transformers import DynamicCache, Gemma3ForCausalLM, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.gemma.attention_masks import TRUNK, attention_masks, mask_dtype
from pokegemma.gemma.button_scores import place_branches, read_branches
from pokegemma.gemma.button_tokens import ButtonTokens


@dataclass
class Conversation:
    """A conversation with a model: `say` appends to the cache; scoring and generating do not change it."""

    model: Gemma3ForConditionalGeneration | Gemma3ForCausalLM
    # Without a config: with one, sliding layers drop old keys, so that scoring could not be undone. The masks limit how
    # far these layers see.
    _cache: DynamicCache = field(default_factory=DynamicCache)
    _token_types: torch.Tensor | None = None  # (1, length) of all that is in the cache
    _logits: torch.Tensor | None = None  # (vocabulary,) after the last of it

    @property
    def num_tokens(self) -> int:
        return self._cache.get_seq_length()

    @torch.inference_mode()
    def say(
        self, ids: Sequence[int], token_type_ids: torch.Tensor, pictures: BaseModelOutputWithPooling | None
    ) -> None:
        """Append tokens with their `token_type_ids` (length,), and the soft tokens of their pictures."""
        self._logits = self._forward(list(ids), token_type_ids[None], pictures=pictures)[0, -1]

    @torch.inference_mode()
    def score_buttons(self, tokens: ButtonTokens) -> torch.Tensor:
        """Return the probabilities (8,) of the buttons as the next answer; see `button_scores.score_buttons`."""
        return self._score([], [], None, tokens)

    @torch.inference_mode()
    def say_and_score(
        self,
        ids: Sequence[int],
        token_type_ids: torch.Tensor,
        pictures: BaseModelOutputWithPooling | None,
        tokens: ButtonTokens,
    ) -> torch.Tensor:
        """Do what `say` and then `score_buttons` do, in one pass; `generate` cannot follow."""
        self._logits = None
        return self._score(list(ids), token_type_ids.tolist(), pictures, tokens)

    def _score(
        self, ids: list[int], types: list[int], pictures: BaseModelOutputWithPooling | None, tokens: ButtonTokens
    ) -> torch.Tensor:
        added, branches, depth = place_branches(tokens)
        num_new, num_tokens = len(ids), self.num_tokens + len(ids)
        logits = self._forward(
            ids + added,
            torch.tensor([types + [0] * len(added)]),
            pictures=pictures,
            branches=[TRUNK] * num_new + branches,
            depth=[*range(num_new), *(num_new + at for at in depth)],
            keep=len(added) - len(tokens.prefix) + 1,
        )
        self.forget_after(num_tokens)
        return read_branches(logits, tokens)[0]

    @torch.inference_mode()
    def read(self, answer: Sequence[int]) -> torch.Tensor:
        """Return the logits (length, vocabulary) of each token of an answer, given those before it."""
        num_tokens, rows = self.num_tokens, [self._logits[None]]
        if len(answer) > 1:
            rows.append(self._forward(list(answer[:-1]), keep=len(answer) - 1)[0])
            self.forget_after(num_tokens)
        return torch.cat(rows)[: len(answer)]

    @torch.inference_mode()
    def generate(self, *, stops: Sequence[int], max_new_tokens: int) -> list[int]:
        """Return the tokens of the greedy answer, up to the first of `stops`."""
        num_tokens = self.num_tokens
        written = self.write(stops=stops, max_new_tokens=max_new_tokens)
        self.forget_after(num_tokens)
        return written

    @torch.inference_mode()
    def write(self, *, stops: Sequence[int], max_new_tokens: int) -> list[int]:
        """Do what `generate` does, and leave the answer without its last token in the cache."""
        logits, written = self._logits, []
        while True:
            written.append(logits.argmax().item())
            if written[-1] in stops or len(written) == max_new_tokens:
                break
            logits = self._forward(written[-1:])[0, -1]
        return written

    def forget_after(self, num_tokens: int) -> None:
        """Remove all tokens after the first `num_tokens` from the cache."""
        self._cache.crop(num_tokens - self.num_tokens)  # a negative number is the number of tokens to remove
        self._token_types = self._token_types[:, :num_tokens]

    def _forward(
        self,
        ids: list[int],
        token_types: torch.Tensor | None = None,
        *,
        pictures: BaseModelOutputWithPooling | None = None,
        branches: list[int] | None = None,
        depth: list[int] | None = None,
        keep: int = 1,
    ) -> torch.Tensor:
        """Append tokens and return the logits (1, keep, vocabulary) of the last ones."""
        device, before, number = self.model.device, self.num_tokens, len(ids)
        new_types = torch.zeros(1, number, dtype=torch.long) if token_types is None else token_types
        old_types = [] if self._token_types is None else [self._token_types]
        self._token_types = torch.cat([*old_types, new_types.to(device)], 1)
        new_branches = torch.tensor([branches or [TRUNK] * number], device=device)
        positions = torch.arange(before + number, device=device)[None]
        if depth is not None:
            positions[0, before:] = before + torch.tensor(depth, device=device)
        masks = attention_masks(
            positions=positions,
            branches=torch.nn.functional.pad(new_branches, (before, 0), value=TRUNK),
            token_type_ids=self._token_types,
            valid=torch.ones_like(positions),
            window=self.model.config.get_text_config().sliding_window,
            dtype=mask_dtype(self.model),
            num_queries=number,
        )
        return self.model(
            input_ids=torch.tensor([ids], device=device),
            **({} if pictures is None else {"mm_encoder_outputs": {"image": pictures}}),
            position_ids=positions[:, before:],
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits
