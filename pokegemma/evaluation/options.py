"""The options of an evaluation, and what follows from them before a model is loaded."""

from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Literal

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import dataset_files, held_out_file
from pokegemma.errors import check_ranges
from pokegemma.evaluation.view import View, resolve_view
from pokegemma.outputs import refuse_to_replace


@dataclass
class EvaluateOptions:
    model_path: str = field(metadata={"help": "Checkpoint folder or Hugging Face id, or an adapter's folder."})
    dataset_path: str = field(
        metadata={"help": "Folder with eval.jsonl and train.jsonl, or a JSONL file next to a train.jsonl."}
    )
    output_dir: str = field(metadata={"help": "Folder to create for the report."})
    layout: Layout | None = field(
        default=None, metadata={"help": "How samples are shown. Default: that of the model's run.json, else grid."}
    )
    max_decisions: int | None = field(
        default=None,
        metadata={"help": "With --layout trajectory: decisions in a conversation. Default: as in training, else 16."},
    )
    overlap_decisions: int | None = field(
        default=None,
        metadata={"help": "Decisions repeated from the conversation before. Default: as in training, else 2."},
    )
    vision_features: str | None = field(
        default=None,
        metadata={"help": "Folder of the vision tower's features, as in training; created if it does not exist."},
    )
    batch_size: int = field(
        default=8, metadata={"help": "Decisions in one forward pass; with --layout trajectory it is always one."}
    )
    max_samples: int | None = field(
        default=None,
        metadata={"help": "Evaluate on about this many decisions, evenly spread; trajectories are taken whole."},
    )
    dtype: Literal["auto", "float32", "bfloat16"] = field(
        default="auto", metadata={"help": "auto: bfloat16 on a GPU that supports it, else float32."}
    )
    device: str | None = field(
        default=None, metadata={"help": "cuda, cuda:1, mps or cpu. Default: the best device of this machine."}
    )
    generate: bool = field(
        default=True, metadata={"help": "Also let the model write whole answers; --no_generate scores only (faster)."}
    )
    max_new_tokens: int = field(default=256, metadata={"help": "Largest number of tokens in a written answer."})
    seed: int = field(default=0, metadata={"help": "Seed of the bootstrap."})
    overwrite: bool = field(default=False, metadata={"help": "Replace an existing OUTPUT_DIR."})
    json: bool = field(default=False, metadata={"help": "Print metrics.json instead of the table."})

    def __post_init__(self) -> None:
        check_ranges(self, "batch_size", "max_samples", "max_new_tokens", "max_decisions", at_least=1)

    def with_view(self) -> "EvaluateOptions":
        """Return the options with layout and trajectories filled in from the model's run.json; see `resolve_view`.

        Raises:
            PokegemmaError: run.json is damaged, or the overlap leaves nothing of a trajectory.
        """
        view = resolve_view(
            self.model_path,
            layout=self.layout,
            max_decisions=self.max_decisions,
            overlap_decisions=self.overlap_decisions,
        )
        return replace(self, **asdict(view))

    @property
    def view(self) -> View:
        """How samples are shown, once `with_view` has filled it in."""
        assert self.layout is not None and self.max_decisions is not None and self.overlap_decisions is not None
        return View(self.layout, self.max_decisions, self.overlap_decisions)

    def find_files(self) -> tuple[Path, Path]:
        """Return the JSONL file to evaluate on and the one that the baselines are fitted on.

        Raises:
            PokegemmaError: one of them does not exist, the dataset has another format, or the output contains an input.
        """
        held_out = held_out_file(Path(self.dataset_path))
        train, _ = dataset_files(held_out.parent)
        features = [] if self.vision_features is None else [Path(self.vision_features)]
        refuse_to_replace(Path(self.output_dir), held_out.parent, self.model_path, *features)
        return held_out, train
