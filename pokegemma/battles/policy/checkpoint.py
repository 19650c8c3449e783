"""Open the checkpoint of a policy: a Gemma 3 for text alone, as a whole model or as an adapter and its base."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, get_args

from peft import PeftModel
from transformers import Gemma3ForCausalLM
from transformers.utils import ADAPTER_CONFIG_NAME

from pokegemma.battles.policy.prompts import ANSWERS
from pokegemma.battles.policy.text_kind import DEFAULT_TEXT, TextKind
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.adapters.attachment import attach_adapter
from pokegemma.gemma.adapters.reading import Adapter, read_adapter
from pokegemma.gemma.button_tokens import ButtonTokens
from pokegemma.gemma.text.checkpoint import TextCheckpoint, open_text_checkpoint
from pokegemma.provenance import read_run_record


@dataclass(frozen=True)
class PolicyCheckpoint(TextCheckpoint):
    """A Gemma 3 for text alone that plays battles; made by `open_policy`.

    `path` and `config` are those of the whole model: for an adapter, of its base.

    Attributes:
        text: what a state is written as.
        adapter: attached to the model; None for a whole model.
    """

    text: TextKind
    adapter: Adapter | None = None

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

    def load_model(self, **options: Any) -> Gemma3ForCausalLM | PeftModel:
        """Return the model as `TextCheckpoint.load_model` does, with its adapter.

        Raises:
            PokegemmaError: as there, or the adapter does not fit.
        """
        model = super().load_model(**options)
        return model if self.adapter is None else attach_adapter(model, self.adapter, self.path)


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
        return PolicyCheckpoint(path, open_text_checkpoint(path).config, text)
    adapter = read_adapter(Path(path))
    base = base or adapter.config.base_model_name_or_path
    if not base:
        raise PokegemmaError(f"{path}: the adapter names no base")
    checkpoint = PolicyCheckpoint(base, open_text_checkpoint(base).config, text, adapter)
    trained_on = adapter.run.get("base_fingerprint")
    if trained_on and checkpoint.weights_fingerprint() != trained_on:
        raise PokegemmaError(f"{base} is not the base of the adapter {path}, which was trained on other weights")
    return checkpoint
