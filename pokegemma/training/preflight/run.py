"""All checks in order: the machine, the dataset, the model on both, then one real step. None stops the others."""

import contextlib
import tempfile
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import constants

from pokegemma.data.checks import leakage
from pokegemma.data.checks.contact_sheet import write_contact_sheet
from pokegemma.data.checks.pictures import check_grids, check_pictures, check_windows, scan_pictures
from pokegemma.data.checks.records import (
    Check,
    Split,
    check_answers,
    check_buttons,
    check_records,
    check_sessions,
    skipped,
)
from pokegemma.data.checks.still_pictures import check_still
from pokegemma.data.prompts import Layout
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.environment import detect_hardware
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches import shared_memory
from pokegemma.gemma.batches.collator import Example
from pokegemma.gemma.batches.feature_cache import missing_feature_bytes
from pokegemma.gemma.batches.processor_collator import Collator, make_collator
from pokegemma.gemma.image_attention import ImageAttention
from pokegemma.gemma.loading import load_config, load_processor, require_full_precision
from pokegemma.training.options import Finetuning, automatic_dtype
from pokegemma.training.preflight import machine, memory, token_lengths
from pokegemma.training.preflight.loader_memory import Loading, measure_rows, needed_bytes
from pokegemma.training.preflight.model_access import check_model_access, is_on_this_machine
from pokegemma.training.preflight.one_step import check_step

Progress = Callable[..., Iterable]


@dataclass(frozen=True)
class Plan:
    """The training run to be checked.

    `step_command` starts the training script; None leaves out the one step. `eval_batch_size`: None for `batch_size`.
    `num_workers` decode pictures in the checks, `dataloader_workers` in training.
    """

    train: Split
    held_out: Split | None
    model: str
    layout: Layout
    finetuning: Finetuning
    max_length: int | None
    batch_size: int
    seed: int
    num_workers: int
    contact_sheet: Path
    output_dir: Path
    step_command: Sequence[str] | None
    eval_batch_size: int | None = None
    accumulation: int = 8
    dataloader_workers: int = 0
    max_decisions: int = 16
    overlap_decisions: int = 2
    image_size: int | None = None
    image_attention: ImageAttention | None = None
    vision_features: Path | None = None

    @property
    def splits(self) -> list[Split]:
        return [split for split in (self.train, self.held_out) if split is not None]

    def rows(self, split: Split) -> Iterator[tuple[str, Example]]:
        """Yield what a row of training shows, and where it is in the file."""
        if self.layout != "trajectory":
            yield from split.located()
            return
        cut = cut_trajectories(split.samples(), max_decisions=self.max_decisions, overlap=self.overlap_decisions)
        yield from ((split.path.name, trajectory) for trajectory in cut)


def run_checks(plan: Plan, *, progress: Progress) -> Iterator[Check]:
    """Yield the results one by one, as they come.

    Args:
        progress: tqdm, or what takes its (iterable, desc=, total=).
    """
    hardware = detect_hardware()
    yield machine.check_environment()
    yield machine.check_hardware(hardware)
    access = check_model_access(plan.model)
    yield access
    usable = access.status != "FAIL"
    yield from check_dataset(plan, progress)
    if usable:
        try:
            yield from _model_checks(plan, hardware, progress)
        except PokegemmaError as error:  # the Hub, which was there a moment ago
            yield Check("model", "FAIL", str(error))
            usable = False
    else:
        yield machine.check_disk({plan.output_dir: None})
        for name in ("token lengths", "shared memory", "memory (estimate)"):
            yield skipped(name, "needs the model")
    if plan.step_command is None:
        yield skipped("one step", "left out by --skip_step")
    elif not usable:
        yield skipped("one step", "needs the model")
    else:
        yield check_step(
            plan.step_command,
            plan.train,
            model=plan.model,
            layout=plan.layout,
            max_decisions=plan.max_decisions,
            finetuning=plan.finetuning,
            image_size=plan.image_size,
            image_attention=plan.image_attention,
            max_length=plan.max_length,
            seed=plan.seed,
        )


def check_dataset(plan: Plan, progress: Progress) -> Iterator[Check]:
    """Yield the results of the checks that need no model; see `run_checks`."""
    train, held_out, splits = plan.train, plan.held_out, plan.splits
    yield check_records(splits)
    if held_out is None:
        yield Check("eval split", "WARN", f"no eval.jsonl beside {train.path.name}: nobody will know what was learned")
    yield check_answers(splits)
    yield leakage.check_prompts(splits)
    yield check_buttons(train, held_out)
    scan = scan_pictures(
        splits,
        num_workers=plan.num_workers,
        progress=lambda results, total: progress(results, desc="pictures", total=total),
    )
    yield check_pictures(splits, scan)
    yield check_grids(splits, scan, num_workers=plan.num_workers)
    yield check_still(splits, scan)
    if held_out is None:
        for name in ("sessions", "identical windows", "text-only probe"):
            yield skipped(name, "needs an eval split")
    else:
        yield check_sessions(train, held_out)
        yield check_windows(train, held_out, scan)
        yield leakage.check_text_probe(train, held_out, seed=plan.seed)
    yield leakage.check_target_text(splits)
    yield leakage.check_history(splits)
    try:
        number = write_contact_sheet(splits, plan.contact_sheet, layout=plan.layout, seed=plan.seed)
    except OSError as error:
        yield Check(
            "contact sheet", "WARN", f"{plan.contact_sheet} cannot be written ({error.strerror}); use --contact_sheet"
        )
    else:
        yield Check("contact sheet", "PASS", f"{number} samples to look at in {plan.contact_sheet}")


