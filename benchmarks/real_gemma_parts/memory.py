"""The memory of real training steps next to the estimate of scripts/validate_training.py."""

from typing import Any

from benchmarks.gpu_parts.memory import search
from benchmarks.gpu_parts.plan import Run
from pokegemma.environment import GIB
from pokegemma.tables import format_markdown_table

WAYS = ("lora", "full", "qlora")


def measure(run: Run) -> dict[str, Any]:
    """Train two steps of one sample in each way, each in a process of its own."""
    return {"ways": [search(run, finetuning, effective_batch_size=1, limit_gib=None) for finetuning in WAYS]}


def table(record: dict[str, Any]) -> str:
    rows = []
    for way in record["ways"]:
        trial = way["trials"][0]
        parts, measured = trial["estimated_bytes"], trial["trial"]["peak_bytes"]
        estimated = sum(parts.values())
        rows.append(
            (
                f"{way['finetuning']}, {way['dtype']}",
                f"{estimated / GIB:.2f}",
                f"{measured / GIB:.2f}",
                f"{estimated / measured:.2f}",
                ", ".join(f"{name} {size / GIB:.2f}" for name, size in parts.items()),
            )
        )
    note = (
        f"The longest sample as frames ({record['ways'][0]['longest_rows_tokens'][0]:,} tokens), with gradient "
        "checkpointing. Measured is the peak memory of the process on a CPU, with Python and its libraries. In GiB:\n\n"
    )
    return note + format_markdown_table(("", "estimate", "measured", "ratio", "parts of the estimate"), rows)
