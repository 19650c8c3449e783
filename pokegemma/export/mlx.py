"""Write a merged Gemma 3 as a folder for MLX, with mlx-vlm's own converter, and check what it wrote."""

import contextlib
import json
import logging
import math
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import fields
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import Gemma3Config

from pokegemma.engines.mlx_engine import mlx_processors
from pokegemma.errors import PokegemmaError, one_line
from pokegemma.export.mlx_check import MlxPart, check_config, check_mlx_weights, check_processor
from pokegemma.export.source import PUBLISHED_HEAD, exported_tensors, open_exportable, stage_weights, staged_bytes
from pokegemma.export.weight_types import MlxBits
from pokegemma.gemma.families import FAMILIES, TOWER
from pokegemma.gemma.image_attention import attention_facts, trained_attention
from pokegemma.gemma.loading import Checkpoint
from pokegemma.outputs import atomic_folder, refuse_to_replace, require_space
from pokegemma.provenance import read_run_record, write_run_record

try:
    from mlx_vlm.convert import convert
    from mlx_vlm.models.gemma3 import ModelConfig, TextConfig, VisionConfig
except ImportError as error:
    raise PokegemmaError(f"MLX cannot be used ({error}); install it with: ./init.sh --with mlx") from error

logger = logging.getLogger(__name__)

_REMEDY = "free some or choose another --output_path"

_GROUP = 64
"""Weights that share a scale and an offset, 16 bits each, in a quantised layer; mlx-vlm's own default."""

_COPIED = ("tokenizer*", "special_tokens_map.json", "added_tokens.json")
_COPIED += ("chat_template.*", "generation_config.json", "processor_config.json", "preprocessor_config.json")


def open_convertible(path: Path) -> Checkpoint:
    """Open a checkpoint that can be converted.

    Raises:
        PokegemmaError: it is an adapter, quantised, of another family, without vision, or for MLX already.
    """
    checkpoint = open_exportable(path, target="MLX")
    tensors = exported_tensors(path)
    if any((tensor.file.metadata() or {}).get("format") == "mlx" for tensor in tensors.values()):
        raise PokegemmaError(f"{path}: for MLX already")
    for part in (TOWER, FAMILIES["gemma3"].projector):
        if not any(name.startswith(f"{part}.") for name in tensors):
            raise PokegemmaError(f"{path}: its weights contain no {part}; take a checkpoint with vision")
    if PUBLISHED_HEAD in tensors:  # mlx-vlm 0.7 replaces it with the embeddings whenever it loads a Gemma 3
        raise PokegemmaError(
            f"{path}: its LM head is not tied to its embeddings, and mlx-vlm computes with tied ones only; "
            "convert it to GGUF: scripts/convert_to_gguf.py"
        )
    return checkpoint


def _own_values(config_type: type, config: Any) -> dict[str, Any]:
    names = [field.name for field in fields(config_type)]
    return {name: getattr(config, name) for name in names if hasattr(config, name)}


def mlx_config(path: Path, config: Gemma3Config) -> dict[str, Any]:
    """Return a checkpoint's config.json with everything that mlx-vlm looks for in it.

    What mlx-vlm 0.7 does not find it takes from its own defaults, in silence, and transformers 5 writes some of it
    elsewhere or not at all:

    - hidden_size next to text_config: soft tokens of pictures are divided by its root. Default 2048; a 4B has 2560.
    - mm_tokens_per_image within text_config. Default 256; pictures of 448 px have 64.
    - rope_scaling: positions of the full-attention layers are divided by its factor. Default 1; a 4B has 8.
    - sliding_window_pattern, and the bases of both kinds of position: their defaults are those of Gemma 3.

    Raises:
        PokegemmaError: mlx-vlm has no setting for what the checkpoint has.
    """
    text: Any = config.get_text_config()
    rope = text.rope_parameters
    full, sliding = rope["full_attention"], rope["sliding_attention"]
    if sliding["rope_type"] != "default" or full["rope_type"] not in ("default", "linear"):
        raise PokegemmaError(f"{path}: mlx-vlm does not know its positions (rope_parameters {rope})")
    layers = text.layer_types
    pattern = layers.index("full_attention") + 1 if "full_attention" in layers else len(layers) + 1
    if any((kind == "full_attention") != (at % pattern == 0) for at, kind in enumerate(layers, 1)):
        raise PokegemmaError(f"{path}: mlx-vlm does not know its order of layers ({', '.join(layers)})")
    stored = json.loads((path / "config.json").read_text(encoding="utf-8"))
    stored["text_config"] = {
        **stored["text_config"],
        **_own_values(TextConfig, text),
        "mm_tokens_per_image": config.mm_tokens_per_image,
        "sliding_window_pattern": pattern,
        "rope_global_base_freq": full["rope_theta"],
        "rope_local_base_freq": sliding["rope_theta"],
        "rope_scaling": {"rope_type": "linear", "factor": full["factor"]} if full["rope_type"] == "linear" else None,
        "dtype": "bfloat16",
    }
    stored["vision_config"] = {
        **stored["vision_config"],
        **_own_values(VisionConfig, config.vision_config),
        "dtype": "bfloat16",
    }
    own = _own_values(ModelConfig, config)
    del own["text_config"], own["vision_config"]
    return {
        **stored,
        **own,
        "hidden_size": text.hidden_size,
        "pad_token_id": text.pad_token_id,
        "vocab_size": text.vocab_size,
        "dtype": "bfloat16",
    }


