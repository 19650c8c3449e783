"""Options of scripts/check_parity.py."""

import math
from dataclasses import dataclass
from typing import Literal

from pokegemma.data.prompts import Layout
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.parity.limits import MAX_INVALID_JSON, MIN_AGREEMENT


@dataclass
class ParityOptions:
    model_path: str = option(..., "Folder of the merged checkpoint. It is the reference.")
    dataset_path: str = option(..., "Folder with eval.jsonl, or a JSONL file.")
    output_dir: str = option(..., "Folder to create for the report.")
    gguf: list[str] = option([], "GGUF files, or folders. All model-*.gguf of a folder are compared.")
    mmproj: str | None = option(None, "Vision part of the GGUF files. Default: mmproj-f16.gguf next to each file.")
    mlx: list[str] = option([], "MLX folders.")
    transformers: list[str] = option([], "Other checkpoints. Each is computed in the type that it is stored in.")
    server: str | None = option(None, "URL of an OpenAI-compatible server, without /v1. Its memory is not measured.")
    server_model: str | None = option(None, "Name of the server's model. Default: the first that it lists.")
    api_key_env: str | None = option(None, "Environment variable that contains the server's key.")
    timeout_s: float = option(1800.0, "Seconds for one answer. An engine's first answer includes loading its model.")
    num_samples: int = option(50, "Decisions to compare, evenly spread over the file.")
    max_new_tokens: int = option(128, "Largest number of tokens of a written answer.")
    layout: Layout | None = option(None, "How samples are shown. Default: that of the model's run.json, else grid.")
    dtype: Literal["float32", "bfloat16"] = option(
        "float32", "Type in which the reference is computed. bfloat16 needs half the memory."
    )
    device: str | None = option(None, "Device for transformers: cuda, mps or cpu. Default: the fastest one.")
    min_agreement: float = option(
        MIN_AGREEMENT,
        "Smallest share of decisions with the reference's button. It applies to scored and to written answers.",
    )
    max_log_probability_difference: float | None = option(
        None,
        "Largest mean difference in log-probability, of the eight buttons and of the answers' tokens. "
        "Servers have no limit. Default: by the type of the weights, see pokegemma/parity/limits.py.",
    )
    max_invalid_json: float = option(
        MAX_INVALID_JSON, "Largest difference by which the share of valid answers may be below the reference's."
    )
    overwrite: bool = option(False, "Replace an existing OUTPUT_DIR.")
    json: bool = option(False, "Print parity.json instead of the table.")

    def __post_init__(self) -> None:
        if not (self.gguf or self.mlx or self.transformers or self.server):
            raise PokegemmaError("nothing to compare: pass --gguf, --mlx, --transformers or --server")
        check_ranges(self, "num_samples", "max_new_tokens", at_least=1)
        check_ranges(self, "min_agreement", "max_invalid_json", at_least=0, at_most=1)
        # JSON has no infinity.
        check_range("--max_log_probability_difference", self.max_log_probability_difference, at_least=0, below=math.inf)
        check_range("--timeout_s", self.timeout_s, above=0, below=math.inf)
