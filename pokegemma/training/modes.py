"""Which modes of training are in force, read from the model and its first step.

Libraries replace modes that they do not support, sometimes without a message. So run.json records the modes that were
used, and training stops if a requested mode is not in force.
"""

from collections import Counter
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from pokegemma.errors import PokegemmaError
from pokegemma.gemma import block_attention
from pokegemma.gemma.families import TOWER
from pokegemma.training.options import ModelOptions, TrainingOptions
from pokegemma.training.trainable import is_reentrant

LANGUAGE_MODEL = "language_model"
OFF, ON, REENTRANT = "off", "not reentrant", "reentrant"
"""Gradient checkpointing of the layers of a part of the model."""


def part_of(name: str) -> str:
    """Return the part of the model that a module or weight belongs to, by its name; "projector" if it is no other."""
    names = name.split(".")
    return next((part for part in (LANGUAGE_MODEL, TOWER, "lm_head") if part in names), "projector")


def _linear_layers(model: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Linear]]:
    """Yield the linear layers of the base model, without those that an adapter adds."""
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and "lora_" not in name:
            yield name, module


def _is_4bit(layer: torch.nn.Linear) -> bool:
    return getattr(layer.weight, "quant_state", None) is not None


def _dtype(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def _joined(names: Iterable[str]) -> str:
    return ", ".join(sorted(set(names)))


def _quantisation(model: torch.nn.Module) -> dict[str, Any] | None:
    """Return how many layers of each part have 4 bits and how they are stored; None where no layer has.

    "compute" is the type of their multiplications: that of `--dtype`, which autocast (`--bf16`) does not change.
    """
    layers: list[tuple[str, Any]] = [(name, layer) for name, layer in _linear_layers(model) if _is_4bit(layer)]
    if not layers:
        return None
    states = [layer.weight.quant_state for _, layer in layers]
    return {
        "layers": dict(Counter(part_of(name) for name, _ in layers)),
        "type": _joined(state.quant_type for state in states),
        "nested": all(state.nested for state in states),
        "storage": _joined(_dtype(layer.weight.dtype) for _, layer in layers),
        "compute": _joined(_dtype(layer.compute_dtype) for _, layer in layers),
    }


def _checkpointing(model: torch.nn.Module) -> dict[str, str]:
    """Return `OFF`, `ON` or `REENTRANT` for the layers of each part that can be checkpointed."""
    found: dict[str, set[str]] = {}
    for name, module in model.named_modules():
        if not name.rpartition(".")[2].isdecimal() or not hasattr(module, "gradient_checkpointing"):
            continue
        kind = OFF
        if module.gradient_checkpointing:
            function: Any = module._gradient_checkpointing_func
            kind = ON if function.keywords.get("use_reentrant") is False else REENTRANT  # torch's default
        found.setdefault(part_of(name), set()).add(kind)
    return {part: _joined(kinds) for part, kinds in sorted(found.items())}


def modes_in_force(model: torch.nn.Module) -> dict[str, Any]:
    """Return the modes that can be read from a model, as run.json records them.

    Example:
        {"4bit": {"layers": {"language_model": 42}, "type": "nf4", "nested": True, "storage": "float32",
                  "compute": "float32"},
         "attention": {"language_model": "blockwise", "vision_tower": "sdpa"},
         "gradient_checkpointing": {"language_model": "not reentrant", "vision_tower": "not reentrant"},
         "trained_weights": {"language_model": "float32"}}
    """
    config: Any = model.config
    types: dict[str, set[str]] = {}
    for name, weight in model.named_parameters():
        if weight.requires_grad:
            types.setdefault(part_of(name), set()).add(_dtype(weight.dtype))
    return {
        "4bit": _quantisation(model),
        "attention": {
            LANGUAGE_MODEL: config.get_text_config()._attn_implementation,
            TOWER: config.vision_config._attn_implementation,
        },
        "gradient_checkpointing": _checkpointing(model),
        "trained_weights": {part: _joined(names) for part, names in sorted(types.items())},
    }


def check_modes(modes: dict[str, Any], options: ModelOptions, *, checkpointing: str) -> None:
    """Refuse to train in other modes than the requested ones.

    Args:
        modes: from `modes_in_force`.
        checkpointing: what was requested for the layers of the language model: `OFF`, `ON` or `REENTRANT`.

    Raises:
        PokegemmaError: a mode is not in force.
    """
    quantised = set() if modes["4bit"] is None else set(modes["4bit"]["layers"])
    if quantised != ({LANGUAGE_MODEL} if options.finetuning == "qlora" else set()):
        raise PokegemmaError(
            f"--finetuning {options.finetuning}: 4 bits are in force in {_joined(quantised) or 'no layer'}"
        )
    attention, expected = modes["attention"][LANGUAGE_MODEL], options.attn_implementation
    if attention != expected and (attention, expected) != (block_attention.BLOCK_ATTENTION, "sdpa"):
        raise PokegemmaError(f"--attn_implementation {expected}: {attention} is in force in the language model")
    found = modes["gradient_checkpointing"].get(LANGUAGE_MODEL, OFF)
    # With every_n_layers some layers are off.
    if found != checkpointing and (checkpointing == OFF or set(found.split(", ")) != {checkpointing, OFF}):
        raise PokegemmaError(f"gradient checkpointing should be {checkpointing}; it is {found} in the language model")


class ModesObserver(TrainerCallback):
    """Record the modes of the first optimizer step, and stop training if a requested mode is not in force.

    After that step, `modes` contains `modes_in_force` and, for each part of the model that ran:

    - `computed_in`: the types of the outputs of its linear layers, such as "bfloat16". With nf4 weights not all of
      them are bfloat16: bitsandbytes returns the type of its input, which is float32 after a norm.
    - `runs_per_pass`: how often its first layer ran for a forward pass and its backward pass; 2 with checkpointing.
    """

    def __init__(self, options: ModelOptions, training: TrainingOptions) -> None:
        self.modes: dict[str, Any] | None = None
        self._options, self._bf16 = options, training.mixed_precision == "bf16"
        self._checkpointing = REENTRANT if is_reentrant(training, adapter=options.use_peft) else ON
        if not training.activation_checkpointing:
            self._checkpointing = OFF
        self._types: dict[str, set[str]] = {}
        self._passes: Counter[str] = Counter()
        self._runs: Counter[str] = Counter()
        self._handles: list[Any] = []

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        model = kwargs["model"]
        check_modes(modes_in_force(model), self._options, checkpointing=self._checkpointing)
        for name, layer in _linear_layers(model):
            self._handles.append(layer.register_forward_hook(self._note_type(part_of(name))))
        for name, module in model.named_modules():
            if name.endswith("layers.0"):
                self._handles.append(module.register_forward_pre_hook(self._count(self._passes, part_of(name))))
            elif name.endswith("layers.0.self_attn"):
                self._handles.append(module.register_forward_pre_hook(self._count(self._runs, part_of(name))))

    def _note_type(self, part: str) -> Any:
        def hook(module: torch.nn.Module, args: Any, output: torch.Tensor) -> None:
            if module.training:
                self._types.setdefault(part, set()).add(_dtype(output.dtype))

        return hook

    def _count(self, counter: Counter[str], part: str) -> Any:
        def hook(module: torch.nn.Module, args: Any) -> None:
            counter[part] += module.training  # an evaluation may come first

        return hook

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self.modes is not None:
            return
        for handle in self._handles:
            handle.remove()
        self.modes = {
            **modes_in_force(kwargs["model"]),
            "computed_in": {part: _joined(types) for part, types in sorted(self._types.items())},
            "runs_per_pass": {part: self._runs[part] / number for part, number in sorted(self._passes.items())},
        }
        if self._bf16 and "bfloat16" not in self._types[LANGUAGE_MODEL]:
            computed = self.modes["computed_in"][LANGUAGE_MODEL]
            raise PokegemmaError(f"bf16 was asked for, but the language model computed in {computed}")
