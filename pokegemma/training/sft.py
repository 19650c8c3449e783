"""Fine-tune Gemma 3 on samples: TRL's SFTTrainer with our collator, metrics and interruption."""

import dataclasses
import itertools
import logging
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from accelerate import PartialState
from datasets import Dataset
from datasets.exceptions import DatasetGenerationError
from peft import LoraConfig
from transformers import BitsAndBytesConfig, PreTrainedModel, TrainerCallback
from transformers.trainer_utils import IntervalStrategy

from pokegemma.data.prompts import ANSWER_PREFIX, parse_buttons
from pokegemma.data.samples import Sample, dataset_files, dataset_hash, read_samples
from pokegemma.data.trajectories import Trajectory, cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.provenance import write_run_record
from pokegemma.training.collator import Example, Row
from pokegemma.training.converter_files import write_converter_files
from pokegemma.training.families import FAMILIES, Family, check_checkpointing, require_exact, set_fsdp_layers
from pokegemma.training.image_attention import attention_facts, image_attention
from pokegemma.training.image_size import picture_facts
from pokegemma.training.models import (
    copy_tokenizer_model,
    load_config,
    load_model,
    load_processor,
    read_family,
    weights_fingerprint,
)
from pokegemma.training.options import DataOptions, ModelOptions, TrainingOptions
from pokegemma.training.processor_collator import Collator, make_collator
from pokegemma.training.run_folder import (
    DATASET_CACHE,
    check_output,
    check_resumed,
    clear_output,
    clear_unfinished,
)
from pokegemma.training.tracking import track
from pokegemma.training.trainer import CurvePlotter, EvaluateAtEnd, PokemonTrainer, StopOnSignal
from pokegemma.training.vision import PROJECTOR, TOWER
from pokegemma.training.vision_features import prepare_cache

logger = logging.getLogger(__name__)

_MAX_NAMED = 5


def eval_file(data: DataOptions, beside_train: Path | None) -> Path | None:
    """Return the JSONL file to evaluate on: the one that was named, or eval.jsonl beside train.jsonl, or None.

    Raises:
        PokegemmaError: the named one does not exist.
    """
    if data.eval_dataset_path is None:
        return beside_train
    path = Path(data.eval_dataset_path)
    path = path / "eval.jsonl" if path.is_dir() else path
    if not path.is_file():
        raise PokegemmaError(f"--eval_dataset_path: {path} not found")
    return path


def read_examples(path: Path, data: DataOptions) -> Iterator[Example]:
    """Yield what a row of training shows: the samples of a JSONL file, or their trajectories. Paths are absolute.

    Raises:
        PokegemmaError: a line is not a sample.
    """
    folder = path.parent.resolve()
    samples = (
        dataclasses.replace(
            sample, frames=tuple(str(folder / frame) for frame in sample.frames),
            image=sample.image and str(folder / sample.image),
        )
        for sample in read_samples(path)
    )  # fmt: skip
    if data.layout != "trajectory":
        return samples
    return cut_trajectories(samples, max_decisions=data.max_decisions, overlap=data.overlap_decisions)


def load_dataset(path: Path, data: DataOptions, *, cache_dir: Path) -> Dataset:
    """Return the rows of a JSONL file as a memory-mapped dataset; see `collator.Row`.

    Paths are absolute, so that files of several folders go through one collator.

    Raises:
        PokegemmaError: a line is not a sample.
    """

    def rows(**cache_key: str) -> Iterator[Row]:
        for example in read_examples(path, data):
            if isinstance(example, Sample):
                yield {"sample": example.to_json()}
            else:
                samples = [sample.to_json() for sample in example.samples]
                yield {"samples": samples, "num_context": example.num_context}

    with PartialState().main_process_first():
        # The whole path, since rows hold whole ones: the same relative one elsewhere is another file.
        key = {"path": str(path.resolve()), "content": dataset_hash(path), "options": repr(data)}
        try:
            return Dataset.from_generator(rows, gen_kwargs=key, cache_dir=str(cache_dir))
        except DatasetGenerationError as error:
            raise PokegemmaError(str(error.__cause__)) from error


def check_lengths(path: Path, examples: Iterable[Example], collator: Collator, *, max_length: int) -> None:
    """Refuse rows of more than `max_length` tokens, naming them: cutting one would cut pictures or the answer.

    Raises:
        PokegemmaError: there are such rows.
    """
    too_long = []
    num_image_tokens = collator.processor.image_seq_length + 4  # begin, end and the newlines around
    for example in examples:
        samples = example.samples if isinstance(example, Trajectory) else (example,)
        num_bytes = sum(len(text.encode()) for one in samples for text in (one.context, one.question, one.output))
        num_images = len(collator.picture_paths(example))
        # A token has at least one byte, and the chat template adds fewer than 64: most need not be tokenized.
        if num_bytes + num_images * num_image_tokens + 64 * len(samples) <= max_length:
            continue
        num_tokens = collator.count_tokens(example)
        if num_tokens > max_length:
            too_long.append(f"{example.id} ({num_tokens})")
    if too_long:
        what, advice = ("samples", "convert with fewer frames")
        if collator.layout == "trajectory":
            what, advice = ("trajectories", "lower --max_decisions")
        raise PokegemmaError(
            f"{path}: {len(too_long)} {what} are longer than {max_length} tokens: {', '.join(too_long[:_MAX_NAMED])}"
            f"{' ...' if len(too_long) > _MAX_NAMED else ''}; raise --max_length, or {advice}"
        )


