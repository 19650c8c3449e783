"""Fine-tune a Gemma on samples with TRL's SFTTrainer."""

import logging
from collections.abc import Sequence
from pathlib import Path

import torch
from accelerate.utils import is_peft_model
from transformers import PreTrainedModel, TrainerCallback

from pokegemma.errors import PokegemmaError, one_line
from pokegemma.gemma.adapters.attachment import check_tensors
from pokegemma.gemma.batches.augmentation import Augmentation
from pokegemma.gemma.batches.feature_encoder import prepare_cache
from pokegemma.gemma.checkpoint_files import write_converter_files
from pokegemma.gemma.families import TOWER, check_checkpointing, set_fsdp_layers
from pokegemma.gemma.vision_tower import PROJECTOR
from pokegemma.training.inputs import Inputs, RunFiles, find_files, load_dataset, read_inputs
from pokegemma.training.lora_targets import lora_config
from pokegemma.training.loss_curve import CurvePlotter
from pokegemma.training.modes import ModesObserver
from pokegemma.training.options import DataOptions, ModelOptions, RunOptions, TrainingOptions
from pokegemma.training.parallel_mode import check_requested_mode, refuse_sharding, require_mode, use_one_gpu
from pokegemma.training.run_folder import DATASET_CACHE, clear_output, clear_unfinished, full_disk_explained
from pokegemma.training.run_record import RunRecord, check_resumed
from pokegemma.training.stop_on_signal import StopOnSignal
from pokegemma.training.tracking.settings import earlier_run_id, make_run_id, track
from pokegemma.training.tracking.trackers import guarded_trackers
from pokegemma.training.trainable import describe_trainable, is_reentrant, load_trainable
from pokegemma.training.trainer import EvaluateAtEnd, PokemonTrainer

logger = logging.getLogger(__name__)


def train(
    data: DataOptions,
    training: TrainingOptions,
    model: ModelOptions,
    *,
    callbacks: Sequence[TrainerCallback] = (),
) -> bool:
    """Train, and write the adapter (or the model), processor, curves and run.json to `training.output_dir`.

    Args:
        callbacks: further ones, which are called before those of this function.

    Returns:
        True if training finished. False if SIGTERM or SIGINT stopped it; then only a checkpoint is written.

    Raises:
        PokegemmaError: the options, the data or the model cannot be used. An earlier run is deleted only after data and
            model have been read without an error.
    """
    options = RunOptions(data, training, model)
    stop, observer = StopOnSignal(), ModesObserver(model, training)
    files = check_options(options)
    inputs = read_inputs(options, files)
    record = check_resume(options, inputs)
    trainer = build_trainer(options, inputs, record, callbacks=[*callbacks, stop, observer])
    run_trainer(trainer, inputs, record, stop, observer)
    return not stop.stopped


def check_options(options: RunOptions) -> RunFiles:
    """Check the options, set the variables of W&B, use one GPU per process, and return the files of the run.

    Evaluation is switched off if there is no eval.jsonl. Neither samples nor model are read.

    Raises:
        PokegemmaError: options contradict each other, the parallel mode is not available, or a file does not exist.
    """
    data, training, model = options.data, options.training, options.model
    check_fast_paths(data, model)
    if model.finetuning == "qlora":
        refuse_sharding(training)
    check_requested_mode(training)
    if model.attn_implementation == "flex_attention" and training.device.type == "cpu":
        raise PokegemmaError("--attn_implementation flex_attention: torch cannot train with it on a CPU; use sdpa")
    track(training.report_to)
    if data.samples_per_row > training.per_device_train_batch_size:
        logger.warning(
            "--samples_per_row %d: a forward pass has %d samples, so no row has more; raise "
            "--per_device_train_batch_size",
            data.samples_per_row,
            training.per_device_train_batch_size,
        )
    if model.finetuning == "full" and training.learning_rate > 1e-4:
        logger.warning("a learning rate of %g is high for full fine-tuning; 1e-5 is usual", training.learning_rate)
    use_one_gpu(training)
    return find_files(options)


def check_fast_paths(data: DataOptions, model: ModelOptions) -> None:
    """Refuse fast paths that would fail or become wrong after the first step.

    These are a feature cache where the weights that make the features are trained, and rows that need masks of their
    own (several samples or answers) with an attention that takes none.

    Raises:
        PokegemmaError: the options contradict each other.
    """
    is_trajectory = data.layout == "trajectory"
    if (is_trajectory or data.samples_per_row > 1) and model.attn_implementation not in ("sdpa", "eager"):
        rows = "--layout trajectory" if is_trajectory else "--samples_per_row"
        raise PokegemmaError(f"{rows} needs --attn_implementation sdpa or eager, not {model.attn_implementation}")
    trained = {
        "--train_vision_tower": model.train_vision_tower,
        "--train_projector": model.train_projector,
        "--lora_modules_to_save": any(part in str(model.lora_modules_to_save) for part in (TOWER, PROJECTOR)),
    }
    flags = [flag for flag, on in trained.items() if on]
    if data.vision_features is not None and flags:
        raise PokegemmaError(
            f"--vision_features: {flags[0]} trains the weights that make the features, so they change with every step; "
            "leave out one of the two"
        )


