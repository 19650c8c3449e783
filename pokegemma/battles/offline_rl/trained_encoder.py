"""An encoder that is trained with the actor-critic: a policy's Gemma 3 with LoRA. Its features are stored nowhere.

All states of a batch go through the encoder, several at a time. Of each such part only the features are kept for the
backward pass, which computes the rest again: the activations of all states at once would take gigabytes.
"""

from pathlib import Path
from typing import Any

import numpy as np
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.checkpoint import checkpoint
from transformers import Gemma3ForCausalLM

from pokegemma.battles.policy.checkpoint import PolicyCheckpoint
from pokegemma.battles.policy.prompts import read_texts
from pokegemma.battles.policy.scoring import hidden_at_ends
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_folder
from pokegemma.provenance import write_run_record


class StateTokens:
    """The prompts of the states of packed battles as tokens: `states[index]` has (T, L) int64, and lengths (T,)."""

    def __init__(self, battles: PackedTrajectories, policy: PolicyCheckpoint) -> None:
        self._battles, self._policy = battles, policy
        self.width = policy.config.hidden_size

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        rows = self._policy.encode(read_texts(self._battles, index, self._policy.text))
        lengths = np.array([len(row) for row in rows])
        tokens = np.zeros((len(rows), int(lengths.max())), dtype=np.int64)
        for place, row in zip(tokens, rows, strict=True):
            place[: len(row)] = row
        return {"tokens": tokens, "lengths": lengths}


class TrainedEncoder(torch.nn.Module):
    """Turns tokens of states into features. Only the adapter is trained, and in `state_dict`.

    Args:
        batch_size: states that go through the encoder at once.
    """

    def __init__(self, model: PeftModel, *, batch_size: int) -> None:
        super().__init__()
        self.model, self._batch_size = model, batch_size
        trained = {name for name, weight in model.named_parameters() if weight.requires_grad}
        self._frozen = {name for name in model.state_dict() if name not in trained}
        self.register_state_dict_post_hook(_leave_out_frozen)
        self.register_load_state_dict_post_hook(_expect_no_frozen)

    def forward(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return the features, (..., width) float32; zeros where the length is 0.

        Args:
            tokens: (..., L) int64, padded at their ends.
            lengths: (...,) int64.
        """
        is_state = lengths > 0
        rows, ends = tokens[is_state], lengths[is_state] - 1
        order = ends.argsort(stable=True)  # states of similar length together
        parts = [self._encode(rows[part], ends[part]) for part in order.split(self._batch_size)]
        features = torch.cat(parts).float()[order.argsort()]
        result = features.new_zeros(*lengths.shape, features.shape[-1])
        result[is_state] = features
        return result

    def _encode(self, rows: torch.Tensor, ends: torch.Tensor) -> torch.Tensor:
        rows = rows[:, : int(ends.max()) + 1]
        if not torch.is_grad_enabled():
            return hidden_at_ends(self.model, rows, ends)
        return checkpoint(hidden_at_ends, self.model, rows, ends, use_reentrant=False)

    @torch.no_grad()
    def encode_untrained(self, tokens: torch.Tensor, lengths: torch.Tensor) -> torch.Tensor:
        """Return what the policy made of the states before it was trained."""
        with self.model.disable_adapter():
            return self(tokens, lengths)

    def save(self, folder: Path, policy: PolicyCheckpoint) -> None:
        """Write the adapter as one that `open_policy` opens.

        Raises:
            PokegemmaError: there is something else at this path, or it cannot be written.
        """
        with atomic_folder(folder, stage="train", overwrite=True) as new:
            self.model.save_pretrained(new)
            (new / "README.md").unlink(missing_ok=True)  # an empty form that contains a path of this machine
            write_run_record(
                new,
                stage="train",
                options={"text": policy.text},
                status="completed",
                base_model=policy.path,
                base_fingerprint=policy.weights_fingerprint(),
            )


def _leave_out_frozen(encoder: TrainedEncoder, weights: dict[str, Any], prefix: str, metadata: Any) -> None:
    for name in encoder._frozen:
        weights.pop(f"{prefix}model.{name}", None)


def _expect_no_frozen(encoder: TrainedEncoder, found: Any) -> None:
    ends = tuple(f".model.{name}" for name in encoder._frozen)
    found.missing_keys[:] = [name for name in found.missing_keys if not f".{name}".endswith(ends)]


def make_trained_encoder(
    policy: PolicyCheckpoint, config: LoraConfig, *, batch_size: int, device: torch.device | str
) -> TrainedEncoder:
    """Return a policy's model with a new adapter.

    Raises:
        PokegemmaError: it is an adapter itself, or cannot be loaded.
    """
    if policy.adapter is not None:
        raise PokegemmaError(
            f"--encoder {policy.adapter.path} is an adapter: with --encoder_training lora it must be a whole model"
        )
    model = policy.load_model(device=device)
    assert isinstance(model, Gemma3ForCausalLM)
    model.config.use_cache = False
    return TrainedEncoder(get_peft_model(model, config), batch_size=batch_size)