def check_answers(path: Path) -> None:
    """Refuse answers that evaluation could not find a button in: at its first one, a run would be lost.

    Raises:
        PokegemmaError: there are such samples.
    """
    bad = []
    for sample in read_samples(path):
        begins = [f'{ANSWER_PREFIX}{button}"' for button in parse_buttons(sample)]
        if not begins or not sample.output.strip().startswith(begins[0]):
            bad.append(sample.id)
    if bad:
        raise PokegemmaError(
            f"{path}: {len(bad)} answers do not begin with {ANSWER_PREFIX} and a button: "
            f"{', '.join(bad[:_MAX_NAMED])}{' ...' if len(bad) > _MAX_NAMED else ''}"
        )


def lora_config(options: ModelOptions, family: Family = FAMILIES["gemma3"]) -> LoraConfig:
    """Return the adapter's config: a regex, because bare names such as q_proj would also match SigLIP.

    `--lora_target_modules` narrows or widens the linear layers by name, within the parts that are trained.
    """
    given = options.lora_target_modules or []  # ModelConfig makes a list of one a string
    named = [name for name in ([given] if isinstance(given, str) else given) if name != "all-linear"]
    # The projector's weight is a bare parameter, not a linear layer: it is trained in full, beside the adapter.
    in_full = [*(options.lora_modules_to_save or []), *([family.projector] if options.train_projector else [])]
    return LoraConfig(
        r=options.lora_r, lora_alpha=options.lora_alpha, lora_dropout=options.lora_dropout, bias="none",
        target_modules=family.adapted(named=named, train_vision_tower=options.train_vision_tower),
        modules_to_save=in_full or None,
        use_rslora=options.use_rslora, use_dora=options.use_dora, task_type="CAUSAL_LM",
    )  # fmt: skip


def load_trainable(options: ModelOptions, training: TrainingOptions) -> PreTrainedModel:
    """Return the base model: quantised for QLoRA, with the right parts frozen for full fine-tuning.

    Raises:
        PokegemmaError: the model cannot be loaded.
    """
    family, extra = read_family(options.model_name_or_path), dict[str, Any]()
    if options.finetuning == "qlora":
        if training.deepspeed_plugin is not None:
            raise PokegemmaError("--finetuning qlora does not work with DeepSpeed; use lora, or multi_gpu.yaml")
        dtype = torch.bfloat16 if options.dtype == "bfloat16" else torch.float32
        extra["quantization_config"] = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type=options.bnb_4bit_quant_type,
            bnb_4bit_use_double_quant=options.use_bnb_nested_quant, bnb_4bit_compute_dtype=dtype,
            # One storage type for all weights, which FSDP and ZeRO-3 need to shard them.
            bnb_4bit_quant_storage=dtype,
            llm_int8_skip_modules=family.not_quantised,
        )  # fmt: skip
        if training.distributed_state.distributed_type in ("NO", "MULTI_GPU", "MULTI_CPU"):
            extra["device_map"] = {"": training.device}
    model = load_model(
        options.model_name_or_path, image_size_px=options.image_size, attention=options.image_attention,
        dtype=options.dtype, attn_implementation=options.attn_implementation, **extra,
    )  # fmt: skip
    model.config.use_cache = False
    if options.finetuning == "full":
        frozen = {TOWER: not options.train_vision_tower, family.projector: not options.train_projector}
        frozen |= dict.fromkeys(family.untrained, True)
        for name, weight in model.named_parameters():
            weight.requires_grad = not any(part in name and freeze for part, freeze in frozen.items())
    return model


def is_reentrant(training: TrainingOptions, *, adapter: bool) -> bool:
    """Return whether gradient checkpointing will be reentrant: as asked, or as TRL does with adapters under ZeRO-3."""
    if not training.gradient_checkpointing:
        return False
    deepspeed = training.deepspeed_plugin
    zero3 = adapter and deepspeed is not None and deepspeed.zero_stage == 3
    return zero3 or bool((training.gradient_checkpointing_kwargs or {}).get("use_reentrant"))


def describe_trainable(model: torch.nn.Module, family: Family = FAMILIES["gemma3"]) -> str:
    """Return how many weights are trained in each part of the model, for the log."""
    counts = dict.fromkeys(("language model", "vision tower", "projector"), 0)
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            part = "vision tower" if TOWER in name else "projector" if family.projector in name else "language model"
            counts[part] += getattr(weight, "ds_numel", weight.numel())
    return ", ".join(f"{part} {count:,}" for part, count in counts.items())