def check_resume(options: RunOptions, inputs: Inputs) -> RunRecord:
    """Return the record of this run. A resumed run continues the earlier record; its inputs must be the same.

    Raises:
        PokegemmaError: the run that is resumed had other inputs.
    """
    files = inputs.files
    record = RunRecord(
        files.output_dir, options.to_dict(), inputs.facts, is_written=options.training.process_index == 0
    )
    if options.training.resume_from_checkpoint is not None:
        check_resumed(files.resume_from or files.output_dir, options=record.options, facts=record.facts)
        record.earlier_id = earlier_run_id(files.output_dir, files.resume_from)
    return record


def build_trainer(
    options: RunOptions, inputs: Inputs, record: RunRecord, *, callbacks: Sequence[TrainerCallback]
) -> PokemonTrainer:
    """Load the model, fill the feature cache, delete an earlier run, write the dataset of rows; return the trainer.

    Raises:
        PokegemmaError: the model cannot be loaded or trained in this way.
    """
    training, files, family = options.training, inputs.files, inputs.base.family
    has_adapter = options.model.use_peft
    check_checkpointing(inputs.base.config, reentrant=is_reentrant(training, adapter=has_adapter))
    adapter = lora_config(options.model, family) if has_adapter else None
    model = load_trainable(inputs.base, options.model, training)
    set_fsdp_layers(model, family)
    if options.data.vision_features is not None:
        _prepare_features(options, inputs, model)
    if files.resume_from is None:
        clear_output(files.output_dir)
    else:
        clear_unfinished(files.output_dir)
    datasets = {}
    for split in files.splits:
        datasets[split.name] = load_dataset(split.path, options.data, cache_dir=files.output_dir / DATASET_CACHE)
        logger.info("%s: %d rows of %s", split.name, len(datasets[split.name]), split.path)
    record.facts["wandb_run_id"] = make_run_id(training.report_to, record.earlier_id)

    def record_mode(wrapped: torch.nn.Module) -> None:
        record.facts["parallel_mode"] = require_mode(wrapped, training)
        record.write("running")

    try:
        trainer = PokemonTrainer(
            model=model,
            args=training,
            train_dataset=datasets["train"],
            eval_dataset=datasets.get("eval"),
            data_collator=inputs.collator,
            processing_class=inputs.base.processor,
            callbacks=[*callbacks, EvaluateAtEnd(), CurvePlotter()],
            peft_config=adapter,
            before_first_step=record_mode,
            augmentation=Augmentation(options.data.augment_colour, options.data.augment_noise, training.seed)
            if options.data.augments
            else None,
        )
    except ValueError as error:  # options that TRL, PEFT or transformers refuse
        raise PokegemmaError(one_line(error, length=300)) from error
    logger.info("trained weights: %s", describe_trainable(trainer.model, family))
    if files.resume_from is not None and has_adapter:
        check_tensors(files.resume_from, trainer.model)
    return trainer


def _prepare_features(options: RunOptions, inputs: Inputs, model: PreTrainedModel) -> None:
    """Encode the pictures that the feature cache lacks, and let the collator read features in place of pictures."""
    inputs.collator.features = prepare_cache(
        Path(options.data.vision_features),
        model,
        inputs.base.processor,
        inputs.picture_paths(options),
        device=options.training.device,
        num_workers=options.training.dataloader_num_workers,
    )


def run_trainer(
    trainer: PokemonTrainer, inputs: Inputs, record: RunRecord, stop: StopOnSignal, observer: ModesObserver
) -> None:
    """Train until the end or a signal, and write the result and the record.

    Raises:
        PokegemmaError: the disk is full, or a requested mode is not in force.
    """
    output_dir, resume_from = inputs.files.output_dir, inputs.files.resume_from
    record.write("running")
    trackers = guarded_trackers(trainer, run_id=record.facts["wandb_run_id"], earlier_id=record.earlier_id)
    with full_disk_explained(output_dir), stop, trackers:
        trainer.train(resume_from_checkpoint=resume_from and str(resume_from))
        if not stop.stopped:
            trainer.model.config.use_cache = True
            trainer.save_model()
            trainer.save_state()
            if record.is_written and not is_peft_model(trainer.model):
                inputs.base.copy_tokenizer_model(output_dir)
                write_converter_files(inputs.base.processor, output_dir)
        record.write(
            "interrupted" if stop.stopped else "completed",
            global_step=trainer.state.global_step,
            best_checkpoint=trainer.state.best_model_checkpoint,
            best_metric=trainer.state.best_metric,
            modes=observer.modes,
        )
    trainer.accelerator.end_training()
