"""Fine-tune Gemma 3 on samples: TRL's SFTTrainer with our collator, metrics and interruption."""

import dataclasses
import itertools
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from pokegemma.data.samples import dataset_files, dataset_hash
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.attachment import check_tensors
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.checkpoint_files import write_converter_files
from pokegemma.gemma.families import check_checkpointing, require_exact, set_fsdp_layers
from pokegemma.gemma.image_attention import attention_facts
from pokegemma.gemma.image_size import picture_facts
from pokegemma.gemma.vision_tower import PROJECTOR, TOWER
from pokegemma.provenance import write_run_record
from pokegemma.training.callbacks import EvaluateAtEnd, StopOnSignal
from pokegemma.training.inputs import check_lengths, eval_file, load_dataset, read_examples, require_scorable_answers
from pokegemma.training.loss_curve import CurvePlotter
from pokegemma.training.modes import ModesObserver
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.parallel_mode import check_requested_mode, require_mode
from pokegemma.training.preflight.loader_memory import check_workers
from pokegemma.training.run_folder import (
    DATASET_CACHE,
    check_output,
    check_resumed,
    clear_output,
    clear_unfinished,
    full_disk_explained,
)
from pokegemma.training.tracking.settings import earlier_run_id, make_run_id, track
from pokegemma.training.tracking.trackers import guarded_trackers
from pokegemma.training.trainable import describe_trainable, is_reentrant, load_trainable, lora_config
from pokegemma.training.trainer import PokemonTrainer

logger = logging.getLogger(__name__)


def check_fast_paths(data: DataOptions, options: ModelOptions) -> None:
    """Refuse what would fail or go stale after the first step, before anything is loaded.

    A feature cache where the weights that make the features are trained; rows with masks of ours (several samples or
    answers) for an attention that takes none.

    Raises:
        PokegemmaError: the options contradict each other.
    """
    rows = "--layout trajectory" if data.layout == "trajectory" else "--samples_per_row"
    if (data.layout == "trajectory" or data.samples_per_row > 1) and options.attn_implementation not in (
        "sdpa",
        "eager",
    ):
        raise PokegemmaError(f"{rows} needs --attn_implementation sdpa or eager, not {options.attn_implementation}")
    trained = {
        "--train_vision_tower": options.train_vision_tower,
        "--train_projector": options.train_projector,
        "--lora_modules_to_save": any(part in str(options.lora_modules_to_save) for part in (TOWER, PROJECTOR)),
    }
    flags = [flag for flag, on in trained.items() if on]
    if data.vision_features is not None and flags:
        raise PokegemmaError(
            f"--vision_features: {flags[0]} trains what makes the features, so they change with every step; "
            "leave out one of the two"
        )


