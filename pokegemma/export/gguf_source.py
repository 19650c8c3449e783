"""Read a checkpoint for the conversion to GGUF: what its files must contain, and a folder for the converter."""

import contextlib
import json
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
from pokegemma.gemma.checkpoint_files import copy_tokenizer_model, write_added_tokens, write_converter_files
from pokegemma.gemma.families import FAMILIES, TOWER
from pokegemma.gemma.loading import Checkpoint
from pokegemma.gemma.text import TEXT_MODEL
from pokegemma.gemma.text.checkpoint import PLAIN_CHAT_TEMPLATE, TextCheckpoint, open_gemma

logger = logging.getLogger(__name__)

_MARKER_BEGIN, _MARKER_END = "<__media", "__>"
_SLIDING_BASE, _LAYERS_OF_27B = 10_000.0, 62


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
    """What a checkpoint contains, and what its GGUF files must contain as well.

    Size and tokens of a picture are None for a model for text alone.
    """

    path: Path
    num_text_tensors: int
    num_vision_tensors: int
    num_weights: int
    num_staged_bytes: int
    image_size_px: int | None
    image_tokens: int | None
    checkpoint: Checkpoint | TextCheckpoint

    @property
    def has_vision(self) -> bool:
        return isinstance(self.checkpoint, Checkpoint)

    @property
    def chat_template(self) -> str:
        """Return the chat template that the GGUF files shall have."""
        return served_template(self.checkpoint.processor.chat_template) if self.has_vision else PLAIN_CHAT_TEMPLATE

    @property
    def control_tokens(self) -> list[str]:
        """Return the tokens that mark turns and pictures in a prompt; without vision, those that begin and end it."""
        if not self.has_vision:
            tokenizer = self.checkpoint.tokenizer
            return [tokenizer.bos_token, tokenizer.eos_token]
        tokenizer = self.checkpoint.processor.tokenizer
        return [tokenizer.bos_token, "<start_of_turn>", "<end_of_turn>", tokenizer.boi_token, tokenizer.eoi_token]


def read_gguf_source(path: Path) -> GgufSource:
    """Return what a merged Gemma 3 contains, from its config and the headers of its weights.

    Raises:
        PokegemmaError: it cannot be converted.
    """
    checkpoint = open_exportable(path, target="GGUF", opener=open_gemma)
    config = checkpoint.config
    _require_tokenizer_model(path)
    shapes = {name: tensor.shape for name, tensor in exported_tensors(path).items()}
    parts = (f"{TOWER}.", f"{FAMILIES['gemma3'].projector}.")
    vision = [name for name in shapes if any(part in name for part in parts)]
    has_vision = isinstance(checkpoint, Checkpoint)
    if has_vision and not any(f"{TOWER}." in name for name in vision):
        raise PokegemmaError(f"{path}: its weights contain no vision tower; take a checkpoint with vision")
    if vision and not has_vision:
        raise PokegemmaError(f"{path}: its weights contain vision, of which its config.json ({TEXT_MODEL}) has nothing")
    _require_known_layers(path, config.get_text_config())
    heads = [name for name in vision if ".vision_model.head." in name]  # SigLIP's pooling, which Gemma does not use
    return GgufSource(
        path=path,
        num_text_tensors=len(shapes) - len(vision),
        num_vision_tensors=len(vision) - len(heads),
        num_weights=sum(math.prod(shape) for shape in shapes.values()),
        num_staged_bytes=staged_bytes(path),
        image_size_px=config.vision_config.image_size if has_vision else None,
        image_tokens=config.mm_tokens_per_image if has_vision else None,
        checkpoint=checkpoint,
    )


def _require_tokenizer_model(path: Path) -> None:
    """Refuse a checkpoint without a tokenizer.model of its own or of its recorded base."""
    if (path / "tokenizer.model").is_file():
        return
    if json.loads((path / "tokenizer.json").read_text(encoding="utf-8"))["model"]["type"] == "WordLevel":
        raise PokegemmaError(f"{path}: its tokens are whole words, which llama.cpp cannot read; it plays as it is")
    if recorded_base(path) is None:
        raise PokegemmaError(
            f"{path}/tokenizer.model not found, which llama.cpp needs; copy it from the base checkpoint"
        )


def _require_known_layers(path: Path, config: Any) -> None:
    """Refuse layers that llama.cpp would compute in another way: it knows those of the published checkpoints only.

    https://github.com/ggml-org/llama.cpp, LLM_ARCH_GEMMA3: every sixth layer has full attention, positions of the
    others have a base of 10,000, and attention is scaled by the width of a head (with 62 layers by another number).
    """
    kinds = ["sliding_attention"] * 5 + ["full_attention"]
    expected = (kinds * (len(config.layer_types) // 6 + 1))[: len(config.layer_types)]
    if list(config.layer_types) != expected:
        raise PokegemmaError(f"{path}: llama.cpp does not know its order of layers ({', '.join(config.layer_types)})")
    sliding = config.rope_parameters["sliding_attention"]
    if sliding["rope_type"] != "default" or sliding["rope_theta"] != _SLIDING_BASE:
        raise PokegemmaError(f"{path}: llama.cpp does not know the positions of its sliding layers ({sliding})")
    if config.num_hidden_layers != _LAYERS_OF_27B and config.query_pre_attn_scalar != config.head_dim:
        raise PokegemmaError(
            f"{path}: llama.cpp scales attention by head_dim {config.head_dim}, not by query_pre_attn_scalar "
            f"{config.query_pre_attn_scalar}"
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
            copy_tokenizer_model(base, folder, is_required=True)
        shutil.copyfile(path / "tokenizer_config.json", folder / "tokenizer_config.json")
        if isinstance(checkpoint.checkpoint, Checkpoint):
            write_converter_files(checkpoint.checkpoint.processor, folder)
        else:
            write_added_tokens(folder)
        (folder / "chat_template.jinja").write_text(checkpoint.chat_template, encoding="utf-8")
        yield folder
