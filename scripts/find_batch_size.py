"""Find the batch size that trains fastest within memory, by trying: before the first run on a new GPU.

python scripts/find_batch_size.py --dataset_path training_data --model_name google/gemma-3-4b-it --write_env

Takes the options of scripts/sft_pokemon_gemma3.py. Each size is tried in a process of its own, which trains a few steps
on the longest samples and evaluates once where training evaluates. It is tried with and without gradient checkpointing,
unless --gradient_checkpointing is given. Only sizes that divide --effective_batch_size are tried, so that batch x
accumulation x processes stays exactly that.

Under `accelerate launch` or torchrun all processes try at once, each alone on its GPU. A size must then fit in each
with the gradients of the trained weights counted twice, for the buckets of DistributedDataParallel. On a CPU, the
memory of the process and its data loader workers counts. Exit status 1 when not even one sample fits.
"""

import logging
import sys
from dataclasses import asdict
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import detect_hardware
from pokegemma.errors import CheckFailedError, PokegemmaError
from pokegemma.provenance import write_record
from pokegemma.settings import check_settings, write_settings

logger = logging.getLogger("find_batch_size")


def main() -> int:
    hardware = detect_hardware()  # before CUDA_VISIBLE_DEVICES is narrowed to one
    from pokegemma.training.batch_search.options import SearchOptions
    from pokegemma.training.batch_search.ranks import join_ranks
    from pokegemma.training.batch_search.report import explain_attempts, suggest_changes
    from pokegemma.training.batch_search.search import find_batch_size
    from pokegemma.training.options import DataOptions, ModelOptions, RunOptions, TrainingOptions

    ranks = join_ranks()
    search, data, training, model = parse_options(
        SearchOptions, DataOptions, TrainingOptions, ModelOptions, description=__doc__
    )
    options = RunOptions(data, training, model)
    output, env_path = Path(search.output), Path(search.env_path)
    if output.exists() and not data.overwrite:
        raise PokegemmaError(f"{output} exists; choose another --output or pass --overwrite")
    if search.write_env:
        check_settings(env_path)
    if ranks.size < len(hardware.usable_gpus):
        logger.warning("using %d of %d GPUs; accelerate launch uses all", ranks.size, len(hardware.usable_gpus))

    result = find_batch_size(search, options, arguments=sys.argv[1:], ranks=ranks)
    if ranks.rank != 0:
        return 0 if result.chosen else 1
    why = explain_attempts(result.attempts, limit_bytes=result.limit_bytes)
    write_record(
        output,
        stage="find_batch_size",
        options={**vars(search), **options.to_dict()},
        why=why,
        hardware=asdict(hardware),
        device=training.device.type,
        **result.to_record(),
    )
    print(*why, sep="\n")
    if result.chosen is None:
        raise CheckFailedError(f"even one sample does not fit; try: {'; '.join(suggest_changes(options))}")
    rows = "conversations" if data.layout == "trajectory" else "samples"
    settings = " ".join(f"{name}={value}" for name, value in result.settings.items())
    print(f"take {settings}: {result.effective_batch_size} {rows} a step")
    if result.chosen.gradient_checkpointing != training.gradient_checkpointing:
        print(f"and pass --gradient_checkpointing {str(result.chosen.gradient_checkpointing).lower()} to training")
    if search.write_env:
        write_settings(env_path, {name: str(value) for name, value in result.settings.items()})
    return 0


if __name__ == "__main__":
    run(main)
