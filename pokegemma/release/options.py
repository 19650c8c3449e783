"""Options of scripts/production_pipeline.py and scripts/model_registry.py."""

from dataclasses import dataclass
from typing import Literal

from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.export.weight_types import MLX_BITS, check_quantizations
from pokegemma.options import option
from pokegemma.parity.limits import MIN_AGREEMENT
from pokegemma.play.toy.rooms import check_level

EXPORTS = ("gguf", "mlx")
DEFAULT_REGISTRY = "outputs/registry/registry.db"
DEFAULT_MODEL_NAME = "pokegemma"


@dataclass
class PipelineOptions:
    """What to make from which checkpoint, and the limits of each gate."""

    checkpoint: str = option(..., "Folder of a trained adapter or of a whole model. A whole model is not merged.")
    dataset_path: str = option(..., "Folder with eval.jsonl and train.jsonl.")
    output_dir: str = option(..., "Folder for all results. An earlier run in it is continued.")
    exports: list[str] = option(["gguf"], "Formats to export: gguf, mlx, both, or none.")
    quantization: list[str] = option(["f16", "q8_0"], "Weight types of the GGUF files.")
    quantization_bits: int = option(16, "Bits of the MLX weights: 4, 8 or 16.", choices=[*MLX_BITS])
    llama_cpp_dir: str | None = option(
        None, "Checkout of llama.cpp to convert with. Default: the one that ./init.sh fetched."
    )
    base_model: str | None = option(None, "Base checkpoint. Default: that of the adapter.")
    dtype: Literal["bfloat16", "float32"] = option("bfloat16", "Type of the merged weights.")
    device: str | None = option(None, "Device for the evaluation. Default: the fastest one.")
    max_samples: int | None = option(None, "Evaluate on about this many samples. Default: all.")
    generate: bool = option(True, "Also evaluate written answers. --no_generate only scores the buttons.")
    parity_samples: int = option(50, "Number of samples on which exports are compared.")
    max_stored_difference: float | None = option(
        None,
        "Gate of merge: largest difference between the logits of the stored weights and those of adapter "
        "+ base. Default: by --dtype.",
    )
    min_accuracy: float | None = option(None, "Gate of evaluate: smallest accuracy.")
    min_gain_over_baseline: float = option(
        0.0, "Gate of evaluate: smallest difference to the accuracy of the best baseline. 0.05 is five points."
    )
    closed_loop: int | None = option(None, "Also let the model play this many unseen rooms of the toy game.")
    level: int = option(1, "Level of these rooms.")
    noise: float = option(0.0, "Share of the presses to replace in these rooms.")
    min_solved: float | None = option(None, "Gate of evaluate: smallest share of these rooms that the model solves.")
    max_export_gib: float | None = option(
        None, "Gate of each export: largest size of its smallest model with the vision part, in GiB."
    )
    min_agreement: float = option(
        MIN_AGREEMENT, "Gate of parity: smallest share of samples on which an export chooses the same button."
    )
    max_log_probability_difference: float | None = option(
        None, "Gate of parity: largest mean difference in log-probability. Default: by the type of the weights."
    )
    register: bool = option(True, "Register the model. --no_register skips this step.")
    registry_uri: str = option(DEFAULT_REGISTRY, "SQLite file (or sqlite:///FILE), or http(s)://... of a server.")
    name: str = option(DEFAULT_MODEL_NAME, "Name of the model in the registry.")
    copy: bool = option(False, "Store a copy of the files in the registry.")
    license: str | None = option(None, "Licence id for the model card. Default: that of the base model's family.")
    push_to_hub: str | None = option(None, "Repository on the Hub to which the result is uploaded.")
    hub_public: bool = option(False, "Make that repository public if it is new.")
    dry_run: bool = option(False, "Print which steps would run, and why. No step runs.")
    json: bool = option(False, "Print the result as JSON.")

    def __post_init__(self) -> None:
        for kind in self.exports:
            if kind not in (*EXPORTS, "none"):
                raise PokegemmaError(f"--exports: {kind!r} is not one of {', '.join(EXPORTS)}, none")
        if "none" in self.exports and len(self.exports) > 1:
            raise PokegemmaError(f"--exports: none and {', '.join(set(self.exports) - {'none'})} contradict each other")
        check_quantizations(self.quantization)
        check_ranges(self, "parity_samples", "max_samples", "closed_loop", at_least=1)
        check_ranges(self, "min_accuracy", "min_agreement", "min_solved", "noise", at_least=0, at_most=1)
        check_level(self.level)
        if self.min_solved is not None and self.closed_loop is None:
            raise PokegemmaError(f"--min_solved {self.min_solved}: needs --closed_loop, the number of rooms to play")
        check_ranges(self, "min_gain_over_baseline", at_least=-1, at_most=1)
        check_ranges(self, "max_stored_difference", "max_export_gib", "max_log_probability_difference", at_least=0)


@dataclass(kw_only=True)
class RegistryOptions:
    """Options of every command of scripts/model_registry.py."""

    registry_uri: str = option(DEFAULT_REGISTRY, "SQLite file (or sqlite:///FILE), or http(s)://... of a server.")
    name: str = option(DEFAULT_MODEL_NAME, "Name of the model.")


@dataclass(kw_only=True)
class RegisterOptions(RegistryOptions):
    model_path: str = option(..., "Folder of the merged checkpoint.")
    evaluation: str | None = option(None, "Folder of the model's results by scripts/evaluate.py.")
    parity: str | None = option(None, "Folder of the model's results by scripts/check_parity.py.")
    exports: list[str] = option([], "Folders of the model's exports.")
    copy: bool = option(False, "Keep a copy of the files. Default: only their paths and hashes.")
    description: str | None = option(None, "A sentence about this version.")
    output: str | None = option(None, "JSON file to create with the name and the version.")


@dataclass(kw_only=True)
class VersionOptions(RegistryOptions):
    """Options of `check`, and of all commands about a version."""

    version: str = option(..., "Number, alias or latest.")


@dataclass(kw_only=True)
class ListOptions(RegistryOptions):
    json: bool = option(False, "Print JSON instead of a table.")


@dataclass(kw_only=True)
class ShowOptions(VersionOptions, ListOptions):
    pass


@dataclass(kw_only=True)
class CompareOptions(ShowOptions):
    other: str = option(..., "Number, alias or latest. The table shows its figures minus those of VERSION.")


@dataclass(kw_only=True)
class RollbackOptions(RegistryOptions):
    alias: str = option("champion", "Name to give to the version.")


@dataclass(kw_only=True)
class PromoteOptions(RollbackOptions, VersionOptions):
    force: bool = option(False, "Promote it even if its evaluation or parity failed.")


@dataclass(kw_only=True)
class ExportOptions(VersionOptions):
    output_dir: str = option(..., "Folder to create.")
    part: str = option("model", "model, or the name of an export's folder.")
    overwrite: bool = option(False, "Replace the output of an earlier export.")
