"""The features of a frozen encoder for every state, computed once: what a policy's Gemma 3 makes of a state's text."""

import hashlib
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
from peft import PeftModel
from tqdm import tqdm
from transformers import Gemma3ForCausalLM

from pokegemma.battles.policy.checkpoint import PolicyCheckpoint
from pokegemma.battles.policy.prompts import read_texts
from pokegemma.battles.policy.scoring import encode_prompts
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.reading import WEIGHTS_FILE
from pokegemma.outputs import atomic_file, write_synced

_FEATURES_FILE, _KEY_FILE = "features.npy", "key.json"
_STATES_A_BATCH = 4096


class StateFeatures:
    """The features of the states of packed battles, memory-mapped: `states[index]` has (T, width) float32."""

    def __init__(self, folder: Path, ends: np.ndarray) -> None:
        self._features = np.load(folder / _FEATURES_FILE, mmap_mode="r")
        self._ends = ends
        self.width = self._features.shape[1]

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        start = int(self._ends[index - 1]) if index else 0
        return {"features": np.array(self._features[start : int(self._ends[index])])}


def count_states(battles: PackedTrajectories) -> np.ndarray:
    """Return where the states of each battle end among all, (battles,) int64."""
    return np.cumsum([len(battles[index].actions) for index in range(len(battles))], dtype=np.int64)


def describe_encoder(policy: PolicyCheckpoint) -> dict[str, str | None]:
    """Return what features depend on besides the battles: hashes of the weights, and the kind of text."""
    adapter = policy.adapter and hashlib.sha256((policy.adapter.path / WEIGHTS_FILE).read_bytes()).hexdigest()
    return {"model": policy.weights_fingerprint(), "adapter": adapter, "text": policy.text}


def prepare_features(
    folder: Path,
    battles: PackedTrajectories,
    policy: PolicyCheckpoint,
    *,
    device: torch.device | str,
    batch_size: int = 64,
) -> StateFeatures:
    """Return the cache in a folder, which is written if it does not exist.

    Raises:
        PokegemmaError: the folder contains the features of other battles or another encoder.
    """
    ends = count_states(battles)
    key = {"battles": battles.digest(), **describe_encoder(policy)}
    if (folder / _KEY_FILE).is_file():
        found = json.loads((folder / _KEY_FILE).read_text(encoding="utf-8"))
        if found != key:
            changed = next(name for name in key if found.get(name) != key[name])
            raise PokegemmaError(f"{folder} contains features of another {changed}; choose another folder")
        return StateFeatures(folder, ends)
    model = policy.load_model(device=device)
    with atomic_file(folder / _FEATURES_FILE) as temporary, open(temporary, "wb") as file:
        shape = (int(ends[-1]), model.config.hidden_size)
        np.lib.format.write_array_header_1_0(file, {"descr": "<f4", "fortran_order": False, "shape": shape})
        for prompts in tqdm(_batches(battles, policy), desc="encoding states", unit="batch"):
            file.write(_encode(model, policy, prompts, batch_size).tobytes())
    write_synced(folder / _KEY_FILE, json.dumps(key).encode())
    return StateFeatures(folder, ends)


def _batches(battles: PackedTrajectories, policy: PolicyCheckpoint) -> Iterator[list[str]]:
    """Yield the prompts of all states in order, some thousand at a time."""
    waiting: list[str] = []
    for index in range(len(battles)):
        waiting += read_texts(battles, index, policy.text)
        if len(waiting) >= _STATES_A_BATCH:
            yield waiting
            waiting = []
    if waiting:
        yield waiting


def _encode(
    model: Gemma3ForCausalLM | PeftModel, policy: PolicyCheckpoint, prompts: list[str], batch_size: int
) -> np.ndarray:
    return encode_prompts(model, policy.encode(prompts), batch_size=batch_size).numpy()
