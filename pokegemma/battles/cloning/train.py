"""Train a policy by behaviour cloning: the steps of a run."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import PreTrainedModel
from transformers.trainer_utils import IntervalStrategy

from pokegemma.battles.cloning.baselines import measure_baselines
from pokegemma.battles.cloning.batches import TrainingBatches
from pokegemma.battles.cloning.options import CloningOptions, CloningRun, CloningTrainingOptions, PolicyModelOptions
from pokegemma.battles.cloning.rows import load_rows, spread
from pokegemma.battles.cloning.time_limit import TimeLimit
from pokegemma.battles.cloning.trainer import CloningTrainer
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.training_run import TrainingRun, describe_inputs, find_evaluation, open_run
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError, one_line
from pokegemma.gemma.adapters.attachment import check_tensors
from pokegemma.gemma.families import LINEAR_LAYERS
from pokegemma.tables import format_percent
from pokegemma.training.lora_targets import adapter_config, named_layers
from pokegemma.training.loss_curve import CurvePlotter
from pokegemma.training.parallel_mode import refuse_sharding, require_mode
from pokegemma.training.run_folder import DATASET_CACHE
from pokegemma.training.stop_on_signal import StopOnSignal
from pokegemma.training.trainable import loading_options
from pokegemma.training.trainer import EvaluateAtEnd

logger = logging.getLogger(__name__)

_FIXED_OPTIONS = (
    "text",
    "won_only",
    "min_rating",
    "formats",
    "since",
    "until",
    "eval_fraction",
    "finetuning",
    "lora_r",
    "lora_alpha",
    "lora_target_modules",
    "use_dora",
    "use_rslora",
    "learning_rate",  # a checkpoint contains it twice, in the optimizer and in the schedule: another would be ignored
)
"""Options that a resumed run must have as before."""


@dataclass(frozen=True)
class _Inputs:
    """What a run reads."""

    battles: PackedTrajectories
    base: PolicyCheckpoint


def train_policy(data: CloningOptions, training: CloningTrainingOptions, model: PolicyModelOptions) -> bool:
    """Train, and write the model or adapter, tokenizer, curves and run.json to `training.output_dir`.

    Returns:
        True if training finished. False if SIGTERM or SIGINT stopped it; then only a checkpoint is written.

    Raises:
        PokegemmaError: the options, the trajectories or the model cannot be used. An earlier run is deleted only after
            they have been read without an error.
    """
    options, stop = CloningRun(data, training, model), StopOnSignal()
    if training.max_length is not None:
        raise PokegemmaError("--max_length: the text of a state is never cut; leave it out")
    if model.finetuning == "qlora":
        refuse_sharding(training)
    if Path(model.model_name_or_path).is_dir():
        model.model_name_or_path = str(Path(model.model_name_or_path).resolve())
    inputs = _read_inputs(options)
    run = open_run(
        training,
        options=options.to_dict(),
        read_facts=lambda: describe_inputs(inputs.base, inputs.battles, data.folder, seed=training.seed),
        sources=[data.folder, Path(model.model_name_or_path)],
        overwrite=data.overwrite,
        fixed=_FIXED_OPTIONS,
    )
    trainer, facts = _build_trainer(options, inputs, run, stop)

    def finish() -> dict[str, Any]:
        trainer.model.config.use_cache = True
        trainer.save_model()
        trainer.save_state()
        if run.record.is_written and not options.model.use_peft:
            inputs.base.save_files(Path(training.output_dir))  # with tokenizer.model, for llama.cpp
        best = trainer.state.best_model_checkpoint
        return {"best_checkpoint": best, **facts, "accuracy": _find_accuracy(trainer)}

    return run.train(trainer, stop, finish=finish)


def _read_inputs(options: CloningRun) -> _Inputs:
    battles, name = PackedTrajectories(options.data.folder), options.model.model_name_or_path
    opened = open_policy(name)
    if opened.adapter is not None:
        raise PokegemmaError(f"{name} is an adapter: name a whole model to train")
    return _Inputs(battles, PolicyCheckpoint(opened.path, opened.config, options.data.text))


def _build_trainer(
    options: CloningRun, inputs: _Inputs, run: TrainingRun, stop: StopOnSignal
) -> tuple[CloningTrainer, dict[str, Any]]:
    """Load the model, delete an earlier run, write the rows; return the trainer and facts about the rows."""
    training, base, record = options.training, inputs.base, run.record
    model = load_trainable_policy(base, options.model, training)
    run.clear_folder()
    train, held_out = _load_datasets(options, inputs)
    facts: dict[str, Any] = {"num_decisions": len(train), "num_eval_decisions": len(held_out or ())}
    if held_out is not None:
        facts["baselines"] = measure_baselines(train, held_out)
        shares = {name: format_percent(value) for name, value in facts["baselines"].items()}
        logger.info("accuracy without a model: %s", shares)

    def record_mode(wrapped: torch.nn.Module) -> None:
        record.facts["parallel_mode"] = require_mode(wrapped, training)
        record.write("running")

    limits = [] if training.max_minutes is None else [TimeLimit(training.max_minutes)]
    try:
        trainer = CloningTrainer(
            model=model,
            args=training,
            train_dataset=train,
            eval_dataset=held_out,
            data_collator=TrainingBatches(base.tokenizer.pad_token_id or 0),
            processing_class=base.tokenizer,
            callbacks=[stop, EvaluateAtEnd(), CurvePlotter(), *limits],
            peft_config=make_lora_config(options.model) if options.model.use_peft else None,
            before_first_step=record_mode,
            action_tokens=base.action_tokens,
        )
    except ValueError as error:  # options that TRL, PEFT or transformers refuse
        raise PokegemmaError(one_line(error, length=300)) from error
    facts["num_trained_weights"] = sum(each.numel() for each in trainer.model.parameters() if each.requires_grad)
    logger.info("%d decisions to learn from, %d trained weights", len(train), facts["num_trained_weights"])
    if run.resume_from is not None and options.model.use_peft:
        check_tensors(run.resume_from, trainer.model)
    return trainer, facts


def _load_datasets(options: CloningRun, inputs: _Inputs) -> tuple[Dataset, Dataset | None]:
    data, training = options.data, options.training
    cache = Path(training.output_dir) / DATASET_CACHE
    train = load_rows(inputs.battles, data, inputs.base, "train", cache_dir=cache)
    if data.eval_fraction == 0 or not training.evaluates:
        training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
        return train, None
    return train, spread(load_rows(inputs.battles, data, inputs.base, "eval", cache_dir=cache), data.max_eval_decisions)


def load_trainable_policy(
    base: PolicyCheckpoint, options: PolicyModelOptions, training: CloningTrainingOptions
) -> PreTrainedModel:
    """Return the model to train, in 4 bits for QLoRA.

    Raises:
        PokegemmaError: it cannot be loaded.
    """
    model = base.load_model(**loading_options(options, training, not_quantised=["lm_head"]))
    model.config.use_cache = False
    return model


def make_lora_config(options: PolicyModelOptions) -> LoraConfig:
    """Return the adapter's config: the linear layers of all blocks, or those that `--lora_target_modules` names."""
    pattern = rf"model\.layers\..*\.({'|'.join(named_layers(options) or LINEAR_LAYERS)})"
    return adapter_config(options, pattern, in_full=options.lora_modules_to_save or [])


def _find_accuracy(trainer: CloningTrainer) -> dict[str, float] | None:
    evaluation = find_evaluation(trainer, "eval_action_accuracy")
    names = ("action_accuracy", "switch_accuracy", "loss")
    return None if evaluation is None else {name: evaluation[f"eval_{name}"] for name in names}
