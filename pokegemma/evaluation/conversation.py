"""Judge a model on trajectories: a conversation whose cache grows, so that a decision costs its own frame only."""

import itertools
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from tqdm import tqdm
from transformers import DynamicCache, Gemma3ForConditionalGeneration
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.data.trajectories import Trajectory
from pokegemma.evaluation.button_scores import checked_scores, encoded_pictures, place_branches, read_branches
from pokegemma.evaluation.predict import GeneratedAnswer, Predictor, read_answer, stop_tokens
from pokegemma.training.button_tokens import ButtonTokens
from pokegemma.training.masks import TRUNK, attention_masks, mask_dtype


@dataclass
class Conversation:
    """A conversation of one row with a model: what was said is in the cache, and asking leaves it as it was."""

    model: Gemma3ForConditionalGeneration
    # No config: with one, sliding layers forget what a question asked aside would have pushed out, and could not be
    # cut back. The masks say how far they look.
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
        """Append tokens, of one length with `token_type_ids` (length,), and the soft tokens of their pictures."""
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
        """Do what `say` and then `score_buttons` do, in one pass; afterwards `generate` lacks where to begin."""
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
        num_tokens, logits, written = self.num_tokens, self._logits, []
        while True:
            written.append(logits.argmax().item())
            if written[-1] in stops or len(written) == max_new_tokens:
                break
            logits = self._forward(written[-1:])[0, -1]
        self.forget_after(num_tokens)
        return written

    def forget_after(self, num_tokens: int) -> None:
        """Forget what was said after the first `num_tokens` tokens."""
        self._cache.crop(num_tokens - self.num_tokens)  # a negative number says how many to remove
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
            mm_encoder_outputs=None if pictures is None else {"image": pictures},
            position_ids=positions[:, before:],
            attention_mask=masks,
            past_key_values=self._cache,
            use_cache=True,
            logits_to_keep=keep,
        ).logits


@dataclass(frozen=True)
class TrajectoryPredictions:
    """What a model said to the counted decisions of trajectories, in order. `latency_s`: by way, one a decision."""

    answers: list[GeneratedAnswer] | None
    scores: np.ndarray
    latency_s: dict[str, list[float]]


def predict_trajectories(
    predictor: Predictor, trajectories: Sequence[Trajectory], *, generate: bool = True
) -> TrajectoryPredictions:
    """Ask for every counted decision, after the recorded answers to those before it: what the frames followed from.

    The latency of a decision holds reading and encoding its new frame and the turn before it, not the session so far.
    """
    answers, scores = [], []
    latency_s: dict[str, list[float]] = {"generated": [], "scored": []} if generate else {"scored": []}
    with tqdm(total=sum(len(one.counted) for one in trajectories), desc="evaluate", unit="decision") as progress:
        for trajectory in trajectories:
            for number, (conversation, said_s) in enumerate(_hold(predictor, trajectory)):
                if number < trajectory.num_context:
                    continue
                began = time.perf_counter()
                scores.append(checked_scores(conversation.score_buttons(predictor.collator.button_tokens)))
                latency_s["scored"].append(said_s + time.perf_counter() - began)
                if generate:
                    began = time.perf_counter()
                    tokenizer = predictor.collator.processor.tokenizer
                    stops = stop_tokens(tokenizer)
                    written = conversation.generate(stops=stops, max_new_tokens=predictor.max_new_tokens)
                    answers.append(read_answer(written, tokenizer))
                    latency_s["generated"].append(said_s + time.perf_counter() - began)
                progress.update()
    return TrajectoryPredictions(answers if generate else None, np.stack(scores), latency_s)


def _hold(predictor: Predictor, trajectory: Trajectory) -> Iterator[tuple[Conversation, float]]:
    """Yield the conversation before every answer of a trajectory, and the seconds that the new turn took."""
    collator, conversation = predictor.collator, Conversation(predictor.model)
    row = collator.tokenize(trajectory)
    boundaries = [0, *row.answer_starts]
    image_token = collator.processor.tokenizer.image_token_id
    paths = list(collator.picture_paths(trajectory))
    for start, end in itertools.pairwise(boundaries):
        began = time.perf_counter()
        ids = row.ids[start:end]  # the answer before, and the new turn
        num_new = ids.count(image_token) // collator.processor.image_seq_length
        new, paths = paths[:num_new], paths[num_new:]
        batch = {name: value.to(predictor.model.device) for name, value in collator.read_paths(new).items()}
        with torch.inference_mode():
            pictures = encoded_pictures(predictor.model, batch)
        conversation.say(ids, collator.token_types(torch.tensor(ids)), pictures)
        yield conversation, time.perf_counter() - began
