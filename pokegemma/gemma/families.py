"""The model families that can be trained, and their differences."""

import logging
import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import is_timm_available

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.text import TEXT_MODEL

logger = logging.getLogger(__name__)

TOWER = "vision_tower"
LINEAR_LAYERS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")
"""Linear layers of every language model of the families, and of the vision tower of Gemma 4."""
_FSDP_LAYERS = "FSDP_TRANSFORMER_CLS_TO_WRAP"  # where `accelerate launch` puts fsdp_transformer_layer_cls_to_wrap


@dataclass(frozen=True)
class Family:
    """The properties of a family; names of modules and classes are those of transformers.

    Attributes:
        name: for messages.
        checkpoints: published checkpoints with vision, for messages.
        processor: class of the processor in published checkpoints.
        projector: module between vision tower and language model.
        tower_linears: linear layers of the tower that an adapter may have; empty where LoRA supports none of them.
        tower_suffix: regex of the end of those names, where the linear layer is wrapped.
        untrained: modules that neither text nor pictures reach (audio), which are never trained or quantised.
        unquantised: regexes of further modules that cannot be stored in nf4.
        token_types: argument of the model that marks the soft tokens of pictures.
        end_of_turn: token at the end of an answer.
        attention: implementation for the parts that do not support all of them, by the name of their config.
        empty_thought: text that the template may write before an answer that is to be generated, but not before a
            given answer.
        layer_classes: layers that FSDP shards one by one.
        has_tokenizer_model: whether published checkpoints contain SentencePiece's tokenizer.model.
        no_flash: why flash attention is wrong, or None.
        inexact: why the fast paths, which rely on Gemma 3's forward pass, are not exact, or None.
    """

    name: str
    checkpoints: str
    processor: str
    projector: str
    tower_linears: tuple[str, ...]
    token_types: str
    end_of_turn: str
    layer_classes: tuple[str, ...]
    tower_suffix: str = ""
    untrained: tuple[str, ...] = ()
    unquantised: tuple[str, ...] = ()
    attention: Mapping[str, str] = field(default_factory=dict)
    empty_thought: str = ""
    has_tokenizer_model: bool = True
    no_flash: str | None = None
    inexact: str | None = None

    @property
    def not_quantised(self) -> list[str]:
        """Modules that QLoRA keeps in full precision: a tower in 4 bits saves little memory and encodes worse."""
        parts = (TOWER, self.projector, *self.untrained)
        return ["lm_head", *(f"model.{part}" for part in parts), *self.unquantised]


FAMILIES = {
    "gemma3": Family(
        name="Gemma 3",
        checkpoints="google/gemma-3-4b-it, 12b or 27b",
        processor="Gemma3Processor",
        projector="multi_modal_projector",
        tower_linears=("q_proj", "k_proj", "v_proj", "out_proj", "fc1", "fc2"),
        token_types="token_type_ids",
        end_of_turn="<end_of_turn>",
        layer_classes=("Gemma3DecoderLayer", "SiglipEncoderLayer"),
        no_flash="it is causal inside images",
    ),
    "gemma3n": Family(
        name="Gemma 3n",
        checkpoints="google/gemma-3n-E2B-it or E4B",
        processor="Gemma3nProcessor",
        projector="embed_vision",
        tower_linears=(),  # MobileNet V5 is made of convolutions
        token_types="token_type_ids",
        end_of_turn="<end_of_turn>",
        layer_classes=("Gemma3nTextDecoderLayer",),
        untrained=("audio_tower", "embed_audio"),
        attention={"vision_config": "sdpa", "audio_config": "eager"},
        # In training AltUp clamps its weights in place, which would destroy packed nf4 values.
        unquantised=(r"model\.language_model\.layers\.\d+\.altup",),
        inexact="its pictures go through a MobileNet at one size, its masks are causal inside pictures",
    ),
    "gemma4": Family(
        name="Gemma 4",
        checkpoints="google/gemma-4-E2B-it, E4B, 26B-A4B or 31B",
        processor="Gemma4Processor",
        projector="embed_vision",
        tower_linears=LINEAR_LAYERS,
        tower_suffix=r"\.linear",
        token_types="mm_token_type_ids",
        end_of_turn="<turn|>",
        layer_classes=("Gemma4TextDecoderLayer", "Gemma4VisionEncoderLayer"),
        untrained=("audio_tower", "embed_audio"),
        attention={"audio_config": "eager"},
        empty_thought="<|channel>thought\n<channel|>",
        has_tokenizer_model=False,
        no_flash="its full-attention heads are wider than the kernels allow",
        inexact="a picture's tokens follow from its shape, its masks differ between kinds of layer",
    ),
}

_TEXT_ONLY = {TEXT_MODEL: "gemma3", "gemma3n_text": "gemma3n", "gemma4_text": "gemma4"}


def find_family(model_type: str | None, *, where: str) -> Family:
    """Return the family of a `model_type`.

    Args:
        where: the checkpoint, for the message.

    Raises:
        PokegemmaError: it is not a supported family; the message names checkpoints that are supported.
    """
    if model_type in FAMILIES:
        return FAMILIES[model_type]
    if model_type in _TEXT_ONLY:
        family = FAMILIES[_TEXT_ONLY[model_type]]
        raise PokegemmaError(
            f"{where}: a {family.name} for text alone ({model_type!r}), without a vision tower; "
            f"take {family.checkpoints}"
        )
    known = "; ".join(family.checkpoints for family in FAMILIES.values())
    raise PokegemmaError(f"{where}: model type {model_type!r} is not a Gemma 3, 3n or 4 with vision; take {known}")


