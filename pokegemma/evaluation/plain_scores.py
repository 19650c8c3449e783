"""Score the eight buttons with the model's own masks: for models in which a tree of branches would not be exact."""

import torch
from transformers import PreTrainedModel

from pokegemma.training.button_tokens import ButtonTokens
from pokegemma.training.families import family_of


@torch.inference_mode()
def score_by_rows(model: PreTrainedModel, batch: dict[str, torch.Tensor], tokens: ButtonTokens) -> torch.Tensor:
    """Return the probability (batch, 8) of each of `BUTTONS`, normalised over the eight, in a pass for each beginning.

    Buttons that differ in their last token alone share a pass, so that there are between one and eight.

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
