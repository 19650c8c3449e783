"""TRL's SFTTrainer with button accuracy and throughput."""

import dataclasses
import functools
import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import is_peft_model
from torch.utils.data import DataLoader
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy
from trl import SFTTrainer

from pokegemma.gemma.batches.augmentation import Augmentation
from pokegemma.gemma.batches.collator import IGNORED_LABEL
from pokegemma.training.run_folder import WholeCheckpoints

logger = logging.getLogger(__name__)


def find_answers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row, start, end) of every answer in labels (rows, length), in reading order, each (answers,) int64."""
    edges = torch.nn.functional.pad((labels != IGNORED_LABEL).long(), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    return rows, starts, (edges == -1).nonzero(as_tuple=True)[1]


class PokemonTrainer(WholeCheckpoints, SFTTrainer):
    """SFTTrainer that also logs throughput and button accuracy.

    Its log entries have four more values: `tokens_per_second`, `decisions_per_second`, `data_wait_share` (the share of
    the time that was spent waiting for batches), and `eval_button_accuracy`. A button counts as correct if each of its
    tokens is the most likely one of the whole vocabulary, given the picture and the fixed beginning of the answer. So
    greedy decoding would choose it.

    Args:
        data_collator: a `Gemma3Collator` or `ProcessorCollator`.
        augmentation: of training pictures; evaluation sees the recorded ones.
        before_first_step: called with the wrapped model (DDP, FSDP, DeepSpeed or none) before its first forward pass.
    """

    def __init__(
        self,
        *args: Any,
        before_first_step: Callable[[torch.nn.Module], None] | None = None,
        augmentation: Augmentation | None = None,
        **options: Any,
    ) -> None:
        super().__init__(*args, **options)
        self._augmentation = augmentation
        self._before_first_step = before_first_step
        # TRL converts the trained weights of a quantised model to bfloat16. That rounds away small updates and the
        # slow averages of Adam, and does not fit a projector in float32.
        if getattr(self.model, "is_loaded_in_4bit", False):
            for weight in self.model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
        self._results: list[torch.Tensor] = []
        self._num_decisions = 0
        self._last_log = (time.perf_counter(), 0, 0)  # when, tokens so far, decisions so far
        self._paused_s = 0.0  # evaluating and saving since then
        self._waited_s = 0.0  # for batches since then

    def get_train_dataloader(self) -> DataLoader:
        plain = self.data_collator
        if self._augmentation is not None:
            self.data_collator = dataclasses.replace(plain, augmentation=self._augmentation)
        try:
            return super().get_train_dataloader()
        finally:
            self.data_collator = plain

    def _run_epoch(self, *args: Any, epoch: int, **options: Any) -> None:
        options["epoch"] = epoch
        if self._augmentation is not None:  # before the workers start, which copy it
            self._augmentation.epoch = epoch
        super()._run_epoch(*args, **options)

    def get_batch_samples(self, *args: Any, **options: Any) -> Any:
        began = time.perf_counter()
        result = super().get_batch_samples(*args, **options)
        self._waited_s += time.perf_counter() - began
        return result

    def training_step(self, model: torch.nn.Module, inputs: dict[str, Any], *args: Any, **options: Any) -> torch.Tensor:
        if self._before_first_step is not None:
            self._before_first_step(model)
            self._before_first_step = None
        starts = find_answers(inputs["labels"])[1]
        # Assumes that each process has as many. With trajectories some have a few more; gathering would take time.
        self._num_decisions += len(starts) * self.accelerator.num_processes
        return super().training_step(model, inputs, *args, **options)

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if "loss" in logs:
            since, num_tokens, num_decisions = self._last_log
            elapsed_s = max(time.perf_counter() - since - self._paused_s, 1e-9)
            logs["tokens_per_second"] = round((self._total_train_tokens - num_tokens) / elapsed_s, 1)
            logs["decisions_per_second"] = round((self._num_decisions - num_decisions) / elapsed_s, 3)
            logs["data_wait_share"] = round(self._waited_s / elapsed_s, 4)
            self._last_log = (time.perf_counter(), self._total_train_tokens, self._num_decisions)
            self._paused_s = self._waited_s = 0.0
        super().log(logs, start_time)

    def prediction_step(
        self,
        model: torch.nn.Module,
        inputs: dict[str, Any],
        prediction_loss_only: bool,
        ignore_keys: list[str] | None = None,
    ) -> tuple[torch.Tensor, None, None]:
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            outputs = model(**inputs, use_cache=False, fused_lm_head=True)
        results = self._score(inputs, outputs)
        self._results.append(self.accelerator.gather_for_metrics(results).cpu())
        losses, counts = results[:, 2].sum(), results[:, 3].sum()
        return losses / counts, None, None

    def _score(self, inputs: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
        """Return (rows of the dataset, 4) float: correct buttons, decisions, loss and tokens of each row.

        A row of the dataset is a trajectory, which is a row of the batch, or a sample, which is an answer in the batch.
        `gather_for_metrics` removes the repeated rows of the last batch by rows of the dataset. `is_top1` and
        `log_probs` (rows, length - 1) are those of the next token.
        """
        labels = inputs["labels"]
        rows, starts, ends = find_answers(labels)
        results = []
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
            _, first, last = self.data_collator.button_tokens.locate(labels[row, start:end].tolist())
            is_correct = outputs.is_top1[row, start + first - 1 : start + last - 1].bool().all()
            loss = -outputs.log_probs[row, start - 1 : end - 1].float().sum()
            num_decisions, num_tokens = torch.ones_like(loss), torch.full_like(loss, end - start)
            results.append(torch.stack([is_correct.float(), num_decisions, loss, num_tokens]))
        answers = torch.stack(results)
        if self.data_collator.layout != "trajectory":
            return answers
        return torch.zeros(len(labels), 4, device=answers.device).index_add(0, rows, answers)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        began, self._results = time.perf_counter(), []
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        metrics = self.summarize_results(torch.cat(self._results).double().sum(0))
        output.metrics.update({f"{prefix}_{name}": value for name, value in metrics.items()})
        self._paused_s += time.perf_counter() - began
        return output

    def summarize_results(self, sums: torch.Tensor) -> dict[str, float]:
        """Return loss and accuracy from the sums of what `prediction_step` recorded."""
        hits, decisions, losses, counts = sums.tolist()
        # Over all answer tokens. transformers' mean of batch means would depend on which samples share a batch.
        return {"loss": losses / counts, "button_accuracy": hits / decisions}

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        began = time.perf_counter()
        super()._save_checkpoint(*args, **options)
        self._paused_s += time.perf_counter() - began

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            # save_pretrained finds tied weights by their memory, but FSDP2 gathers a copy for each of their names.
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        if not is_peft_model(self.model) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            # Trainer reads a checkpoint by the names of the model in memory. It skips the published names, which
            # save_pretrained writes, with a warning, so a resumed run would start again from the base model.
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_original_format=False)
            try:
                super()._save(output_dir, state_dict)
            finally:
                del self.model.save_pretrained
        else:
            super()._save(output_dir, state_dict)
        # PEFT's model card is an empty form that contains a path of this machine.
        (Path(output_dir or self.args.output_dir) / "README.md").unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write no model card: TRL's does not describe the data, and needs the Hub. run.json is the record."""


class EvaluateAtEnd(TrainerCallback):
    """Also evaluate after the last step, since a run shorter than `--eval_steps` would have no evaluation."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True
