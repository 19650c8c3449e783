"""Score the eight buttons as the beginning of an answer, all in one forward pass of Gemma 3."""

import numpy as np
import torch
from torch.nn.functional import pad
from transformers import DynamicCache, Gemma3ForConditionalGeneration, PreTrainedModel
from transformers.modeling_outputs import BaseModelOutputWithPooling

from pokegemma.errors import CheckFailedError
from pokegemma.gemma.attention_masks import TRUNK, attention_masks, mask_dtype
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.families import family_of
from pokegemma.gemma.vision_tower import encode_pictures


def place_branches(tokens: ButtonTokens) -> tuple[list[int], list[int], list[int]]:
    """Return (tokens, branch, depth) to append to a prompt so that one pass scores all buttons.

    The common beginning of all answers is on the trunk. Every branch of more than one token follows, without its last
    token. `depth` counts from the end of the prompt.
    """
    tails = [branch[:-1] for branch in tokens.branches]
    start = len(tokens.prefix)
    added = [*tokens.prefix, *(token for tail in tails for token in tail)]
    branch = [TRUNK] * start + [number for number, tail in enumerate(tails, TRUNK + 1) for _ in tail]
    depth = [*range(start), *(start + at for tail in tails for at in range(len(tail)))]
    return added, branch, depth


def read_branches(logits: torch.Tensor, tokens: ButtonTokens) -> torch.Tensor:
    """Return the probabilities (batch, 8) of the buttons, normalised over the eight; see `read_log_likelihoods`."""
    return read_log_likelihoods(logits, tokens).softmax(-1)


def read_log_likelihoods(logits: torch.Tensor, tokens: ButtonTokens) -> torch.Tensor:
    """Return the log-probabilities (batch, answers) of the branches, not normalised, float32.

    A score is the sum of the branch's token log-probabilities, as if the answer were in a row of its own.

    Args:
        logits: (batch, places, vocabulary) at the last token of the trunk, then tail after tail of `place_branches`.
    """
    log_probabilities = logits.float().log_softmax(-1)
    scores, next_tail = [], 1
    for branch in tokens.branches:
        slots = [0, *range(next_tail, next_tail + len(branch) - 1)]
        next_tail += len(branch) - 1
        scores.append(log_probabilities[:, slots, list(branch)].sum(-1))
    return torch.stack(scores, 1)


def encoded_pictures(
    model: Gemma3ForConditionalGeneration, batch: dict[str, torch.Tensor]
) -> BaseModelOutputWithPooling:
    """Return the soft tokens of every picture in a batch's text, encoded here or taken from the feature cache."""
    features = batch.get("image_features")
    if features is None:
        features = encode_pictures(model.model, batch["pixel_values"].to(model.dtype))
    return BaseModelOutputWithPooling(pooler_output=features[batch["image_index"]])


@torch.inference_mode()
def score_buttons(
    model: Gemma3ForConditionalGeneration, batch: dict[str, torch.Tensor], tokens: ButtonTokens
) -> torch.Tensor:
    """Return the probability (batch, 8) of each of `BUTTONS`, normalised over the eight, in one forward pass.

    What all prompts begin with, up to their first picture, is computed once, in a pass before.

    Args:
        batch: left-padded prompts, as `Gemma3Collator.prompts` makes them, on the model's device.
    """
    device = batch["input_ids"].device
    shared = count_shared_tokens(batch, image_token=model.config.image_token_id)
    num_rows, num_columns = batch["input_ids"].shape
    num_new = num_columns - shared
    is_new = torch.arange(num_new, device=device) >= (num_columns - batch["attention_mask"].sum(1))[:, None]
    added, branch_of, depth = (torch.tensor(values, device=device) for values in place_branches(tokens))
    new_positions = shared + (is_new.cumsum(1) - 1).clamp(min=0)
    before = torch.arange(shared, device=device).expand(num_rows, -1)
    positions = torch.cat([before, new_positions, new_positions[:, -1:] + 1 + depth], 1)
    masks = attention_masks(
        positions=positions,
        branches=pad(branch_of, (num_columns, 0), value=TRUNK).expand(num_rows, -1),
        token_type_ids=pad(batch["token_type_ids"][:, shared:], (shared, len(added)), value=0),
        valid=pad(is_new, (shared, len(added)), value=True),
        window=model.config.get_text_config().sliding_window,
        dtype=mask_dtype(model),
        num_queries=num_new + len(added),
    )
    logits = model(
        input_ids=torch.cat([batch["input_ids"][:, shared:], added.expand(num_rows, -1)], 1),
        mm_encoder_outputs={"image": encoded_pictures(model, batch)},
        position_ids=positions[:, shared:],
        attention_mask=masks,
        logits_to_keep=torch.arange(num_new + len(tokens.prefix) - 1, num_new + len(added), device=device),
        past_key_values=_read_beginning(model, batch, shared) if shared else None,
        use_cache=shared > 0,
    ).logits
    return read_branches(logits, tokens)


