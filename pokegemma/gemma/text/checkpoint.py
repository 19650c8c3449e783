"""Open the checkpoint of a Gemma 3 for text alone, or of any Gemma: its config, and from it tokenizer and model."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.checkpoint_files import copy_tokenizer_model, load_part, write_added_tokens
from pokegemma.gemma.families import FAMILIES, Family, require_text_model
from pokegemma.gemma.image_attention import ImageAttention
from pokegemma.gemma.loading import Checkpoint, Dtype, open_checkpoint
from pokegemma.gemma.text import TEXT_MODEL
from pokegemma.gemma.weight_files import StoredCheckpoint

PLAIN_CHAT_TEMPLATE = (
    "{{ bos_token }}{% for message in messages %}{% if message['content'] is string %}{{ message['content'] }}"
    "{% else %}{% for part in message['content'] %}{{ part['text'] }}{% endfor %}{% endif %}{% endfor %}"
)
"""Writes messages as they are, behind one BOS: what a model reads that was trained on text without turns.

A pretrained Gemma 3 has no chat template, without which servers take another model's. Those of llama.cpp add no BOS to
the text of a template, or remove the second one.
"""


@dataclass(frozen=True)
class TextCheckpoint(StoredCheckpoint):
    """A Gemma 3 for text alone; made by `open_text_checkpoint`."""

    @property
    def family(self) -> Family:
        """The family, most of whose properties are those of pictures."""
        return FAMILIES["gemma3"]

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer, with `PLAIN_CHAT_TEMPLATE`.

        Raises:
            PokegemmaError: it cannot be loaded, or has no token that begins a text.
        """
        tokenizer = load_part("tokenizer", self.path, AutoTokenizer.from_pretrained)
        if tokenizer.bos_token_id is None:
            raise PokegemmaError(f"{self.path}: the tokenizer has no BOS, which a Gemma 3 needs")
        tokenizer.chat_template = PLAIN_CHAT_TEMPLATE
        return tokenizer

    def load_model(
        self,
        *,
        dtype: Dtype = "float32",
        device: torch.device | str | None = None,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> Gemma3ForCausalLM:
        """Return the model in eval mode on `device` (None: where transformers puts it).

        Args:
            options: of `from_pretrained`, such as a quantization_config.

        Raises:
            PokegemmaError: the weights cannot be loaded, or the attention implementation is wrong.
        """
        if "flash" in attn_implementation:
            raise PokegemmaError(f"attention {attn_implementation!r} takes no custom masks; use sdpa or eager")
        model = load_part(
            "model",
            self.path,
            Gemma3ForCausalLM.from_pretrained,
            dtype=getattr(torch, dtype),
            attn_implementation=attn_implementation,
            **options,
        )
        return (model if device is None else model.to(device)).eval()

    def copy_tokenizer_model(self, folder: Path) -> bool:
        """Copy SentencePiece's tokenizer.model into `folder`; return whether there is one: whole words have none."""
        return copy_tokenizer_model(self.path, folder, is_required=False)

    def save_files(self, folder: Path) -> None:
        """Write everything but config and weights into `folder`: what loading and converting a model needs."""
        self.tokenizer.save_pretrained(folder)
        if self.copy_tokenizer_model(folder):
            write_added_tokens(folder)


def open_text_checkpoint(path: str | Path) -> TextCheckpoint:
    """Open a Gemma 3 for text alone: read its config.json. Tokenizer and weights are loaded when they are needed.

    Raises:
        PokegemmaError: it has no config, is another model, or caps its logits.
    """
    path = str(path)
    settings = load_part("config", path, PreTrainedConfig.get_config_dict)[0]
    if not settings:
        raise PokegemmaError(f"{path}: no config.json in it, so it is not a model")
    require_text_model(settings.get("model_type"), where=path)
    config = load_part("config", path, lambda name: Gemma3TextConfig.from_dict(settings, name_or_path=name))
    if config.final_logit_softcapping is not None:
        raise PokegemmaError(f"{path}: final_logit_softcapping is not supported; no published Gemma 3 has it")
    return TextCheckpoint(path, config)


def open_gemma(
    path: str | Path, image_size: int | None = None, image_attention: ImageAttention | None = None
) -> Checkpoint | TextCheckpoint:
    """Open a checkpoint with or without vision, by the model type in its config.json.

    Args:
        image_size, image_attention: of a checkpoint with vision, see `open_checkpoint`.

    Raises:
        PokegemmaError: as `open_checkpoint` and `open_text_checkpoint`.
    """
    is_adapter = (Path(path) / ADAPTER_CONFIG_NAME).is_file()  # which `open_checkpoint` refuses
    settings = {} if is_adapter else load_part("config", path, PreTrainedConfig.get_config_dict)[0]
    if settings.get("model_type") == TEXT_MODEL:
        return open_text_checkpoint(path)
    return open_checkpoint(path, image_size, image_attention)
