"""Load the config, processor and weights of a Gemma 3, 3n or 4, and tell its weights apart from others."""

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
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

from pokegemma.errors import PokegemmaError
from pokegemma.gemma.checkpoint_files import load_part, read_family
from pokegemma.gemma.families import (
    FAMILIES,
    attention_of_parts,
    family_of,
    require_exact,
    require_packages,
)
from pokegemma.gemma.image_attention import ImageAttention, change_config, change_processor, image_attention
from pokegemma.gemma.image_size import resize_config, resize_model, resize_processor
from pokegemma.gemma.processors import Gemma4PictureProcessor, load_gemma3n_processor
from pokegemma.gemma.vision_tower import accept_compact_batches

Dtype = Literal["float32", "bfloat16"]


def default_device() -> torch.device:
    """Return the device a single process uses: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


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
    config = load_part("config", path, AutoConfig.from_pretrained)
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
        name = load_part("processor", path, ProcessorMixin.get_processor_dict)[0].get("processor_class")
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
    processor = load_part("processor", path, _processor_loader(path))
    if isinstance(processor, Gemma3Processor):
        # Not as an argument of from_pretrained: it would end up in the tokenizer's config, which could not be saved.
        processor.image_processor = load_part("image processor", path, Gemma3ImageProcessorPil.from_pretrained)
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
    model = load_part(
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