def disk_needs(
    model: str,
    size: memory.ModelSize,
    output_dir: Path,
    *,
    finetuning: Finetuning,
    bytes_per_weight: int,
    step_command: Sequence[str] | None,
) -> dict[Path, int | None]:
    """Return the bytes to be written to each folder: the run, a download of the model, the one step (to TMPDIR)."""
    needs: dict[Path, int | None] = {
        output_dir: memory.disk_bytes(size, finetuning=finetuning, bytes_per_weight=bytes_per_weight)
    }
    others = {}
    if not is_on_this_machine(model):
        others[Path(constants.HF_HUB_CACHE)] = size.num_weights * 2
    if step_command is not None:
        temporary = Path(tempfile.gettempdir())
        others[temporary] = memory.step_bytes(size, finetuning=finetuning, bytes_per_weight=bytes_per_weight)
    for folder, num_bytes in others.items():
        needs[folder] = (needs.get(folder) or 0) + num_bytes
    return needs


def _check_shared_memory(
    plan: Plan, hardware: machine.Hardware, collators: dict[str, Collator], *, bytes_per_picture: int | None
) -> Check:
    """Fail if /dev/shm has no room for the batches of training's data loader workers."""
    name, free = "shared memory", shared_memory.free_bytes()
    if free is None or not plan.dataloader_workers:
        return skipped(name, "training has no data loader workers" if free else "not limited here")
    try:
        train, held_out = (
            split
            and measure_rows(
                collators[split.name], (example for _, example in plan.rows(split)), bytes_per_picture=bytes_per_picture
            )
            for split in (plan.train, plan.held_out)
        )
    except PokegemmaError as error:
        return skipped(name, str(error))
    needed = needed_bytes(
        Loading(
            num_workers=plan.dataloader_workers,
            batch_size=plan.batch_size,
            eval_batch_size=plan.eval_batch_size or plan.batch_size,
            accumulation=plan.accumulation,
            on_cpu=not hardware.usable_gpus,
            num_processes=max(1, len(hardware.usable_gpus)),
        ),
        train,
        held_out,
    )
    found = shared_memory.describe(needed, free)
    if needed > free:
        return Check(name, "FAIL", f"{found}: {shared_memory.advise(needed)}")
    return Check(name, "PASS", found)


def _model_checks(plan: Plan, hardware: machine.Hardware, progress: Progress) -> Iterator[Check]:
    config = load_config(plan.model, plan.image_size, plan.image_attention)
    require_full_precision(config, where=plan.model)
    processor = load_processor(plan.model, plan.image_size, plan.image_attention)
    bytes_per_weight = 2 if automatic_dtype(plan.finetuning) == "bfloat16" else 4
    size = memory.measure_model(config)
    needs = disk_needs(
        plan.model,
        size,
        plan.output_dir,
        finetuning=plan.finetuning,
        bytes_per_weight=bytes_per_weight,
        step_command=plan.step_command,
    )
    collators = {
        split.name: make_collator(processor, layout=plan.layout, dataset_folder=split.folder) for split in plan.splits
    }
    bytes_per_picture = None
    if plan.vision_features is not None:
        frames: set[str] = set()
        for split in plan.splits:
            for _, example in plan.rows(split):
                with contextlib.suppress(PokegemmaError):  # no grid picture: the check of token lengths names it
                    frames.update(collators[split.name].picture_paths(example))
        bytes_per_picture = processor.image_seq_length * config.get_text_config().hidden_size * bytes_per_weight
        needs[plan.vision_features] = (needs.get(plan.vision_features) or 0) + missing_feature_bytes(
            plan.vision_features, num_frames=len(frames), bytes_per_frame=bytes_per_picture
        )
    yield machine.check_disk(needs)
    check, lengths = token_lengths.check_token_lengths(
        plan.splits,
        collators,
        max_positions=config.text_config.max_position_embeddings,
        max_length=plan.max_length,
        rows=plan.rows,
        progress=lambda located, name: progress(located, desc=name),
    )
    yield check
    if lengths is None:
        for name in ("shared memory", "memory (estimate)"):
            yield skipped(name, "needs the token lengths")
        return
    yield _check_shared_memory(plan, hardware, collators, bytes_per_picture=bytes_per_picture)
    images = max(
        len(collators[split.name].picture_paths(example)) for split in plan.splits for _, example in plan.rows(split)
    )
    estimate = memory.estimate_memory(
        config,
        size,
        finetuning=plan.finetuning,
        lengths=lengths,
        images_per_sample=images,
        batch_size=plan.batch_size,
        bytes_per_weight=bytes_per_weight,
        eval_batch_size=0 if plan.held_out is None else plan.eval_batch_size or plan.batch_size,
    )
    batches = f"batches of {plan.batch_size}"
    if plan.held_out is not None and plan.eval_batch_size is not None:
        batches += f", in evaluation of {plan.eval_batch_size}"
    yield memory.check_memory(estimate, hardware, what=f"{plan.finetuning}, {batches}")
