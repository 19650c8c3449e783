"""Find the batch size that trains fastest within memory, by trying: before the first run on a new GPU.

python scripts/find_batch_size.py --dataset_path training_data --model_name google/gemma-3-4b-it --write_env

Takes the options of scripts/sft_pokemon_gemma3.py, trains with them a few steps on the longest samples, and evaluates
once where training evaluates: each size in a process of its own, with gradient checkpointing and without, unless
--gradient_checkpointing says which. Only sizes that divide --effective_batch_size are tried, so that batch x
accumulation x processes stays exactly that. Under `accelerate launch` or torchrun all processes try at once, each alone
on its GPU, and a size must fit in each with the gradients of the trained weights once more, for the buckets of
DistributedDataParallel. On a CPU, memory is what the process and its data loader workers hold. Exit status 1 when even
one sample does not fit.
"""

import logging
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from pokegemma.cli import parse_options, run
from pokegemma.environment import detect_hardware
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import write_record
from pokegemma.settings import check_settings, write_settings

logger = logging.getLogger("find_batch_size")


def main() -> int:
    hardware = detect_hardware()  # before CUDA_VISIBLE_DEVICES is narrowed to one
    from pokegemma.training.batch_search.dataset import write_trial_dataset
    from pokegemma.training.batch_search.options import SearchOptions, is_checkpointing_given
    from pokegemma.training.batch_search.ranks import in_lockstep, join_ranks
    from pokegemma.training.batch_search.report import advice, describe, explain, gib
    from pokegemma.training.batch_search.runner import TrialRunner, memory_budget
    from pokegemma.training.batch_search.search import Attempt, Trial, batch_sizes, fastest, search
    from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions

    ranks = join_ranks()
    options, data, training, model = parse_options(
        SearchOptions, DataOptions, TrainingOptions, ModelOptions, description=__doc__
    )
    output, env_path = Path(options.output), Path(options.env_path)
    if output.exists() and not data.overwrite:
        raise PokegemmaError(f"{output} exists; choose another --output or pass --overwrite")
    if options.write_env:
        check_settings(env_path)
    if ranks.size < len(hardware.usable_gpus):
        logger.warning("using %d of %d GPUs; accelerate launch uses all", ranks.size, len(hardware.usable_gpus))
    effective = options.effective_batch_size or (
        training.per_device_train_batch_size * training.gradient_accumulation_steps
    )
    sizes = batch_sizes(effective, ranks.size)
    budget, source = memory_budget(training.device, limit_gib=options.memory_limit_gib, local_size=ranks.local_size)
    limit = int(budget * (1 - options.headroom))
    logger.info("memory: %s GiB (%s), of which %s may be used", gib(budget), source, gib(limit))
    smallest_limit = min(ranks.gather(limit))

    with tempfile.TemporaryDirectory(prefix="pokegemma_batch_") as temporary:
        steps = {"step_rows": sizes[-1], "num_steps": options.trial_steps}
        dataset = Path(temporary, "dataset")
        evaluates = training.eval_strategy != "no" or training.eval_on_start
        eval_rows = max(sizes[-1], training.per_device_eval_batch_size) if evaluates else 0
        lengths = write_trial_dataset(data, model, dataset, **steps, eval_rows=eval_rows)
        logger.info("training on the %d longest rows, %d to %d tokens", len(lengths), lengths[-1], lengths[0])
        run_trial = in_lockstep(
            TrialRunner(
                sys.argv[1:],
                dataset,
                limit_bytes=limit,
                on_gpu=training.device.type != "cpu",
                num_processes=ranks.size,
                **steps,
            ),
            ranks,
        )

        def run_and_log(batch_size: int, gradient_checkpointing: bool) -> Trial:
            trial = run_trial(batch_size, gradient_checkpointing)
            logger.info(describe(Attempt(batch_size, gradient_checkpointing, trial), limit_bytes=smallest_limit))
            return trial

        checkpointing = [training.gradient_checkpointing] if is_checkpointing_given(sys.argv[1:]) else [True, False]
        attempts = search(run_and_log, sizes, gradient_checkpointing=checkpointing)

    chosen = fastest(attempts)
    if ranks.rank != 0:
        return 0 if chosen else 1
    settings = chosen and {"BATCH_SIZE": chosen.batch_size, "GRAD_ACCUM": sizes[-1] // chosen.batch_size}
    why = explain(attempts, limit_bytes=smallest_limit)
    write_record(
        output,
        stage="find_batch_size",
        options={**vars(options), **vars(data), **asdict(model), **training.to_dict()},
        found=chosen and {**settings, "gradient_checkpointing": chosen.gradient_checkpointing},
        why=why,
        effective_batch_size=effective,
        num_processes=ranks.size,
        hardware=asdict(hardware),
        device=training.device.type,
        budget_bytes=budget,
        budget_is=source,
        limit_bytes=smallest_limit,
        longest_rows_tokens=lengths,
        trials=[asdict(attempt) for attempt in attempts],
    )
    print(*why, sep="\n")
    if not chosen:
        print(f"even one sample does not fit; try: {'; '.join(advice(data, training, model))}")
        return 1
    rows = "conversations" if data.layout == "trajectory" else "samples"
    print(f"take BATCH_SIZE={settings['BATCH_SIZE']} GRAD_ACCUM={settings['GRAD_ACCUM']}: {effective} {rows} a step")
    if chosen.gradient_checkpointing != training.gradient_checkpointing:
        print(f"and pass --gradient_checkpointing {str(chosen.gradient_checkpointing).lower()} to training")
    if options.write_env:
        write_settings(env_path, {name: str(value) for name, value in settings.items()})
    return 0


if __name__ == "__main__":
    run(main)
