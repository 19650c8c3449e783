"""Options of scripts/check_parity.py."""

import math
from dataclasses import dataclass, field
from typing import Literal

from pokegemma.data.prompts import Layout
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.parity.limits import MAX_INVALID_JSON, MIN_AGREEMENT


@dataclass
class ParityOptions:
    model_path: str = field(metadata={"help": "The reference: folder of the merged checkpoint."})
    dataset_path: str = field(metadata={"help": "Folder with eval.jsonl, or a JSONL file."})
    output_dir: str = field(metadata={"help": "Folder to make for the report."})
    gguf: list[str] = field(
        default_factory=list, metadata={"help": "GGUF files, or folders whose model-*.gguf are all compared."}
    )
    mmproj: str | None = field(default=None, metadata={"help": "Default: mmproj-f16.gguf next to each GGUF file."})
    mlx: list[str] = field(default_factory=list, metadata={"help": "MLX folders."})
    transformers: list[str] = field(
        default_factory=list, metadata={"help": "Other checkpoints, each computed in the type that it is stored in."}
    )
    server: str | None = field(
        default=None, metadata={"help": "URL of an OpenAI-compatible server, without /v1. A server reports no memory."}
    )
    server_model: str | None = field(
        default=None, metadata={"help": "The server's model. Default: the first that it lists."}
    )
    api_key_env: str | None = field(default=None, metadata={"help": "Environment variable with the server's key."})
    timeout_s: float = field(
        default=1800.0,
        metadata={"help": "Seconds for one answer; an engine's first answer includes loading its model."},
    )
    num_samples: int = field(default=50, metadata={"help": "Decisions to compare, evenly spread over the file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Largest number of tokens of a written answer."})
    layout: Layout | None = field(
        default=None, metadata={"help": "How samples are shown. Default: as the model's run.json says, else grid."}
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "Type that the reference is computed in; bfloat16 needs half the memory."}
    )
    device: str | None = field(
        default=None, metadata={"help": "Of transformers: cuda, mps or cpu. Default: the fastest one."}
    )
    min_agreement: float = field(
        default=MIN_AGREEMENT,
        metadata={"help": "Smallest share of decisions with the reference's button, scored and written."},
    )
    max_log_probability_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean difference in log-probability, of the eight buttons and of the answers' tokens. "
            "Default: by the type of the weights, see pokegemma/parity/limits.py; none for servers."
        },
    )
    max_invalid_json: float = field(
        default=MAX_INVALID_JSON, metadata={"help": "How far the share of valid answers may be below the reference's."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing OUTPUT_DIR."})
    json: bool = field(default=False, metadata={"help": "Print parity.json instead of the table."})

    def __post_init__(self) -> None:
        if not (self.gguf or self.mlx or self.transformers or self.server):
            raise PokegemmaError("nothing to compare: pass --gguf, --mlx, --transformers or --server")
        check_ranges(self, "num_samples", "max_new_tokens", at_least=1)
        check_ranges(self, "min_agreement", "max_invalid_json", at_least=0, at_most=1)
        # JSON has no infinity.
        check_range("--max_log_probability_difference", self.max_log_probability_difference, at_least=0, below=math.inf)
        check_range("--timeout_s", self.timeout_s, above=0, below=math.inf)
