"""loss_curve.png: the curves of loss and accuracy, drawn again after each evaluation."""

from pathlib import Path
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pokegemma.outputs import atomic_file

CURVE_FILE = "loss_curve.png"


class CurvePlotter(TrainerCallback):
    """Draw loss_curve.png in the output folder after each evaluation and at the end of training."""

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
    """Draw training loss, evaluation loss and accuracy (of buttons, of battle actions) over optimizer steps as a PNG.

    Args:
        log_history: the entries of `TrainerState`, each with its "step".
    """
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
    lines = losses.get_lines()
    for kind in ("button", "action"):
        key = f"eval_{kind}_accuracy"
        if accuracies := [(entry["step"], 100 * entry[key]) for entry in log_history if key in entry]:
            right = losses.twinx()
            right.set(ylabel=f"{kind} accuracy (%)", ylim=(0, 102))
            lines = [*lines, *right.plot(*zip(*accuracies, strict=True), "s--C2", label=f"evaluation {kind} accuracy")]
    figure.legend(handles=lines, loc="outside upper center", ncols=len(lines), frameon=False)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, format="png", dpi=120)
