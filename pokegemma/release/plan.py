"""What a release consists of: its steps, and the folders that they read and write."""

import importlib.util
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from pokegemma.data.samples import dataset_files
from pokegemma.errors import PokegemmaError
from pokegemma.release.options import EXPORTS, PipelineOptions

_EXTRAS = {"gguf": ("gguf", "llama_cpp"), "mlx": ("mlx", "mlx_vlm"), "register": ("registry", "mlflow")}


@dataclass(frozen=True)
class ReleasePlan:
    """A release. `needs_merge`: whether the checkpoint is an adapter; `exports`: kind and folder of each export."""

    options: PipelineOptions
    output_dir: Path
    checkpoint: Path
    needs_merge: bool
    model: Path
    train: Path
    held_out: Path
    exports: Mapping[str, Path]

    @property
    def steps(self) -> tuple[str, ...]:
        """The names of the steps, in order."""
        return (
            *(["merge"] if self.needs_merge else []),
            "evaluate",
            *(f"export_{kind}" for kind in self.exports),
            *(["parity"] if self.exports else []),
            *(["register"] if self.options.register else []),
        )

    @property
    def evaluation(self) -> Path:
        return self.output_dir / "evaluation"

    @property
    def parity(self) -> Path:
        return self.output_dir / "parity"

    @property
    def registration(self) -> Path:
        return self.output_dir / "registration.json"


def make_plan(options: PipelineOptions) -> ReleasePlan:
    """Check what can be checked before any work, and return the plan.

    Raises:
        PokegemmaError: the checkpoint, the dataset or an optional part of the installation is missing.
    """
    checkpoint, output_dir = Path(options.checkpoint).absolute(), Path(options.output_dir).absolute()
    if not checkpoint.is_dir():
        raise PokegemmaError(f"--checkpoint {options.checkpoint}: no such folder")
    needs_merge = not (checkpoint / "config.json").is_file()
    if needs_merge and not (checkpoint / "adapter_config.json").is_file():
        raise PokegemmaError(
            f"--checkpoint {checkpoint}: neither an adapter (adapter_config.json) nor a model (config.json)"
        )
    train, held_out = dataset_files(Path(options.dataset_path))
    if held_out is None:
        raise PokegemmaError(f"--dataset_path {options.dataset_path}: no eval.jsonl to evaluate on")
    exports = {kind: output_dir / kind for kind in EXPORTS if kind in options.exports}
    for part in (*exports, *(["register"] if options.register else [])):
        extra, module = _EXTRAS[part]
        if importlib.util.find_spec(module) is None:
            raise PokegemmaError(f"{part} needs {module}: run ./init.sh --with {extra}, or leave it out")
    if output_dir.exists() and not output_dir.is_dir():
        raise PokegemmaError(f"--output_dir {output_dir}: not a folder")
    model = output_dir / "merged" if needs_merge else checkpoint
    return ReleasePlan(options, output_dir, checkpoint, needs_merge, model, train, held_out, exports)
