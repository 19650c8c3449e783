"""Read a checkpoint for the conversion to GGUF: what its files must contain, and a folder for the converter."""

import contextlib
import logging
import math
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pokegemma.errors import PokegemmaError
from pokegemma.export.source import exported_tensors, open_exportable, recorded_base, stage_weights, staged_bytes
from pokegemma.gemma.checkpoint_files import write_converter_files
from pokegemma.gemma.families import FAMILIES, TOWER
from pokegemma.gemma.loading import open_checkpoint

logger = logging.getLogger(__name__)

_MARKER_BEGIN, _MARKER_END = "<__media", "__>"


def served_template(template: str) -> str:
    """Return a chat template that writes empty lines around pictures, for the servers of llama.cpp.

    Gemma 3's processor adds them to what the template writes, and so training has them. llama.cpp's servers put a
    marker into the text where a picture is (<__media__>, or a name of their own between the same ends), render the
    template, and add nothing.
    """
    for marker, padded in ((_MARKER_BEGIN, rf"\n\n{_MARKER_BEGIN}"), (_MARKER_END, rf"{_MARKER_END}\n\n")):
        template = f"{{% filter replace('{marker}', '{padded}') %}}{template}{{% endfilter %}}"
    return template


@dataclass(frozen=True)
class GgufSource:
    """What a checkpoint contains, and what its GGUF files must contain as well."""

    path: Path
    num_text_tensors: int
    num_vision_tensors: int
    num_weights: int
    num_staged_bytes: int
    image_size_px: int
    image_tokens: int
    processor: Any

    @property
    def chat_template(self) -> str:
        """Return the chat template that the GGUF files shall have."""
        return served_template(self.processor.chat_template)

    @property
    def control_tokens(self) -> list[str]:
        """Return the tokens that mark turns and pictures in a prompt."""
        tokenizer = self.processor.tokenizer
        return [tokenizer.bos_token, "<start_of_turn>", "<end_of_turn>", tokenizer.boi_token, tokenizer.eoi_token]


def read_gguf_source(path: Path) -> GgufSource:
    """Return what a merged Gemma 3 contains, from its config and the headers of its weights.

    Raises:
        PokegemmaError: it cannot be converted.
    """
    checkpoint = open_exportable(path, target="GGUF")
    config = checkpoint.config
    if not (path / "tokenizer.model").is_file() and recorded_base(path) is None:
        raise PokegemmaError(
            f"{path}/tokenizer.model not found, which llama.cpp needs; copy it from the base checkpoint"
        )
    shapes = {name: tensor.shape for name, tensor in exported_tensors(path).items()}
    parts = (f"{TOWER}.", f"{FAMILIES['gemma3'].projector}.")
    vision = [name for name in shapes if any(part in name for part in parts)]
    if not any(f"{TOWER}." in name for name in vision):
        raise PokegemmaError(f"{path}: its weights contain no vision tower; take a checkpoint with vision")
    heads = [name for name in vision if ".vision_model.head." in name]  # SigLIP's pooling, which Gemma does not use
    return GgufSource(
        path=path,
        num_text_tensors=len(shapes) - len(vision),
        num_vision_tensors=len(vision) - len(heads),
        num_weights=sum(math.prod(shape) for shape in shapes.values()),
        num_staged_bytes=staged_bytes(path),
        image_size_px=config.vision_config.image_size,
        image_tokens=config.mm_tokens_per_image,
        processor=checkpoint.processor,
    )


@contextlib.contextmanager
def staged(checkpoint: GgufSource, *, beside: Path) -> Iterator[Path]:
    """Yield a folder of what the converter reads: a checkpoint's files, some of them as the converter wants them.

    Its weights have published names. `chat_template` and the files of the tokenizer and the image processor are
    written: merged checkpoints have them, others of transformers 5 do not. Without them <start_of_turn> becomes text,
    and the converter does not report it. A checkpoint-N has no tokenizer.model: its base's is taken.

    Args:
        beside: a folder on a disk with room for `checkpoint.num_staged_bytes`, in which the other one is made.
    """
    left_out = ("*.safetensors", "*.safetensors.index.json", "preprocessor_config.json", "chat_template.*")
    left_out += ("tokenizer_config.json",)
    path = checkpoint.path
    with tempfile.TemporaryDirectory(prefix=".staged.", dir=beside) as temporary:
        folder = Path(temporary) / path.resolve().name  # the converter takes the model's name from it
        folder.mkdir()
        for file in sorted(path.resolve().iterdir()):
            if file.is_file() and not any(file.match(pattern) for pattern in left_out):
                (folder / file.name).symlink_to(file)
        stage_weights(path, folder)
        if not (path / "tokenizer.model").is_file():
            base = recorded_base(path)
            assert base is not None  # see read_gguf_source
            logger.info("tokenizer.model of %s: that of its base, %s", path, base)
            open_checkpoint(base).copy_tokenizer_model(folder)
        shutil.copyfile(path / "tokenizer_config.json", folder / "tokenizer_config.json")
        write_converter_files(checkpoint.processor, folder)
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
        yield folder
