"""Read a LoRA adapter from its folder, and check that it is complete and finite."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftConfig
from peft.utils.other import get_pattern_key
from safetensors import SafetensorError
from safetensors.torch import load_file

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.weight_files import plain_name
from pokegemma.provenance import read_run_record

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_MAX_NAMED = 3
_UNSUPPORTED = (
    "ensure_weight_tying",
    "lora_bias",
    "layer_replication",
    "target_parameters",
    "trainable_token_indices",
    "alora_invocation_tokens",
)
_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""How `init_lora_weights` begins where it also changes the weights of the base."""


@dataclass(frozen=True)
class LoraLayer:
    """The adapter of one layer.

    Attributes:
        name: of the layer in the model that was trained.
        parts: the tensors, by what follows the layer's name, such as lora_A.weight.
        alpha: divided by the rank, or by its root (`use_rslora`), it is the factor of B A.
    """

    name: str
    parts: dict[str, torch.Tensor]
    alpha: float
    use_rslora: bool

    @property
    def is_embedding(self) -> bool:
        return "lora_embedding_A" in self.parts

    @property
    def rank(self) -> int:
        return len(self.parts["lora_embedding_A" if self.is_embedding else "lora_A.weight"])

    def merge_into(self, weight: torch.Tensor) -> torch.Tensor:
        """Return W + factor B A in the type of `weight`; with DoRA, its rows scaled to the trained lengths."""
        kind, suffix = ("lora_embedding_", "") if self.is_embedding else ("lora_", ".weight")
        down, up = (self.parts[f"{kind}{side}{suffix}"].to(weight.dtype).flatten(1) for side in "AB")
        factor = self.alpha / (math.sqrt(self.rank) if self.use_rslora else self.rank)
        rows = torch.addmm(weight.T if self.is_embedding else weight.flatten(1), up, down, alpha=factor)
        magnitude = self.parts.get("lora_magnitude_vector")
        if magnitude is not None:
            rows = rows * (magnitude.to(weight.dtype).flatten() / rows.norm(dim=1))[:, None]
        return rows.T if self.is_embedding else rows.reshape(weight.shape)


@dataclass(frozen=True)
class Adapter:
    """A LoRA adapter as its files contain it.

    Attributes:
        layers: by the plain name of the layer.
        full: weights of modules trained in full (`modules_to_save`), by their plain name.
        copies: other weights of the base that the file contains, by their plain name.
        names: of `full` and `copies`, as the file spells them.
        run: the run.json of its training, empty where there is none.
    """

    path: Path
    config: LoraConfig
    layers: dict[str, LoraLayer]
    full: dict[str, torch.Tensor]
    copies: dict[str, torch.Tensor]
    names: dict[str, str]
    run: dict[str, Any]


def name_some(names: Sequence[str]) -> str:
    """Return the first few of many names, for a message."""
    return ", ".join(names[:_MAX_NAMED]) + (", ..." if len(names) > _MAX_NAMED else "")


def read_adapter(path: Path) -> Adapter:
    """Return the adapter in a folder, which may be a checkpoint-N of an unfinished run.

    Raises:
        PokegemmaError: `path` does not contain a complete LoRA adapter.
    """
    run = _check_folder(path)
    config = _read_config(path)
    try:
        tensors = load_file(path / WEIGHTS_FILE)
    except (OSError, SafetensorError, ValueError, KeyError, TypeError) as error:
        raise PokegemmaError(f"{path}: the adapter is incomplete or damaged: {error}") from error
    if not tensors:
        raise PokegemmaError(f"{path}: the adapter has no weights")
    broken = sorted(name for name, tensor in tensors.items() if not tensor.float().isfinite().all())
    if broken:
        raise PokegemmaError(
            f"{path}: {len(broken)} of {len(tensors)} tensors contain NaN or infinity ({name_some(broken)}); training "
            "diverged: take an earlier checkpoint, or train with a lower --learning_rate"
        )
    lora = {name: tensor for name, tensor in tensors.items() if ".lora_" in name}
    names = {plain_name(_without_peft(name)): name for name in sorted(tensors.keys() - lora.keys())}
    full = [name for name in names if trained_in_full(name.rpartition(".")[0], config)]
    return Adapter(
        path=path,
        config=config,
        layers=_sort_layers(path, config, lora),
        full={name: tensors[names[name]] for name in full},
        copies={name: tensors[names[name]] for name in names if name not in full},
        names=names,
        run=run,
    )


def _without_peft(name: str) -> str:
    """Return a tensor's name without the parts that PEFT adds in the state_dict of a PeftModel."""
    return ".".join(part for part in name.split(".") if part not in ("default", "modules_to_save", "base_layer"))


def trained_in_full(name: str, config: LoraConfig) -> str | None:
    """Return the module of `modules_to_save` that contains a module or weight; all names are plain ones."""
    ends = tuple(plain_name(module) for module in config.modules_to_save or ())  # PEFT also compares the ends
    parts = name.split(".")
    modules = (".".join(parts[: count + 1]) for count in range(len(parts)))
    return next((module for module in modules if ends and module.endswith(ends)), None)


