"""Load the config, processor and weights of a Gemma 3, 3n or 4, and tell its weights apart from others."""

import hashlib
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedConfig,
    PreTrainedModel,
    ProcessorMixin,
)
from transformers.utils import cached_file

from pokegemma.errors import PokegemmaError
from pokegemma.training.families import (
    FAMILIES,
    Family,
    attention_of_parts,
    family_of,
    find_family,
    require_exact,
    require_packages,
)
from pokegemma.training.image_attention import ImageAttention, change_config, change_processor, image_attention
from pokegemma.training.image_size import resize_config, resize_model, resize_processor
from pokegemma.training.processors import Gemma4PictureProcessor, load_gemma3n_processor
from pokegemma.training.stored_weights import EMBEDDINGS, HEAD, plain_name, stored_tensors
from pokegemma.training.vision import accept_compact_batches

Dtype = Literal["float32", "bfloat16"]
_FINGERPRINT_VERSION = "2:"


def default_device() -> torch.device:
    """Return the device a single process uses: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def _load(what: str, path: str | Path, function: Any, **options: Any) -> Any:
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
    config = _load("config", path, PreTrainedConfig.get_config_dict)[0]
    if not config:
        raise PokegemmaError(f"{path}: no config.json in it, so it is no model")
    return find_family(config.get("model_type"), where=str(path))


def load_config(
    path: str | Path, image_size_px: int | None = None, attention: ImageAttention | None = None
) -> PreTrainedConfig:
    """Return the config of a Gemma 3, 3n or 4 with vision.

    Args:
        image_size_px: of its pictures; None: its own.
        attention: inside pictures; None: its own.

    Raises:
        PokegemmaError: there is none at `path`, it is of another architecture, needs packages that are missing, the
            size does not fit, or the attention contradicts its own.
    """
    require_packages(read_family(path), where=str(path))
    config = _load("config", path, AutoConfig.from_pretrained)
    if image_size_px is not None:
        require_exact(config, "--image_size")
        resize_config(config, image_size_px)
    if attention is not None:
        require_exact(config, "--image_attention")
        change_config(config, attention)
    return config


def is_quantised(config: PreTrainedConfig) -> bool:
    """Return whether the weights of a checkpoint are stored quantised, by its config."""
    return bool(getattr(config, "quantization_config", None))


def require_full_precision(config: PreTrainedConfig, *, where: str) -> None:
    """Refuse to train a checkpoint that is stored quantised.

    Raises:
        PokegemmaError: it is.
    """
    if is_quantised(config):
        raise PokegemmaError(
            f"{where}: its weights are stored quantised, and what is trained on them cannot be merged; take the "
            f"full-precision checkpoint ({family_of(config).checkpoints}): --finetuning qlora quantises it in memory"
        )


def _processor_loader(path: str | Path) -> Callable[[str], Any]:
    """Return what loads the processor of a checkpoint, or that in the folder of an adapter, which has no config."""
    if (Path(path) / "adapter_config.json").is_file():
        name = _load("processor", path, ProcessorMixin.get_processor_dict)[0].get("processor_class")
    else:
        name = read_family(path).processor
    return {"Gemma3nProcessor": load_gemma3n_processor, "Gemma4Processor": Gemma4PictureProcessor.from_pretrained}.get(
        name, Gemma3Processor.from_pretrained
    )


def load_processor(path: str | Path, image_size_px: int | None = None, attention: ImageAttention | None = None) -> Any:
    """Return the processor of a checkpoint, with the PIL image processor (torchvision is optional).

    An adapter's folder has its own, which says the size of its pictures and the attention inside them.

    Raises:
        PokegemmaError: it could not be loaded, or has no chat template.
    """
    config, changed = None, image_size_px is not None or attention is not None
    is_adapter = (Path(path) / "adapter_config.json").is_file()
    if not is_adapter and (changed or read_family(path) is FAMILIES["gemma3"]):
        config = load_config(path, image_size_px, attention)
    processor = _load("processor", path, _processor_loader(path))
    if isinstance(processor, Gemma3Processor):
        # Not as an argument of from_pretrained: it would end up in the tokenizer's config, which could not be saved.
        processor.image_processor = _load("image processor", path, Gemma3ImageProcessorPil.from_pretrained)
    if not processor.chat_template:
        raise PokegemmaError(f"{path}: the processor has no chat template; take an instruction-tuned (-it) checkpoint")
    if config is not None and image_size_px is not None:
        resize_processor(processor, config)
    if config is not None:  # config.json decides: the tokenizer's files may be copies of another model's
        change_processor(processor, image_attention(config))
    return processor


def load_model(
    path: str | Path,
    *,
    image_size_px: int | None = None,
    attention: ImageAttention | None = None,
    dtype: Dtype = "float32",
    device: torch.device | str | None = None,
    attn_implementation: str = "sdpa",
    **options: Any,
) -> PreTrainedModel:
    """Return a checkpoint in eval mode, on `device` (None: left where transformers puts it).

    Its pictures have `image_size_px` (None: the checkpoint's own size); the position embeddings are interpolated.
    `attention` inside pictures is what its config will say (None: its own); the batches of a collator bring it about.
    `options` go to `from_pretrained` (a quantization_config, say).

    Raises:
        PokegemmaError: it could not be loaded, the size does not fit, or attention would be wrong.
    """
    implementation = attention_of_parts(load_config(path, image_size_px, attention), attn_implementation)
    model = _load(
        "model",
        path,
        AutoModelForImageTextToText.from_pretrained,
        dtype=getattr(torch, dtype),
        attn_implementation=implementation,
        **options,
    )
    # Under ZeRO-3 transformers 5.23 keeps all renamings that it knows, not those that loading needed. Saving undoes the
    # ones kept, so the names would be neither the published ones nor those of one process.
    model._weight_conversions = [step for step in model._weight_conversions if step.was_used()]
    if image_size_px is not None:
        resize_model(model, image_size_px)
    if attention is not None:
        change_config(model.config, attention)
    if device is not None:
        try:
            model = model.to(device)
        except (RuntimeError, AssertionError) as error:  # CUDA's out of memory is a RuntimeError
            raise PokegemmaError(f"{path} does not go to {device}: {str(error).splitlines()[0]}") from error
    if isinstance(model, Gemma3ForConditionalGeneration):
        accept_compact_batches(model)
    return model.eval()


def stored_names(path: str | Path) -> set[str]:
    """Return the plain names of the tensors in a checkpoint's files.

    Raises:
        PokegemmaError: they cannot be read, or are not safetensors.
    """
    return _load("weights", path, lambda folder: {plain_name(tensor.name) for tensor in stored_tensors(folder)})


def weights_fingerprint(path: str | Path) -> str:
    """Return a hash that tells checkpoints apart: all names and shapes, all vectors, and the first row of each matrix.

    It is that of what is loaded: one file or several, the spelling of the names, and a copy of the embeddings as LM
    head make no difference. A row and not the whole, so that a fingerprint of a 4B takes a second, not a minute;
    merging an adapter changes it.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    return _load("weights", path, _hash_weights)


def has_fingerprint(path: str | Path, fingerprint: str) -> bool:
    """Return whether a checkpoint has a fingerprint, which an earlier version may have taken.

    Raises:
        PokegemmaError: the weights cannot be read.
    """
    function = _hash_weights if fingerprint.startswith(_FINGERPRINT_VERSION) else _hash_weights_as_spelled
    return _load("weights", path, function) == fingerprint


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
    path = _load(
        "tokenizer.model",
        source,
        cached_file,
        filename="tokenizer.model",
        _raise_exceptions_for_missing_entries=needed,
    )
    if path is not None:
        shutil.copyfile(path, folder / "tokenizer.model")