@contextlib.contextmanager
def _staged(path: Path, config: dict[str, Any], *, beside: Path) -> Iterator[str]:
    """Yield a folder of a checkpoint's files with `config` as config.json: the converter reads and copies no others.

    Args:
        beside: a folder on a disk with room for the weights, in which the other one is made.
    """
    with tempfile.TemporaryDirectory(prefix=".staged.", dir=beside) as folder:
        for pattern in _COPIED:
            for file in path.glob(pattern):
                (Path(folder) / file.name).symlink_to(file.resolve())
        stage_weights(path, Path(folder))
        (Path(folder) / "config.json").write_text(json.dumps(config), encoding="utf-8")
        yield folder


def _size(path: Path, bits: MlxBits) -> int:
    """Return the bytes that a converted checkpoint takes, with a copy of the embeddings as LM head."""
    num_quantised = num_kept = 0
    for name, tensor in exported_tensors(path).items():
        shape = tensor.shape
        count = math.prod(shape) * (2 if "embed_tokens" in name else 1)
        if bits < 16 and name.startswith("language_model.") and len(shape) == 2:
            num_quantised += count
        else:
            num_kept += count
    return int(num_kept * 2 + num_quantised * (bits + 32 / _GROUP) / 8)


def _leave_bos_to_template(folder: Path) -> None:
    """Make the folder's tokenizer add no BOS: the chat template writes it.

    mlx-vlm 0.7.10 tokenizes text of a template with `add_special_tokens=False`, but hands that only to processors whose
    signature has this argument. Its own for Gemma 3 does not, so its server would begin a prompt with two BOS tokens
    wherever there is a picture.
    """
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    tokenizer.post_processor = TemplateProcessing(single="$A", pair="$A $B:1", special_tokens=[])
    tokenizer.save(str(folder / "tokenizer.json"))


def convert_to_mlx(path: Path, output: Path, *, bits: MlxBits = 16, overwrite: bool = False) -> list[MlxPart]:
    """Write a checkpoint for MLX: bfloat16, or the language model in groups of quantised weights.

    Never float16, in which Gemma 3's activations overflow; mlx-vlm would clip them. Vision tower and projector stay in
    bfloat16: mlx-vlm does not quantise them.

    Returns:
        What was written, part by part.

    Raises:
        PokegemmaError: the checkpoint cannot be converted, or the disk is full.
        CheckFailedError: what was written differs from the checkpoint; nothing is left at `output`.
    """
    checkpoint = open_convertible(path)
    config, processor = checkpoint.config, checkpoint.processor
    refuse_to_replace(output, path, flag="--output_path")
    stored = mlx_config(path, config)
    num_bytes = int(1.02 * _size(path, bits)) + 64 * 2**20 + staged_bytes(path)
    require_space(output, num_bytes, remedy=_REMEDY)
    if trained_attention(config) != "causal":
        logger.warning(
            "mlx-vlm is causal inside pictures, and this model was trained with bidirectional attention there: its "
            "answers will differ a little. How much, and a training flag: docs/models.md, Attention inside pictures"
        )
    with atomic_folder(output, stage="mlx", overwrite=overwrite) as folder:
        with (
            _staged(path, stored, beside=folder) as source,
            contextlib.redirect_stdout(sys.stderr),
            mlx_processors(),
        ):
            try:
                convert(
                    source,
                    str(folder),
                    quantize=bits < 16,
                    q_bits=bits,
                    q_group_size=_GROUP,
                    dtype="bfloat16",
                    trust_remote_code=False,
                )
            except (ValueError, KeyError, RuntimeError, SafetensorError) as error:
                reason = one_line(error)
                raise PokegemmaError(f"{path}: mlx-vlm cannot convert it: {reason}") from error
        (folder / "README.md").unlink()  # an empty model card
        _leave_bos_to_template(folder)
        parts = check_mlx_weights(path, folder, bits=bits)
        check_config(folder, stored)
        check_processor(processor, folder, config)
        options = {"model_path": str(path), "quantization_bits": bits}
        write_run_record(
            folder,
            stage="mlx",
            options=options,
            image_size_px=config.vision_config.image_size,
            image_tokens=config.mm_tokens_per_image,
            parts=[vars(part) for part in parts],
            **attention_facts(config),
            model=read_run_record(path),
        )
    return parts
