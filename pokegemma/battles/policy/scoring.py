"""Score the 13 actions after many prompts, one forward pass a batch."""

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from transformers import Gemma3ForCausalLM

from pokegemma.gemma.attention_masks import TRUNK, attention_masks, mask_dtype
from pokegemma.gemma.button_scores import place_branches, read_log_likelihoods
from pokegemma.gemma.button_tokens import ButtonTokens

DEFAULT_BATCH_SIZE = 64


@torch.inference_mode()
def score_actions(
    model: Gemma3ForCausalLM | PeftModel,
    prompts: Sequence[Sequence[int]],
    tokens: ButtonTokens,
    *,
    batch_size: int = DEFAULT_BATCH_SIZE,
) -> torch.Tensor:
    """Return log P(action | prompt), (len(prompts), 13) float32 on the CPU; not normalised over the 13.

    All actions are scored in the pass that reads the prompt, which they share. Prompts of similar length are read
    together, so that little is padding.

    Args:
        prompts: the tokens of each, of any length above 0.
        tokens: of the 13 actions.
    """
    one_token_each = not tokens.prefix and all(len(branch) == 1 for branch in tokens.branches)
    score = _score_next_token if one_token_each else _score_branches
    return _by_length(lambda rows: score(model, rows, tokens), prompts, len(tokens.branches), batch_size=batch_size)


@torch.inference_mode()
def encode_prompts(
    model: Gemma3ForCausalLM | PeftModel, prompts: Sequence[Sequence[int]], *, batch_size: int = DEFAULT_BATCH_SIZE
) -> torch.Tensor:
    """Return the model's output before the LM head at the last token of each prompt, (len(prompts), width) float32."""
    width = model.config.hidden_size
    return _by_length(lambda rows: last_hidden_states(model, rows), prompts, width, batch_size=batch_size)


def _by_length(
    read: Callable[[list[list[int]]], torch.Tensor], prompts: Sequence[Sequence[int]], width: int, *, batch_size: int
) -> torch.Tensor:
    """Return `read` of all prompts, (len(prompts), width) float32 on the CPU, in batches of similar length."""
    order = sorted(range(len(prompts)), key=lambda index: len(prompts[index]))
    results = torch.empty(len(prompts), width)
    for start in range(0, len(order), batch_size):
        part = order[start : start + batch_size]
        results[part] = read([list(prompts[index]) for index in part]).float().cpu()
    return results


def _score_next_token(
    model: Gemma3ForCausalLM | PeftModel, rows: list[list[int]], tokens: ButtonTokens
) -> torch.Tensor:
    """Score actions of one token each, by the logits after the prompt.

    Only one place of each row goes through the LM head.
    """
    head = _bare_model(model).lm_head
    return read_log_likelihoods(head(last_hidden_states(model, rows))[:, None], tokens)


def last_hidden_states(model: Gemma3ForCausalLM | PeftModel, rows: Sequence[Sequence[int]]) -> torch.Tensor:
    """Return the model's output before the LM head at the last token of each row, (rows, width).

    Rows are padded at their ends, which no earlier token sees: no mask is needed.
    """
    length = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (length - len(row))] for row in rows], device=model.device)
    return hidden_at_ends(model, ids, torch.tensor([len(row) - 1 for row in rows], device=model.device))


def hidden_at_ends(model: Gemma3ForCausalLM | PeftModel, ids: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
    """Return the model's output before the LM head at one place of each row, (rows, length), (rows,) -> (rows, width).

    What follows that place makes no difference.
    """
    hidden = _bare_model(model).model(input_ids=ids, use_cache=False).last_hidden_state
    return hidden[torch.arange(len(ids), device=ids.device), ends]


def _bare_model(model: Gemma3ForCausalLM | PeftModel) -> Gemma3ForCausalLM:
    return model.get_base_model() if isinstance(model, PeftModel) else model


def _score_branches(model: Gemma3ForCausalLM | PeftModel, rows: list[list[int]], tokens: ButtonTokens) -> torch.Tensor:
    """Score actions of any number of tokens: each is a branch after the prompt that sees the prompt and itself."""
    added, branch_of, depth = (torch.tensor(values, device=model.device) for values in place_branches(tokens))
    length = max(map(len, rows))
    ids = torch.tensor([[0] * (length - len(row)) + row for row in rows], device=model.device)
    is_token = torch.tensor([[0] * (length - len(row)) + [1] * len(row) for row in rows], device=model.device)
    prompt_positions = (is_token.cumsum(1) - 1).clamp(min=0)
    positions = torch.cat([prompt_positions, prompt_positions[:, -1:] + 1 + depth], 1)
    masks = attention_masks(
        positions=positions,
        branches=torch.nn.functional.pad(branch_of, (length, 0), value=TRUNK).expand(len(rows), -1),
        token_type_ids=torch.zeros_like(positions),
        valid=torch.nn.functional.pad(is_token, (0, len(added)), value=1),
        window=model.config.sliding_window,
        dtype=mask_dtype(model),
    )
    logits = model(
        input_ids=torch.cat([ids, added.expand(len(rows), -1)], 1),
        position_ids=positions,
        attention_mask=masks,
        logits_to_keep=torch.arange(length + len(tokens.prefix) - 1, positions.shape[1], device=model.device),
        use_cache=False,
    ).logits
    return read_log_likelihoods(logits, tokens)
