"""TRL's SFTTrainer with the accuracy of actions: of the legal ones, is the likeliest the one that was played?"""

from typing import Any

import torch
from torch.utils.data import DataLoader

from pokegemma.battles.cloning.batches import ScoringBatches, TrainingBatches
from pokegemma.battles.policy.scoring import score_actions
from pokegemma.battles.trajectories.actions import FIRST_SWITCH, FIRST_TERA
from pokegemma.gemma.batches.collator import IGNORED_LABEL
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.training.trainer import PokemonTrainer


class CloningTrainer(PokemonTrainer):
    """`PokemonTrainer` on decisions of battles.

    Evaluation logs `eval_loss` (nats an action, of the tokens that tell it from the others), `eval_action_accuracy`,
    and `eval_switch_accuracy`, the same on decisions in which a switch was played.

    Args:
        action_tokens: of the 13 actions.
    """

    def __init__(self, *args: Any, action_tokens: ButtonTokens, **options: Any) -> None:
        self._action_tokens = action_tokens
        super().__init__(*args, **options)
        assert isinstance(self.data_collator, TrainingBatches)

    def compute_loss(
        self,
        model: torch.nn.Module,
        inputs: dict[str, torch.Tensor],
        return_outputs: bool = False,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> torch.Tensor:
        """Return TRL's loss, with the LM head on the places before the answers only.

        On a CPU TRL (1.16) runs the head on all places, which for Gemma 3 270M takes more time than all its layers.
        """
        if self.label_smoother is not None or self.args.loss_type != "nll":
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        labels = inputs["labels"]
        first = int((labels != IGNORED_LABEL).any(0).int().argmax())
        read = {name: inputs[name] for name in ("input_ids", "attention_mask", "position_ids")}
        # Places and not their number, by which transformers takes a slice: in bfloat16 on a CPU, torch (2.13) takes 40
        # times as long and more for the head of a slice as for that of a copy.
        places = torch.arange(first - 1, labels.shape[1] - 1, device=labels.device)
        logits = model(**read, logits_to_keep=places, use_cache=False).logits
        wanted = labels[:, first:]
        loss = torch.nn.functional.cross_entropy(
            logits.float().flatten(0, 1), wanted.flatten(), ignore_index=IGNORED_LABEL, reduction="sum"
        )
        num_processes = self.accelerator.num_processes
        self._total_train_tokens += int(inputs["attention_mask"].sum()) * num_processes
        if num_items_in_batch is None:
            return loss / (wanted != IGNORED_LABEL).sum()
        # The count is that of all processes, over which DDP averages gradients.
        return loss / num_items_in_batch * (num_processes if self.args.average_tokens_across_devices else 1)

    def get_eval_dataloader(self, *args: Any, **options: Any) -> DataLoader:
        collator = self.data_collator
        self.data_collator = ScoringBatches(collator.pad_id)
        try:
            return super().get_eval_dataloader(*args, **options)
        finally:
            self.data_collator = collator

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        lengths = inputs["lengths"].tolist()
        prompts = [row[:length] for row, length in zip(inputs["input_ids"].tolist(), lengths, strict=True)]
        bare = self.accelerator.unwrap_model(model)
        with torch.no_grad(), self.compute_loss_context_manager():
            scores = score_actions(bare, prompts, self._action_tokens, batch_size=len(prompts)).to(self.args.device)
        results = judge_scores(scores, actions=inputs["actions"], legal=inputs["legal"])
        self._results.append(self.accelerator.gather_for_metrics(results).cpu())
        return results[:, 2].mean(), None, None

    def summarize_results(self, sums: torch.Tensor) -> dict[str, float]:
        hits, decisions, loss, switch_hits, switches = sums.tolist()
        return {
            "loss": loss / decisions,
            "action_accuracy": hits / decisions,
            "switch_accuracy": switch_hits / switches if switches else 0.0,
        }


def judge_scores(scores: torch.Tensor, *, actions: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Return (decisions, 5) float: correct, 1, loss, correct switch, switch.

    Args:
        scores: log-probabilities (decisions, 13).
        actions: that were played, (decisions,) int64.
        legal: (decisions, 13) bool.
    """
    correct = (scores.masked_fill(~legal, -torch.inf).argmax(1) == actions).float()
    switches = ((actions >= FIRST_SWITCH) & (actions < FIRST_TERA)).float()
    loss = -scores.gather(1, actions[:, None].long())[:, 0]
    return torch.stack([correct, torch.ones_like(correct), loss, correct * switches, switches], 1)
