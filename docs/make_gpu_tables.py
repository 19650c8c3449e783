"""Write the tables of docs/hardware.md from the result of benchmarks/on_gpu.sh.

python docs/make_gpu_tables.py

Without a result the page says that no GPU has run it. A rehearsal is refused.
"""

import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks import decision_latency
from benchmarks.gpu_parts.plan import LOSSES, PARTS, RATES, is_measured
from benchmarks.train_throughput import ROWS, throughput_table
from pokegemma.cli import parse_options, run
from pokegemma.environment import Gpu, Hardware
from pokegemma.errors import PokegemmaError
from pokegemma.options import option
from pokegemma.outputs import write_if_changed
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.tables import format_markdown_table
from pokegemma.training.batch_search.report import gib

PAGE, RESULT = PROJECT_ROOT / "docs" / "hardware.md", PROJECT_ROOT / "benchmarks" / "on_gpu.json"
START = "<!-- From here on python docs/make_gpu_tables.py writes the page, up to the next comment. -->\n"
END = "<!-- The end of what it writes. -->\n"
NOT_MEASURED = "**No GPU has run it yet**, so nothing on this page was measured on one.\n"


@dataclass
class TableOptions:
    result: str | None = option(
        None, "JSON file of benchmarks/on_gpu.sh. Default: benchmarks/on_gpu.json, if it exists."
    )


Record = dict[str, Any]


def main() -> None:
    (options,) = parse_options(TableOptions, description=__doc__)
    record = read_result(Path(options.result) if options.result else RESULT, required=options.result is not None)
    write_if_changed(PAGE, write_page(PAGE.read_text(encoding="utf-8"), record))


def read_result(path: Path, *, required: bool) -> Record | None:
    """Return the result of a run; None where it does not exist and is not `required`.

    Raises:
        PokegemmaError: it cannot be read, or is a rehearsal.
    """
    if not path.exists() and not required:
        return None
    try:
        record = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise PokegemmaError(f"{path} cannot be read: {error}") from error
    if not isinstance(record, dict) or record.get("stage") != "on_gpu":
        raise PokegemmaError(f"{path} is not a result of benchmarks/on_gpu.sh")
    if record["rehearsal"]:
        raise PokegemmaError(f"{path} is a rehearsal, whose figures mean nothing; run benchmarks/on_gpu.sh on a GPU")
    return record


def write_page(page: str, record: Record | None) -> str:
    """Return the page with what a run measured, or with the sentence that none has."""
    before, _, rest = page.partition(START)
    _, _, after = rest.partition(END)
    return f"{before}{START}\n{NOT_MEASURED if record is None else describe(record)}\n{END}{after}"


def describe(record: Record) -> str:
    """Return the machine and all tables in Markdown, each only if it has a row."""
    parts = (training, memory, batch_size, latency, exactness, not_measured)
    return "\n\n".join([machine(record), *(text for part in parts if (text := part(record)))]) + "\n"


def measured(record: Record, part: str) -> list[Record]:
    return [row for row in record["parts"][part]["rows"] if is_measured(row)]


def rates_of(record: Record) -> Record | None:
    return next((row for row in measured(record, "preparation") if row["unit"] == RATES), None)


def machine(record: Record) -> str:
    hardware = Hardware(**{**record["hardware"], "gpus": tuple(Gpu(**gpu) for gpu in record["hardware"]["gpus"])})
    versions = ", ".join(f"{name} {version}" for name, version in record["versions"].items())
    text = f"{hardware.describe()}; commit {record['commit'][:7]}, {record['created'][:10]}; {versions}."
    if rates := rates_of(record):
        text += (
            f" In bfloat16, a large matrix product reached {rates['flop_per_s'] / 1e12:.3g} teraFLOP/s, and a copy "
            f"{rates['bytes_per_s'] / 1e9:.3g} GB/s."
        )
    if record["rehearsal"]:
        return text + " **A rehearsal with tiny shapes: its figures mean nothing.**"
    return text + " Weights are random, in Gemma-3-4B's shape."


