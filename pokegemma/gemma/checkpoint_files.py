"""What llama.cpp's converter reads in a checkpoint's folder, and transformers 5 no longer writes there."""

import hashlib
import json
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from transformers import (
    Gemma3Processor,
    PreTrainedConfig,
    ProcessorMixin,
)
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, cached_file

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.families import (
    Family,
    find_family,
)


def published_name(name: str) -> str:
    """Return what published Gemma 3 checkpoints call a tensor, which is what llama.cpp and mlx-vlm read.

    transformers 5 saves other names in three cases: a checkpoint-N of full fine-tuning (`model.vision_tower...`), a
    model built from its config (`vision_tower.embeddings...`), and full fine-tuning under DeepSpeed ZeRO-3
    (`language_model.model.model.layers...`).

    Example:
        >>> published_name("model.language_model.layers.0.mlp.up_proj.weight")
        'language_model.model.layers.0.mlp.up_proj.weight'
    """
    plain = plain_name(name)
    part, _, rest = plain.partition(".")
    if part == "lm_head":
        return f"language_model.{plain}"
    if part == "vision_tower":
        return f"vision_tower.vision_model.{rest}"
    return plain if part == "multi_modal_projector" else f"language_model.model.{plain}"


def write_converter_files(processor: ProcessorMixin, folder: Path) -> None:
    """Add to a saved checkpoint what converting it to GGUF takes beside tokenizer.model.

    - preprocessor_config.json: newer converters read processor_config.json, others know this one only.
    - `added_tokens_decoder` in tokenizer_config.json: it tells control tokens from text. Without it <start_of_turn>
      becomes plain text, which llama.cpp cuts into letters, in every prompt.

    Of other families than Gemma 3 nothing is converted here, so their files stay as they are.
    """
    if not isinstance(processor, Gemma3Processor):
        return
    processor.image_processor.save_pretrained(folder)
    added = json.loads((folder / "tokenizer.json").read_text(encoding="utf-8"))["added_tokens"]
    path = folder / "tokenizer_config.json"
    config = json.loads(path.read_text(encoding="utf-8"))
    config["added_tokens_decoder"] = {str(token.pop("id")): token for token in added}
    path.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


EMBEDDINGS, HEAD = "embed_tokens.weight", "lm_head.weight"
"""Plain names of the two weights that a Gemma ties."""


_WRAPPERS = frozenset(("base_model", "model", "language_model", "vision_model"))


def plain_name(name: str) -> str:
    """Return the name of a module or tensor without the wrappers in which spellings differ.

    Example::

        language_model.model.layers.0.mlp.up_proj             published checkpoints, transformers 4.49
        model.language_model.layers.0.mlp.up_proj             transformers 4.52 and newer
        model.layers.0.mlp.up_proj                            the model for text alone
        base_model.model.model.layers.0.mlp.up_proj           its adapter, by PEFT

    all become ``layers.0.mlp.up_proj``; ``vision_tower.vision_model.encoder.layers.0`` (published) and
    ``model.vision_tower.encoder.layers.0`` (transformers 5) become ``vision_tower.encoder.layers.0``.
    """
    return ".".join(part for part in name.split(".") if part not in _WRAPPERS)


@dataclass(frozen=True)
class StoredTensor:
    """A tensor in a file, read when it is asked for.

    Attributes:
        name: as the file spells it.
        file: the opened safetensors file.
    """

    name: str
    file: Any

    @property
    def shape(self) -> list[int]:
        return self.file.get_slice(self.name).get_shape()

    def read(self) -> torch.Tensor:
        return self.file.get_tensor(self.name)

    def beginning(self) -> bytes:
        """Return the first row of a matrix, or the whole of a vector, as float32."""
        values = self.read() if len(self.shape) < 2 else self.file.get_slice(self.name)[:1]  # a scalar has no slices
        return values.float().numpy().tobytes()


def stored_tensors(path: str | Path) -> Iterator[StoredTensor]:
    """Yield the tensors of a checkpoint, a folder or a Hub id: file by file, sorted by name in each.

    Raises:
        OSError, ValueError, KeyError, SafetensorError: a file is missing or damaged.
    """
    files = [cached_file(str(path), "model.safetensors", _raise_exceptions_for_missing_entries=False)]
    if files == [None]:  # several files, and an index that names them
        index = cached_file(str(path), "model.safetensors.index.json")
        names = set(json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values())
        files = [cached_file(str(path), name) for name in sorted(names)]
    for name in files:
        file = safe_open(name, framework="pt")
        for key in sorted(file.keys()):
            yield StoredTensor(key, file)


_FINGERPRINT_VERSION = "2:"


