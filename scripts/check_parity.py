"""Compare exports with the checkpoint that they were made from: the same pictures and prompts, decision by decision.

    python scripts/check_parity.py --model_path outputs/merged --dataset_path training_data --gguf outputs/gguf \\
        --output_dir outputs/parity

Writes parity.json, report.html (one page, no network) and run.json, and prints a table. Exits 1 where an engine differs
from the reference by more than the limits allow, and names the first such decision. After an interruption, the same
command reuses the answers of the engines that were finished.
"""

import json
from dataclasses import asdict
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.data.samples import dataset_hash, held_out_file
from pokegemma.errors import CheckFailedError
from pokegemma.evaluation.view import resolve_view
from pokegemma.outputs import atomic_folder, refuse_to_replace
from pokegemma.parity.limits import ParityLimits
from pokegemma.parity.options import ParityOptions
from pokegemma.provenance import write_run_record
from pokegemma.settings import read_api_key


def main() -> None:
    (options,) = parse_options(ParityOptions, description=__doc__)
    api_key = read_api_key("--api_key_env", options.api_key_env)
    held_out, output_dir = held_out_file(Path(options.dataset_path)), Path(options.output_dir)
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
    servers = [Server(options.server, options.server_model, api_key)] if options.server else []
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
