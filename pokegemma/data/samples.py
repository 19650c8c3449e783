"""The sample format (docs/format_spec.md): one decision a line of JSONL."""

import contextlib
import hashlib
import json
import re
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from pokegemma.data.checks.foreign_datasets import describe_record, refuse_foreign_dataset
from pokegemma.errors import PokegemmaError

TRAIN_FILE, EVAL_FILE = "train.jsonl", "eval.jsonl"
"""The files of a dataset folder; the second contains the held-out sessions, if there are any."""

_FIELDS = ("id", "frames", "image", "context", "question", "output", "metadata")
_SHOWN = ("context", "question", "output")
_MAX_PROBLEMS_NAMED = 5
_CONTROL_TOKEN = re.compile(
    r"<(pad|eos|bos|unk|mask|unused\d+|(start|end)_of_(turn|image|audio)|(image|audio)_soft_token)>"  # Gemma 3, 3n
    r"|\[multimodal\]"
    r"|<\|[\"/]?[A-Za-z][\w\"/-]*\|?>|<[\"/]?[A-Za-z][\w\"/-]*\|>"  # Gemma 4: <|turn>, <turn|>, <|image|>
    r"|<__media\w*__>"  # where llama.cpp puts a picture
)


@dataclass(frozen=True)
class Sample:
    """One decision: what the player saw and knew, and the answer.

    `frames` are paths relative to the JSONL file, oldest first; the last is what the player saw when deciding.
    `image` is the same window as one 2x2 picture, or None.
    """

    id: str
    frames: tuple[str, ...]
    image: str | None
    context: str
    question: str
    output: str
    metadata: dict[str, Any]

    @property
    def session(self) -> str:
        return self.metadata["session"]

    @property
    def episode(self) -> tuple[str, int | None]:
        """What samples share that were played without a break: the session, and where it last started anew."""
        return self.session, self.metadata.get("start_turn")

    @property
    def previous_buttons(self) -> list[str]:
        """Buttons pressed before this turn, oldest first, the last few only."""
        return self.metadata["previous_buttons"]

    @property
    def frame_turns(self) -> list[tuple[int, str]]:
        """The turn that each frame comes from, with the frame's path, as far as the metadata states it."""
        turns = self.metadata.get("frame_turns")
        turns = turns if isinstance(turns, list) and len(turns) == len(self.frames) else []
        return [(turn, path) for turn, path in zip(turns, self.frames, strict=False) if type(turn) is int]

    @classmethod
    def from_json(cls, line: str | bytes) -> "Sample":
        """Return the sample of one checked line of JSONL (see `scan_samples` for unchecked ones)."""
        record = json.loads(line)
        return cls(**{**record, "frames": tuple(record["frames"])})

    def to_json(self) -> str:
        """Return the sample as one line of JSONL, without the newline."""
        return json.dumps(asdict(self), ensure_ascii=False)


def find_control_token(text: str) -> str | None:
    """Return the first control token of Gemma 3, 3n or 4 in a text, or None.

    Tokenizers and engines would read it as the token itself: an end of turn in the middle of an answer, a second BOS, a
    picture that does not exist.
    """
    match = _CONTROL_TOKEN.search(text)
    return match[0] if match else None


def _fits_utf8(value: object) -> bool:
    """Return whether all text in a JSON value can be written: JSON may escape half of a surrogate pair."""
    try:
        json.dumps(value, ensure_ascii=False).encode()
    except (UnicodeEncodeError, RecursionError):
        return False
    return True


def _path_problem(path: object) -> str | None:
    if not isinstance(path, str) or not PurePosixPath(path).parts or not _fits_utf8(path):
        return f"{path!r} is not a path"
    pure = PurePosixPath(path)
    if pure.is_absolute() or "\\" in path or ":" in path or "\0" in path:
        return f"{path!r} is not a relative path (paths are relative to the JSONL file)"
    if ".." in pure.parts:
        return f"{path!r} leads out of the dataset folder"
    return None