def check_fast_paths(data: DataOptions, options: ModelOptions) -> None:
    """Refuse what would fail or go stale after the first step, before anything is loaded.

    A feature cache where the weights that make the features are trained; rows with masks of ours (several samples or
    answers) for an attention that takes none.

    Raises:
        PokegemmaError: the options contradict each other.
    """
    rows = "--layout trajectory" if data.layout == "trajectory" else "--samples_per_row"
    if (data.layout == "trajectory" or data.samples_per_row > 1) and options.attn_implementation not in (
        "sdpa", "eager"
    ):  # fmt: skip
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
    if data.samples_per_row > training.per_device_train_batch_size:
        logger.warning(
            "--samples_per_row %d: a forward pass has %d samples, so no row has more; raise "
            "--per_device_train_batch_size", data.samples_per_row, training.per_device_train_batch_size,
        )  # fmt: skip
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
        output_dir, sources=[*files.values(), Path(base), *features], overwrite=data.overwrite,
        resume=training.resume_from_checkpoint,
    )  # fmt: skip
    config, family = load_config(base, model_options.image_size, model_options.image_attention), read_family(base)
    processor = load_processor(base, model_options.image_size, model_options.image_attention)
    own = load_config(base)  # asking for what the checkpoint is: the same run as without the option
    if model_options.image_size == getattr(own.vision_config, "image_size", None):
        model_options.image_size = None
    if model_options.image_attention == image_attention(own):
        model_options.image_attention = None
    for option, used in (("--vision_features", data.vision_features), ("--samples_per_row", data.samples_per_row > 1)):
        if used:
            require_exact(config, option)
    max_length = training.max_length or config.text_config.max_position_embeddings
    # Rows name their pictures by absolute paths, so the folder is not used.
    collator = make_collator(processor, layout=data.layout, dataset_folder=Path(), samples_per_row=data.samples_per_row)
    for path in files.values():
        check_lengths(path, read_examples(path, data), collator, max_length=max_length)
    if eval_path is not None and (training.eval_strategy != IntervalStrategy.NO or training.eval_on_start):
        check_answers(eval_path)
    options = {**vars(data), **dataclasses.asdict(model_options), **training.to_dict()}
    hashes = {split: {"path": str(path.resolve()), "sha256": dataset_hash(path)} for split, path in files.items()}
    facts = {
        "base_model": base, "base_fingerprint": weights_fingerprint(base), "seed": training.seed,
        "dataset": hashes["train"], "eval_dataset": hashes.get("eval"),
        **picture_facts(config), **attention_facts(config),
    }  # fmt: skip
    if training.resume_from_checkpoint is not None:
        check_resumed(checkpoint or output_dir, options=options, facts=facts)
    if model_options.finetuning == "full" and training.learning_rate > 1e-4:
        logger.warning("a learning rate of %g is high for full fine-tuning; 1e-5 is usual", training.learning_rate)

    check_checkpointing(config, reentrant=is_reentrant(training, adapter=model_options.use_peft))
    adapter = lora_config(model_options, family) if model_options.use_peft else None
    model = load_trainable(model_options, training)
    set_fsdp_layers(model, family)
    if data.vision_features is not None:
        examples = itertools.chain.from_iterable(read_examples(path, data) for path in files.values())
        paths = (path for example in examples for path in collator.picture_paths(example))
        collator.features = prepare_cache(
            Path(data.vision_features), model, processor, paths, device=training.device,
            num_workers=training.dataloader_num_workers,
        )  # fmt: skip
    if checkpoint is None:
        clear_output(output_dir)
    else:
        clear_unfinished(output_dir)
    cache_dir = output_dir / DATASET_CACHE
    datasets = {split: load_dataset(path, data, cache_dir=cache_dir) for split, path in files.items()}
    for split, dataset in datasets.items():
        logger.info("%s: %d rows of %s", split, len(dataset), files[split])
    track(training.report_to)
    stop = StopOnSignal()
    try:
        trainer = PokemonTrainer(
            model=model, args=training, train_dataset=datasets["train"], eval_dataset=datasets.get("eval"),
            data_collator=collator, processing_class=processor,
            callbacks=[*callbacks, stop, EvaluateAtEnd(), CurvePlotter()],
            peft_config=adapter,
        )  # fmt: skip
    except ValueError as error:  # options that TRL, PEFT or transformers refuse
        raise PokegemmaError(" ".join(str(error).split())[:300]) from error
    logger.info("trained weights: %s", describe_trainable(trainer.model, family))

    def record(status: str, **results: Any) -> None:
        if trainer.is_world_process_zero():
            write_run_record(output_dir, stage="train", options=options, **facts, status=status, **results)

    record("running")
    with stop:
        trainer.train(resume_from_checkpoint=checkpoint and str(checkpoint))
        state = trainer.state
        if not stop.stopped:
            trainer.model.config.use_cache = True
            trainer.save_model()
            trainer.save_state()
            if trainer.is_world_process_zero() and not model_options.use_peft:
                copy_tokenizer_model(base, output_dir)
                write_converter_files(processor, output_dir)
        record(
            "interrupted" if stop.stopped else "completed", global_step=state.global_step,
            best_checkpoint=state.best_model_checkpoint, best_metric=state.best_metric,
        )  # fmt: skip
    trainer.accelerator.end_training()
    return not stop.stopped
