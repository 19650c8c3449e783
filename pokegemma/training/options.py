"""Options of a training run: what TRL's SFTConfig and ModelConfig have, with defaults for Gemma 3, and ours."""

import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from transformers.trainer_utils import IntervalStrategy
from trl import ModelConfig, SFTConfig

from pokegemma.data.checks.records import Split, find_splits
from pokegemma.data.prompts import Layout
from pokegemma.data.trajectories import DEFAULT_MAX_DECISIONS, DEFAULT_OVERLAP
from pokegemma.environment import default_finetuning
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.gemma.image_attention import ImageAttention
from pokegemma.gemma.loading import Checkpoint, open_checkpoint
from pokegemma.options import option
from pokegemma.training.precision import choose_bf16, deepspeed_precision, is_forced_to_cpu

DEFAULT_MODEL = "google/gemma-3-4b-it"
LAST_CHECKPOINT = ("last", "true", "True")
"""Values of `--resume_from_checkpoint` for the last checkpoint. Without a value, the flag has the first of these."""

Finetuning = Literal["qlora", "lora", "full"]


def automatic_dtype(finetuning: Finetuning) -> Literal["bfloat16", "float32"]:
    """Return the type of the weights for a way of fine-tuning on this machine."""
    if finetuning != "full" and torch.cuda.is_available() and torch.cuda.is_bf16_supported(including_emulation=False):
        return "bfloat16"
    return "float32"


_UNUSED_MODEL_OPTIONS = {
    "model_revision": ("main", "download that revision (hf download) and name its folder"),
    "lora_target_parameters": (None, "name linear layers with --lora_target_modules"),
    "lora_task_type": ("CAUSAL_LM", "it is always CAUSAL_LM"),
    "bnb_4bit_quant_storage": (None, "it follows --dtype"),
}
_PICTURES = "it does not work with pictures"
_OUR_COLLATOR = "the loss is always on the answer and its end of turn"
_UNUSED_TRAINING_OPTIONS = {
    "packing": (False, _PICTURES),
    "padding_free": (False, _PICTURES),
    "eval_packing": (None, _PICTURES),
    "train_sampling_strategy": ("random", "lengths are not known before pictures are read"),
    "assistant_only_loss": (False, _OUR_COLLATOR),
    "completion_only_loss": (None, _OUR_COLLATOR),
    "chat_template_path": (None, "the model's own template is used"),
    "use_liger_kernel": (False, "TRL's fused LM head takes its place"),
    "activation_offloading": (False, "use --gradient_checkpointing"),
    "push_to_hub": (False, "upload the merged folder instead (hf upload)"),
}


def refuse_options(options: object, unused: Mapping[str, tuple[object, str]]) -> None:
    """Refuse options that would be ignored or would break training: those that are not as by default.

    Args:
        unused: name: (default, why it is not supported).

    Raises:
        PokegemmaError: one is not as by default.
    """
    for name, (default, reason) in unused.items():
        if getattr(options, name) != default:
            raise PokegemmaError(f"--{name} {getattr(options, name)} is not supported: {reason}")


@dataclass
class DataOptions:
    """What to train on."""

    dataset_path: str = option(..., "Folder with train.jsonl (and eval.jsonl), or a JSONL file.")
    eval_dataset_path: str | None = option(
        None, "Folder or JSONL file to evaluate on. Default: eval.jsonl next to train.jsonl."
    )
    layout: Layout = option(
        "grid",
        "grid: one 2x2 picture a sample. frames: each frame as a picture. trajectory: part of a session "
        "as one conversation (frame, answer, frame, answer ...), with loss on every answer.",
    )
    max_decisions: int = option(
        DEFAULT_MAX_DECISIONS, "With --layout trajectory: decisions in a conversation. Longer sessions are cut."
    )
    overlap_decisions: int = option(
        DEFAULT_OVERLAP,
        "With --layout trajectory: decisions that are repeated where a session is cut. They are not counted again.",
    )
    samples_per_row: int = option(
        1,
        "Samples that share a row and the first part of their prompts. The batch size still counts "
        "samples. Not with --layout trajectory.",
    )
    vision_features: str | None = option(
        None,
        "Folder for the vision tower's output for each frame. It is computed once. After that, no picture "
        "is decoded and the tower does not run. Not with --train_vision_tower or --train_projector.",
    )
    augment_colour: float = option(
        0.0,
        "Change the colours of each training picture at random, by up to this share of their range; others in each "
        "epoch. Evaluation sees the recorded pictures. Not with --vision_features.",
    )
    augment_noise: float = option(
        0.0,
        "Add noise with this standard deviation, as a share of the range, to each training picture. Not with "
        "--vision_features.",
    )
    overwrite: bool = option(False, "Delete an earlier run in --output_dir first.")

    def __post_init__(self) -> None:
        check_ranges(self, "max_decisions", "samples_per_row", at_least=1)
        check_ranges(self, "overlap_decisions", at_least=0)
        check_ranges(self, "augment_colour", "augment_noise", at_least=0, at_most=0.5)
        if self.augments and self.vision_features is not None:
            raise PokegemmaError(
                "--vision_features: stored features are those of the recorded pictures, which --augment_colour and "
                "--augment_noise change; leave out one of the two"
            )
        if self.layout == "trajectory":
            if self.samples_per_row > 1:
                raise PokegemmaError(
                    "--samples_per_row: with --layout trajectory a row is a conversation; use --max_decisions"
                )
            self.overlap_decisions = min(self.overlap_decisions, self.max_decisions - 1)

    @property
    def augments(self) -> bool:
        """Whether training pictures are changed at random."""
        return self.augment_colour > 0 or self.augment_noise > 0

    def find_splits(self) -> tuple[Split, Split | None]:
        """Return the split to train on and the one to evaluate on; None where the dataset has no such file.

        Raises:
            PokegemmaError: a file does not exist.
        """
        return find_splits(Path(self.dataset_path), Path(self.eval_dataset_path) if self.eval_dataset_path else None)


