"""Offline reinforcement learning from packed trajectories: the steps of a run."""

import copy
import dataclasses
import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from pokegemma.battles.cloning.options import PolicyModelOptions
from pokegemma.battles.cloning.selection import SplitName, select_battles
from pokegemma.battles.cloning.train import make_lora_config
from pokegemma.battles.offline_rl import formulas
from pokegemma.battles.offline_rl.encoder_path import ADAPTER_FOLDER
from pokegemma.battles.offline_rl.features import StateFeatures, describe_encoder, prepare_features
from pokegemma.battles.offline_rl.kl_damping import KLController
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.network_files import load_actor_critic, save_actor_critic
from pokegemma.battles.offline_rl.options import OfflineRLOptions, OfflineRLRun, OfflineRLTrainingOptions
from pokegemma.battles.offline_rl.trained_encoder import StateTokens, TrainedEncoder, make_trained_encoder
from pokegemma.battles.offline_rl.trainer import OfflineRLTrainer, TrainableActorCritic
from pokegemma.battles.offline_rl.windows import BattleWindows
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.training_run import describe_inputs, find_evaluation, open_run
from pokegemma.battles.trajectories.files import name_of
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from pokegemma.training.loss_curve import CurvePlotter
from pokegemma.training.stop_on_signal import StopOnSignal
from pokegemma.training.trainer import EvaluateAtEnd

logger = logging.getLogger(__name__)

_FIXED_OPTIONS = (
    *("won_only", "min_rating", "formats", "since", "until", "eval_fraction", "reward", "actor", "width"),
    *("num_layers", "num_heads", "window", "gammas", "td_lambda", "num_critics", "difference_decay"),
    "per_device_train_batch_size",
    *("encoder_training", "lora_r", "lora_alpha", "lora_dropout"),
    *("reference", "learning_rate"),
)
"""Options that a resumed run must have as before."""

_FIXED_WITH_REFERENCE = ("kl_start", "kl_max", "kl_target")


def train_offline_rl(data: OfflineRLOptions, training: OfflineRLTrainingOptions) -> bool:
    """Train, and write the network, curves and run.json to `training.output_dir`.

    Returns:
        True if training finished. False if SIGTERM or SIGINT stopped it; then only a checkpoint is written.

    Raises:
        PokegemmaError: the options, the trajectories or the encoder cannot be used.
    """
    options, stop = OfflineRLRun(data, training), StopOnSignal()
    if Path(data.encoder).is_dir():
        data.encoder = str(Path(data.encoder).resolve())
    battles, policy = PackedTrajectories(data.folder), open_policy(data.encoder)
    reference = None if data.reference is None else _load_reference(data, policy)
    run = open_run(
        training,
        options=options.to_dict(),
        read_facts=lambda: {
            **describe_inputs(policy, battles, data.folder, seed=training.seed),
            "encoder": describe_encoder(policy),
        },
        sources=[Path(each) for each in (data.folder, data.encoder, data.reference) if each is not None],
        overwrite=data.overwrite,
        fixed=_FIXED_OPTIONS if reference is None else (*_FIXED_OPTIONS, *_FIXED_WITH_REFERENCE),
    )
    states = _prepare_states(options, battles, policy)
    set_seed(training.seed)
    model = _make_model(options, policy, reference)
    run.clear_folder()
    train = _make_windows(options, battles, states, "train")
    held_out = _make_windows(options, battles, states, "eval") if data.eval_fraction and training.evaluates else None
    if held_out is None:
        training.eval_strategy, training.load_best_model_at_end = IntervalStrategy.NO, False
    trainer = OfflineRLTrainer(
        model,
        args=training,
        train_dataset=train,
        eval_dataset=held_out,
        callbacks=[stop, EvaluateAtEnd(), CurvePlotter()],
        difference_decay=data.difference_decay,
    )
    num_trained = sum(weight.numel() for weight in trainer.model.parameters() if weight.requires_grad)
    logger.info("%d windows of battles, %d trained weights", len(train), num_trained)

    def finish() -> dict[str, Any]:
        if run.record.is_written:
            _save_result(Path(training.output_dir), trainer.model, policy)
        trainer.save_state()
        evaluation = find_evaluation(trainer, "eval_rank_of_played")
        if evaluation is not None:
            warn_of_collapse(evaluation)
        return {"num_trained_weights": num_trained, "evaluation": evaluation}

    return run.train(trainer, stop, finish=finish)


