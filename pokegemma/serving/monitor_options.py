"""Options of scripts/health_monitor.py, and the questions that they select."""

from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample, dataset_files, evenly_spread, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.engines.questions import Question, build_questions
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.options import option

_DECISIONS_IN_TRAJECTORY = 4
_WEEK_S = 604_800.0
"""Longer times overflow in system calls; the shortest limit of one is 24 days."""


@dataclass
class MonitorOptions:
    """Which server to ask what, and the limits that it must keep; None: no such limit."""

    server_url: str = option(..., "URL of the server without /v1, such as http://127.0.0.1:8000.")
    dataset_path: str = option(
        ...,
        "Source of the questions: a converted dataset, or a JSONL file. Of a dataset, eval.jsonl is used if it exists.",
    )
    model: str | None = option(None, "Name of the model in requests. Default: the only one that the server lists.")
    num_samples: int = option(8, "Number of questions, spread over the dataset. They are asked in turn.")
    layout: Layout = option("grid", "How samples are shown. Use the layout of training.")
    image_size: int = option(896, "Width and height of the pictures in pixels. Use the size of training.")
    max_new_tokens: int = option(256, "Largest number of tokens of an answer.")
    interval_s: float = option(30.0, "Seconds from the start of a check to the start of the next one.")
    num_checks: int | None = option(None, "Stop after this many checks. Default: never.")
    duration_s: float | None = option(None, "Stop after this many seconds. Default: never.")
    timeout_s: float = option(30.0, "Seconds for a whole answer. A longer one is a timeout.")
    max_latency_p95_s: float | None = option(
        5.0, "Limit in seconds. A longer answer is slow. The 95th percentile over the window may not exceed the limit."
    )
    min_valid_rate: float = option(0.95, "Smallest share of the window's checks with a valid answer.")
    max_consecutive_failures: int = option(3, "This many checks in a row without a valid answer are a breach.")
    max_memory_gib: float | None = option(None, "Limit of the resident memory of the server's processes.")
    max_gpu_memory_gib: float | None = option(None, "Limit of memory in use on the GPUs.")
    max_restarts: int | None = option(None, "Limit of the server's restarts while it is watched.")
    window: int = option(20, "Number of checks over which percentiles and rates are computed.")
    pid: int | None = option(None, "Process whose memory is measured. Default: the one that listens on the port.")
    log_file: str | None = option(None, "Append a line of JSON for each check to this file.")
    metrics_port: int | None = option(None, "Serve Prometheus metrics on 127.0.0.1.")
    webhook_url: str | None = option(None, "URL to which breaches and recoveries are sent as JSON.")
    api_key_variable: str | None = option(None, "Environment variable that contains the server's API key.")
    exit_on_breach: bool = option(False, "Stop at the first breach.")
    json: bool = option(False, "Print the summary as JSON.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_samples", "image_size", "max_new_tokens", "num_checks", "pid", at_least=1)
        check_ranges(self, "max_consecutive_failures", "window", at_least=1)
        check_ranges(self, "timeout_s", above=0, at_most=_WEEK_S)
        check_ranges(self, "interval_s", at_least=0, at_most=_WEEK_S)
        check_ranges(self, "max_latency_p95_s", "max_memory_gib", "max_gpu_memory_gib", "duration_s", above=0)
        check_ranges(self, "min_valid_rate", at_least=0, at_most=1)
        check_ranges(self, "metrics_port", at_least=1, at_most=65535)
        if self.window < self.max_consecutive_failures:
            raise PokegemmaError(
                f"--window {self.window}: must be at least --max_consecutive_failures {self.max_consecutive_failures}"
            )


def read_questions(options: MonitorOptions) -> list[Question]:
    """Return the questions to ask, spread over the dataset."""
    train, held_out = dataset_files(Path(options.dataset_path))
    file = held_out or train
    examples: list[Sample | Trajectory] = list(read_samples(file))
    if options.layout == "trajectory":
        examples = list(cut_trajectories(examples, max_decisions=_DECISIONS_IN_TRAJECTORY, overlap=0))
    examples = evenly_spread(examples, options.num_samples)
    return build_questions(examples, layout=options.layout, dataset_folder=file.parent, size_px=options.image_size)