@dataclass
class WeightOptions(ModelConfig):
    """How the weights of any Gemma are loaded and trained."""

    dtype: str = option(
        "auto",
        "Type of the weights. auto: bfloat16 on a GPU that supports it, else float32. With --finetuning "
        "full, auto is float32, because bfloat16 rounds small updates away.",
        choices=["auto", "bfloat16", "float32"],
    )
    attn_implementation: str = option(
        "sdpa", "sdpa, eager or flex_attention. Flash attention computes wrong results for Gemma 3."
    )
    finetuning: Finetuning = option(
        default_finetuning(),
        "qlora: LoRA on nf4 weights. lora: LoRA on unquantised weights. full: all weights. Default: "
        "qlora, or lora without bitsandbytes.",
    )
    use_bnb_nested_quant: bool = option(True, "Also quantise the quantisation constants.")

    def __post_init__(self) -> None:
        refuse_options(self, _UNUSED_MODEL_OPTIONS)
        if self.finetuning == "qlora" and default_finetuning() != "qlora":
            raise PokegemmaError("--finetuning qlora needs bitsandbytes, which is not installed; use --finetuning lora")
        if self.load_in_8bit:
            raise PokegemmaError("--load_in_8bit is not supported; use --finetuning qlora (4 bit) or lora")
        if self.load_in_4bit and self.finetuning != "qlora":
            raise PokegemmaError(f"--load_in_4bit contradicts --finetuning {self.finetuning}; use --finetuning qlora")
        if self.use_peft and self.finetuning == "full":
            raise PokegemmaError("--use_peft contradicts --finetuning full; use --finetuning lora or qlora")
        self.use_peft = self.finetuning != "full"
        self.load_in_4bit = self.finetuning == "qlora"
        if self.dtype == "auto":
            self.dtype = automatic_dtype(self.finetuning)
        super().__post_init__()


@dataclass
class ModelOptions(WeightOptions):
    """What to train. The defaults fit google/gemma-3-4b-it on a GPU with 24 GB."""

    model_name_or_path: str = option(
        DEFAULT_MODEL, "Gemma 3 checkpoint with vision: a Hub id or a folder.", aliases=["--model_name"]
    )
    train_vision_tower: bool = option(False, "Also train the vision tower.")
    train_projector: bool = option(False, "Also train the projector, with all of its weights.")
    image_size: int | None = option(
        None,
        "Width and height of a picture in pixels. At 448, a picture has 64 tokens instead of 256. "
        "Default: the model's (896).",
    )
    image_attention: ImageAttention | None = option(
        None,
        "bidirectional: a picture's tokens attend to the whole picture. causal: they attend only to what "
        "comes before them, as mlx-vlm computes it. Default: the model's (bidirectional).",
    )

    def open_checkpoint(self) -> Checkpoint:
        """Open the base model with the image options given here; see `gemma.loading.open_checkpoint`."""
        return open_checkpoint(self.model_name_or_path, self.image_size, self.image_attention)


