"""Attach an adapter to its base so that every tensor of its file has a layer, and every adapted layer its tensors."""

import dataclasses
import logging
from pathlib import Path

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import check_target_module_exists
from safetensors import safe_open
from transformers import PreTrainedModel

from pokegemma.errors import PokegemmaError, one_line
from pokegemma.gemma.adapters.reading import CONFIG_FILE, WEIGHTS_FILE, Adapter, name_some, trained_in_full
from pokegemma.gemma.weight_files import plain_name

logger = logging.getLogger(__name__)


def attach_adapter(model: PreTrainedModel, adapter: Adapter, base: str) -> PeftModel:
    """Return a loaded base with its adapter, ready for inference; `model` itself is changed.

    PEFT itself adapts all layers that adapter_config.json matches, and ignores tensors whose names fit no layer.

    Raises:
        PokegemmaError: a tensor has no layer, a layer has no tensors, or a shape differs.
    """
    modules = {plain_name(name): name for name, _ in model.named_modules()}
    in_full = [name for name in modules if name and trained_in_full(name, adapter.config) == name]
    _check_places(adapter, model, modules, base)
    _check_complete(adapter, model, modules)
    _untie(model, [*adapter.layers, *in_full])
    layers = {modules[name]: layer for name, layer in adapter.layers.items()}
    config = dataclasses.replace(
        adapter.config,
        target_modules=sorted(layers),
        modules_to_save=[modules[name] for name in in_full] or None,
        rank_pattern={name: layer.rank for name, layer in layers.items()},
        alpha_pattern={name: layer.alpha for name, layer in layers.items()},
        exclude_modules=None,
        layers_to_transform=None,
        layers_pattern=None,
        bias="none",
        init_lora_weights=True,
        inference_mode=True,
        base_model_name_or_path=base,
    )
    tensors = {
        f"{name}.{part}": tensor for name, layer in adapter.layers.items() for part, tensor in layer.parts.items()
    }
    tensors |= adapter.full
    try:
        attached = PeftModel(model, config)
        places = {saved_name(name): name for name in attached.state_dict() if _is_of_adapter(name)}
        places = {plain_name(saved): name for saved, name in places.items()}
        if missing := sorted(places.keys() - tensors.keys()):
            raise PokegemmaError(
                f"{adapter.path}: {len(missing)} of {len(places)} tensors are missing from {WEIGHTS_FILE}: "
                f"{name_some(missing)}"
            )
        attached.load_state_dict({places[name]: tensor for name, tensor in tensors.items()}, strict=False)
    except (RuntimeError, ValueError) as error:
        reason = one_line(error)
        raise PokegemmaError(f"{adapter.path} does not fit {base}, is it the wrong base? {reason}") from error
    return attached.eval()


def _is_of_adapter(name: str) -> bool:
    return ".lora_" in name or ".modules_to_save." in name


def saved_name(name: str) -> str:
    """Return the name that a weight of an attached adapter has in PEFT's file."""
    parts = [part for part in name.split(".") if part not in ("default", "modules_to_save")]
    return ".".join(parts).replace("lora_magnitude_vector.weight", "lora_magnitude_vector")


def check_tensors(folder: Path, model: torch.nn.Module) -> None:
    """Refuse to continue training from an adapter in `folder` whose tensors are not exactly those of the model.

    `Trainer` ignores the others with a warning. It also handles a folder that contains no adapter.

    Raises:
        PokegemmaError: they differ.
    """
    if not (folder / WEIGHTS_FILE).is_file():
        return
    with safe_open(folder / WEIGHTS_FILE, framework="pt") as file:
        stored = set(file.keys())
    wrong = sorted(stored ^ {saved_name(name) for name in model.state_dict() if _is_of_adapter(name)})
    if wrong:
        raise PokegemmaError(
            f"{folder}: {len(wrong)} tensors of {WEIGHTS_FILE} are missing or do not belong to this model: "
            f"{name_some(wrong)}; continue from another checkpoint"
        )


