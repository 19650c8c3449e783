"""From a checkpoint to a registered version: merge, evaluate, export, compare the exports, register, upload."""

import logging
import time
from pathlib import Path
from typing import Any

from pokegemma.fingerprints import CARD_FILE
from pokegemma.outputs import write_if_changed
from pokegemma.release import hub
from pokegemma.release.gates import check_gates, read_gates
from pokegemma.release.measurements import read_json
from pokegemma.release.model_card import render_card
from pokegemma.release.plan import ReleasePlan
from pokegemma.release.step_commands import EARLIER_STEPS_READ, build_step
from pokegemma.release.step_runner import PipelineRecord, lock_folder, run_step

logger = logging.getLogger(__name__)


def explain_steps(plan: ReleasePlan) -> list[tuple[str, str]]:
    """Return what each step would do: "unchanged", or why it runs. Nothing is run or written."""
    record = PipelineRecord.read(plan.output_dir)
    explained, running = [], set[str]()
    if not plan.needs_merge:
        explained.append(("merge", f"left out: {plan.options.checkpoint} is a whole model"))
    for name in plan.steps:
        upstream = [step for step in EARLIER_STEPS_READ[name] if step in running]
        if name not in record.steps:
            action = "runs: not done yet"
        elif upstream:
            action = f"runs if the output of {' or '.join(upstream)} differs"
        else:
            reason = record.reason_to_run(build_step(name, plan, record.hashes))
            action = f"runs: {reason}" if reason else "unchanged"
        if action != "unchanged":
            running.add(name)
        explained.append((name, action))
    return explained


def run_pipeline(plan: ReleasePlan) -> dict[str, Any]:
    """Run the steps that have to run, check every gate, and upload.

    Returns:
        "steps" ({"name", "ran", "seconds" of its last run} of each), "version" that was registered (None without),
        "pushed" (the address of the upload, None without) and "seconds" of this run.

    Raises:
        CheckFailedError: a step or a gate failed; the steps before it are not repeated by the next run.
        PokegemmaError: a step failed by a user's mistake, or another pipeline runs in the folder.
    """
    started = time.monotonic()
    if plan.options.push_to_hub:
        hub.check_hub(plan.options.push_to_hub)
    PipelineRecord.read(plan.output_dir)  # refuses a folder of something else before a lock file is written there
    with lock_folder(plan.output_dir) as lock:
        record = PipelineRecord.read(plan.output_dir)
        if not plan.needs_merge:
            logger.info("merge: left out, %s is a whole model", plan.options.checkpoint)
        steps = [run_if_changed(name, plan, record, lock=lock) for name in plan.steps if name != "register"]
        write_cards(plan)
        if plan.options.register:
            steps.append(run_if_changed("register", plan, record, lock=lock))
        record.write()  # with the hashes of unchanged files
        pushed = upload(plan)
    version = read_json(plan.registration)["version"] if plan.options.register else None
    return {"steps": steps, "version": version, "pushed": pushed, "seconds": time.monotonic() - started}


def run_if_changed(name: str, plan: ReleasePlan, record: PipelineRecord, *, lock: int) -> dict[str, Any]:
    """Run a step if something that it depends on has changed, and check its gates."""
    step = build_step(name, plan, record.hashes)
    reason = record.reason_to_run(step)
    logger.info("%s: %s", name, reason or "unchanged, not repeated")
    if reason:
        run_step(step, record, lock=lock)
    check_gates(name, read_gates(name, plan))
    return {"name": name, "ran": reason is not None, "seconds": record.steps[name]["seconds"]}


def write_cards(plan: ReleasePlan) -> None:
    """Write README.md next to the results and, if the pipeline made the model's folder, into that folder."""
    text = render_card(
        plan.model,
        evaluation=plan.evaluation,
        parity=plan.parity if plan.exports else None,
        dataset=plan.held_out,
        exports=plan.exports,
        license_id=plan.options.license,
        name=plan.options.name,
    )
    for folder in (plan.output_dir, *([plan.model] if plan.needs_merge else [])):
        write_if_changed(folder / CARD_FILE, text)


def upload(plan: ReleasePlan) -> str | None:
    """Upload to the Hub if --push_to_hub is given; return the address."""
    if not plan.options.push_to_hub:
        return None
    card = Path(plan.output_dir, CARD_FILE).read_text(encoding="utf-8")
    return hub.push(
        plan.options.push_to_hub, plan.model, card=card, exports=plan.exports, private=not plan.options.hub_public
    )
