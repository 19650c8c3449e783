"""Which engines are compared: checkpoints, GGUF files and MLX folders, and the type of their weights."""

import json
import math
import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from safetensors import safe_open

from pokegemma.errors import PokegemmaError

MMPROJ_FILE = "mmproj-f16.gguf"
_TORCH_TYPES = {"float32": "f32", "bfloat16": "bf16", "float16": "f16"}
_SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}
_GGUF_TYPE = re.compile(r"(?<![a-z0-9])(bf16|f16|f32|i?q([2-8])(?:_\w+)?)(?![a-z0-9])", re.IGNORECASE)


class EngineFailedError(PokegemmaError):
    """An engine could not be loaded, or its process died; the message is the last line that it wrote."""


@dataclass(frozen=True)
class EngineSpec:
    """An engine and its model: a checkpoint or MLX folder, or a GGUF file with its mmproj file.

    `dtype`, `device` and `image_attention` apply to transformers only.
    """

    kind: Literal["transformers", "llama.cpp", "mlx"]
    name: str
    path: Path
    mmproj: Path | None = None
    dtype: str = "auto"
    device: str | None = None
    image_attention: str | None = None

    @property
    def files(self) -> tuple[Path, ...]:
        """The files that contain its weights."""
        if self.kind == "llama.cpp":
            return (self.path,) if self.mmproj is None else (self.path, self.mmproj)
        return tuple(sorted(self.path.glob("*.safetensors")))


def find_engines(
    *,
    gguf: Sequence[str] = (),
    mmproj: str | None = None,
    mlx: Sequence[str] = (),
    transformers: Sequence[str] = (),
    device: str | None = None,
) -> list[EngineSpec]:
    """Return what to compare: every model-*.gguf of a folder, single GGUF files, MLX folders and checkpoints.

    Raises:
        PokegemmaError: a path does not exist, or a folder contains no model.
    """
    specs = []
    for path in map(Path, gguf):
        files = sorted(path.glob("model-*.gguf")) if path.is_dir() else [path]
        if not files or not all(file.is_file() for file in files):
            raise PokegemmaError(f"--gguf {path}: " + ("no model-*.gguf in it" if path.is_dir() else "no such file"))
        for file in files:
            vision = Path(mmproj) if mmproj else file.parent / MMPROJ_FILE
            specs.append(EngineSpec("llama.cpp", f"llama.cpp {file.stem.removeprefix('model-')}", file, mmproj=vision))
    for flag, kind, paths in (("--mlx", "mlx", mlx), ("--transformers", "transformers", transformers)):
        for path in map(Path, paths):
            if not (path / "config.json").is_file():
                raise PokegemmaError(f"{flag} {path}: not a checkpoint (config.json not found)")
            specs.append(EngineSpec(kind, f"{kind} {path.resolve().name}", path, device=device))
    names = [spec.name for spec in specs]
    return [spec if names.count(spec.name) == 1 else replace(spec, name=f"{spec.name} ({spec.path})") for spec in specs]


def gguf_type(name: str) -> str | None:
    """Return the type of weights in the name of a GGUF file or in llama.cpp's name for a type; None without one.

    Example:
        >>> gguf_type("model-q4_k_m")
        '4 bits'
    """
    found = _GGUF_TYPE.findall(name)
    if not found:
        return None
    kind, bits = found[-1]
    return f"{bits} bits" if bits else kind.lower()


def weights_type(spec: EngineSpec) -> str:
    """Return the type of an engine's weights, such as "f16" or "4 bits"; for a GGUF file, the type in its name.

    Raises:
        PokegemmaError: the type is unknown.
    """
    if spec.kind == "llama.cpp":
        if (named := gguf_type(spec.path.stem)) is None:
            raise PokegemmaError(
                f"{spec.path}: no type in its name, such as f16 or q8_0; pass --max_log_probability_difference"
            )
        return named
    if spec.dtype != "auto":
        return _TORCH_TYPES[spec.dtype]
    config = json.loads((spec.path / "config.json").read_text(encoding="utf-8"))
    if spec.kind == "mlx" and "quantization" in config:
        return f"{config['quantization']['bits']} bits"
    largest = max((entry for file in spec.files for entry in _tensor_sizes(file)), default=None)
    if largest is None or largest[1] not in _SAFETENSORS_TYPES:
        raise PokegemmaError(f"{spec.path}: weights of an unknown type: {largest and largest[1]}")
    return _SAFETENSORS_TYPES[largest[1]]


def _tensor_sizes(file: Path) -> list[tuple[int, str]]:
    """Return (number of values, type) of each tensor of a safetensors file."""
    with safe_open(file, framework="numpy") as tensors:
        slices = map(tensors.get_slice, tensors.keys())
        return [(math.prod(tensor.get_shape()), tensor.get_dtype()) for tensor in slices]


def check_loaded(spec: EngineSpec, *, engine: str, weights: str) -> None:
    """Check that an engine loaded weights of the type that its file is named after.

    Args:
        engine: the name that the loaded engine reports.
        weights: the type of weights that it reports.

    Raises:
        EngineFailedError: it is another engine, or the weights have another type.
    """
    if engine.split()[0] != spec.kind:
        raise EngineFailedError(f"{engine} answered instead of {spec.kind}")
    if spec.kind == "transformers":
        return
    named = gguf_type(spec.path.stem) if spec.kind == "llama.cpp" else weights_type(spec)
    loaded = gguf_type(weights) or weights
    if named and loaded and named != loaded:
        raise EngineFailedError(f"{spec.path} is named after {named}, and the loaded weights are {weights}")
