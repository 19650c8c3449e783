"""The files of a trained actor-critic: its network, its shape, and which encoder it needs."""

import dataclasses
import json
from pathlib import Path

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from pokegemma.battles.offline_rl.encoder_path import (
    ADAPTER_FOLDER,
    SHAPE_FILE,
    describe_path,
    find_encoder,
    read_shape_file,
)
from pokegemma.battles.offline_rl.features import describe_encoder
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.errors import PokegemmaError
from pokegemma.outputs import atomic_file, write_synced

NETWORK_FILE = "actor_critic.safetensors"


def save_actor_critic(folder: Path, network: ActorCritic, *, encoder: str, has_adapter: bool = False) -> None:
    """Write a network, its shape, and which encoder its features come from and where that is.

    Args:
        has_adapter: the encoder was trained, and its adapter is in `ADAPTER_FOLDER`.
    """
    folder.mkdir(parents=True, exist_ok=True)
    weights = {name: weight.contiguous().cpu() for name, weight in network.state_dict().items()}
    with atomic_file(folder / NETWORK_FILE) as temporary:
        save_file(weights, temporary)
    record = {
        **describe_path(encoder, folder),
        "encoder_hashes": describe_encoder(open_policy(encoder)),
        "has_adapter": has_adapter,
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
    if record.get("has_adapter"):
        policy = open_policy(folder / ADAPTER_FOLDER, base=path)
    return network.eval(), policy
