"""Checks of a converted dataset: what each found, with numbers, and every bad record by name."""

from collections import Counter
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.data.prompts import ANSWER_PREFIX, BUTTONS, AnswerError, answer_button, parse_answer
from pokegemma.data.samples import EVAL_FILE, Sample, dataset_files, scan_samples
from pokegemma.errors import PokegemmaError

Status = Literal["PASS", "WARN", "FAIL", "SKIP"]

NO_SAMPLES = "no line is a sample"

MAX_MAJORITY_SHARE = 0.7
"""Above this share of one button, a model that always presses it seems to be good."""


@dataclass(frozen=True)
class Check:
    """What one check found.

    `summary` is one line with its numbers; `details` names every record that it is about, one a line.
    """

    name: str
    status: Status
    summary: str
    details: tuple[str, ...] = ()


@dataclass(frozen=True)
class Split:
    """One JSONL file of a dataset; it is read line by line, as often as needed."""

    name: str
    path: Path

    @property
    def folder(self) -> Path:
        return self.path.parent

    def samples(self) -> Iterator[Sample]:
        """Yield the lines that are samples; `check_records` reports the others."""
        return (sample for _, sample in self.located())

    def located(self) -> Iterator[tuple[str, Sample]]:
        """Yield ("train.jsonl:42", sample) for each line that is a sample."""
        for number, sample, _ in scan_samples(self.path):
            if sample is not None:
                yield f"{self.path.name}:{number}", sample


def find_splits(dataset_path: Path, eval_dataset_path: Path | None = None) -> tuple[Split, Split | None]:
    """Return train and eval (or None) of a dataset folder, or of a JSONL file and another folder or file.

    Raises:
        PokegemmaError: a file that was named does not exist.
    """
    train, held_out = dataset_files(dataset_path)
    if eval_dataset_path is not None:
        held_out = eval_dataset_path / EVAL_FILE if eval_dataset_path.is_dir() else eval_dataset_path
        if not held_out.is_file():
            raise PokegemmaError(f"--eval_dataset_path: {held_out} not found")
    return Split("train", train), held_out and Split("eval", held_out)


def skipped(name: str, why: str) -> Check:
    """Return the result of a check that could not run."""
    return Check(name, "SKIP", why)


def percent(part: int, whole: int) -> str:
    """Return `part` of `whole` as "12.3 %"."""
    return f"{100 * part / whole:.1f} %" if whole else "0.0 %"


def check_records(splits: Iterable[Split]) -> Check:
    """Fail if a line of a file is not a sample, a file has no sample, or an id is used twice.

    Raises:
        PokegemmaError: a file cannot be read.
    """
    details, counts, ids = [], [], set()
    for split in splits:
        num_good = 0
        for number, sample, problems in scan_samples(split.path):
            where = f"{split.path.name}:{number}"
            details += [f"{where}: {problem}" for problem in problems]
            if sample is None:
                continue
            num_good += 1
            if sample.id in ids:
                details.append(f"{where}: id {sample.id!r} was used before")
            ids.add(sample.id)
        if not num_good:
            details.append(f"{split.path.name} contains no sample")
        counts.append(f"{num_good} {split.name}")
    summary = f"{' + '.join(counts)} samples"
    if details:
        return Check("records", "FAIL", f"{summary}; {len(details)} problems", tuple(details))
    return Check("records", "PASS", f"{summary}, every line a sample, every id once")


def _answer_problems(sample: Sample) -> list[str]:
    try:
        answer = parse_answer(sample.output)
    except AnswerError as error:
        return [f"output: {error}"]
    problems = []
    if any("\ud800" <= letter <= "\udfff" for letter in answer.reasoning + answer.context):
        problems.append("output: its reasoning or context contains text that UTF-8 cannot encode")
    if not sample.output.startswith(f'{ANSWER_PREFIX}{answer.button}"'):
        problems.append(f'output does not begin with {ANSWER_PREFIX}{answer.button}": {sample.output[:40]!r}')
    pressed = sample.metadata.get("buttons")
    if pressed is not None and pressed[:1] != [answer.button] and not sample.metadata.get("corrected"):
        problems.append(f"output has {answer.button!r}, metadata.buttons {pressed!r}")
    unknown = [button for button in sample.previous_buttons if button not in BUTTONS]
    if unknown:
        problems.append(f"metadata.previous_buttons: {unknown[0]!r} is not one of {', '.join(BUTTONS)}")
    return problems


def check_answers(splits: Iterable[Split]) -> Check:
    """Fail if an answer does not parse, does not begin with its button, or contradicts the buttons pressed."""
    details, num_samples = [], 0
    for split in splits:
        for where, sample in split.located():
            num_samples += 1
            details += [f"{where} ({sample.id}): {problem}" for problem in _answer_problems(sample)]
    if not num_samples:
        return skipped("answers", NO_SAMPLES)
    if details:
        return Check("answers", "FAIL", f"{len(details)} problems in {num_samples} answers", tuple(details))
    return Check("answers", "PASS", f"{num_samples} answers parse and begin with their button")


def _count_buttons(split: Split) -> Counter[str]:
    return Counter(button for sample in split.samples() if (button := answer_button(sample.output)))


def _shares(counts: dict[str, int]) -> str:
    total = sum(counts.values())
    return ", ".join(f"{button} {percent(count, total)}" for button, count in counts.items())


def check_buttons(train: Split, held_out: Split | None) -> Check:
    """Show the button distribution; fail if train has one button only, warn if it is lopsided or eval has others."""
    counts = {split.name: _count_buttons(split) for split in (train, held_out) if split}
    learned = counts[train.name]
    if not learned:
        return skipped("buttons", "no answer in train parses")
    details = tuple(f"{name}: {_shares({button: part[button] for button in BUTTONS})}" for name, part in counts.items())
    (majority, num_majority), *_ = learned.most_common()
    summary = _shares(dict(learned.most_common()))
    unseen = sorted(set(counts[held_out.name]) - set(learned)) if held_out else []
    if len(learned) == 1:
        return Check("buttons", "FAIL", f"train presses {majority} only: nothing to learn", details)
    if unseen:
        return Check("buttons", "WARN", f"{summary}; eval also has {', '.join(unseen)}", details)
    if num_majority > MAX_MAJORITY_SHARE * learned.total():
        return Check("buttons", "WARN", f"{summary}: a model that always presses {majority} looks good", details)
    return Check("buttons", "PASS", summary, details)


def check_sessions(train: Split, held_out: Split) -> Check:
    """Fail if a session is in both splits."""
    train_sessions = {sample.session for sample in train.samples()}
    eval_sessions = {sample.session for sample in held_out.samples()}
    if not train_sessions or not eval_sessions:
        return skipped("sessions", NO_SAMPLES)
    shared = sorted(train_sessions & eval_sessions)
    summary = f"{len(shared)} shared by {len(train_sessions)} train and {len(eval_sessions)} eval sessions"
    return Check("sessions", "FAIL" if shared else "PASS", summary, tuple(shared))
