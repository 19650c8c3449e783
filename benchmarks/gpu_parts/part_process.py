"""Run a part of on_gpu.py in worker processes: within its time, and again after a unit that failed."""

import contextlib
import json
import os
import re
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import psutil

from benchmarks.gpu_parts.plan import Part, Run, is_measured
from pokegemma.provenance import PROJECT_ROOT
from pokegemma.training.batch_search.runner import kill_with_children

_POLL_S = 0.1
_LOG_LINES = 30
_ERROR = re.compile(r"(\w+\.)*\w*(Error|Exception|Interrupt)\b")

Status = Literal["completed", "skipped", "failed"]


@dataclass(frozen=True)
class PartResult:
    """How a part ended. `rows`: a dictionary for each unit, with its figures or why it has none."""

    status: Status
    reason: str | None = None
    seconds: float = 0.0
    limit_s: float = 0.0
    rows: list[dict[str, Any]] = field(default_factory=list)


def run_part(part: Part, run: Run, *, limit_s: float, on_row: Callable[[PartResult], None]) -> PartResult:
    """Measure the units of a part, for `limit_s` seconds at most.

    A unit that ends its process gets a row with the error and the end of the log; a new process goes on with the next
    one. At the end of the time the process is killed.

    Args:
        on_row: called whenever a unit has its row, with what a run that is killed now should leave.
    """
    if missing := sorted(set(part.needs) - run.measured().keys()):
        return PartResult("skipped", f"not measured: {', '.join(missing)}")
    began = time.monotonic()

    def result(status: Status, reason: str | None) -> PartResult:
        return PartResult(status, reason, round(time.monotonic() - began, 1), round(limit_s, 1), run.rows(part.name))

    on_row(result("failed", "the run ended here"))
    while len(rows := run.rows(part.name)) < len(part.units):
        log = run.rows_file(part.name).with_suffix(".log")
        returncode = _run_worker(
            part, run, log, ends=began + limit_s, on_row=lambda: on_row(result("failed", "the run ended here"))
        )
        rows = run.rows(part.name)
        if returncode is None:
            return result("failed", f"stopped after its {limit_s:.0f} s, {len(rows)} of {len(part.units)} measured")
        if len(rows) < len(part.units):
            text = log.read_text(encoding="utf-8", errors="replace")
            failed = error_in(text) or f"exit status {returncode}"
            run.add_row(part.name, {"unit": part.units[len(rows)], "failed": failed, "log": last_lines(text)})
            on_row(result("failed", "the run ended here"))
    return _judge(rows=run.rows(part.name), result=result)


def _judge(rows: list[dict[str, Any]], result: Callable[[Status, str | None], PartResult]) -> PartResult:
    failed = [f"{row['unit']}: {row['failed']}" for row in rows if "failed" in row]
    if failed:
        return result("failed", "; ".join(failed))
    if not any(map(is_measured, rows)):
        return result("skipped", rows[0]["skipped"])
    return result("completed", None)


def _run_worker(part: Part, run: Run, log: Path, *, ends: float, on_row: Callable[[], None]) -> int | None:
    """Run a worker; return its exit status, or None where it was killed at the end of the time.

    An exception in this process, such as that of Ctrl-C or SIGTERM, kills the worker, too.
    """
    task = json.dumps({"part": asdict(part), "ends": ends, "folder": str(run.folder), "rehearse": run.rehearse})
    command = [sys.executable, "-m", "benchmarks.gpu_parts.worker", task]
    environment = {**os.environ, "TMPDIR": str(run.folder)}  # what a process that is killed leaves is deleted, too
    num_rows = len(run.rows(part.name))
    with (
        open(log, "wb") as output,
        subprocess.Popen(
            command,
            cwd=PROJECT_ROOT,
            env=environment,
            stdin=subprocess.DEVNULL,
            stdout=output,
            stderr=subprocess.STDOUT,
        ) as started,
    ):
        try:
            while started.poll() is None and time.monotonic() < ends:
                with contextlib.suppress(subprocess.TimeoutExpired):
                    started.wait(_POLL_S)
                if len(run.rows(part.name)) > num_rows:
                    num_rows = len(run.rows(part.name))
                    on_row()
        finally:
            is_late = started.poll() is None
            if is_late:
                kill_with_children(psutil.Process(started.pid))
    return None if is_late else started.returncode


def error_in(log: str) -> str | None:
    """Return the line of a log that tells why a process ended: our own error, an exception's line, or the last line."""
    lines = [line.strip() for line in log.splitlines() if line.strip()]
    ours = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    raised = [line for line in lines if _ERROR.match(line)]
    return next((found[-1] for found in (ours, raised, lines) if found), None)


def last_lines(log: str) -> list[str]:
    """Return the end of a log, without what progress bars have overwritten."""
    return [line.rpartition("\r")[2] for line in log.split("\n") if line.strip()][-_LOG_LINES:]
