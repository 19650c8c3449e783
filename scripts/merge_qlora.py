"""Merge a LoRA adapter into full-precision weights: a checkpoint that needs neither PEFT nor bitsandbytes.

python scripts/merge_qlora.py --lora_path outputs/adapter --output_path outputs/merged --verify
"""

import math
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from pokegemma.cli import parse_options, run
from pokegemma.data.samples import dataset_files
from pokegemma.errors import PokegemmaError, check_range
from pokegemma.options import option
from pokegemma.provenance import read_run_record


@dataclass
class MergeOptions:
    lora_path: str = option(..., "Folder of the trained adapter.")
    output_path: str = option(..., "Folder to write the merged checkpoint to.")
    base_model: str | None = option(None, "Base checkpoint. Default: that of the adapter.")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "Type of the stored weights.")
    verify: bool = option(False, "Compare the logits of adapter + base and of the merged weights on samples.")
    dataset_path: str | None = option(
        None,
        "Samples to verify on; packed trajectories for a policy. Default: what the adapter was trained with.",
    )
    num_samples: int = option(8, "Number of samples to verify on.")
    stored_tolerance: float | None = option(
        None, "With --verify: largest difference of the logits of the stored weights. Default: by --dtype."
    )
    device: str = option("cpu", "Device to merge on. The float32 weights of a 4B model need 17 GB.")
    overwrite: bool = option(False, "Replace an existing --output_path.")

    def __post_init__(self) -> None:
        check_range("--num_samples", self.num_samples, at_least=1)
        check_range("--stored_tolerance", self.stored_tolerance, above=0)


def verification_path(options: MergeOptions) -> Path:
    """Return the JSONL file to verify on, the held-out one where there is one; or a folder of packed trajectories."""
    if options.dataset_path:
        if is_packed(Path(options.dataset_path)):
            return Path(options.dataset_path)
        train, held_out = dataset_files(Path(options.dataset_path))
        return held_out or train
    record = read_run_record(Path(options.lora_path)) or {}
    source = record.get("eval_dataset") or record.get("dataset")
    if not source:
        raise PokegemmaError(f"--verify: the run.json of {options.lora_path} names no dataset; give --dataset_path")
    path = Path(source["path"])
    if not (path.is_file() or is_packed(path)):
        raise PokegemmaError(f"--verify: {path} does not exist; give --dataset_path")
    return path


def is_packed(path: Path) -> bool:
    """Return whether a folder contains packed trajectories of battles."""
    return (path / "pack.json").is_file()


def main() -> None:
    (options,) = parse_options(MergeOptions, description=__doc__)
    from pokegemma.export.merge import merge
    from pokegemma.export.merge_limits import MERGE_TOLERANCE, STORED_TOLERANCE

    verify_on = verification_path(options) if options.verify else None
    if verify_on is not None and is_packed(verify_on):
        from pokegemma.battles.cloning.verification import recorded_decisions

        verify_on = recorded_decisions(
            Path(options.lora_path), verify_on, base=options.base_model, count=options.num_samples
        )
    result = merge(
        Path(options.lora_path),
        Path(options.output_path),
        base=options.base_model,
        dtype=options.dtype,
        verify_on=verify_on,
        num_samples=options.num_samples,
        stored_tolerance=options.stored_tolerance,
        device=options.device,
        overwrite=options.overwrite,
    )
    if result:
        print(f"logits on the answers of {result.num_samples} samples, relative root mean square difference:")
        print(f"  adapter + base against base         {result.adapter_effect:.2e}  (more than 0)")
        print(f"  merged against adapter + base       {result.merged_error:.2e}  (at most {MERGE_TOLERANCE:.0e})")
        stored = STORED_TOLERANCE[result.dtype] if options.stored_tolerance is None else options.stored_tolerance
        limit = "not judged here" if math.isinf(stored) else f"at most {stored:.0e}"
        print(f"  stored {result.dtype} against the same    {result.stored_error:.2e}  ({limit})")
    print(f"merged checkpoint in {options.output_path}")


if __name__ == "__main__":
    run(main)