def train(
    data: DataOptions,
    training: TrainingOptions,
    model_options: ModelOptions,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> bool:
    """Train, and write the adapter (or the model), processor, curves and run.json to `training.output_dir`.

    Args:
        callbacks: more of them, called before ours.

    Returns:
        Whether training came to its end; False after SIGTERM or SIGINT, which leave a checkpoint only.

    Raises:
        PokegemmaError: the options, the data or the model are at fault. An earlier run is deleted only when data and
            model have been read without one.
    """
    check_fast_paths(data, model_options)
    check_requested_mode(training)
    if model_options.attn_implementation == "flex_attention" and training.device.type == "cpu":
        raise PokegemmaError("--attn_implementation flex_attention: torch cannot train with it on a CPU; use sdpa")
    track(training.report_to)
    if data.samples_per_row > training.per_device_train_batch_size:
        logger.warning(
            "--samples_per_row %d: a forward pass has %d samples, so no row has more; raise "
            "--per_device_train_batch_size",
            data.samples_per_row,
            training.per_device_train_batch_size,
        )
    if training.n_gpu > 1:
        # DataParallel would cut pixel_values and image_index at places that have nothing to do with each other.
        logger.warning("using one of %d GPUs; accelerate launch uses all", training.n_gpu)
        training._n_gpu = 1
    output_dir, base = Path(training.output_dir), model_options.model_name_or_path
    if Path(base).is_dir():  # the adapter names its base: make that hold from anywhere
        base = model_options.model_name_or_path = str(Path(base).resolve())
    train_path, beside = dataset_files(Path(data.dataset_path))
    eval_path = eval_file(data, beside)
    if eval_path is None:
        logger.warning("no eval.jsonl: training without evaluation, the last checkpoint counts as the best")
        training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
    files = {split: path for split, path in (("train", train_path), ("eval", eval_path)) if path is not None}
    features = [] if data.vision_features is None else [Path(data.vision_features)]
    checkpoint = check_output(
        output_dir,
        sources=[*files.values(), Path(base), *features],
        overwrite=data.overwrite,
        resume=training.resume_from_checkpoint,
    )
    base_checkpoint = model_options.open_checkpoint()
    config, family, processor = base_checkpoint.config, base_checkpoint.family, base_checkpoint.processor
    base_checkpoint.require_full_precision()
    # Naming what is the checkpoint's own anyway is the same run as without the option.
    model_options.image_size = base_checkpoint.image_size
    model_options.image_attention = base_checkpoint.image_attention
    for option, used in (("--vision_features", data.vision_features), ("--samples_per_row", data.samples_per_row > 1)):
        if used:
            require_exact(config, option)
    max_length = training.max_length or config.text_config.max_position_embeddings
    # Rows name their pictures by absolute paths, so the folder is not used.
    collator = base_checkpoint.collator(layout=data.layout, dataset_folder=Path(), samples_per_row=data.samples_per_row)
    for path in files.values():
        check_lengths(path, read_examples(path, data), collator, max_length=max_length)
    evaluates = eval_path is not None and (training.eval_strategy != IntervalStrategy.NO or training.eval_on_start)
    if evaluates:
        require_scorable_answers(eval_path)
    feature_bytes = processor.image_seq_length * config.get_text_config().hidden_size if data.vision_features else None
    check_workers(
        data,
        training,
        collator,
        train_path,
        eval_path if evaluates else None,
        bytes_per_picture=feature_bytes and feature_bytes * getattr(torch, model_options.dtype).itemsize,
    )
    options = {**vars(data), **dataclasses.asdict(model_options), **training.to_dict()}
    hashes = {split: {"path": str(path.resolve()), "sha256": dataset_hash(path)} for split, path in files.items()}
    facts = {
        "base_model": base,
        "base_fingerprint": base_checkpoint.weights_fingerprint(),
        "seed": training.seed,
        "dataset": hashes["train"],
        "eval_dataset": hashes.get("eval"),
        **picture_facts(config),
        **attention_facts(config),
    }
    earlier_id = None
    if training.resume_from_checkpoint is not None:
        check_resumed(checkpoint or output_dir, options=options, facts=facts)
        earlier_id = earlier_run_id(output_dir, checkpoint)
    if model_options.finetuning == "full" and training.learning_rate > 1e-4:
        logger.warning("a learning rate of %g is high for full fine-tuning; 1e-5 is usual", training.learning_rate)

    check_checkpointing(config, reentrant=is_reentrant(training, adapter=model_options.use_peft))
    adapter = lora_config(model_options, family) if model_options.use_peft else None
    model = load_trainable(base_checkpoint, model_options, training)
    set_fsdp_layers(model, family)
    if data.vision_features is not None:
        examples = itertools.chain.from_iterable(read_examples(path, data) for path in files.values())
        paths = (path for example in examples for path in collator.picture_paths(example))
        collator.features = prepare_cache(
            Path(data.vision_features),
            model,
            processor,
            paths,
            device=training.device,
            num_workers=training.dataloader_num_workers,
        )
    if checkpoint is None:
        clear_output(output_dir)
    else:
        clear_unfinished(output_dir)
    cache_dir = output_dir / DATASET_CACHE
    datasets = {split: load_dataset(path, data, cache_dir=cache_dir) for split, path in files.items()}
    for split, dataset in datasets.items():
        logger.info("%s: %d rows of %s", split, len(dataset), files[split])
    facts["wandb_run_id"] = make_run_id(training.report_to, earlier_id)

    def record(status: str, **results: Any) -> None:
        if trainer.is_world_process_zero():
            write_run_record(output_dir, stage="train", options=options, **facts, status=status, **results)

    def record_modes(wrapped: torch.nn.Module) -> None:
        facts["parallel_mode"] = require_mode(wrapped, training)
        record("running")

    stop, observer = StopOnSignal(), ModesObserver(model_options, training)
    try:
        trainer = PokemonTrainer(
            model=model,
            args=training,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            data_collator=collator,
            processing_class=processor,
            callbacks=[*callbacks, stop, observer, EvaluateAtEnd(), CurvePlotter()],
            peft_config=adapter,
            before_first_step=record_modes,
        )
    except ValueError as error:  # options that TRL, PEFT or transformers refuse
        raise PokegemmaError(" ".join(str(error).split())[:300]) from error
    logger.info("trained weights: %s", describe_trainable(trainer.model, family))

    if checkpoint is not None and adapter is not None:
        check_tensors(checkpoint, trainer.model)
    record("running")
    trackers = guarded_trackers(trainer, run_id=facts["wandb_run_id"], earlier_id=earlier_id)
    with full_disk_explained(output_dir), stop, trackers:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        state = trainer.state
        if not stop.stopped:
            trainer.model.config.use_cache = True
            trainer.save_model()
            trainer.save_state()
            if trainer.is_world_process_zero() and not model_options.use_peft:
                base_checkpoint.copy_tokenizer_model(output_dir)
                write_converter_files(processor, output_dir)
        record(
            "interrupted" if stop.stopped else "completed",
            global_step=state.global_step,
            best_checkpoint=state.best_model_checkpoint,
            best_metric=state.best_metric,
            modes=observer.modes,
        )
    trainer.accelerator.end_training()
    return not stop.stopped