def require_text_model(model_type: str | None, *, where: str) -> None:
    """Refuse a checkpoint that is not a Gemma 3 for text alone.

    Args:
        where: the checkpoint, for the message.

    Raises:
        PokegemmaError: it is another model.
    """
    if model_type != TEXT_MODEL:
        raise PokegemmaError(
            f"{where}: model type {model_type!r} is not a Gemma 3 for text alone ({TEXT_MODEL!r}); "
            "take google/gemma-3-270m, 1b or a checkpoint of scripts/battles_tiny_model.py"
        )


def family_of(config: PreTrainedConfig) -> Family:
    """Return the family of a loaded config."""
    return find_family(config.model_type, where=config.name_or_path or "the model")


def require_exact(config: PreTrainedConfig, option: str) -> None:
    """Refuse an option whose fast path is exact for Gemma 3 only.

    Args:
        option: as the user writes it, such as "--samples_per_row".

    Raises:
        PokegemmaError: the model is of another family.
    """
    family = family_of(config)
    if family.inexact:
        raise PokegemmaError(f"{option}: not exact for {family.name} ({family.inexact}); leave it out")


def require_packages(family: Family, *, where: str) -> None:
    """Refuse a model whose code needs packages that are not installed.

    Raises:
        PokegemmaError: they are missing.
    """
    if family is FAMILIES["gemma3n"] and not is_timm_available():
        raise PokegemmaError(
            f"{where}: the vision tower of {family.name} needs timm and torchvision; "
            "install them with: ./init.sh --with gemma3n"
        )


def attention_of_parts(config: PreTrainedConfig, attn_implementation: str) -> str | dict[str, str]:
    """Return `attn_implementation` for `from_pretrained`, with other values for parts that do not support it.

    transformers refuses to load a model if one part does not support the implementation, even an unused audio tower.

    Raises:
        PokegemmaError: the implementation is wrong for the family.
    """
    family = family_of(config)
    if "flash" in attn_implementation and family.no_flash:
        raise PokegemmaError(
            f"attention {attn_implementation!r} is wrong for {family.name}: {family.no_flash}; "
            "use sdpa, eager or flex_attention"
        )
    parts = {name: own for name, own in family.attention.items() if getattr(config, name, None) is not None}
    if not parts:
        return attn_implementation
    # With "" alone transformers 5.23 leaves the parts that are not named at sdpa.
    return {"": attn_implementation, "text_config": attn_implementation, "vision_config": attn_implementation, **parts}


def check_checkpointing(config: PreTrainedConfig, *, reentrant: bool) -> None:
    """Refuse reentrant gradient checkpointing of a model whose layers share keys and values.

    It drops the gradient from a layer to the layer whose keys it uses, without an error: gradients of tiny models
    were wrong by 40 %.

    Raises:
        PokegemmaError: checkpointing is reentrant, and layers of the model share keys and values.
    """
    if reentrant and getattr(config.get_text_config(), "num_kv_shared_layers", 0):
        raise PokegemmaError(
            f"reentrant gradient checkpointing gives {family_of(config).name} wrong gradients (its layers share keys "
            "and values); leave out --gradient_checkpointing_kwargs (under DeepSpeed ZeRO-3 adapters make any of them "
            "reentrant)"
        )


def set_fsdp_layers(model: torch.nn.Module, family: Family) -> None:
    """Set the layer classes that FSDP shards to those of this model: accelerate refuses classes that it does not have.

    accelerate_configs/fsdp2.yaml names the classes of Gemma 3. A setting whose classes are all in the model stays.
    """
    named = os.environ.get(_FSDP_LAYERS)
    if not named:
        return
    present = {type(module).__name__ for module in model.modules()}
    if set(named.split(",")) <= present:
        return
    layers = ",".join(name for name in family.layer_classes if name in present)
    logger.info("FSDP shards %s of %s, not %s", layers, family.name, named)
    os.environ[_FSDP_LAYERS] = layers


def head_width(config: PreTrainedConfig) -> int:
    """Return the width of an attention head of the language model, the largest one where layers differ."""
    text: Any = config.get_text_config()
    if config.model_type == "gemma4":
        return max(text.per_layer_config[layer].head_dim for layer in range(text.num_hidden_layers))
    return text.head_dim


def tower_shape(config: PreTrainedConfig) -> dict[str, int]:
    """Return positions per picture, width, inner width and layers of the vision tower, for the memory estimate.

    Those of MobileNet V5 describe its third stage at 768 px, which has most of its 84 blocks.
    """
    vision: Any = config.vision_config
    if config.model_type == "gemma3n":
        return {"positions": 48 * 48, "width": 640, "inner_width": 1280, "layers": 84}
    positions = (vision.image_size // vision.patch_size) ** 2 if config.model_type == "gemma3" else 280 * 9
    return {
        "positions": positions,
        "width": vision.hidden_size,
        "inner_width": vision.intermediate_size,
        "layers": vision.num_hidden_layers,
    }


def stop_tokens(tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Return the tokens that end an answer."""
    ends = {tokenizer.convert_tokens_to_ids(family.end_of_turn) for family in FAMILIES.values()}
    # For a tokenizer the tokens of other families are unknown ones.
    return [tokenizer.eos_token_id, *sorted(ends - {tokenizer.unk_token_id})]
