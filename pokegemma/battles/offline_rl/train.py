"""Offline reinforcement learning from packed trajectories: the steps of a run, and the files of its result."""

import copy
import dataclasses
import json
import logging
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers import set_seed
from transformers.trainer_utils import IntervalStrategy

from pokegemma.battles.cloning.selection import SplitName, select_battles
from pokegemma.battles.offline_rl import formulas
from pokegemma.battles.offline_rl.encoder_path import SHAPE_FILE, describe_path, find_encoder, read_shape_file
from pokegemma.battles.offline_rl.features import StateFeatures, describe_encoder, prepare_features
from pokegemma.battles.offline_rl.kl_damping import KLController
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.options import OfflineRLOptions, OfflineRLRun, OfflineRLTrainingOptions
from pokegemma.battles.offline_rl.trainer import OfflineRLTrainer, TrainableActorCritic
from pokegemma.battles.offline_rl.windows import BattleWindows
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.training_run import describe_inputs, open_run
from pokegemma.battles.trajectories.files import TrajectoryName
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file, write_synced
from pokegemma.training.loss_curve import CurvePlotter
from pokegemma.training.stop_on_signal import StopOnSignal
from pokegemma.training.trainer import EvaluateAtEnd

logger = logging.getLogger(__name__)

NETWORK_FILE = "actor_critic.safetensors"

_FIXED_OPTIONS = (
    *("won_only", "min_rating", "formats", "since", "until", "eval_fraction", "reward", "actor", "width"),
    *("num_layers", "num_heads", "window", "gammas", "num_critics", "difference_decay", "per_device_train_batch_size"),
    "reference",
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
    features_dir = Path(data.features_dir or f"{Path(training.output_dir)}_features")
    cache = prepare_features(features_dir, battles, policy, device=training.device)
    set_seed(training.seed)
    model = _make_model(data, reference, cache.width)
    run.clear_folder()
    train = _make_windows(options, battles, cache, "train")
    held_out = _make_windows(options, battles, cache, "eval") if data.eval_fraction and training.evaluates else None
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
        save_actor_critic(Path(training.output_dir), trainer.model.network, encoder=data.encoder)
        trainer.save_state()
        evaluations = [entry for entry in trainer.state.log_history if "eval_rank_of_played" in entry]
        return {"num_trained_weights": num_trained, "evaluation": evaluations[-1] if evaluations else None}

    return run.train(trainer, stop, finish=finish)


def _make_windows(
    options: OfflineRLRun, battles: PackedTrajectories, cache: StateFeatures, split: SplitName
) -> BattleWindows:
    data = options.data
    indices = list(select_battles(battles, data.battle_filter(), eval_fraction=data.eval_fraction, split=split))
    if split == "eval" and data.teacher is not None:
        names = {index: TrajectoryName.parse(battles.name(index).rpartition("/")[2]).player for index in indices}
        indices = [index for index in indices if names[index].startswith(data.teacher)]
    if not indices:
        raise PokegemmaError(
            f"{data.trajectories_dir}: no battle to {'learn from' if split == 'train' else 'evaluate on'}; change "
            "--won_only, --min_rating, --formats, --since, --until, --teacher or --eval_fraction"
        )
    return BattleWindows(battles, cache, indices, length=data.window, reward=data.reward)


def _load_reference(data: OfflineRLOptions, policy: PolicyCheckpoint) -> ActorCritic:
    data.reference = str(Path(data.reference).resolve())
    reference, encoder = load_actor_critic(Path(data.reference))
    if describe_encoder(encoder) != describe_encoder(policy):
        raise PokegemmaError(f"--reference {data.reference}: its encoder is not --encoder {data.encoder}")
    return reference


def _make_model(data: OfflineRLOptions, reference: ActorCritic | None, feature_width: int) -> TrainableActorCritic:
    """Return what is trained: a new network, or one that starts as the reference, which is frozen next to it."""
    shape, clone = _choose_shape(data, feature_width), data.actor == "clone"
    if reference is None:
        return TrainableActorCritic(ActorCritic(shape), clone=clone)
    before, now = dataclasses.asdict(reference.shape), dataclasses.asdict(shape)
    if changed := [f"{name} is {before[name]} instead of {now[name]}" for name in now if before[name] != now[name]]:
        raise PokegemmaError(f"--reference {data.reference}: its network has other sizes: {', '.join(changed)}")
    controller = KLController(k_start=data.kl_start, k_max=data.kl_max, kl_target=data.kl_target)
    return TrainableActorCritic(copy.deepcopy(reference), clone=clone, reference=reference, controller=controller)


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


def save_actor_critic(folder: Path, network: ActorCritic, *, encoder: str) -> None:
    """Write a network, its shape, and which encoder its features come from and where that is."""
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous().cpu() for name, weight in network.state_dict().items()}
    with atomic_file(folder / NETWORK_FILE) as temporary:
        save_file(weights, temporary)
    record = {
        **describe_path(encoder, folder),
        "encoder_hashes": describe_encoder(open_policy(encoder)),
        "shape": dataclasses.asdict(network.shape),
    }
    write_synced(folder / SHAPE_FILE, json.dumps(record, indent=2).encode())


def load_actor_critic(folder: Path) -> tuple[ActorCritic, PolicyCheckpoint]:
    """Return a trained network in eval mode, and the policy that encodes states for it.

    Raises:
        PokegemmaError: the folder has no network, its training was interrupted, or the encoder cannot be found or
            opened, or is not the one of training.
    """
    record = read_shape_file(folder)
    try:
        shape = ActorCriticShape(**record["shape"] | {"gammas": tuple(record["shape"]["gammas"])})
        network = ActorCritic(shape)
        network.load_state_dict(load_file(folder / NETWORK_FILE))
    except (OSError, ValueError, KeyError, TypeError, RuntimeError, SafetensorError) as error:
        raise PokegemmaError(f"{folder} is not the result of scripts/rl_battles.py: {error}") from error
    path, before = find_encoder(folder), record.get("encoder_hashes") or {}
    policy = open_policy(path)
    now = describe_encoder(policy)
    if changed := [name for name in before if before[name] != now.get(name)]:
        raise PokegemmaError(f"{folder} was trained with another encoder than {path} is now: its {changed[0]} differs")
    return network.eval(), policy