@dataclass
class TrainingOptions(SFTConfig):
    """How to train: every option of TRL's SFTConfig, with other defaults."""

    output_dir: str = option("outputs/adapter", "Folder for checkpoints and the result.")
    per_device_train_batch_size: int = option(2, "Samples on each device in a forward pass.")
    per_device_eval_batch_size: int | None = option(None, "The same for evaluation. Default: as in training.")
    gradient_accumulation_steps: int = option(8, "Forward passes for each optimizer step.")
    num_train_epochs: float = option(3.0, "Passes over the data. --max_steps replaces it.")
    learning_rate: float = option(2e-4, "Peak learning rate. Use about 1e-5 for full fine-tuning.")
    lr_scheduler_type: str = option("cosine", "Schedule of the learning rate after the warm-up.")
    warmup_steps: float = option(0.03, "Optimizer steps of the warm-up. A number below 1 is a share of all steps.")
    max_grad_norm: float = option(1.0, "Gradients are clipped to this norm.")
    max_length: int | None = option(
        None, "Largest number of tokens of a sample. Longer samples are refused, not cut. Default: the model's."
    )
    eval_strategy: str = option("steps", "When to evaluate: no, steps or epoch.")
    eval_steps: float | None = option(100, "Optimizer steps between evaluations.")
    save_steps: float = option(
        100, "Optimizer steps between checkpoints. --eval_steps replaces a number that is not a multiple of it."
    )
    save_total_limit: int | None = option(2, "Number of checkpoints to keep, including the best one.")
    load_best_model_at_end: bool = option(True, "Return the checkpoint with the best evaluation.")
    metric_for_best_model: str | None = option("eval_button_accuracy", "Metric that selects the best checkpoint.")
    logging_steps: float = option(5, "Optimizer steps between log lines.")
    dataloader_num_workers: int = option(
        min(4, os.cpu_count() or 1),
        "Processes that decode and resize pictures. Default: one for each core, at most four.",
    )
    bf16: bool | None = option(
        None,
        "Compute in bfloat16. This overrides mixed_precision of the accelerate config. Default: as set "
        "there, else bfloat16 on a GPU that supports it.",
    )
    report_to: str | None = option(
        None, "wandb, tensorboard or none. Default: wandb if WANDB_API_KEY is set, else tensorboard."
    )
    ddp_find_unused_parameters: bool | None = option(
        False, "Search for unused weights in each step. It is not needed, because every sample has pictures."
    )
    resume_from_checkpoint: str | None = option(
        None, "Checkpoint folder to continue from. Without a value: the last one.", nargs="?", const=LAST_CHECKPOINT[0]
    )

    def __post_init__(self) -> None:
        check_ranges(self, "per_device_train_batch_size", "per_device_eval_batch_size", at_least=1)
        check_ranges(self, "gradient_accumulation_steps", "max_length", at_least=1)
        check_ranges(self, "dataloader_num_workers", "seed", at_least=0)
        if self.fp16:
            raise PokegemmaError("--fp16 overflows in Gemma 3; use --bf16 or neither")
        refuse_options(self, _UNUSED_TRAINING_OPTIONS)
        if self.per_device_eval_batch_size is None:
            self.per_device_eval_batch_size = self.per_device_train_batch_size
        self.use_cpu |= is_forced_to_cpu()  # or transformers refuses bf16 where there is no GPU
        asked_bf16, self.bf16 = self.bf16, choose_bf16(self.bf16, use_cpu=self.use_cpu)
        if asked_bf16 is None and not (self.use_cpu or torch.cuda.is_available()):
            self.bf16 = False  # transformers refuses this option without a GPU, and not the accelerate config's
        if self.report_to is None:
            self.report_to = "wandb" if os.environ.get("WANDB_API_KEY") else "tensorboard"
        if "no" in (self.eval_strategy, self.save_strategy):
            self.load_best_model_at_end = False
        if self.load_best_model_at_end:  # a checkpoint for every evaluation, else the best one may not be there
            self.save_strategy = self.eval_strategy
            if self.eval_strategy == "steps" and self.save_steps % (self.eval_steps or self.save_steps):
                self.save_steps = self.eval_steps
        self.dataloader_pin_memory &= torch.cuda.is_available()
        self.remove_unused_columns = False  # the collator reads the sample itself
        self.dataset_kwargs = {**(self.dataset_kwargs or {}), "skip_prepare_dataset": True}
        super().__post_init__()
        for kwargs in (self.activation_checkpointing_kwargs, self.gradient_checkpointing_kwargs):
            if kwargs:  # torch's default is True
                kwargs.setdefault("use_reentrant", False)
        if self.deepspeed_plugin is not None:
            self.mixed_precision = deepspeed_precision(self.deepspeed_plugin.deepspeed_config, asked=asked_bf16)
        self.bf16 = self.mixed_precision == "bf16"  # without a GPU the accelerate config alone may ask for it

    @property
    def evaluates(self) -> bool:
        """Whether training evaluates, if there is a file to evaluate on."""
        return self.eval_strategy != IntervalStrategy.NO or self.eval_on_start

    def to_dict(self) -> dict[str, Any]:
        """Return the options, and the precision that follows from them."""
        return {**super().to_dict(), "mixed_precision": self.mixed_precision}


@dataclass(frozen=True)
class RunOptions:
    """All options of a training run."""

    data: DataOptions
    training: TrainingOptions
    model: ModelOptions

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name, as run.json records them."""
        return {**vars(self.data), **asdict(self.model), **self.training.to_dict()}