def _check_folder(path: Path) -> dict[str, Any]:
    if not path.is_dir():
        raise PokegemmaError(f"{path}: no such folder")
    run = read_run_record(path) or {}
    if (path / "config.json").is_file() and not (path / CONFIG_FILE).is_file():
        raise PokegemmaError(f"{path}: a whole model, nothing to merge")
    checkpoints = sorted(checkpoint.name for checkpoint in path.glob("checkpoint-*"))
    unfinished = run.get("status") in ("running", "interrupted") and not path.name.startswith("checkpoint-")
    if unfinished or (checkpoints and not (path / CONFIG_FILE).is_file()):
        raise PokegemmaError(
            f"{path}: training did not finish ({', '.join(checkpoints) or 'no checkpoint'}); continue it with "
            "--resume_from_checkpoint, or name one of its checkpoints"
        )
    if not (path / CONFIG_FILE).is_file():
        raise PokegemmaError(f"{path}: contains no adapter ({CONFIG_FILE} not found)")
    old = path / "adapter_model.bin"
    if old.is_file() and not (path / WEIGHTS_FILE).is_file():
        raise PokegemmaError(
            f"{old}: the format of older versions of PEFT; convert it in that folder: python -c 'import torch; from "
            'safetensors.torch import save_file; save_file(torch.load("adapter_model.bin", weights_only=True), '
            f'"{WEIGHTS_FILE}")\''
        )
    return run


def _read_config(path: Path) -> LoraConfig:
    try:
        kind = json.loads((path / CONFIG_FILE).read_text(encoding="utf-8"))["peft_type"]
        config = PeftConfig.from_pretrained(str(path)) if kind == "LORA" else None
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise PokegemmaError(f"{path}: the adapter is incomplete or damaged: {CONFIG_FILE}: {error}") from error
    if isinstance(config, LoraConfig) and (reason := _find_damage(config)):
        raise PokegemmaError(f"{path}: the adapter is incomplete or damaged: {CONFIG_FILE}: {reason}")
    if not isinstance(config, LoraConfig):
        raise PokegemmaError(
            f"{path}: an adapter of the type {kind}, not LORA; train one with --finetuning lora or qlora"
        )
    used = [name for name in _UNSUPPORTED if getattr(config, name, None)]
    if config.bias != "none":
        used.append(f"bias={config.bias!r}")
    if used:
        raise PokegemmaError(f"{path}: {CONFIG_FILE} sets {used[0]}, which is not supported; merge it with PEFT itself")
    if str(config.init_lora_weights).lower().startswith(_CHANGE_THE_BASE):
        raise PokegemmaError(
            f"{path}: its training began with init_lora_weights={config.init_lora_weights!r}, which changes the base; "
            "save it with PEFT's path_initial_model_for_weight_conversion"
        )
    return config


def _find_damage(config: LoraConfig) -> str | None:
    """Return which value would fail in PEFT later: one of a wrong type, or an invalid regular expression."""
    for name, kind in (("r", int), ("lora_alpha", int | float), ("rank_pattern", dict), ("alpha_pattern", dict)):
        if not isinstance(getattr(config, name), kind):
            return f"{name} is {getattr(config, name)!r}"
    targets = [config.target_modules] if isinstance(config.target_modules, str) else []
    for pattern in (*targets, *config.rank_pattern, *config.alpha_pattern):
        try:
            re.compile(pattern)
        except re.error as error:
            return f"{pattern!r} is not a regular expression: {error}"
    return None


def _sort_layers(path: Path, config: LoraConfig, tensors: dict[str, torch.Tensor]) -> dict[str, LoraLayer]:
    layers = dict[str, LoraLayer]()
    for spelled, tensor in sorted(tensors.items()):
        module, _, part = _without_peft(spelled).removeprefix("base_model.model.").partition(".lora_")
        part = f"lora_{part}".replace("magnitude_vector.weight", "magnitude_vector")
        alpha = config.alpha_pattern.get(get_pattern_key(config.alpha_pattern, module), config.lora_alpha)
        layer = layers.setdefault(plain_name(module), LoraLayer(module, {}, alpha, config.use_rslora))
        if part in layer.parts:
            raise PokegemmaError(f"{path}: {part} of {plain_name(module)} is there twice, also as {spelled}")
        layer.parts[part] = tensor
    expected = {"lora_A.weight", "lora_B.weight"}, {"lora_embedding_A", "lora_embedding_B"}
    extra = {"lora_magnitude_vector"} if config.use_dora else set()
    torn = [
        layer.name
        for layer in layers.values()
        if layer.parts.keys() not in [parts | extra for parts in expected]
        or any(tensor.ndim < 2 for part, tensor in layer.parts.items() if part not in extra)
    ]
    if torn:
        raise PokegemmaError(
            f"{path}: {len(torn)} of {len(layers)} layers do not have the tensors of a "
            f"{'DoRA' if extra else 'LoRA'} layer, A and B{' and magnitude' if extra else ''}: {name_some(torn)}"
        )
    for layer in layers.values():
        rank = config.rank_pattern.get(get_pattern_key(config.rank_pattern, layer.name), config.r)
        if layer.rank != rank:
            raise PokegemmaError(f"{path}: {CONFIG_FILE} says rank {rank}, {layer.name} has rank {layer.rank}")
    return layers