def _check_places(adapter: Adapter, model: PreTrainedModel, modules: dict[str, str], base: str) -> None:
    """Refuse tensors that have no layer, do not fit it, or are copies of other weights than the base's."""
    weights = {plain_name(name): weight for name, weight in model.state_dict().items()}
    lost = [layer.name for name, layer in adapter.layers.items() if name not in modules]
    lost += [spelled for name, spelled in adapter.names.items() if name not in weights]
    if lost:
        raise PokegemmaError(
            f"{adapter.path}: {len(lost)} of its {len(adapter.layers) + len(adapter.names)} layers and weights are not "
            f"in {base}: {name_some(lost)}; is it the adapter of another model?"
        )
    for name, tensor in (adapter.full | adapter.copies).items():
        weight, spelled = weights[name], adapter.names[name]
        if tensor.ndim == 2 and tensor.shape[1:] == weight.shape[1:] and len(tensor) != len(weight):
            raise PokegemmaError(
                f"{adapter.path}: {spelled} has {len(tensor)} rows, that of {base} {len(weight)}: tokens were added in "
                f"training; save the base with resize_token_embeddings({len(tensor)}) and the adapter's tokenizer, "
                "and name it as --base_model"
            )
        if tensor.shape != weight.shape:
            raise PokegemmaError(
                f"{adapter.path} does not fit {base}, is it the wrong base? {spelled} has the shape "
                f"{tuple(tensor.shape)}, not {tuple(weight.shape)}"
            )
        if name in adapter.copies and not _is_copy(tensor, weight.cpu()):
            raise PokegemmaError(
                f"{adapter.path}: {spelled} is not LoRA, not in modules_to_save, and differs from {base}; "
                "is it the wrong base?"
            )


def _is_copy(tensor: torch.Tensor, weight: torch.Tensor) -> bool:
    """Return whether a tensor is a weight of the base, which training may have had in another type."""
    return torch.equal(tensor, weight.to(tensor.dtype)) or torch.equal(tensor.bfloat16(), weight.bfloat16())


def _check_complete(adapter: Adapter, model: PreTrainedModel, modules: dict[str, str]) -> None:
    """Refuse an adapter that lacks layers which its config matches in the model that was trained."""
    if not adapter.config.target_modules:
        return
    spelled = {modules[name]: layer.name for name, layer in adapter.layers.items()}
    prefixes = dict(_differing_prefixes(own, other) for own, other in spelled.items())
    prefixes.pop("", None)  # of an LM head that was spelled with a prefix, which no other layer shares
    trained_text_alone = any("language_model" in own and "language_model" not in prefixes[own] for own in prefixes)
    matched = []
    for plain, name in modules.items():
        if not isinstance(model.get_submodule(name), torch.nn.Linear | torch.nn.Embedding | torch.nn.Conv2d):
            continue
        if trained_text_alone and "language_model" not in name:
            continue
        own = max((prefix for prefix in prefixes if name.startswith(prefix)), key=len, default="")
        trained = spelled.get(name, prefixes.get(own, "") + name.removeprefix(own))
        if check_target_module_exists(adapter.config, trained):
            matched.append(plain)
    if missing := [modules[name] for name in matched if name not in adapter.layers]:
        raise PokegemmaError(
            f"{adapter.path}: {len(missing)} of the {len(matched)} layers that {CONFIG_FILE} names have no tensors in "
            f"{WEIGHTS_FILE}: {name_some(missing)}; the file is not whole"
        )


def _differing_prefixes(name: str, other: str) -> tuple[str, str]:
    """Return the beginnings of two spellings of a layer's name, before the part that they share."""
    parts, others = name.split("."), other.split(".")
    while parts and others and parts[-1] == others[-1]:
        parts.pop(), others.pop()
    return "".join(f"{part}." for part in parts), "".join(f"{part}." for part in others)


def _untie(model: PreTrainedModel, adapted: list[str]) -> None:
    """Untie the LM head where an adapter changes embeddings or head: otherwise merging would change both."""
    if not {"embed_tokens", "lm_head"} & set(adapted) or not model.config.tie_word_embeddings:
        return
    logger.warning("the adapter changes embeddings or LM head, which are tied: they are untied")
    head = model.get_output_embeddings()
    head.weight = torch.nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    model.config.tie_word_embeddings = model.config.get_text_config().tie_word_embeddings = False
    model.all_tied_weights_keys = {}
