"""Options of scripts/production_pipeline.py."""

from dataclasses import dataclass, field
from typing import Literal

from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.parity.limits import MIN_AGREEMENT

EXPORTS = ("gguf", "mlx")


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
    quantization_bits: int = field(default=16, metadata={"help": "Bits of the MLX weights: 4, 8 or 16."})
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
    registry_uri: str = field(
        default="outputs/registry/registry.db", metadata={"help": "As of scripts/model_registry.py."}
    )
    name: str = field(default="pokegemma", metadata={"help": "Name of the model in the registry."})
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
        check_ranges(self, "parity_samples", "max_samples", at_least=1)
