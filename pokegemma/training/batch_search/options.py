"""Options of the search for a batch size."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from pokegemma.errors import check_ranges


@dataclass
class SearchOptions:
    """How to search for the batch size."""

    effective_batch_size: int | None = field(
        default=None,
        metadata={
            "help": "Samples an optimizer step, over all processes; default: batch size x accumulation as given."
        },
    )
    memory_limit_gib: float | None = field(
        default=None,
        metadata={"help": "Largest memory to use; default: that of the GPU, or the free memory of the machine."},
    )
    headroom: float = field(default=0.1, metadata={"help": "Share of the memory to leave unused."})
    trial_steps: int = field(default=3, metadata={"help": "Optimizer steps of a trial; the first is not timed."})
    output: str = field(default="batch_size_results.json", metadata={"help": "JSON file to write."})
    write_env: bool = field(default=False, metadata={"help": "Write BATCH_SIZE and GRAD_ACCUM into --env_path."})
    env_path: str = field(default=".env", metadata={"help": "File for --write_env; its other lines stay."})

    def __post_init__(self) -> None:
        check_ranges(self, "effective_batch_size", at_least=1)
        check_ranges(self, "memory_limit_gib", above=0)
        check_ranges(self, "headroom", at_least=0, below=1)
        check_ranges(self, "trial_steps", at_least=2)  # the first is not timed


def is_checkpointing_given(arguments: Sequence[str]) -> bool:
    """Return whether gradient checkpointing is switched on or off by flags, or by the YAML file that they name.

    Parsed options do not show that, since the default is one of the two.
    """
    words = [word for argument in arguments for word in argument.split("=", 1)]
    names = {word.lstrip("-").replace("-", "_") for word in words if word.startswith("--")}
    if "--config" in words:
        settings = yaml.safe_load(Path(words[words.index("--config") + 1]).read_text(encoding="utf-8"))
        names |= set(settings or ())
    # transformers 5.23 also has activation_checkpointing, which overrides the old name.
    return not names.isdisjoint({"gradient_checkpointing", "no_gradient_checkpointing", "activation_checkpointing"})
