"""From a checkpoint to a registered version: merge, evaluate, export, compare the exports, register, upload."""

import logging
import time
from pathlib import Path
from typing import Any

from pokegemma.data.samples import dataset_files
from pokegemma.fingerprints import CARD_FILE
from pokegemma.outputs import write_if_changed
from pokegemma.release import hub
from pokegemma.release.gates import check_gates, read_gates
from pokegemma.release.measurements import read_json
from pokegemma.release.model_card import render_card
from pokegemma.release.options import EXPORTS, PipelineOptions
from pokegemma.release.plan import make_steps
from pokegemma.release.step_runner import Step, StepRunner, lock_folder

logger = logging.getLogger(__name__)


def explain_steps(options: PipelineOptions) -> list[tuple[str, str]]:
    """Return what each step would do: "unchanged", or why it runs. Nothing is run or written."""
    steps, runner, running = make_steps(options), StepRunner(Path(options.output_dir)), list[Step]()
    explained = []
    if steps[0].name != "merge":
        explained.append(("merge", f"left out: {options.checkpoint} is a whole model"))
    for step in steps:
        upstream = [earlier.name for earlier in running if earlier.output in step.inputs.values()]
        if upstream and step.name in runner.record:
            action = f"runs if the output of {' or '.join(upstream)} differs"
        else:
            reason = runner.reason_to_run(step)
            action = f"runs: {reason}" if reason else "unchanged"
        if action != "unchanged":
            running.append(step)
        explained.append((step.name, action))
    return explained


def run_pipeline(options: PipelineOptions) -> dict[str, Any]:
    """Run the steps that have to run, check every gate, and upload.

    Returns:
        "steps" ({"name", "ran", "seconds" of its last run} of each), "version" that was registered (None without),
        "pushed" (the address of the upload, None without) and "seconds" of this run.

    Raises:
        CheckFailedError: a step or a gate failed; the steps before it are not repeated by the next run.
        PokegemmaError: a user's mistake, or another pipeline runs in the folder.
    """
    started, steps, output_dir = time.monotonic(), make_steps(options), Path(options.output_dir)
    outputs = {step.name: step.output for step in steps}
    model = outputs.get("merge", Path(options.checkpoint))
    exports = {kind: outputs[f"export_{kind}"] for kind in EXPORTS if f"export_{kind}" in outputs}
    pushed = None
    if options.push_to_hub:
        hub.check_hub(options.push_to_hub)
    with lock_folder(output_dir) as runner:
        if "merge" not in outputs:
            logger.info("merge: left out, %s is a whole model", options.checkpoint)
        done = [run_if_changed(step, options, runner) for step in steps if step.name != "register"]
        card = render_card(
            model,
            evaluation=outputs["evaluate"],
            parity=outputs.get("parity"),
            dataset=dataset_files(Path(options.dataset_path))[1],
            exports=exports,
            license_id=options.license,
            name=options.name,
        )
        for folder in (output_dir, *([model] if "merge" in outputs else [])):
            write_if_changed(folder / CARD_FILE, card)
        done += [run_if_changed(step, options, runner) for step in steps if step.name == "register"]
        if options.push_to_hub:
            pushed = hub.push(options.push_to_hub, model, card=card, exports=exports, private=not options.hub_public)
    version = read_json(outputs["register"])["version"] if options.register else None
    return {"steps": done, "version": version, "pushed": pushed, "seconds": time.monotonic() - started}


def run_if_changed(step: Step, options: PipelineOptions, runner: StepRunner) -> dict[str, Any]:
    """Run a step if something that it depends on has changed, and check its gates."""
    reason = runner.reason_to_run(step)
    logger.info("%s: %s", step.name, reason or "unchanged, not repeated")
    if reason:
        runner.run(step)
    check_gates(step.name, read_gates(step.name, step.output, options))
    return {"name": step.name, "ran": reason is not None, "seconds": runner.record[step.name]["seconds"]}
