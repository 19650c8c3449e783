"""Open the checkpoint of a Gemma 3, 3n or 4: its config, family and processor, and from it the model and a collator."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
from transformers import (
    CONFIG_MAPPING,
    AutoModelForImageTextToText,
    Gemma3ForConditionalGeneration,
    Gemma3ImageProcessorPil,
    Gemma3Processor,
    PreTrainedConfig,
    PreTrainedModel,
)
from transformers.utils import ADAPTER_CONFIG_NAME

from pokegemma.data.prompts import Layout
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.batches.processor_collator import Collator, make_collator
from pokegemma.gemma.checkpoint_files import copy_tokenizer_model, load_part, write_converter_files
from pokegemma.gemma.families import Family, attention_of_parts, find_family, require_exact, require_packages
from pokegemma.gemma.image_attention import ImageAttention, change_config, change_processor, trained_attention
from pokegemma.gemma.model_image_size import resize_config, resize_model, resize_processor
from pokegemma.gemma.processors import Gemma4PictureProcessor, load_gemma3n_processor
from pokegemma.gemma.vision_tower import accept_compact_batches
from pokegemma.gemma.weight_files import StoredCheckpoint

Dtype = Literal["float32", "bfloat16"]

_PROCESSOR_LOADERS = {
    "Gemma3Processor": Gemma3Processor.from_pretrained,
    "Gemma3nProcessor": load_gemma3n_processor,
    "Gemma4Processor": Gemma4PictureProcessor.from_pretrained,
}


def default_device() -> torch.device:
    """Return the device a single process uses: CUDA, then Apple's MPS, then the CPU."""
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


@dataclass(frozen=True)
class Checkpoint(StoredCheckpoint):
    """A Gemma 3, 3n or 4 with vision, as it is or with other pictures; made by `open_checkpoint`.

    `config` has `image_size` and `image_attention`.

    Attributes:
        image_size: size of pictures in pixels, where it is not the checkpoint's own.
        image_attention: attention inside pictures, where it is not the checkpoint's own.
        processor_path: where the processor is loaded from; an adapter's folder has one, too.
    """

    family: Family
    image_size: int | None
    image_attention: ImageAttention | None
    processor_path: str

    @cached_property
    def processor(self) -> Any:
        """The processor with the PIL image processor, since torchvision is optional.

        Raises:
            PokegemmaError: it cannot be loaded, or has no chat template.
        """
        path = self.processor_path
        processor = load_part("processor", path, _PROCESSOR_LOADERS[self.family.processor])
        if isinstance(processor, Gemma3Processor):
            # Not as an argument of from_pretrained: it would end up in the tokenizer's config, which could not be
            # saved.
            processor.image_processor = load_part("image processor", path, Gemma3ImageProcessorPil.from_pretrained)
        if not processor.chat_template:
            raise PokegemmaError(
                f"{path}: the processor has no chat template; take an instruction-tuned (-it) checkpoint"
            )
        if self.image_size is not None:
            resize_processor(processor, self.config)
        if isinstance(processor, Gemma3Processor):  # by config.json: the tokenizer may be a copy of another model's
            change_processor(processor, trained_attention(self.config))
        return processor

    def load_model(
        self,
        *,
        dtype: Dtype = "float32",
        device: torch.device | str | None = None,
        attn_implementation: str = "sdpa",
        **options: Any,
    ) -> PreTrainedModel:
        """Return the model in eval mode on `device` (None: where transformers puts it).

        Position embeddings are interpolated where `image_size` is given. `image_attention` only changes the config.
        The attention mask itself comes from the collator's batches.

        Args:
            options: of `from_pretrained`, such as a quantization_config.

        Raises:
            PokegemmaError: the weights cannot be loaded, or the attention implementation is wrong for the family.
        """
        model = load_part(
            "model",
            self.path,
            AutoModelForImageTextToText.from_pretrained,
            dtype=getattr(torch, dtype),
            attn_implementation=attention_of_parts(self.config, attn_implementation),
            **options,
        )
        # Under ZeRO-3 transformers 5.23 keeps every renaming that it knows, not only those that loading used. Saving
        # would undo all of them, so weights would get names that differ from the published ones.
        model._weight_conversions = [step for step in model._weight_conversions if step.was_used()]
        if self.image_size is not None:
            resize_model(model, self.image_size)
        if self.image_attention is not None:
            change_config(model.config, self.image_attention)
        if device is not None:
            try:
                model = model.to(device)
            except (RuntimeError, AssertionError) as error:  # CUDA's out of memory is a RuntimeError
                message = str(error).splitlines()[0]
                raise PokegemmaError(f"{self.path} cannot be moved to {device}: {message}") from error
        if isinstance(model, Gemma3ForConditionalGeneration):
            accept_compact_batches(model)
        return model.eval()

    def collator(self, *, layout: Layout, dataset_folder: Path, **options: Any) -> Collator:
        """Return the collator that makes batches for the model; see `make_collator`."""
        return make_collator(self.processor, layout=layout, dataset_folder=dataset_folder, **options)

    def require_full_precision(self) -> None:
        """Refuse to train weights that are stored quantised.

        Raises:
            PokegemmaError: they are.
        """
        if self.is_quantised:
            raise PokegemmaError(
                f"{self.path}: its weights are stored quantised, and an adapter trained on them cannot be merged; take "
                f"the full-precision checkpoint ({self.family.checkpoints}): --finetuning qlora quantises it in memory"
            )

    def copy_tokenizer_model(self, folder: Path) -> None:
        """Copy SentencePiece's tokenizer.model, which `save_pretrained` leaves out and llama.cpp needs, into `folder`.

        Gemma 4 has none: nothing is copied.

        Raises:
            PokegemmaError: the checkpoint has none, and its family does.
        """
        copy_tokenizer_model(self.path, folder, is_required=self.family.has_tokenizer_model)

    def save_files(self, folder: Path) -> None:
        """Write everything but config and weights into `folder`: what loading and converting a model needs.

        Raises:
            PokegemmaError: as `copy_tokenizer_model`.
        """
        self.processor.save_pretrained(folder)
        self.copy_tokenizer_model(folder)
        write_converter_files(self.processor, folder)


