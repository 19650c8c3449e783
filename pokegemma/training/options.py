"""Options of a training run: what TRL's SFTConfig and ModelConfig have, with defaults for Gemma 3, and ours."""

import os
from dataclasses import asdict, dataclass, field
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


def _refuse(options: object, unused: dict[str, tuple[object, str]]) -> None:
    """Refuse options of TRL that would be ignored or would break training."""
    for name, (default, reason) in unused.items():
        if getattr(options, name) != default:
            raise PokegemmaError(f"--{name} {getattr(options, name)} is not supported: {reason}")


@dataclass
class DataOptions:
    """What to train on."""

    dataset_path: str = field(metadata={"help": "Folder with train.jsonl (and eval.jsonl), or a JSONL file."})
    eval_dataset_path: str | None = field(
        default=None, metadata={"help": "Folder or JSONL file to evaluate on; default: eval.jsonl next to train.jsonl."}
    )
    layout: Layout = field(
        default="grid",
        metadata={
            "help": "grid: one 2x2 picture a sample; frames: each frame as a picture; trajectory: a stretch of a "
            "session as one conversation, frame, answer, frame, answer ..., with loss on every answer."
        },
    )
    max_decisions: int = field(
        default=DEFAULT_MAX_DECISIONS,
        metadata={"help": "With --layout trajectory: decisions in a conversation; longer sessions are cut."},
    )
    overlap_decisions: int = field(
        default=DEFAULT_OVERLAP,
        metadata={
            "help": "With --layout trajectory: number of decisions that are repeated where a session is cut. They "
            "are not counted again."
        },
    )
    samples_per_row: int = field(
        default=1,
        metadata={
            "help": "Samples that share a row and what their prompts begin with; the batch size still counts "
            "samples. Not with --layout trajectory."
        },
    )
    vision_features: str | None = field(
        default=None,
        metadata={
            "help": "Folder for the vision tower's output for each frame: computed once, then no picture is "
            "decoded and no tower is run. Not with --train_vision_tower or --train_projector."
        },
    )
    overwrite: bool = field(default=False, metadata={"help": "Delete an earlier run in --output_dir first."})

    def __post_init__(self) -> None:
        check_ranges(self, "max_decisions", "samples_per_row", at_least=1)
        check_ranges(self, "overlap_decisions", at_least=0)
        if self.layout == "trajectory":
            if self.samples_per_row > 1:
                raise PokegemmaError(
                    "--samples_per_row: with --layout trajectory a row is a conversation; use --max_decisions"
                )
            self.overlap_decisions = min(self.overlap_decisions, self.max_decisions - 1)

    def find_splits(self) -> tuple[Split, Split | None]:
        """Return the split to train on and the one to evaluate on; None where the dataset has no such file.

        Raises:
            PokegemmaError: a file does not exist.
        """
        return find_splits(Path(self.dataset_path), Path(self.eval_dataset_path) if self.eval_dataset_path else None)


@dataclass
class ModelOptions(ModelConfig):
    """What to train. The defaults fit google/gemma-3-4b-it on a GPU with 24 GB."""

    model_name_or_path: str = field(
        default=DEFAULT_MODEL,
        metadata={"help": "Gemma 3 checkpoint with vision: a Hub id or a folder.", "aliases": ["--model_name"]},
    )
    dtype: str = field(
        default="auto",
        metadata={
            "help": "Type of the weights; auto: bfloat16 on a GPU that has it, else float32. For full fine-tuning auto "
            "is float32: bfloat16 rounds small updates away.",
            "choices": ["auto", "bfloat16", "float32"],
        },
    )
    attn_implementation: str = field(
        default="sdpa", metadata={"help": "sdpa, eager or flex_attention; flash attention is wrong for Gemma 3."}
    )
    finetuning: Finetuning = field(
        default=default_finetuning(),  # no factory: HfArgumentParser would take the flag for required
        metadata={
            "help": "qlora: LoRA on nf4 weights; lora: LoRA on unquantised ones; full. Without bitsandbytes lora."
        },
    )
    train_vision_tower: bool = field(default=False, metadata={"help": "Also train SigLIP."})
    train_projector: bool = field(default=False, metadata={"help": "Also train the projector, in full."})
    image_size: int | None = field(
        default=None,
        metadata={"help": "Pixels a side of a picture: at 448 it has 64 tokens, not 256. Default: the model's (896)."},
    )
    image_attention: ImageAttention | None = field(
        default=None,
        metadata={
            "help": "bidirectional: a picture's tokens see all of it; causal: only what comes before them, as mlx-vlm "
            "computes it. Default: the model's (bidirectional)."
        },
    )
    use_bnb_nested_quant: bool = field(default=True, metadata={"help": "Quantise the quantisation constants too."})

    def __post_init__(self) -> None:
        _refuse(self, _UNUSED_MODEL_OPTIONS)
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

    def open_checkpoint(self) -> Checkpoint:
        """Open the base model with the image options given here; see `gemma.loading.open_checkpoint`."""
        return open_checkpoint(self.model_name_or_path, self.image_size, self.image_attention)


