"""Compare exports with the checkpoint that they were made from: the same pictures and prompts, decision by decision.

    python scripts/check_parity.py --model_path outputs/merged --dataset_path training_data --gguf outputs/gguf \\
        --output_dir outputs/parity

Writes parity.json, report.html (one page, no network) and run.json, and prints a table. Exits 1 where an engine differs
from the reference by more than the limits allow, and names the first such decision. After an interruption, the same
command reuses the answers of the engines that were finished.
"""

import json
import math
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.data.checks.foreign_datasets import refuse_foreign_dataset
from pokegemma.data.samples import dataset_hash
from pokegemma.errors import CheckFailedError, PokegemmaError, check_range, check_ranges
from pokegemma.evaluation.view import resolve_view
from pokegemma.outputs import atomic_folder, refuse_to_replace
from pokegemma.parity.limits import MAX_INVALID_JSON, MIN_AGREEMENT, ParityLimits
from pokegemma.provenance import write_run_record


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
    layout: Literal["grid", "frames", "trajectory"] | None = field(
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
        if self.api_key_env and not os.environ.get(self.api_key_env):
            raise PokegemmaError(f"--api_key_env {self.api_key_env}: this variable is not set")


def find_dataset(path: Path) -> Path:
    """Return the JSONL file that decisions are taken from."""
    refuse_foreign_dataset(path)
    file = path if path.suffix == ".jsonl" else path / "eval.jsonl"
    if not file.is_file():
        raise PokegemmaError(f"{file} not found; make it with scripts/convert_eevee_data_v2.py")
    return file


def main() -> None:
    (options,) = parse_options(ParityOptions, description=__doc__)
    held_out, output_dir = find_dataset(Path(options.dataset_path)), Path(options.output_dir)
    sources = (options.model_path, options.dataset_path, *options.gguf, *options.mlx, *options.transformers)
    refuse_to_replace(output_dir, *sources)
    view = resolve_view(options.model_path, layout=options.layout)
    from pokegemma.parity import report
    from pokegemma.parity.engine_spec import EngineSpec, find_engines
    from pokegemma.parity.resume import FinishedEngines
    from pokegemma.parity.run import Comparison, Server, run_comparison

    specs = find_engines(
        gguf=options.gguf,
        mmproj=options.mmproj,
        mlx=options.mlx,
        transformers=options.transformers,
        device=options.device,
    )
    key = os.environ[options.api_key_env] if options.api_key_env else None
    servers = [Server(options.server, options.server_model, key)] if options.server else []
    reference = EngineSpec(
        "transformers", "reference", Path(options.model_path), dtype=options.dtype, device=options.device
    )
    finished = FinishedEngines.next_to(output_dir)
    with atomic_folder(output_dir, stage="parity", overwrite=options.overwrite) as output:
        comparison = Comparison.prepare(
            reference,
            held_out,
            view,
            limits=ParityLimits(
                options.min_agreement, options.max_log_probability_difference, options.max_invalid_json
            ),
            num_samples=options.num_samples,
            max_new_tokens=options.max_new_tokens,
            timeout_s=options.timeout_s,
            finished=finished,
        )
        result = run_comparison(comparison, specs, servers)
        report.write_parity_report(output, result, comparison.task)
        facts = {"dataset_hash": dataset_hash(held_out), "passed": result["passed"]}
        write_run_record(output, stage="parity", options=asdict(options), **facts)
    finished.remove()
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False))
    else:
        print(report.format_parity_table(result))
        print(f"report: {output_dir / report.PARITY_REPORT}")
    if not result["passed"]:
        raise CheckFailedError(report.failure_line(result))


if __name__ == "__main__":
    run(main)
