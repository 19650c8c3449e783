"""Options of scripts/production_pipeline.py and scripts/model_registry.py."""

from dataclasses import dataclass, field
from typing import Literal

from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.export.weight_types import MLX_BITS, check_quantizations
from pokegemma.parity.limits import MIN_AGREEMENT

EXPORTS = ("gguf", "mlx")
DEFAULT_REGISTRY = "outputs/registry/registry.db"
DEFAULT_MODEL_NAME = "pokegemma"


@dataclass
class PipelineOptions:
    """What to make from which checkpoint, and the limits of each gate."""

    checkpoint: str = field(
        metadata={"help": "Folder of a trained adapter, or of a whole model, which needs no merging."}
    )
    dataset_path: str = field(metadata={"help": "Folder with eval.jsonl and train.jsonl."})
    output_dir: str = field(metadata={"help": "Folder for all results. An earlier run in it is continued."})
    exports: list[str] = field(default_factory=lambda: ["gguf"], metadata={"help": "gguf, mlx, both, or none."})
    quantization: list[str] = field(
        default_factory=lambda: ["f16", "q8_0"], metadata={"help": "Types of the GGUF files."}
    )
    quantization_bits: int = field(
        default=16, metadata={"help": "Bits of the MLX weights: 4, 8 or 16.", "choices": [*MLX_BITS]}
    )
    llama_cpp_dir: str | None = field(default=None, metadata={"help": "As of scripts/convert_to_gguf.py."})
    base_model: str | None = field(default=None, metadata={"help": "Base checkpoint; default: the adapter's."})
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "Type of the merged weights."})
    device: str | None = field(default=None, metadata={"help": "Device for the evaluation. Default: the fastest one."})
    max_samples: int | None = field(
        default=None, metadata={"help": "Evaluate on about this many samples. Default: all."}
    )
    generate: bool = field(
        default=True, metadata={"help": "Also evaluate written answers; --no_generate only scores the buttons."}
    )
    parity_samples: int = field(default=50, metadata={"help": "Number of samples on which exports are compared."})
    max_stored_difference: float | None = field(
        default=None,
        metadata={
            "help": "Gate of merge: difference between the stored weights and adapter + base. Default: by --dtype."
        },
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "Gate of evaluate: accuracy."})
    min_gain_over_baseline: float = field(
        default=0.0,
        metadata={"help": "Gate of evaluate: accuracy above that of the best baseline; 0.05 is five points."},
    )
    max_export_gib: float | None = field(
        default=None, metadata={"help": "Gate of each export: size of its smallest model with the vision part."}
    )
    min_agreement: float = field(
        default=MIN_AGREEMENT,
        metadata={"help": "Gate of parity: share of samples on which an export chooses the same button."},
    )
    max_log_probability_difference: float | None = field(
        default=None,
        metadata={"help": "Gate of parity: mean difference in log-probability. Default: by the type of the weights."},
    )
    register: bool = field(default=True, metadata={"help": "Register the model; --no_register leaves this out."})
    registry_uri: str = field(default=DEFAULT_REGISTRY, metadata={"help": "As of scripts/model_registry.py."})
    name: str = field(default=DEFAULT_MODEL_NAME, metadata={"help": "Name of the model in the registry."})
    copy: bool = field(default=False, metadata={"help": "Store a copy of the files in the registry."})
    license: str | None = field(
        default=None, metadata={"help": "Licence id for the model card. Default: that of the base's family."}
    )
    push_to_hub: str | None = field(
        default=None, metadata={"help": "Repository on the Hub to which the result is uploaded."}
    )
    hub_public: bool = field(default=False, metadata={"help": "Make that repository public if it is new."})
    dry_run: bool = field(default=False, metadata={"help": "Print which steps would run, and why; run none."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON."})

    def __post_init__(self) -> None:
        for kind in self.exports:
            if kind not in (*EXPORTS, "none"):
                raise PokegemmaError(f"--exports: {kind!r} is not one of {', '.join(EXPORTS)}, none")
        if "none" in self.exports and len(self.exports) > 1:
            raise PokegemmaError(f"--exports: none and {', '.join(set(self.exports) - {'none'})} contradict each other")
        check_quantizations(self.quantization)
        check_ranges(self, "parity_samples", "max_samples", at_least=1)
        check_ranges(self, "min_accuracy", "min_agreement", at_least=0, at_most=1)
        check_ranges(self, "min_gain_over_baseline", at_least=-1, at_most=1)
        check_ranges(self, "max_stored_difference", "max_export_gib", "max_log_probability_difference", at_least=0)


@dataclass(kw_only=True)
class RegistryOptions:
    """Options of every command of scripts/model_registry.py."""

    registry_uri: str = field(
        default=DEFAULT_REGISTRY, metadata={"help": "SQLite file (or sqlite:///FILE), or http(s)://... of a server."}
    )
    name: str = field(default=DEFAULT_MODEL_NAME, metadata={"help": "Name of the model."})


@dataclass(kw_only=True)
class RegisterOptions(RegistryOptions):
    model_path: str = field(metadata={"help": "Folder of the merged checkpoint."})
    evaluation: str | None = field(default=None, metadata={"help": "Output of scripts/evaluate.py for it."})
    parity: str | None = field(default=None, metadata={"help": "Output of scripts/check_parity.py for it."})
    exports: list[str] = field(default_factory=list, metadata={"help": "Folders of its exports."})
    copy: bool = field(
        default=False, metadata={"help": "Keep a copy of the files. Default: only their paths and hashes."}
    )
    description: str | None = field(default=None, metadata={"help": "A sentence about this version."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write name and version to."})


@dataclass(kw_only=True)
class ListOptions(RegistryOptions):
    json: bool = field(default=False, metadata={"help": "Print JSON instead of a table."})


@dataclass(kw_only=True)
class ShowOptions(ListOptions):
    version: str = field(metadata={"help": "Number, alias or latest."})


@dataclass(kw_only=True)
class CheckOptions(RegistryOptions):
    version: str = field(metadata={"help": "Number, alias or latest."})


@dataclass(kw_only=True)
class PromoteOptions(RegistryOptions):
    version: str = field(metadata={"help": "Number, alias or latest."})
    alias: str = field(default="champion", metadata={"help": "The alias."})
    force: bool = field(default=False, metadata={"help": "Promote it even if its evaluation or parity failed."})


@dataclass(kw_only=True)
class CompareOptions(ListOptions):
    version: str = field(metadata={"help": "Number, alias or latest."})
    other: str = field(
        metadata={"help": "Number, alias or latest; the table shows its figures minus those of VERSION."}
    )


@dataclass(kw_only=True)
class RollbackOptions(RegistryOptions):
    alias: str = field(default="champion", metadata={"help": "The alias."})


@dataclass(kw_only=True)
class ExportOptions(RegistryOptions):
    version: str = field(metadata={"help": "Number, alias or latest."})
    output_dir: str = field(metadata={"help": "Folder to create."})
    part: str = field(default="model", metadata={"help": "model, or the name of an export's folder."})
    overwrite: bool = field(default=False, metadata={"help": "Replace the output of an earlier export."})