@dataclass
class TrainingOptions(SFTConfig):
    """How to train: every option of TRL's SFTConfig, with other defaults."""

    output_dir: str = field(default="outputs/adapter", metadata={"help": "Folder for checkpoints and the result."})
    per_device_train_batch_size: int = field(default=2, metadata={"help": "Samples a device a forward pass."})
    per_device_eval_batch_size: int | None = field(
        default=None,
        metadata={"help": "The same, in evaluation. Default: as in training."},
    )
    gradient_accumulation_steps: int = field(default=8, metadata={"help": "Forward passes an optimizer step."})
    num_train_epochs: float = field(default=3.0, metadata={"help": "Passes over the data, unless --max_steps."})
    learning_rate: float = field(default=2e-4, metadata={"help": "Peak learning rate; 1e-5 for full fine-tuning."})
    lr_scheduler_type: str = field(default="cosine", metadata={"help": "Schedule after the warm-up."})
    warmup_steps: float = field(default=0.03, metadata={"help": "Warm-up: steps, or a share of all if below 1."})
    max_grad_norm: float = field(default=1.0, metadata={"help": "Gradient norm to clip to."})
    max_length: int | None = field(
        default=None,
        metadata={"help": "Most tokens a sample may have; a longer one is refused, never cut. Default: the model's."},
    )
    eval_strategy: str = field(default="steps", metadata={"help": "no, steps or epoch."})
    eval_steps: float | None = field(default=100, metadata={"help": "Optimizer steps between evaluations."})
    save_steps: float = field(
        default=100, metadata={"help": "Optimizer steps between checkpoints; follows --eval_steps if not a multiple."}
    )
    save_total_limit: int | None = field(default=2, metadata={"help": "Checkpoints to keep, the best one included."})
    load_best_model_at_end: bool = field(default=True, metadata={"help": "Return the checkpoint that evaluates best."})
    metric_for_best_model: str | None = field(
        default="eval_button_accuracy", metadata={"help": "What makes a checkpoint the best one."}
    )
    logging_steps: float = field(default=5, metadata={"help": "Optimizer steps between log lines."})
    dataloader_num_workers: int = field(
        default_factory=lambda: min(4, os.cpu_count() or 1),
        metadata={"help": "Processes that decode and resize pictures; default: a core each, four at most."},
    )
    bf16: bool | None = field(
        default=None,
        metadata={
            "help": "Compute in bfloat16; overrides mixed_precision of the accelerate config. Default: as set there, "
            "else bfloat16 on a GPU that supports it."
        },
    )
    report_to: str | None = field(
        default=None,
        metadata={"help": "wandb, tensorboard or none; default: wandb with WANDB_API_KEY, else tensorboard."},
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Every sample has pictures, so every trained weight is used."}
    )
    resume_from_checkpoint: str | None = field(
        default=None,
        metadata={
            "help": "Continue from a checkpoint folder; alone: the last one.",
            "nargs": "?",
            "const": LAST_CHECKPOINT[0],
        },
    )

    def __post_init__(self) -> None:
        check_ranges(self, "per_device_train_batch_size", "per_device_eval_batch_size", at_least=1)
        check_ranges(self, "gradient_accumulation_steps", "max_length", at_least=1)
        check_ranges(self, "dataloader_num_workers", "seed", at_least=0)
        if self.fp16:
            raise PokegemmaError("--fp16 overflows in Gemma 3; use --bf16 or neither")
        _refuse(self, _UNUSED_TRAINING_OPTIONS)
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