def load_part(what: str, path: str | Path, function: Any, **options: Any) -> Any:
    local = Path(path).is_dir()
    if not local and (str(path).startswith((".", "/")) or str(path).count("/") > 1):
        raise PokegemmaError(
            f"{path}: no such folder (a model is a folder or a Hugging Face id like google/gemma-3-4b-it)"
        )
    try:
        return function(str(path), **options)
    except (OSError, ValueError, KeyError, RuntimeError, SafetensorError) as error:
        hint = "" if local else "; a gated model needs its licence accepted on the Hub and HUGGINGFACE_TOKEN in .env"
        raise PokegemmaError(
            f"{path}: the {what} could not be loaded: {' '.join(str(error).split())[:300]}{hint}"
        ) from error


def read_family(path: str | Path) -> Family:
    """Return the family of a checkpoint with vision, from its config alone.

    Raises:
        PokegemmaError: there is no config at `path`, or it is of another architecture.
    """
    config = load_part("config", path, PreTrainedConfig.get_config_dict)[0]
    if not config:
        raise PokegemmaError(f"{path}: no config.json in it, so it is no model")
    return find_family(config.get("model_type"), where=str(path))


def stored_names(path: str | Path) -> set[str]:
    """Return the plain names of the tensors in a checkpoint's files.

    Raises:
        PokegemmaError: they cannot be read, or are not safetensors.
    """
    return load_part("weights", path, lambda folder: {plain_name(tensor.name) for tensor in stored_tensors(folder)})


def weights_fingerprint(path: str | Path) -> str:
    """Return a hash that tells checkpoints apart: all names and shapes, all vectors, and the first row of each matrix.

    It is that of what is loaded: one file or several, the spelling of the names, and a copy of the embeddings as LM
    head make no difference. A row and not the whole, so that a fingerprint of a 4B takes a second, not a minute;
    merging an adapter changes it.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    return load_part("weights", path, _hash_weights)


def has_fingerprint(path: str | Path, fingerprint: str) -> bool:
    """Return whether a checkpoint has a fingerprint, which an earlier version may have taken.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    function = _hash_weights if fingerprint.startswith(_FINGERPRINT_VERSION) else _hash_weights_as_spelled
    return load_part("weights", path, function) == fingerprint


def _hash_weights(path: str) -> str:
    weights = {plain_name(tensor.name): tensor for tensor in stored_tensors(path)}
    if {HEAD, EMBEDDINGS} <= weights.keys():
        head, embeddings = weights[HEAD].read(), weights[EMBEDDINGS].read()
        if head.dtype == embeddings.dtype and torch.equal(head, embeddings):
            del weights[HEAD]
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(f"{name}{tensor.shape}".encode())
        digest.update(tensor.beginning())
    return _FINGERPRINT_VERSION + digest.hexdigest()


def _hash_weights_as_spelled(path: str) -> str:
    """Return the fingerprint that run.json had at first; it depends on names and files."""
    digest = hashlib.sha256()
    for tensor in stored_tensors(path):
        digest.update(f"{tensor.name}{tensor.shape}".encode())
        digest.update(tensor.beginning())
    return digest.hexdigest()


def copy_tokenizer_model(source: str | Path, folder: Path) -> None:
    """Copy SentencePiece's tokenizer.model, which `save_pretrained` leaves out and llama.cpp needs, into `folder`.

    Gemma 4 has none: nothing is copied.

    Raises:
        PokegemmaError: the checkpoint `source` has none, and its family does.
    """
    needed = read_family(source).has_tokenizer_model
    path = load_part(
        "tokenizer.model",
        source,
        cached_file,
        filename="tokenizer.model",
        _raise_exceptions_for_missing_entries=needed,
    )
    if path is not None:
        shutil.copyfile(path, folder / "tokenizer.model")


def weight_files(path: Path) -> list[Path]:
    """Return the files of a checkpoint's weights that transformers reads: one file, else those that an index names.

    Raises:
        PokegemmaError: there are none, one is missing, or the index is damaged.
    """
    if (path / SAFE_WEIGHTS_NAME).is_file():
        return [path / SAFE_WEIGHTS_NAME]
    index = path / SAFE_WEIGHTS_INDEX_NAME
    if not index.is_file():
        raise PokegemmaError(f"{path}: no weights ({SAFE_WEIGHTS_NAME} or {SAFE_WEIGHTS_INDEX_NAME}) in it")
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        files = [path / name for name in sorted(names)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise PokegemmaError(f"{index} is damaged: {error}") from error
    if missing := [file.name for file in files if not file.is_file()]:
        raise PokegemmaError(f"{path}: {', '.join(missing)} not found, which {SAFE_WEIGHTS_INDEX_NAME} names")
    return files


def open_weights(path: Path) -> Iterator[tuple[Path, Any]]:
    """Yield each of `weight_files`, and it opened.

    Raises:
        PokegemmaError: as there, or one cannot be read.
    """
    for file in weight_files(path):
        try:
            with safe_open(file, framework="pt") as weights:
                yield file, weights
        except (OSError, SafetensorError) as error:
            raise PokegemmaError(f"{file}: the weights cannot be read: {error}") from error