def warn_of_collapse(evaluation: Mapping[str, float]) -> None:
    """Warn where the actor takes the actions of held-out battles less often than a uniform choice would."""
    accuracy, uniform = evaluation["eval_action_accuracy"], evaluation["eval_uniform_accuracy"]
    if accuracy < uniform:
        logger.warning(
            "warning: the actor takes the action that was played in %.1f %% of the held-out decisions, a uniform "
            "choice in %.1f %%: it has collapsed onto few actions and will play badly; --actor clone learns all",
            100 * accuracy,
            100 * uniform,
        )


def _prepare_states(
    options: OfflineRLRun, battles: PackedTrajectories, policy: PolicyCheckpoint
) -> StateFeatures | StateTokens:
    """Return the features of all states, or their tokens where the encoder is trained."""
    data, training = options.data, options.training
    if data.trains_encoder:
        return StateTokens(battles, policy)
    folder = Path(data.features_dir or f"{Path(training.output_dir)}_features")
    return prepare_features(folder, battles, policy, device=training.device, batch_size=data.encoder_batch_size)


def _make_windows(
    options: OfflineRLRun, battles: PackedTrajectories, states: StateFeatures | StateTokens, split: SplitName
) -> BattleWindows:
    data = options.data
    indices = list(select_battles(battles, data.battle_filter(), eval_fraction=data.eval_fraction, split=split))
    if split == "eval" and data.teacher is not None:
        names = {index: name_of(battles.name(index)).player for index in indices}
        indices = [index for index in indices if names[index].startswith(data.teacher)]
    if not indices:
        raise PokegemmaError(
            f"{data.trajectories_dir}: no battle to {'learn from' if split == 'train' else 'evaluate on'}; change "
            "--won_only, --min_rating, --formats, --since, --until, --teacher or --eval_fraction"
        )
    return BattleWindows(battles, states, indices, length=data.window, reward=data.reward)


def _load_reference(data: OfflineRLOptions, policy: PolicyCheckpoint) -> ActorCritic:
    data.reference = str(Path(data.reference).resolve())
    reference, encoder = load_actor_critic(Path(data.reference))
    if describe_encoder(encoder) != describe_encoder(policy):
        raise PokegemmaError(f"--reference {data.reference}: its encoder is not --encoder {data.encoder}")
    return reference


def _make_model(options: OfflineRLRun, policy: PolicyCheckpoint, reference: ActorCritic | None) -> TrainableActorCritic:
    """Return what is trained: a new network, or one that starts as the reference, which is frozen next to it."""
    data = options.data
    shape = _choose_shape(data, policy.config.hidden_size)
    encoder = _make_encoder(options, policy) if data.trains_encoder else None
    learning = {"clone": data.actor == "clone", "td_lambda": data.td_lambda, "encoder": encoder}
    if reference is None:
        return TrainableActorCritic(ActorCritic(shape), **learning)
    before, now = dataclasses.asdict(reference.shape), dataclasses.asdict(shape)
    if changed := [f"{name} is {before[name]} instead of {now[name]}" for name in now if before[name] != now[name]]:
        raise PokegemmaError(f"--reference {data.reference}: its network has other sizes: {', '.join(changed)}")
    controller = KLController(k_start=data.kl_start, k_max=data.kl_max, kl_target=data.kl_target)
    start = copy.deepcopy(reference)
    return TrainableActorCritic(start, **learning, reference=reference, controller=controller)


def _make_encoder(options: OfflineRLRun, policy: PolicyCheckpoint) -> TrainedEncoder:
    data = options.data
    lora = PolicyModelOptions(
        finetuning="lora", lora_r=data.lora_r, lora_alpha=data.lora_alpha, lora_dropout=data.lora_dropout
    )
    return make_trained_encoder(
        policy, make_lora_config(lora), batch_size=data.encoder_batch_size, device=options.training.device
    )


def _choose_shape(data: OfflineRLOptions, feature_width: int) -> ActorCriticShape:
    return ActorCriticShape(
        feature_width=feature_width,
        width=data.width,
        num_layers=data.num_layers,
        num_heads=data.num_heads,
        max_length=data.window,
        gammas=tuple(data.gammas),
        num_critics=data.num_critics,
        max_return=2 * formulas.MAX_RETURN if data.reward == "aggressive_shaped" else formulas.MAX_RETURN,
    )


def _save_result(folder: Path, model: TrainableActorCritic, policy: PolicyCheckpoint) -> None:
    if model.encoder is not None:
        model.encoder.save(folder / ADAPTER_FOLDER, policy)
    path = policy.path if policy.adapter is None else str(policy.adapter.path)
    save_actor_critic(folder, model.network, encoder=path, has_adapter=model.encoder is not None)
