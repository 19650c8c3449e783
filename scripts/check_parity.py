"""Compare exports with the checkpoint they were made from: the same pictures and prompts, decision by decision.

python scripts/check_parity.py --model_path outputs/merged --dataset_path training_data --gguf outputs/gguf \\
    --output_dir outputs/parity

Writes parity.json, report.html (one page, no network) and run.json; prints a table. Exits 1 where an engine differs
from the reference by more than the gates allow, and says where first. Interrupted, the same command goes on from the
engines that were finished.
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
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.evaluation.view import resolve_view
from pokegemma.outputs import atomic_folder, refuse_to_replace
from pokegemma.provenance import write_run_record


@dataclass
class ParityOptions:
    model_path: str = field(metadata={"help": "The reference: folder of the merged checkpoint."})
    dataset_path: str = field(metadata={"help": "Folder with eval.jsonl, or a JSONL file."})
    output_dir: str = field(metadata={"help": "Folder to make for the report."})
    gguf: list[str] = field(
        default_factory=list, metadata={"help": "GGUF files, or folders whose model-*.gguf are all compared."}
    )
    mmproj: str | None = field(default=None, metadata={"help": "Default: mmproj-f16.gguf beside each GGUF file."})
    mlx: list[str] = field(default_factory=list, metadata={"help": "MLX folders."})
    transformers: list[str] = field(
        default_factory=list, metadata={"help": "Other checkpoints, each computed in the type it is stored in."}
    )
    server: str | None = field(
        default=None, metadata={"help": "URL of an OpenAI-compatible server, without /v1; it tells no memory."}
    )
    server_model: str | None = field(default=None, metadata={"help": "Its model. Default: the first it lists."})
    api_key_env: str | None = field(default=None, metadata={"help": "Environment variable with the server's key."})
    timeout_s: float = field(
        default=1800.0,
        metadata={"help": "Seconds that an engine may take for one answer, for its first with loading; or the server."},
    )
    num_samples: int = field(default=50, metadata={"help": "Decisions to compare, evenly spread over the file."})
    max_new_tokens: int = field(default=128, metadata={"help": "Tokens after which a written answer is cut off."})
    layout: Literal["grid", "frames", "trajectory"] | None = field(
        default=None, metadata={"help": "How samples are shown. Default: as the model's run.json says, else grid."}
    )
    dtype: Literal["float32", "bfloat16"] = field(
        default="float32", metadata={"help": "What the reference is computed in; bfloat16 where memory is short."}
    )
    device: str | None = field(default=None, metadata={"help": "Of transformers: cuda, mps or cpu. Default: the best."})
    min_agreement: float = field(
        default=0.98, metadata={"help": "Least share of decisions with the reference's button, scored and written."}
    )
    max_log_probability_difference: float | None = field(
        default=None,
        metadata={
            "help": "Largest mean difference in log-probability, of the eight buttons and of the answers' tokens. "
            "Default: by the type of the weights, in units of what bfloat16 costs the reference; servers: not judged."
        },
    )
    max_invalid_json: float = field(
        default=0.02, metadata={"help": "How far the share of valid answers may be below the reference's."}
    )
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing OUTPUT_DIR."})
    json: bool = field(default=False, metadata={"help": "Print parity.json instead of the table."})

    def __post_init__(self) -> None:
        if not (self.gguf or self.mlx or self.transformers or self.server):
            raise PokegemmaError("nothing to compare: pass --gguf, --mlx, --transformers or --server")
        for name in ("num_samples", "max_new_tokens"):
            if getattr(self, name) < 1:
                raise PokegemmaError(f"--{name}: {getattr(self, name)} is not at least 1")
        for name in ("min_agreement", "max_invalid_json"):
            if not 0 <= getattr(self, name) <= 1:
                raise PokegemmaError(f"--{name}: {getattr(self, name):g} is not between 0 and 1")
        limit = self.max_log_probability_difference
        if limit is not None and not 0 <= limit < math.inf:  # JSON has no infinity
            raise PokegemmaError(f"--max_log_probability_difference: {limit:g} is not a number from 0 on")
        if not 0 < self.timeout_s < math.inf:
            raise PokegemmaError(f"--timeout_s: {self.timeout_s:g} is not a number above 0")
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
    held_out = find_dataset(Path(options.dataset_path))
    inputs = [options.model_path, options.dataset_path, *options.gguf, *options.mlx, *options.transformers]
    refuse_to_replace(Path(options.output_dir), *inputs)
    view = resolve_view(options.model_path, layout=options.layout)
    from pokegemma.parity import report
    from pokegemma.parity.compare import Gates
    from pokegemma.parity.resume import FinishedEngines
    from pokegemma.parity.run import Comparison, Server, find_engines, run_comparison
    from pokegemma.parity.worker import EngineSpec

    specs = find_engines(
        gguf=options.gguf,
        mmproj=options.mmproj,
        mlx=options.mlx,
        transformers=options.transformers,
        device=options.device,
    )
    key = os.environ[options.api_key_env] if options.api_key_env else None
    servers = [Server(options.server, options.server_model, key)] if options.server else []
    gates = Gates(options.min_agreement, options.max_log_probability_difference, options.max_invalid_json)
    reference = EngineSpec(
        "transformers", "reference", Path(options.model_path), dtype=options.dtype, device=options.device
    )
    finished = FinishedEngines.beside(Path(options.output_dir))
    with atomic_folder(Path(options.output_dir), stage="parity", overwrite=options.overwrite) as output:
        comparison = Comparison.prepare(
            reference,
            held_out,
            view,
            gates=gates,
            num_samples=options.num_samples,
            max_new_tokens=options.max_new_tokens,
            timeout_s=options.timeout_s,
            finished=finished,
        )
        result = run_comparison(comparison, specs, servers)
        report.write_report(output, result, comparison.task)
        write_run_record(
            output,
            stage="parity",
            options=asdict(options),
            dataset_hash=dataset_hash(held_out),
            passed=result["passed"],
        )
    finished.remove()
    if options.json:
        print(json.dumps(result, indent=2, allow_nan=False, ensure_ascii=False))
    else:
        print(report.format_table(result))
        print(f"report: {Path(options.output_dir) / report.REPORT_FILE}")
    if not result["passed"]:
        raise CheckFailedError(report.failure_line(result))


if __name__ == "__main__":
    run(main)
