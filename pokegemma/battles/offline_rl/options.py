"""Options of offline reinforcement learning. Each one acts, or is refused where it is not as by default."""

import dataclasses
from dataclasses import dataclass
from typing import Any, Literal

from transformers import TrainingArguments
from trl import SFTConfig

from pokegemma.battles.cloning.options import BattleOptions
from pokegemma.battles.offline_rl.formulas import GAMMAS, TD_LAMBDA
from pokegemma.battles.offline_rl.kl_damping import K_MAX, K_START, KL_TARGET
from pokegemma.errors import PokegemmaError, check_range, check_ranges
from pokegemma.options import option
from pokegemma.training.options import TrainingOptions, refuse_options

RewardName = Literal["default_shaped", "aggressive_shaped", "binary"]


@dataclass(kw_only=True)  # the encoder has no default, what is inherited has
class OfflineRLOptions(BattleOptions):
    """What to learn from, and the network."""

    encoder: str = option(
        ..., "Policy whose Gemma 3 encodes states: a checkpoint or an adapter of scripts/sft_battles.py."
    )
    encoder_training: Literal["frozen", "lora"] = option(
        "frozen",
        "frozen: the encoder stays as it is, and features of all states are computed once. lora: an adapter of it is "
        "trained, too, so that every step computes features.",
    )
    encoder_batch_size: int = option(64, "States that go through the encoder at once.")
    lora_r: int = option(16, "With --encoder_training lora: rank of the adapter.")
    lora_alpha: int = option(32, "With --encoder_training lora: its scale, divided by the rank.")
    lora_dropout: float = option(0.05, "With --encoder_training lora: dropout before it.")
    features_dir: str | None = option(
        None, "Folder of the features of all states, computed once. Default: --output_dir with _features appended."
    )
    reward: RewardName = option("default_shaped", "Reward of a transition.")
    actor: Literal["filter", "clone"] = option(
        "filter",
        "filter: learn actions that the critics find better than the average. clone: learn every action. With "
        "--won_only that was as good or better where many battles were won.",
    )
    teacher: str | None = option(
        None, "Evaluate on the decisions of players whose name begins so. Default: on those of all."
    )
    width: int = option(128, "Width of the transformer over a battle.")
    num_layers: int = option(2, "Its layers.")
    num_heads: int = option(4, "Its attention heads.")
    window: int = option(128, "States of a battle that it sees.")
    gammas: list[float] = option([*GAMMAS], "Discount factors; the last one plays.", nargs="+")
    td_lambda: float = option(
        TD_LAMBDA,
        "Lambda of the critics' targets. 1: the rewards up to the battle's end. 0: one reward and the critics' own "
        "value of the next state, as AMAGO has it, for which 1,500 steps were too few.",
    )
    num_critics: int = option(6, "Critics for each discount factor.")
    difference_decay: float = option(1.0, "Weight decay of what tells the critics' actions apart.")
    reference: str | None = option(
        None, "Result of an earlier run: training starts from its weights, and KL damping keeps the policy near its."
    )
    kl_start: float = option(K_START, "With --reference: weight of the KL divergence at first; it is adapted.")
    kl_max: float = option(K_MAX, "With --reference: its largest weight.")
    kl_target: float = option(KL_TARGET, "With --reference: mean divergence to aim at, nats a decision.")

    def __post_init__(self) -> None:
        super().__post_init__()
        check_ranges(self, "width", "num_layers", "num_heads", "num_critics", at_least=1)
        check_ranges(self, "encoder_batch_size", "lora_r", "lora_alpha", at_least=1)
        check_range("--lora_dropout", self.lora_dropout, at_least=0, below=1)
        check_range("--window", self.window, at_least=2)
        check_range("--difference_decay", self.difference_decay, at_least=0)
        check_ranges(self, "kl_start", "kl_max", "kl_target", above=0)
        check_range("--td_lambda", self.td_lambda, at_least=0, at_most=1)
        for gamma in self.gammas:
            check_range("--gammas", gamma, at_least=0, below=1)
        if self.width % self.num_heads:
            raise PokegemmaError(f"--width {self.width}: must be a multiple of --num_heads {self.num_heads}")
        if self.trains_encoder and self.features_dir is not None:
            raise PokegemmaError("--features_dir: with --encoder_training lora features change in every step")
        if not self.trains_encoder:
            self._refuse_changed("--encoder_training lora", "lora_r", "lora_alpha", "lora_dropout")
        if self.reference is None:
            self._refuse_changed("--reference", "kl_start", "kl_max", "kl_target")

    @property
    def trains_encoder(self) -> bool:
        return self.encoder_training == "lora"

    def _refuse_changed(self, needed: str, *names: str) -> None:
        for each in dataclasses.fields(self):
            if each.name in names and getattr(self, each.name) != each.default:
                raise PokegemmaError(f"--{each.name} needs {needed}")