def count_shared_tokens(batch: dict[str, torch.Tensor], *, image_token: int) -> int:
    """Return how many tokens all of several left-padded prompts begin with, without pictures; 0 for one prompt."""
    ids, lengths = batch["input_ids"], batch["attention_mask"].sum(1)
    if len(ids) == 1:
        return 0
    num_columns, shortest = ids.shape[1], int(lengths.min())
    columns = (num_columns - lengths)[:, None] + torch.arange(shortest, device=ids.device)
    beginnings = ids.gather(1, columns)
    is_shared = ((beginnings == beginnings[0]) & (beginnings != image_token)).all(0)
    return min(int(is_shared.cumprod(0).sum()), shortest - 1)


def _read_beginning(model: PreTrainedModel, batch: dict[str, torch.Tensor], length: int) -> DynamicCache:
    """Return the keys and values of the first `length` tokens of all prompts, for each prompt."""
    num_rows, num_columns = batch["input_ids"].shape
    start = num_columns - int(batch["attention_mask"][0].sum())
    # Without a config: with one, sliding layers drop keys that the masks need, though they may not be seen.
    cache, positions = DynamicCache(), torch.arange(length, device=batch["input_ids"].device)[None]
    masks = attention_masks(
        positions=positions,
        branches=torch.full_like(positions, TRUNK),
        token_type_ids=torch.zeros_like(positions),
        valid=torch.ones_like(positions),
        window=model.config.get_text_config().sliding_window,
        dtype=mask_dtype(model),
    )
    model(
        input_ids=batch["input_ids"][:1, start : start + length],
        position_ids=positions,
        attention_mask=masks,
        past_key_values=cache,
        use_cache=True,
        logits_to_keep=1,
    )
    cache.batch_repeat_interleave(num_rows)
    return cache


def checked_scores(scores: torch.Tensor) -> np.ndarray:
    """Return probabilities as float64.

    Raises:
        CheckFailedError: they contain NaN.
    """
    values = scores.double().cpu().numpy()
    if not np.isfinite(values).all():
        raise CheckFailedError("the model returns NaN instead of probabilities: its training diverged or overflowed")
    return values


@torch.inference_mode()
def score_by_rows(model: PreTrainedModel, batch: dict[str, torch.Tensor], tokens: ButtonTokens) -> torch.Tensor:
    """Return the probability (batch, 8) of each of `BUTTONS`, normalised over the eight, in up to eight passes.

    Buttons that differ in their last token only share a pass.

    Args:
        batch: left-padded prompts, as `ProcessorCollator.prompts` makes them, on the model's device.
    """
    passes: dict[tuple[int, ...], torch.Tensor] = {}
    scores = []
    for branch in tokens.branches:
        added = (*tokens.prefix, *branch[:-1])
        if added not in passes:
            passes[added] = _log_probabilities(model, batch, added, num_kept=len(branch))
        places = torch.arange(len(branch), device=model.device)
        scores.append(passes[added][:, places, list(branch)].sum(-1))
    return torch.stack(scores, 1).softmax(-1)


def _log_probabilities(
    model: PreTrainedModel, batch: dict[str, torch.Tensor], added: tuple[int, ...], *, num_kept: int
) -> torch.Tensor:
    """Return the log probabilities (batch, num_kept, vocabulary) after the last tokens of prompt + `added`."""
    inputs = dict(batch)
    new = torch.tensor(added, dtype=torch.long, device=model.device).expand(len(batch["input_ids"]), -1)
    inputs["input_ids"] = torch.cat([batch["input_ids"], new], 1)
    for name, value in (("attention_mask", 1), (family_of(model.config).token_types, 0)):
        inputs[name] = pad(batch[name], (0, len(added)), value=value)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["pixel_values"] = batch["pixel_values"].to(model.dtype)
    # A tensor and not a number: Gemma 4 leaves out parts of its layers for a number, by a path of its own.
    length = inputs["input_ids"].shape[1]
    kept = torch.arange(length - num_kept, length, device=model.device)
    return model(**inputs, logits_to_keep=kept, use_cache=False).logits.float().log_softmax(-1)