def training(record: Record) -> str:
    rows = [row for row in measured(record, "training") if row["unit"] != LOSSES]
    if not rows:
        return ""
    stock = next((row["decisions_per_second"] for row in rows if row["name"] == ROWS[0].name), None)
    rows = [{**row, "ratio": row["decisions_per_second"] / stock if stock else None} for row in rows]
    rates = rates_of(record)
    text = f"**Training steps.** {losses_note(record)}\n\n"
    return text + throughput_table(rows, rates and rates["flop_per_s"] / 1e12)


def losses_note(record: Record) -> str:
    losses = next((row for row in measured(record, "training") if row["unit"] == LOSSES), None)
    if losses is None:
        return "The losses were not compared with stock TRL's."
    return f"Losses differ from stock TRL's by {losses['largest_difference']:.1e} at most."


def trials(rows: Sequence[Record]) -> Iterator[Sequence[str]]:
    """Yield the cells of each trial of a batch size."""
    for row in rows:
        for attempt in row["trials"]:
            trial, estimated = attempt["trial"], sum(attempt["estimated_bytes"].values())
            peak = "" if trial["peak_bytes"] is None else gib(trial["peak_bytes"])
            speed = f"{trial['decisions_per_second']:.3g}" if trial["fits"] else f"does not fit: {trial['reason']}"
            yield (row["finetuning"], str(attempt["batch_size"]), gib(estimated), peak, speed)


TRIALS = ("", "batch", "estimate, GiB", "measured, GiB", "decisions/s")


def memory(record: Record) -> str:
    rows = measured(record, "memory")
    if not rows:
        return ""
    note = f"The longest samples as frames ({rows[0]['longest_rows_tokens'][0]} tokens), gradient checkpointing. "
    note += "Measured is all memory in use on the GPU, with the CUDA contexts of the trial and of the search."
    return f"**Peak memory.** {note}\n\n{format_markdown_table(TRIALS, trials(rows))}"


def batch_size(record: Record) -> str:
    rows = measured(record, "batch size")
    if not rows:
        return ""
    row = rows[0]
    found = row["found"] and f"BATCH_SIZE={row['found']['BATCH_SIZE']} GRAD_ACCUM={row['found']['GRAD_ACCUM']}"
    note = f"`scripts/find_batch_size.py` within {gib(row['limit_bytes'])} GiB found {found or 'no size that fits'}."
    return f"**Batch size.** {note}\n\n{format_markdown_table(TRIALS, trials(rows))}"


def latency(record: Record) -> str:
    rows = measured(record, "latency")
    if not rows:
        return ""
    written = " and ".join(sorted({str(row["tokens_written"]) for row in rows}))
    note = (
        f"Sessions of {rows[0]['num_decisions']} decisions; generation writes {written} tokens. Buttons are compared "
        f"with those scored in one pass; largest difference of a probability "
        f"{max(row['largest_difference'] for row in rows):.1e}."
    )
    return f"**One decision.** {note}\n\n{decision_latency.format_table([one for row in rows for one in row['rows']])}"


def exactness(record: Record) -> str:
    lines = []
    for row in measured(record, "exactness"):
        if "differences" in row:
            lines += [
                f"- {name}: loss {found['loss']:.1e}, gradient {found['gradient']:.1e} from {row['reference']}"
                for name, found in row["differences"].items()
            ]
        else:
            mode = row["mode"]
            lines.append(
                f"- {mode['engine']} with one process: losses and gradient norms differ by "
                f"{row['largest_relative_difference']:.1e} (relative) from training without it"
            )
    return "**Exactness.**\n\n" + "\n".join(lines) if lines else ""


def not_measured(record: Record) -> str:
    """Return what has no figures, and why."""
    lines = []
    for part in PARTS:
        result = record["parts"][part.name]
        reasons = {row["unit"]: row.get("skipped") or row.get("failed") for row in result["rows"]}
        for unit in part.units:
            if reason := reasons.get(unit, result["reason"]):
                lines.append(f"- {part.name}, {unit}: {reason}")
    return "**Not measured, or failed.**\n\n" + "\n".join(lines) if lines else ""


if __name__ == "__main__":
    run(main)
