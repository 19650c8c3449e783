"""All checks in order: the machine, the dataset, the model with the dataset, then one real step.

A check that fails does not stop the others.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path

from tqdm import tqdm

from pokegemma.data.checks import leakage, text_probe
from pokegemma.data.checks.contact_sheet import write_contact_sheet
from pokegemma.data.checks.pictures import check_grids, check_pictures, check_windows, scan_pictures
from pokegemma.data.checks.records import (
    Check,
    check_answers,
    check_buttons,
    check_records,
    check_sessions,
    skipped,
)
from pokegemma.data.checks.still_pictures import check_still
from pokegemma.environment import Hardware, detect_hardware
from pokegemma.errors import PokegemmaError
from pokegemma.training.preflight.disk import check_disk, disk_needs
from pokegemma.training.preflight.loader_memory import check_shared_memory, feature_bytes
from pokegemma.training.preflight.machine import check_environment, check_hardware
from pokegemma.training.preflight.memory import check_memory, estimate_memory, measure_model
from pokegemma.training.preflight.model_access import check_model_access
from pokegemma.training.preflight.one_step import check_step
from pokegemma.training.preflight.planned_run import PlannedRun
from pokegemma.training.preflight.token_lengths import check_token_lengths


def run_checks(run: PlannedRun) -> Iterator[Check]:
    """Yield the result of each check as soon as it is known."""
    hardware = detect_hardware()
    yield check_environment()
    yield check_hardware(hardware)
    access = check_model_access(run.options.model.model_name_or_path)
    yield access
    usable = access.status != "FAIL"
    yield from check_dataset(run)
    if usable:
        try:
            yield from _check_model(run, hardware)
        except PokegemmaError as error:  # such as the Hub, after it was reachable for the check of access
            yield Check("model", "FAIL", str(error))
            usable = False
    else:
        yield check_disk({Path(run.options.training.output_dir): None})
        yield from (
            skipped(name, "needs the model") for name in ("token lengths", "shared memory", "memory (estimate)")
        )
    if run.step_command is None:
        yield skipped("one step", "left out by --skip_step")
    elif not usable:
        yield skipped("one step", "needs the model")
    else:
        yield check_step(run.step_command, run.train, run.options)


def check_dataset(run: PlannedRun) -> Iterator[Check]:
    """Yield the results of the checks that need no model."""
    train, held_out, splits = run.train, run.held_out, run.splits
    yield check_records(splits)
    if held_out is None:
        summary = f"no eval.jsonl next to {train.path.name}: accuracy cannot be measured without it"
        yield Check("eval split", "WARN", summary)
    yield check_answers(splits)
    yield leakage.check_prompts(splits)
    yield check_buttons(train, held_out)
    scan = scan_pictures(splits, num_workers=run.num_workers, progress=_picture_progress)
    yield check_pictures(splits, scan)
    yield check_grids(splits, scan, num_workers=run.num_workers)
    yield check_still(splits, scan)
    if held_out is None:
        for name in ("sessions", "identical windows", "text-only probe"):
            yield skipped(name, "needs an eval split")
    else:
        yield check_sessions(train, held_out)
        yield check_windows(train, held_out, scan)
        yield text_probe.check_text_probe(train, held_out, seed=run.options.training.seed)
    yield leakage.check_target_text(splits)
    yield leakage.check_history(splits)
    yield leakage.check_frame_turns(splits)
    yield _draw_contact_sheet(run)


def _picture_progress(pictures: Iterable, total: int) -> Iterable:
    return tqdm(pictures, "pictures", total=total, leave=False)


def _draw_contact_sheet(run: PlannedRun) -> Check:
    """Draw the contact sheet; warn if it cannot be written."""
    name, path, options = "contact sheet", run.contact_sheet, run.options
    try:
        num_samples = write_contact_sheet(run.splits, path, layout=options.data.layout, seed=options.training.seed)
    except OSError as error:
        return Check(name, "WARN", f"{path} cannot be written ({error.strerror}); use --contact_sheet")
    return Check(name, "PASS", f"{num_samples} samples to look at in {path}")


def _check_model(run: PlannedRun, hardware: Hardware) -> Iterator[Check]:
    """Yield the results of the checks that need the model's config and processor, and no weights.

    Raises:
        PokegemmaError: the model cannot be read, or is stored quantised.
    """
    model, training, layout = run.options.model, run.options.training, run.options.data.layout
    checkpoint = model.open_checkpoint()
    checkpoint.require_full_precision()
    collators = {split.name: checkpoint.collator(layout=layout, dataset_folder=split.folder) for split in run.splits}
    picture_bytes = feature_bytes(checkpoint, run.options)
    size = measure_model(checkpoint.config)

    yield check_disk(disk_needs(run, size, collators, picture_bytes=picture_bytes))
    check, lengths = check_token_lengths(
        run.splits,
        collators,
        max_positions=checkpoint.config.text_config.max_position_embeddings,
        max_length=training.max_length,
        rows=run.rows,
    )
    yield check
    if lengths is None:
        yield from (skipped(name, "needs the token lengths") for name in ("shared memory", "memory (estimate)"))
        return
    yield check_shared_memory(run, hardware, collators, picture_bytes=picture_bytes)
    batch_size, eval_batch_size = training.per_device_train_batch_size, run.eval_batch_size
    estimate = estimate_memory(
        checkpoint.config,
        size,
        finetuning=model.finetuning,
        lora_r=model.lora_r,
        lengths=lengths,
        batch_size=batch_size,
        eval_batch_size=eval_batch_size,
        bytes_per_weight=run.bytes_per_weight,
    )
    batches = f"batches of {batch_size}"
    if eval_batch_size not in (0, batch_size):
        batches += f", in evaluation of {eval_batch_size}"
    yield check_memory(estimate, hardware, what=f"{model.finetuning}, {batches}")
