"""Options of scripts/production_pipeline.py."""

from dataclasses import dataclass, field
from typing import Literal

from pokegemma.errors import PokegemmaError

EXPORTS = ("gguf", "mlx")


@dataclass
class PipelineOptions:
    """What to make of which checkpoint, and what is asked of it on the way."""

    checkpoint: str = field(metadata={"help": "Folder of a trained adapter, or of a whole model (nothing to merge)."})
    dataset_path: str = field(metadata={"help": "Folder with eval.jsonl and train.jsonl."})
    output_dir: str = field(metadata={"help": "Folder for everything; of an earlier run it is continued."})
    exports: list[str] = field(default_factory=lambda: ["gguf"], metadata={"help": "gguf, mlx, both, or none."})
    quantization: list[str] = field(
        default_factory=lambda: ["f16", "q8_0"], metadata={"help": "Types of the GGUF files."}
    )
    quantization_bits: int = field(default=16, metadata={"help": "Bits of the MLX weights: 4, 8 or 16."})
    llama_cpp_dir: str | None = field(default=None, metadata={"help": "As of scripts/convert_to_gguf.py."})
    base_model: str | None = field(default=None, metadata={"help": "Base checkpoint; default: the adapter's."})
    dtype: Literal["bfloat16", "float32"] = field(default="bfloat16", metadata={"help": "Type of the merged weights."})
    device: str | None = field(default=None, metadata={"help": "Where to evaluate. Default: the best there is."})
    max_samples: int | None = field(default=None, metadata={"help": "Evaluate on about so many. Default: all."})
    generate: bool = field(default=True, metadata={"help": "Also evaluate whole answers; --no_generate scores only."})
    parity_samples: int = field(default=50, metadata={"help": "Samples that the exports are compared on."})
    max_stored_difference: float | None = field(
        default=None,
        metadata={"help": "Gate of verify: merged weights as stored, against adapter + base. Default: by --dtype."},
    )
    min_accuracy: float | None = field(default=None, metadata={"help": "Gate of evaluate: share of right buttons."})
    min_gain_over_baseline: float = field(
        default=0.0, metadata={"help": "Gate of evaluate: accuracy above the best baseline's; 0.05 is five points."}
    )
    max_export_gib: float | None = field(
        default=None, metadata={"help": "Gate of each export: the smallest model in it, with its vision part."}
    )
    min_agreement: float = field(
        default=0.98, metadata={"help": "Gate of parity: share of samples where an export presses the same button."}
    )
    max_log_probability_difference: float | None = field(
        default=None,
        metadata={"help": "Gate of parity: mean difference in log-probability. Default: by the type of the weights."},
    )
    register: bool = field(default=True, metadata={"help": "--no_register leaves that out."})
    registry_uri: str = field(
        default="outputs/registry/registry.db", metadata={"help": "As of scripts/model_registry.py."}
    )
    name: str = field(default="pokegemma", metadata={"help": "Name of the model in the registry."})
    copy: bool = field(default=False, metadata={"help": "Let the registry keep a copy of the files."})
    license: str | None = field(
        default=None, metadata={"help": "Licence id for the model card. Default: that of the base's family."}
    )
    push_to_hub: str | None = field(default=None, metadata={"help": "Repository on the Hub to upload to at the end."})
    hub_public: bool = field(default=False, metadata={"help": "Make that repository public if it is new."})
    dry_run: bool = field(default=False, metadata={"help": "Say which steps would run, and why; run none."})
    json: bool = field(default=False, metadata={"help": "Print the result as JSON."})

    def __post_init__(self) -> None:
        for kind in self.exports:
            if kind not in (*EXPORTS, "none"):
                raise PokegemmaError(f"--exports: {kind!r} is not one of {', '.join(EXPORTS)}, none")
        if "none" in self.exports and len(self.exports) > 1:
            raise PokegemmaError(f"--exports: none and {', '.join(set(self.exports) - {'none'})} contradict each other")
        for name in ("parity_samples", "max_samples"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise PokegemmaError(f"--{name}: {value} is not at least 1")
