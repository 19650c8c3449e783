"""From a checkpoint to a registered version: merge, verify, evaluate, export, parity, register, and perhaps the Hub."""

import importlib.util
import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.samples import dataset_files
from pokegemma.errors import PokegemmaError
from pokegemma.fingerprints import CARD_FILE
from pokegemma.outputs import write_if_changed
from pokegemma.release.model_card import render_card
from pokegemma.release.options import EXPORTS, PipelineOptions
from pokegemma.release.step_runner import State, Step, check_gates, run_step
from pokegemma.release.steps import StepBuilder

logger = logging.getLogger(__name__)

_EXTRAS = {"gguf": ("gguf", "llama_cpp"), "mlx": ("mlx", "mlx_vlm"), "register": ("registry", "mlflow")}


@dataclass(frozen=True)
class Plan:
    """The steps in order, and where things lie. `merges`: whether the checkpoint is an adapter."""

    options: PipelineOptions
    output_dir: Path
    merges: bool
    model: Path
    held_out: Path
    steps: tuple[Step, ...]
    exports: Mapping[str, Path]

    def place(self, name: str) -> Path:
        """Return where something of this name lies in the output folder."""
        return self.output_dir / name


def make_plan(options: PipelineOptions) -> Plan:
    """Check what can be checked before any work, and return the steps.

    Raises:
        PokegemmaError: something is not there: checkpoint, dataset, an optional part of the installation.
    """
    checkpoint, output_dir = Path(options.checkpoint), Path(options.output_dir).absolute()
    if not checkpoint.is_dir():
        raise PokegemmaError(f"--checkpoint {checkpoint}: no such folder")
    merges = not (checkpoint / "config.json").is_file()
    if merges and not (checkpoint / "adapter_config.json").is_file():
        raise PokegemmaError(f"--checkpoint {checkpoint}: no adapter (adapter_config.json) and no model (config.json)")
    train, held_out = dataset_files(Path(options.dataset_path))
    if held_out is None:
        raise PokegemmaError(f"--dataset_path {options.dataset_path}: no eval.jsonl to evaluate on")
    exports = {kind: output_dir / kind for kind in EXPORTS if kind in options.exports}
    for part in (*exports, *(["register"] if options.register else [])):
        extra, module = _EXTRAS[part]
        if importlib.util.find_spec(module) is None:
            raise PokegemmaError(f"{part} needs {module}: ./init.sh --with {extra}, or leave it out")
    if output_dir.exists() and not output_dir.is_dir():
        raise PokegemmaError(f"--output_dir {output_dir}: not a folder")
    model = output_dir / "merged" if merges else checkpoint.absolute()
    steps = StepBuilder(options, output_dir, model, checkpoint.absolute(), train, held_out, exports, merges)
    return Plan(options, output_dir, merges, model, held_out, tuple(steps.build()), exports)


def explain(plan: Plan, state: State) -> list[tuple[str, str]]:
    """Return for every step what it would do: "unchanged", or why it runs."""
    explained, running = [], set[str]()
    if not plan.merges:
        explained.append(("merge", f"left out: {plan.options.checkpoint} is a whole model"))
    for step in plan.steps:
        upstream = [name for name in step.after if name in running]
        reason = f"runs if what {' or '.join(upstream)} makes differs" if upstream else state.why(step)
        if upstream and step.name not in state.steps:
            reason = "runs: not done yet"
        elif reason and not upstream:
            reason = f"runs: {reason}"
        if reason:
            running.add(step.name)
        explained.append((step.name, reason or "unchanged"))
    return explained


def run_plan(plan: Plan, state: State, *, lock: int) -> list[tuple[str, bool, float]]:
    """Run what has to run, check every gate, write the model card before registering.

    Returns:
        (step, whether it ran, seconds it took when it did) of each step.

    Raises:
        CheckFailedError: a step or a gate failed; what was done before stays and is not done again.
    """

    done = []
    if not plan.merges:
        logger.info("merge: left out, %s is a whole model; nothing to verify", plan.options.checkpoint)
    carded = False
    for step in plan.steps:
        if step.name == "register":
            write_cards(plan)
            carded = True
        reason = state.why(step)
        if reason:
            logger.info("%s: %s", step.name, reason)
            run_step(step, state, lock=lock)
        else:
            logger.info("%s: unchanged, not done again", step.name)
        check_gates({"merge": "verify"}.get(step.name, step.name), step.gates())
        done.append((step.name, reason is not None, state.steps[step.name]["seconds"]))
    if not carded:
        write_cards(plan)
    state.write()  # hashes of files that were looked at
    return done


def read_version(plan: Plan) -> int | None:
    """Return the version that was registered, None where that was left out."""
    if not plan.options.register:
        return None
    return json.loads(plan.place("registration.json").read_text(encoding="utf-8"))["version"]


def write_cards(plan: "Plan") -> None:
    """Write README.md beside the results and, where the pipeline made the model's folder, into that."""
    text = render_card(
        plan.model,
        evaluation=plan.place("evaluation"),
        parity=plan.place("parity") if plan.exports else None,
        dataset=plan.held_out,
        exports=plan.exports,
        license_id=plan.options.license,
        name=plan.options.name,
    )
    for folder in (plan.output_dir, *([plan.model] if plan.merges else [])):
        write_if_changed(folder / CARD_FILE, text)
