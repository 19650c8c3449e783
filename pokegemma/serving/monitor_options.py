"""Options of scripts/health_monitor.py, and the questions that they select."""

from dataclasses import dataclass, field
from pathlib import Path

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import Sample, dataset_files, evenly_spread, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.engines.questions import Question, build_questions
from pokegemma.errors import PokegemmaError, check_ranges

_DECISIONS_IN_TRAJECTORY = 4
_WEEK_S = 604_800.0
"""Longer times overflow in system calls; the shortest limit of one is 24 days."""


@dataclass
class MonitorOptions:
    """Which server to ask what, and the limits that it must keep; None: no such limit."""

    server_url: str = field(metadata={"help": "The server, without /v1: http://127.0.0.1:8000."})
    dataset_path: str = field(
        metadata={"help": "Source of the questions: a converted dataset (its eval.jsonl, if any), or a JSONL file."}
    )
    model: str | None = field(
        default=None, metadata={"help": "Name of the model in requests; default: the only one that the server lists."}
    )
    num_samples: int = field(default=8, metadata={"help": "Questions to ask in turn, spread over the dataset."})
    layout: Layout = field(default="grid", metadata={"help": "How samples are shown: as in training."})
    image_size: int = field(default=896, metadata={"help": "Side of the pictures sent, in pixels: that of the model."})
    max_new_tokens: int = field(default=256, metadata={"help": "Tokens after which an answer is cut off."})
    interval_s: float = field(default=30.0, metadata={"help": "From the start of a check to that of the next."})
    num_checks: int | None = field(default=None, metadata={"help": "Stop after this many; default: never."})
    duration_s: float | None = field(default=None, metadata={"help": "Stop after this long; default: never."})
    timeout_s: float = field(default=30.0, metadata={"help": "Limit for a whole answer; longer is a timeout."})
    max_latency_p95_s: float | None = field(
        default=5.0,
        metadata={"help": "Longer answers are slow; the 95th percentile over the window may not exceed it."},
    )
    min_valid_rate: float = field(
        default=0.95, metadata={"help": "Share of the window's checks that must get a valid answer."}
    )
    max_consecutive_failures: int = field(
        default=3, metadata={"help": "This many checks in a row without a valid answer are a breach."}
    )
    max_memory_gib: float | None = field(default=None, metadata={"help": "Limit of the processes' resident memory."})
    max_gpu_memory_gib: float | None = field(default=None, metadata={"help": "Limit of memory in use on the GPUs."})
    max_restarts: int | None = field(default=None, metadata={"help": "Limit of restarts while watching."})
    window: int = field(default=20, metadata={"help": "Checks over which percentiles and rates are taken."})
    pid: int | None = field(
        default=None, metadata={"help": "Process whose memory counts; default: the one listening on the port."}
    )
    log_file: str | None = field(default=None, metadata={"help": "Append a line of JSON for each check to this file."})
    metrics_port: int | None = field(default=None, metadata={"help": "Serve Prometheus metrics on 127.0.0.1."})
    webhook_url: str | None = field(default=None, metadata={"help": "URL that gets breaches and recoveries as JSON."})
    api_key_variable: str | None = field(
        default=None, metadata={"help": "Environment variable that holds the server's API key."}
    )
    exit_on_breach: bool = field(default=False, metadata={"help": "Stop at the first breach."})
    json: bool = field(default=False, metadata={"help": "Print the summary as JSON."})

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
