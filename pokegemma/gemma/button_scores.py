"""Score the eight buttons as the beginning of an answer, all in one forward pass of Gemma 3."""

import numpy as np
import torch
from transformers import Gemma3ForConditionalGeneration, PreTrainedModel
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
    """Return the probabilities (batch, 8) of the buttons, normalised over the eight.

    A score is the product of the branch's token probabilities, as if the answer were in a row of its own.

    Args:
        logits: (batch, places, vocabulary) at the last token of the trunk, then tail after tail of `place_branches`.
    """
    log_probabilities = logits.float().log_softmax(-1)
    scores, next_tail = [], 1
    for branch in tokens.branches:
        slots = [0, *range(next_tail, next_tail + len(branch) - 1)]
        next_tail += len(branch) - 1
        scores.append(log_probabilities[:, slots, list(branch)].sum(-1))
    return torch.stack(scores, 1).softmax(-1)


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

    Args:
        batch: left-padded prompts, as `Gemma3Collator.prompts` makes them, on the model's device.
    """
    device = batch["input_ids"].device
    added, branch_of, depth = (torch.tensor(values, device=device) for values in place_branches(tokens))
    num_rows, prompt_length = batch["input_ids"].shape
    prompt_positions = (batch["attention_mask"].cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([prompt_positions, prompt_positions[:, -1:] + 1 + depth], 1)
    masks = attention_masks(
        positions=positions,
        branches=torch.nn.functional.pad(branch_of, (prompt_length, 0), value=TRUNK).expand(num_rows, -1),
        token_type_ids=torch.nn.functional.pad(batch["token_type_ids"], (0, len(added)), value=0),
        valid=torch.nn.functional.pad(batch["attention_mask"], (0, len(added)), value=1),
        window=model.config.get_text_config().sliding_window,
        dtype=mask_dtype(model),
    )
    logits = model(
        input_ids=torch.cat([batch["input_ids"], added.expand(num_rows, -1)], 1),
        mm_encoder_outputs={"image": encoded_pictures(model, batch)},
        position_ids=positions,
        attention_mask=masks,
        logits_to_keep=torch.arange(prompt_length + len(tokens.prefix) - 1, positions.shape[1], device=device),
        use_cache=False,
    ).logits
    return read_branches(logits, tokens)


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
        inputs[name] = torch.nn.functional.pad(batch[name], (0, len(added)), value=value)
    inputs["position_ids"] = (inputs["attention_mask"].cumsum(1) - 1).clamp(min=0)
    inputs["pixel_values"] = batch["pixel_values"].to(model.dtype)
    # A tensor and not a number: Gemma 4 leaves out parts of its layers for a number, by a path of its own.
    length = inputs["input_ids"].shape[1]
    kept = torch.arange(length - num_kept, length, device=model.device)
    return model(**inputs, logits_to_keep=kept, use_cache=False).logits.float().log_softmax(-1)
