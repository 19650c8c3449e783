"""Read a part of a checkpoint in one line of error, and write the files that llama.cpp's converter needs."""

import json
import shutil
from pathlib import Path
from typing import Any

from huggingface_hub.errors import StrictDataclassError
from safetensors import SafetensorError
from transformers import Gemma3Processor, ProcessorMixin
from transformers.utils import cached_file

from pokegemma.errors import PokegemmaError


def load_part(what: str, path: str | Path, function: Any, **options: Any) -> Any:
    """Return `function(path, **options)`, where `path` is a folder or a Hub id.

    Args:
        what: the part of the checkpoint, for the message.

    Raises:
        PokegemmaError: there is no such folder, or the part cannot be loaded.
    """
    local = Path(path).is_dir()
    if not local and (str(path).startswith((".", "/")) or str(path).count("/") > 1):
        raise PokegemmaError(
            f"{path}: no such folder (a model is a folder or a Hugging Face id like google/gemma-3-4b-it)"
        )
    try:
        return function(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError, StrictDataclassError) as error:
        hint = "" if local else "; a gated model needs its licence accepted on the Hub and HUGGINGFACE_TOKEN in .env"
        raise PokegemmaError(
            f"{path}: the {what} could not be loaded: {' '.join(str(error).split())[:300]}{hint}"
        ) from error


def write_converter_files(processor: ProcessorMixin, folder: Path) -> None:
    """Add the files to a saved checkpoint that converting it to GGUF needs, except tokenizer.model.

    preprocessor_config.json is one of them: newer converters read processor_config.json, others only this one.

    Of other families than Gemma 3 nothing is converted here, so their files stay as they are.
    """
    if not isinstance(processor, Gemma3Processor):
        return
    processor.image_processor.save_pretrained(folder)
    write_added_tokens(folder)


def write_added_tokens(folder: Path) -> None:
    """Add `added_tokens_decoder` to the tokenizer_config.json of a saved tokenizer, from its tokenizer.json.

    It separates control tokens from text. Without it, llama.cpp cuts <start_of_turn> into letters in every prompt.
    """
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def copy_tokenizer_model(path: str | Path, folder: Path, *, is_required: bool) -> bool:
    """Copy SentencePiece's tokenizer.model of a checkpoint into `folder`; return whether there is one.

    `save_pretrained` leaves it out, and llama.cpp needs it.

    Raises:
        PokegemmaError: there is none, and it is required.
    """
    found = load_part(
        "tokenizer.model",
        path,
        cached_file,
        filename="tokenizer.model",
        _raise_exceptions_for_missing_entries=is_required,
    )
    if found is not None:
        shutil.copyfile(found, folder / "tokenizer.model")
    return found is not None
