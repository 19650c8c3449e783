"""Options of the search for a batch size."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import yaml

from pokegemma.errors import check_ranges
from pokegemma.options import option


@dataclass
class SearchOptions:
    """How to search for the batch size."""

    effective_batch_size: int | None = option(
        None, "Samples in an optimizer step, over all processes. Default: batch size times accumulation, as given."
    )
    memory_limit_gib: float | None = option(
        None, "Largest memory to use. Default: that of the GPU, or the free memory of the machine."
    )
    headroom: float = option(0.1, "Share of the memory that stays unused.")
    trial_steps: int = option(3, "Optimizer steps of a trial. The first is not timed.")
    output: str = option("batch_size_results.json", "JSON file to write.")
    write_env: bool = option(False, "Write BATCH_SIZE and GRAD_ACCUM into --env_path.")
    env_path: str = option(".env", "File for --write_env. Its other lines do not change.")

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
