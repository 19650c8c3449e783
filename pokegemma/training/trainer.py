"""TRL's SFTTrainer with button accuracy, throughput, a loss curve, and a clean stop on SIGTERM."""

import functools
import logging
import signal
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from accelerate.utils import is_peft_model
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, IntervalStrategy, rotate_checkpoints
from trl import SFTTrainer

from pokegemma.outputs import atomic_file
from pokegemma.training.collator import IGNORED_LABEL
from pokegemma.training.run_folder import COMPLETE_FILE

logger = logging.getLogger(__name__)

CURVE_FILE = "loss_curve.png"


def find_answers(labels: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Return (row, start, end) of every answer in labels (rows, length), in reading order, each (answers,) int64."""
    edges = torch.nn.functional.pad((labels != IGNORED_LABEL).long(), (1, 1)).diff(dim=1)
    rows, starts = (edges == 1).nonzero(as_tuple=True)
    return rows, starts, (edges == -1).nonzero(as_tuple=True)[1]


class PokemonTrainer(SFTTrainer):
    """SFTTrainer that also logs throughput (`tokens_per_second`, `decisions_per_second`), `eval_button_accuracy`, and
    `data_wait_share`: the share of the time in which the step waited for its batch.

    The collator must be a `Gemma3Collator`. A button counts as right when each of its tokens is the most likely
    one of the whole vocabulary, given the picture and the answer's fixed beginning: what greedy decoding reads.

    Args:
        before_first_step: called with the wrapped model (DDP, FSDP, DeepSpeed or none) before its first forward pass.
    """

    def __init__(
        self, *args: Any, before_first_step: Callable[[torch.nn.Module], None] | None = None, **options: Any
    ) -> None:
        super().__init__(*args, **options)
        self._before_first_step = before_first_step
        # TRL makes the trained weights of a quantised model bfloat16, which rounds small updates and Adam's slow
        # averages away, and clashes with a projector in float32. FSDP wants one type for all and keeps bfloat16.
        if getattr(self.model, "is_loaded_in_4bit", False) and not self.is_fsdp_enabled:
            for weight in self.model.parameters():
                if weight.requires_grad:
                    weight.data = weight.data.float()
        self._results: list[torch.Tensor] = []
        self._num_decisions = 0
        self._last_log = (time.perf_counter(), 0, 0)  # when, tokens so far, decisions so far
        self._paused_s = 0.0  # evaluating and saving since then
        self._waited_s = 0.0  # for batches since then

    def _run_epoch(self, *args: Any, **options: Any) -> None:
        if self.state.global_step < self.state.max_steps:
            super()._run_epoch(*args, **options)
        else:  # continued from its last step: transformers would make one more before it looks
            self.control.should_training_stop = True

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
        # As if every process had as many: of trajectories one may have a few more, and counting them would cost a wait.
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
        results = self._judge(inputs, outputs)
        self._results.append(self.accelerator.gather_for_metrics(results).cpu())
        losses, counts = results[:, 2].sum(), results[:, 3].sum()
        return losses / counts, None, None

    def _judge(self, inputs: dict[str, torch.Tensor], outputs: Any) -> torch.Tensor:
        """Return (rows of the dataset, 4) float: right buttons, decisions, loss and tokens of each.

        A row of the dataset is a trajectory and a row of the batch, or a sample and an answer of the batch: gathering
        drops what fills up the last batch by rows of the dataset. `is_top1` and `log_probs` (rows, length - 1) look
        one token ahead.
        """
        labels = inputs["labels"]
        rows, starts, ends = find_answers(labels)
        results = []
        for row, start, end in zip(rows.tolist(), starts.tolist(), ends.tolist(), strict=True):
            _, first, last = self.data_collator.button_tokens.locate(labels[row, start:end].tolist())
            right = outputs.is_top1[row, start + first - 1 : start + last - 1].bool().all()
            loss = -outputs.log_probs[row, start - 1 : end - 1].float().sum()
            one, num_tokens = torch.ones_like(loss), torch.full_like(loss, end - start)
            results.append(torch.stack([right.float(), one, loss, num_tokens]))
        answers = torch.stack(results)
        if self.data_collator.layout != "trajectory":
            return answers
        return torch.zeros(len(labels), 4, device=answers.device).index_add(0, rows, answers)

    def evaluation_loop(self, *args: Any, **options: Any) -> Any:
        began, self._results = time.perf_counter(), []
        output = super().evaluation_loop(*args, **options)
        prefix = options.get("metric_key_prefix", "eval")
        hits, decisions, losses, counts = torch.cat(self._results).double().sum(0)
        # Over all answer tokens: transformers' mean of batch means would depend on how samples fall into batches.
        output.metrics[f"{prefix}_loss"] = (losses / counts).item()
        output.metrics[f"{prefix}_button_accuracy"] = (hits / decisions).item()
        self._paused_s += time.perf_counter() - began
        return output

    def _save_checkpoint(self, *args: Any, **options: Any) -> None:
        """Save a checkpoint, mark it complete once every process has written its part, then delete older ones.

        transformers deletes them when the first process is done: killed then, a run could be left with none.
        """
        began = time.perf_counter()
        folder = Path(self.args.output_dir)
        mark = folder / f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}" / COMPLETE_FILE
        if self.args.should_save:
            mark.unlink(missing_ok=True)  # an earlier run may have written this one
        limit, self.args.save_total_limit = self.args.save_total_limit, None
        super()._save_checkpoint(*args, **options)
        self.args.save_total_limit = limit
        self.accelerator.wait_for_everyone()
        if self.args.should_save:
            mark.touch()
            rotate_checkpoints(
                folder, save_total_limit=limit, best_model_checkpoint=self.state.best_model_checkpoint, use_mtime=True
            )
        self._paused_s += time.perf_counter() - began

    def _save(self, output_dir: str | None = None, state_dict: dict[str, torch.Tensor] | None = None) -> None:
        folder = Path(output_dir or self.args.output_dir)
        if state_dict is not None:
            # save_pretrained finds tied weights by their memory. FSDP2 gathers a copy for each name of one.
            tied = getattr(self.model, "all_tied_weights_keys", {})
            state_dict = {name: weight for name, weight in state_dict.items() if name not in tied}
        if not is_peft_model(self.model) and folder.name.startswith(PREFIX_CHECKPOINT_DIR):
            # Trainer reads a checkpoint back by the names of the model in memory, and passes over, with a warning, the
            # published names that save_pretrained writes: a resumed run would start again from the base.
            self.model.save_pretrained = functools.partial(self.model.save_pretrained, save_original_format=False)
            try:
                super()._save(output_dir, state_dict)
            finally:
                del self.model.save_pretrained
        else:
            super()._save(output_dir, state_dict)
        # PEFT's model card, an empty form with a path of this machine in it.
        (Path(output_dir or self.args.output_dir) / "README.md").unlink(missing_ok=True)

    def create_model_card(self, *args: Any, **options: Any) -> None:
        """Write none: TRL's says nothing of the data, and asks the Hub; run.json is the record."""


class StopOnSignal(TrainerCallback):
    """On SIGTERM or SIGINT, finish the optimizer step, save a checkpoint and stop; on a second SIGINT, stop at once.

    A context manager around `Trainer.train`. Unlike transformers' just-in-time checkpoint, which may save between
    two halves of an accumulated step, it saves at the end of a step only, and in the same one on every process.
    `stopped` says whether it did; a signal during the last step changes nothing.
    """

    def __init__(self) -> None:
        self.stopped = False
        self._requested = False
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopOnSignal":
        for number in (signal.SIGTERM, signal.SIGINT):
            self._previous[number] = signal.signal(number, self._handle)
        return self

    def __exit__(self, *exception: object) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self._requested and number == signal.SIGINT:
            raise KeyboardInterrupt
        self._requested = True

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        requested = self._requested
        if args.world_size > 1:  # the signal may reach the processes in different steps
            flag = torch.tensor(float(requested), device=args.device)
            torch.distributed.all_reduce(flag, op=torch.distributed.ReduceOp.MAX)
            requested = bool(flag.item())
        if requested and state.global_step < state.max_steps:
            self.stopped = control.should_save = control.should_training_stop = True
            logger.warning("stopping after step %d of %d, as asked by a signal", state.global_step, state.max_steps)


class EvaluateAtEnd(TrainerCallback):
    """Evaluate after the last step, too: a run shorter than `--eval_steps` would not say what it learned."""

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= state.max_steps and args.eval_strategy != IntervalStrategy.NO:
            control.should_evaluate = True


class CurvePlotter(TrainerCallback):
    """Keep loss_curve.png in the output folder: losses and button accuracy by step."""

    def on_evaluate(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._write(args, state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        self._write(args, state)

    def _write(self, args: TrainingArguments, state: TrainerState) -> None:
        if state.is_world_process_zero and any("loss" in entry for entry in state.log_history):
            plot_curves(state.log_history, Path(args.output_dir) / CURVE_FILE)


def plot_curves(log_history: list[dict[str, float]], path: Path) -> None:
    """Draw training and evaluation loss, and button accuracy where there is any, as a PNG."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 4.5), layout="constrained")
    losses = figure.subplots()
    losses.set(xlabel="optimizer step", ylabel="loss (nats a token)")
    for key, label in (("loss", "training loss"), ("eval_loss", "evaluation loss")):
        points = [(entry["step"], entry[key]) for entry in log_history if key in entry]
        if points:
            losses.plot(*zip(*points, strict=True), label=label, marker="o" if key == "eval_loss" else None)
    losses.set_yscale("log")
    losses.grid(alpha=0.3, which="both")
    accuracies = [(e["step"], 100 * e["eval_button_accuracy"]) for e in log_history if "eval_button_accuracy" in e]
    lines = losses.get_lines()
    if accuracies:
        right = losses.twinx()
        right.set(ylabel="button accuracy (%)", ylim=(0, 102))
        lines = [*lines, *right.plot(*zip(*accuracies, strict=True), "s--C2", label="evaluation button accuracy")]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