def _sft_options() -> dict[str, tuple[Any, str]]:
    """Return what SFTConfig adds to transformers' TrainingArguments, for `refuse_options`."""
    ours = {each.name for each in dataclasses.fields(TrainingArguments)}
    return {
        each.name: (None if each.name == "max_length" else each.default, "it is of TRL's SFTTrainer, which clones")
        for each in dataclasses.fields(SFTConfig)
        if each.name not in ours
    }


_FLOAT32 = "returns up to 1,100 need float32"
_NO_HUB = "nothing is uploaded"
_NO_METRICS = "evaluation measures the rank of the action played, and its accuracy"
_NO_LANGUAGE_MODEL = "the network is no language model"
UNUSED: dict[str, tuple[Any, str]] = {
    **_sft_options(),
    "bf16": (None, _FLOAT32),
    **dict.fromkeys(("fp16", "bf16_full_eval", "fp16_full_eval"), (False, _FLOAT32)),
    **dict.fromkeys(
        (
            *("gradient_checkpointing", "activation_checkpointing"),
            *("gradient_checkpointing_kwargs", "activation_checkpointing_kwargs"),
        ),
        (None, "an encoder that is trained always computes its activations again"),
    ),
    **dict.fromkeys(("hub_token", "hub_private_repo", "hub_model_id", "hub_revision"), (None, _NO_HUB)),
    **dict.fromkeys(("push_to_hub", "hub_always_push"), (False, _NO_HUB)),
    "hub_strategy": ("every_save", _NO_HUB),
    **dict.fromkeys(("prediction_loss_only", "eval_use_gather_object", "batch_eval_metrics"), (False, _NO_METRICS)),
    **dict.fromkeys(("eval_accumulation_steps", "label_names"), (None, _NO_METRICS)),
    "eval_do_concat_batches": (True, _NO_METRICS),
    "include_for_metrics": ([], _NO_METRICS),
    "label_smoothing_factor": (0.0, "the critics' targets are distributions"),
    **dict.fromkeys(("neftune_noise_alpha", "liger_kernel_config"), (None, _NO_LANGUAGE_MODEL)),
    **dict.fromkeys(("use_cache", "use_liger_kernel"), (False, _NO_LANGUAGE_MODEL)),
    "include_num_input_tokens_seen": ("no", _NO_LANGUAGE_MODEL),
    "average_tokens_across_devices": (True, _NO_LANGUAGE_MODEL),
    "train_sampling_strategy": ("random", "windows of battles are drawn at random"),
    "length_column_name": ("length", "windows of battles are drawn at random"),
    "remove_unused_columns": (False, "there are no columns"),
    **dict.fromkeys(("do_train", "do_eval", "do_predict"), (False, "it trains, and evaluates by --eval_strategy")),
    "local_rank": (-1, "the launcher sets it"),
}
"""Options that nothing here reads, or that would break training: name, default, reason."""


@dataclass
class OfflineRLTrainingOptions(TrainingOptions):
    """How to train: the options of training, with other defaults."""

    output_dir: str = option("outputs/battles_rl", "Folder for checkpoints and the result.")
    per_device_train_batch_size: int = option(16, "Windows of battles on each device in a step.")
    gradient_accumulation_steps: int = option(1, "Forward passes for each optimizer step.")
    num_train_epochs: float = option(10.0, "Passes over the battles. --max_steps replaces it.")
    learning_rate: float = option(1e-3, "Peak learning rate. AMAGO has 1.5e-4, for millions of battles.")
    lr_scheduler_type: str = option("constant_with_warmup", "Schedule of the learning rate after the warm-up.")
    warmup_steps: float = option(100, "Optimizer steps of the warm-up. A number below 1 is a share of all steps.")
    max_grad_norm: float = option(1.5, "Gradients are clipped to this norm.")
    eval_steps: float | None = option(500, "Optimizer steps between evaluations.")
    save_steps: float = option(500, "Optimizer steps between checkpoints.")
    logging_steps: float = option(20, "Optimizer steps between log lines.")
    load_best_model_at_end: bool = option(False, "Return the checkpoint with the best evaluation.")
    metric_for_best_model: str | None = option("eval_rank_of_played", "Metric that selects the best checkpoint.")
    dataloader_num_workers: int = option(0, "Processes that make batches, which is little work.")
    gradient_checkpointing: bool | None = option(None, "Not supported: a trained encoder has it always.")
    remove_unused_columns: bool = option(False, "Not supported: there are no columns.")

    def __post_init__(self) -> None:
        for name in ("bf16", "gradient_checkpointing", "activation_checkpointing"):
            setattr(self, name, getattr(self, name) or None)  # None and False are the same here
        self.include_num_input_tokens_seen = self.include_num_input_tokens_seen or "no"  # the parser makes it False
        refuse_options(self, UNUSED)
        self.bf16 = False  # not what a GPU could do
        super().__post_init__()


@dataclass(frozen=True)
class OfflineRLRun:
    """All options of a run."""

    data: OfflineRLOptions
    training: OfflineRLTrainingOptions

    def to_dict(self) -> dict[str, Any]:
        """Return all options by name, as run.json records them."""
        return {**vars(self.data), **self.training.to_dict()}