def check_record(record: object) -> list[str]:
    """Return what is wrong with a decoded JSONL line as a sample; an empty list if nothing is. Opens no file."""
    if not isinstance(record, dict):
        return ["not a JSON object"]
    if foreign := describe_record(record):
        return [f"of {foreign}"]
    problems = [f"{name!r} is missing" for name in _FIELDS if name not in record]
    problems += [f"unknown key {name!r}" for name in record if name not in _FIELDS]
    for name in ("id", "context", "question", "output"):
        if name in record and not (isinstance(record[name], str) and record[name]):
            problems.append(f"{name!r} is not a text: {str(record[name])[:60]!r}")
        elif not _fits_utf8(record.get(name)):
            problems.append(f"{name!r} contains text that UTF-8 cannot encode: {record[name][:60]!r}")
        elif name in _SHOWN and name in record and (token := find_control_token(record[name])):
            problems.append(f"{name!r} contains {token}, a control token of the model")
    frames = record.get("frames", [None])
    if not isinstance(frames, list) or not frames:
        problems.append("'frames' is not a list of paths")
    elif "frames" in record:
        problems += [problem for problem in map(_path_problem, frames) if problem]
    if record.get("image") is not None and (problem := _path_problem(record["image"])):
        problems.append(problem)
    metadata = record.get("metadata", {})
    if not isinstance(metadata, dict):
        problems.append("'metadata' is not an object")
    elif "metadata" in record:
        if not (isinstance(metadata.get("session"), str) and metadata["session"]):
            problems.append("'metadata.session' is not a text")
        if not isinstance(metadata.get("turn"), int) or isinstance(metadata.get("turn"), bool):
            problems.append("'metadata.turn' is not a whole number")
        previous = metadata.get("previous_buttons")
        if not isinstance(previous, list) or not all(isinstance(button, str) for button in previous):
            problems.append("'metadata.previous_buttons' is not a list of buttons")
        pressed = metadata.get("buttons")
        if pressed is not None and not (
            isinstance(pressed, list) and all(isinstance(button, str) for button in pressed)
        ):
            problems.append("'metadata.buttons' is not a list of buttons")
        if not _fits_utf8(metadata):
            problems.append("'metadata' contains text that UTF-8 cannot encode")
    return problems


def scan_samples(path: Path) -> Iterator[tuple[int, Sample | None, list[str]]]:
    """Yield (line number from 1, sample or None, problems) for every line of a JSONL file that is not blank.

    Raises:
        PokegemmaError: the file cannot be read.
    """
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open(path, "rb"))
        except OSError as error:
            raise PokegemmaError(f"{path} cannot be read: {error.strerror}") from error
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except (ValueError, RecursionError):
                yield number, None, ["not JSON"]
                continue
            problems = check_record(record)
            if problems:
                yield number, None, problems
            else:
                yield number, Sample.from_json(line), []


def read_samples(path: Path) -> Iterator[Sample]:
    """Yield the samples of a JSONL file in order.

    Raises:
        PokegemmaError: lines are not samples (raised after the last line), or the file is empty.
    """
    path, bad, num_bad, num_lines = Path(path), [], 0, 0
    for number, sample, problems in scan_samples(path):
        num_lines += 1
        if sample is not None:
            yield sample
            continue
        num_bad += 1
        if len(bad) < _MAX_PROBLEMS_NAMED:
            bad.append(f"line {number}: {problems[0]}")
    if num_bad:
        raise PokegemmaError(f"{path}: {num_bad} of {num_lines} lines are not samples: {'; '.join(bad)}")
    if not num_lines:
        raise PokegemmaError(f"{path} contains no samples")


def dataset_files(dataset_path: Path) -> tuple[Path, Path | None]:
    """Return (train.jsonl, eval.jsonl or None) of a dataset folder; a path of a JSONL file is taken as train.

    Raises:
        PokegemmaError: there is no such file, or it is the dataset of another tool.
    """
    path = Path(dataset_path)
    refuse_foreign_dataset(path)
    train = path / TRAIN_FILE if path.is_dir() else path
    if not train.is_file():
        raise _missing_file(train, path)
    held_out = train.parent / EVAL_FILE
    return train, held_out if held_out.is_file() and held_out != train else None


def held_out_file(dataset_path: Path) -> Path:
    """Return the file to measure a model on: eval.jsonl of a dataset folder, or the JSONL file that was named.

    Raises:
        PokegemmaError: there is no such file, or it is the dataset of another tool.
    """
    path = Path(dataset_path)
    refuse_foreign_dataset(path)
    held_out = path if path.suffix == ".jsonl" else path / EVAL_FILE
    train = held_out.parent / TRAIN_FILE
    if held_out != path and not held_out.is_file() and train.is_file():
        raise PokegemmaError(
            f"{held_out} not found: a dataset has this file if it has at least two sessions; "
            f"to measure accuracy on the training sessions, pass --dataset_path {train}"
        )
    if not held_out.is_file():
        raise _missing_file(held_out, path)
    return held_out


def _missing_file(file: Path, dataset_path: Path) -> PokegemmaError:
    folder = dataset_path if dataset_path.suffix != ".jsonl" else dataset_path.parent
    return PokegemmaError(
        f"{file} not found; convert sessions first: scripts/convert_eevee_data_v2.py --eevee_data_dir DIR "
        f"--output_dir {folder}"
    )


def dataset_hash(path: Path) -> str:
    """Return the SHA-256 of a JSONL file, in hex: which dataset a run saw."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def evenly_spread(items: Sequence[Any], count: int) -> list[Any]:
    """Return at most `count` of `items`, evenly spread, in order; always the same ones."""
    return [items[number * len(items) // count] for number in range(count)] if len(items) > count else list(items)