def open_checkpoint(
    path: str | Path, image_size: int | None = None, image_attention: ImageAttention | None = None
) -> Checkpoint:
    """Open a checkpoint: read its config.json once, and apply the image options to it.

    Processor and weights are loaded when they are needed.

    Args:
        path: a folder or a Hub id.
        image_size: of its pictures in pixels; None: its own.
        image_attention: inside pictures; None: its own.

    Raises:
        PokegemmaError: `path` is an adapter or has no config, the architecture is another one or needs packages that
            are missing, the size does not fit, or the attention contradicts the checkpoint's own.
    """
    if (Path(path) / ADAPTER_CONFIG_NAME).is_file():
        raise PokegemmaError(f"{path} is an adapter; merge it first: scripts/merge_qlora.py --lora_path {path}")
    path = str(path)
    settings = load_part("config", path, PreTrainedConfig.get_config_dict)[0]
    if not settings:
        raise PokegemmaError(f"{path}: no config.json in it, so it is not a model")
    family = find_family(settings.get("model_type"), where=path)
    require_packages(family, where=path)
    config_class = CONFIG_MAPPING[settings["model_type"]]
    config = load_part("config", path, lambda name: config_class.from_dict(settings, name_or_path=name))
    if image_size is not None:
        require_exact(config, "--image_size")
        is_own = image_size == config.vision_config.image_size
        resize_config(config, image_size)
        image_size = None if is_own else image_size
    if image_attention is not None:
        require_exact(config, "--image_attention")
        is_own = image_attention == trained_attention(config)
        change_config(config, image_attention)
        image_attention = None if is_own else image_attention
    return Checkpoint(path, config, family, image_size, image_attention, processor_path=path)
