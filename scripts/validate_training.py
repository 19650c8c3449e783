"""Check a dataset, the model and this machine before paying for a GPU.

python scripts/validate_training.py --dataset_path training_data --model_name_or_path google/gemma-3-4b-it

Takes the options of scripts/sft_pokemon_gemma3.py, so that a training run is checked as it is started. Prints a line
for each check, then the records that it found, and writes a contact sheet of random samples with their answers. The
last check is one real training step; --skip_step leaves it out. Exit status 1 when a check fails.
"""

import json
import os
import sys
from collections import Counter
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.checks.records import Check
from pokegemma.errors import check_ranges
from pokegemma.options import option

MAX_NAMED = 10


@dataclass
class ValidateOptions:
    """How to check the training run that the other options describe."""

    contact_sheet: str | None = option(None, "PNG to write. Default: contact_sheet.png in the dataset's folder.")
    skip_step: bool = option(False, "Do not run the training step.")
    num_workers: int = option(0, "Processes that decode pictures. 0: one for each core.")
    json: bool = option(False, "Print JSON with every bad record instead of the table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_workers", at_least=0)


def print_check(check: Check) -> None:
    print(f"{check.status}  {check.name:<22}  {check.summary}", flush=True)
    if check.status in ("WARN", "FAIL"):
        for detail in check.details[:MAX_NAMED]:
            print(f"{'':30}{detail}")
        if len(check.details) > MAX_NAMED:
            print(f"{'':30}and {len(check.details) - MAX_NAMED} more (--json names all)")


def main() -> int:
    from pokegemma.training.options import DataOptions, ModelOptions, RunOptions
    from pokegemma.training.preflight.planned_run import OneProcessOptions, PlannedRun
    from pokegemma.training.preflight.run import run_checks

    options, data, training, model = parse_options(
        ValidateOptions, DataOptions, OneProcessOptions, ModelOptions, description=__doc__
    )
    train, held_out = data.find_splits()
    training_script = Path(__file__).resolve().with_name("sft_pokemon_gemma3.py")
    planned = PlannedRun(
        options=RunOptions(data, training, model),
        train=train,
        held_out=held_out,
        contact_sheet=Path(options.contact_sheet or train.folder / "contact_sheet.png"),
        num_workers=options.num_workers or os.cpu_count() or 1,
        step_command=None if options.skip_step else [sys.executable, str(training_script)],
    )
    checks = []
    for check in run_checks(planned):
        checks.append(check)
        if not options.json:
            print_check(check)
    counts = Counter(check.status for check in checks)
    if options.json:
        record = {"failed": counts["FAIL"], "warnings": counts["WARN"], "contact_sheet": str(planned.contact_sheet)}
        print(json.dumps({**record, "checks": [asdict(check) for check in checks]}, indent=2, ensure_ascii=False))
    else:
        print(", ".join(f"{counts[status]} {status}" for status in ("PASS", "WARN", "FAIL", "SKIP")))
    return 1 if counts["FAIL"] else 0


if __name__ == "__main__":
    run(main)
