"""Datasets of other tools, recognised so that the error can name them."""

import json
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.provenance import is_hub_id

_KINDS = (
    ({"messages"}, "a chat dataset of TRL or LLaMA-Factory"),
    ({"conversations"}, "a ShareGPT dataset of LLaMA-Factory or LLaVA"),
    ({"prompt", "completion"}, "a prompt-completion dataset of TRL"),
    ({"chosen", "rejected"}, "a preference dataset of TRL"),
    ({"instruction", "output"}, "an Alpaca dataset of LLaMA-Factory"),
    ({"text"}, "a language-modelling dataset of TRL"),
)
_SUFFIXES = {".parquet": "Parquet", ".arrow": "Arrow", ".csv": "CSV", ".tar": "WebDataset", ".json": "JSON"}
_OWN_FILES = ("conversion_report.json", "run.json")
_LISTED_FOLDERS = ("", "data", "train", "default")
_MAX_LINE_BYTES = 2**20
_READS = (
    "this project reads train.jsonl and its pictures as scripts/convert_eevee_data_v2.py writes them from recorded "
    "sessions (docs/format_spec.md)"
)


def describe_record(record: dict[str, Any]) -> str | None:
    """Return which other tool's dataset a record is of, with its keys; None if none is recognised."""
    if "frames" in record:  # a sample of this project
        return None
    for keys, kind in _KINDS:
        if keys <= set(record):
            return f"{kind} (keys {', '.join(sorted(map(str, record)))})"
    return None


def refuse_foreign_dataset(path: Path) -> None:
    """Refuse a dataset that is recognised as that of another tool.

    Args:
        path: a folder or a file, as the user named it, or a dataset's id on the Hub.

    Raises:
        PokegemmaError: it is one.
    """
    found = None
    if path.is_dir():
        own = [path / name for name in ("train.jsonl", "eval.jsonl") if (path / name).is_file()]
        found = _describe_file(own[0]) if own else _describe_folder(path)
    elif path.is_file():
        found = _describe_file(path)
    elif is_hub_id(str(path)) and not path.parent.exists():
        found = "no such folder here, and datasets of the Hugging Face Hub are not read"
    if found:
        raise PokegemmaError(f"{path}: {found}; {_READS}")


def _describe_folder(folder: Path) -> str | None:
    for name in _LISTED_FOLDERS:
        for path in sorted((folder / name).iterdir()) if (folder / name).is_dir() else ():
            if path.suffix in _SUFFIXES and path.name not in _OWN_FILES:
                kind = _SUFFIXES[path.suffix]
                return f"no train.jsonl, but {path.relative_to(folder)}, of a {kind} dataset of other tools"
    return None


def _describe_file(path: Path) -> str | None:
    try:
        with open(path, "rb") as file:
            line = file.readline(_MAX_LINE_BYTES).strip()
            more = file.read(_MAX_LINE_BYTES) if line.startswith(b"[") else b""
    except OSError:  # the reader of the file reports it
        return None
    if line.startswith(b"PAR1"):
        return "a Parquet file, a dataset of other tools"
    is_array = line.startswith(b"[")
    text = (
        (line + b"\n" + more).decode(errors="replace").removeprefix("[") if is_array else line.decode(errors="replace")
    )
    try:
        record, _ = json.JSONDecoder().raw_decode(text.lstrip())
    except (ValueError, RecursionError):
        record = None
    kind = describe_record(record) if isinstance(record, dict) else None
    return kind or ("a JSON array, a dataset of other tools" if is_array and path.suffix == ".json" else None)
