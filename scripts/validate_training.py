"""Check a dataset, the model and this machine before paying for a GPU.

python scripts/validate_training.py --dataset_path training_data --model_name_or_path google/gemma-3-4b-it

Prints a line for each check, then the records it is about; writes a contact sheet of random samples with their
answers. Exit status 1 when a check fails. --skip_step leaves out the last check, one real training step.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path

from tqdm import tqdm

from pokegemma.cli import parse_options, run
from pokegemma.data.checks.records import Check, find_splits
from pokegemma.data.prompts import Layout
from pokegemma.environment import default_finetuning
from pokegemma.errors import PokegemmaError

MAX_NAMED = 10


@dataclass
class ValidateOptions:
    """Which training run to check. The defaults are those of training."""

    dataset_path: str = field(metadata={"help": "Folder with train.jsonl and eval.jsonl, or a JSONL file."})
    eval_dataset_path: str | None = field(
        default=None, metadata={"help": "Folder or JSONL file to evaluate on; default: eval.jsonl beside train.jsonl."}
    )
    model_name_or_path: str = field(
        default="google/gemma-3-4b-it", metadata={"help": "Gemma 3 checkpoint with vision: a Hub id or a folder."}
    )
    layout: Layout = field(
        default="grid", metadata={"help": "grid: one 2x2 picture a sample; frames: each frame; trajectory: sessions."}
    )
    max_decisions: int = field(default=16, metadata={"help": "With --layout trajectory: decisions in a conversation."})
    overlap_decisions: int = field(default=2, metadata={"help": "The same: of these, from the conversation before."})
    finetuning: str = field(
        default=default_finetuning(),
        metadata={
            "help": "qlora, lora or full; default: qlora, or lora without bitsandbytes.",
            "choices": ["qlora", "lora", "full"],
        },
    )
    image_size: int | None = field(default=None, metadata={"help": "Pixels a side of a picture; default: the model's."})
    image_attention: str | None = field(
        default=None,
        metadata={"help": "bidirectional or causal; default: the model's.", "choices": ["bidirectional", "causal"]},
    )
    vision_features: str | None = field(
        default=None, metadata={"help": "Where training will keep features: for the disk check."}
    )
    max_length: int | None = field(default=None, metadata={"help": "Most tokens a sample may have."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "For the memory estimate."})
    per_device_eval_batch_size: int | None = field(
        default=None, metadata={"help": "The same, in evaluation. Default: as in training."}
    )
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "For the check of shared memory."})
    dataloader_num_workers: int = field(
        default_factory=lambda: min(4, os.cpu_count() or 1), metadata={"help": "The same: workers in training."}
    )
    output_dir: str = field(default="outputs", metadata={"help": "Where training will write: for the disk check."})
    contact_sheet: str | None = field(
        default=None, metadata={"help": "PNG to write; default: contact_sheet.png in the dataset's folder."}
    )
    skip_step: bool = field(default=False, metadata={"help": "Leave out the real training step."})
    num_workers: int = field(default=0, metadata={"help": "Processes that decode pictures; 0 means one a core."})
    seed: int = field(default=0, metadata={"help": "Which samples the contact sheet and the probe draw."})
    json: bool = field(default=False, metadata={"help": "Print JSON, with every bad record, instead of the table."})

    def __post_init__(self) -> None:
        self.overlap_decisions = min(self.overlap_decisions, self.max_decisions - 1)
        at_least = {
            "max_decisions": 1,
            "overlap_decisions": 0,
            "max_length": 1,
            "per_device_train_batch_size": 1,
            "per_device_eval_batch_size": 1,
            "gradient_accumulation_steps": 1,
            "dataloader_num_workers": 0,
            "num_workers": 0,
            "seed": 0,
        }
        for name, least in at_least.items():
            value = getattr(self, name)
            if value is not None and value < least:
                raise PokegemmaError(f"--{name}: {value} is less than {least}")


def print_check(check: Check) -> None:
    print(f"{check.status}  {check.name:<22}  {check.summary}", flush=True)
    if check.status in ("WARN", "FAIL"):
        for detail in check.details[:MAX_NAMED]:
            print(f"{'':30}{detail}")
        if len(check.details) > MAX_NAMED:
            print(f"{'':30}and {len(check.details) - MAX_NAMED} more (--json names all)")


def main() -> int:
    (options,) = parse_options(ValidateOptions, description=__doc__)
    train, held_out = find_splits(
        Path(options.dataset_path), Path(options.eval_dataset_path) if options.eval_dataset_path else None
    )
    from pokegemma.training.preflight.run import Plan, run_checks

    plan = Plan(
        train=train,
        held_out=held_out,
        model=options.model_name_or_path,
        layout=options.layout,
        max_decisions=options.max_decisions,
        overlap_decisions=options.overlap_decisions,
        finetuning=options.finetuning,
        image_size=options.image_size,
        image_attention=options.image_attention,
        max_length=options.max_length,
        seed=options.seed,
        batch_size=options.per_device_train_batch_size,
        eval_batch_size=options.per_device_eval_batch_size,
        accumulation=options.gradient_accumulation_steps,
        dataloader_workers=options.dataloader_num_workers,
        num_workers=options.num_workers or os.cpu_count() or 1,
        contact_sheet=Path(options.contact_sheet or train.folder / "contact_sheet.png"),
        output_dir=Path(options.output_dir),
        vision_features=Path(options.vision_features) if options.vision_features else None,
        step_command=None if options.skip_step else training_command(),
    )
    checks = []
    for check in run_checks(plan, progress=partial(tqdm, leave=False, file=sys.stderr)):
        checks.append(check)
        if not options.json:
            print_check(check)
    counts = Counter(check.status for check in checks)
    if options.json:
        record = {"failed": counts["FAIL"], "warnings": counts["WARN"], "contact_sheet": str(plan.contact_sheet)}
        print(json.dumps({**record, "checks": [asdict(check) for check in checks]}, indent=2, ensure_ascii=False))
    else:
        print(", ".join(f"{counts[status]} {status}" for status in ("PASS", "WARN", "FAIL", "SKIP")))
    return 1 if counts["FAIL"] else 0


def training_command() -> list[str]:
    return [sys.executable, str(Path(__file__).resolve().with_name("sft_pokemon_gemma3.py"))]


if __name__ == "__main__":
    run(main)
