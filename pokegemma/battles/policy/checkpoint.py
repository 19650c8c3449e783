"""Open the checkpoint of a policy: a Gemma 3 for text alone, as a whole model or as an adapter and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

import torch
from peft import PeftModel
from transformers import AutoTokenizer, Gemma3ForCausalLM, Gemma3TextConfig, PreTrainedConfig, PreTrainedTokenizerBase
from transformers.utils import ADAPTER_CONFIG_NAME

from pokegemma.battles.policy.prompts import ANSWERS
from pokegemma.battles.policy.text_kind import DEFAULT_TEXT, TextKind
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.reading import Adapter, read_adapter
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.checkpoint_files import load_part
from pokegemma.gemma.families import require_text_model
from pokegemma.gemma.loading import Dtype
from pokegemma.gemma.weight_files import hash_weights
from pokegemma.provenance import read_run_record


@dataclass(frozen=True)
class PolicyCheckpoint:
    """A Gemma 3 for text alone; made by `open_policy`.

    Attributes:
        path: a folder or a Hub id of the whole model: for an adapter, that of its base.
        text: what a state is written as.
        adapter: attached to the model; None for a whole model.
    """

    path: str
    config: Gemma3TextConfig
    text: TextKind
    adapter: Adapter | None = None

    @cached_property
    def tokenizer(self) -> PreTrainedTokenizerBase:
        """The tokenizer.

        Raises:
            PokegemmaError: it cannot be loaded, or has no token that begins a text.
        """
        tokenizer = load_part("tokenizer", self.path, AutoTokenizer.from_pretrained)
        if tokenizer.bos_token_id is None:
            raise PokegemmaError(f"{self.path}: the tokenizer has no BOS, which a Gemma 3 needs")
        return tokenizer

    @cached_property
    def action_tokens(self) -> ButtonTokens:
        """The tokens of the 13 actions.

        Raises:
            PokegemmaError: the tokenizer does not tell them apart.
        """
        try:
            return ButtonTokens.of_answers(self.tokenizer, ANSWERS)
        except ValueError as error:
            raise PokegemmaError(f"{self.path}: the answers <0> to <12>: {error}") from error

    def encode(self, prompts: Sequence[str]) -> list[list[int]]:
        """Return the tokens of prompts, each after one BOS, which a tokenizer may or may not add by itself."""
        if not prompts:
            return []
        encoded = self.tokenizer(list(prompts), add_special_tokens=False)["input_ids"]
        return [[self.tokenizer.bos_token_id, *ids] for ids in encoded]

    def load_model(
        self,
        *,
        dtype: Dtype = "float32",
        device: torch.device | str | None = None,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> Gemma3ForCausalLM | PeftModel:
        """Return the model, with its adapter, in eval mode on `device` (None: where transformers puts it).

        Args:
            options: of `from_pretrained`, such as a quantization_config.

        Raises:
            PokegemmaError: the weights cannot be loaded, the attention implementation is wrong, or the adapter does
                not fit.
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
        if device is not None:
            model = model.to(device)
        return model.eval() if self.adapter is None else attach_adapter(model, self.adapter, self.path)

    def weights_fingerprint(self) -> str:
        """Return a hash that identifies the stored weights of the whole model; see `hash_weights`."""
        return hash_weights(self.path)


def open_policy(path: str | Path, *, base: str | None = None) -> PolicyCheckpoint:
    """Open a checkpoint or an adapter: read its config. Tokenizer and weights are loaded when they are needed.

    Args:
        base: of an adapter; None: the one that the adapter names.

    Raises:
        PokegemmaError: it is not a Gemma 3 for text alone, its training was interrupted, or the base of an adapter
            cannot be opened or is another one.
    """
    path = str(path)
    record = (read_run_record(Path(path)) or {}) if Path(path).is_dir() else {}
    text = record.get("options", {}).get("text", DEFAULT_TEXT)
    if text not in get_args(TextKind):
        raise PokegemmaError(f"{path}: its run.json has the text {text!r}, not one of {', '.join(get_args(TextKind))}")
    if not (Path(path) / ADAPTER_CONFIG_NAME).is_file():
        return PolicyCheckpoint(path, _read_config(path), text)
    adapter = read_adapter(Path(path))
    base = base or adapter.config.base_model_name_or_path
    if not base:
        raise PokegemmaError(f"{path}: the adapter names no base")
    checkpoint = PolicyCheckpoint(base, _read_config(base), text, adapter)
    trained_on = adapter.run.get("base_fingerprint")
    if trained_on and checkpoint.weights_fingerprint() != trained_on:
        raise PokegemmaError(f"{base} is not the base of the adapter {path}, which was trained on other weights")
    return checkpoint


def _read_config(path: str) -> Gemma3TextConfig:
    settings = load_part("config", path, PreTrainedConfig.get_config_dict)[0]
    if not settings:
        raise PokegemmaError(f"{path}: no config.json in it, so it is not a model")
    require_text_model(settings.get("model_type"), where=path)
    config = load_part("config", path, lambda name: Gemma3TextConfig.from_dict(settings, name_or_path=name))
    if config.final_logit_softcapping is not None:
        raise PokegemmaError(f"{path}: final_logit_softcapping is not supported; no published Gemma 3 has it")
    return config
