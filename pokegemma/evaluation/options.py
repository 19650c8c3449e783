"""The options of an evaluation, and what follows from them before a model is loaded."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal

from pokegemma.data.prompts import Layout
from pokegemma.data.samples import dataset_files, held_out_file
from pokegemma.errors import PokegemmaError, check_ranges
from pokegemma.evaluation.view import View, resolve_view
from pokegemma.options import option
from pokegemma.outputs import refuse_to_replace


@dataclass
class EvaluateOptions:
    model_path: str = option(..., "Folder of a checkpoint or of an adapter, or a Hugging Face id.")
    output_dir: str = option(..., "Folder to create for the report.")
    dataset_path: str | None = option(
        None,
        "Folder with eval.jsonl and train.jsonl, or a JSONL file next to a train.jsonl. Not needed with --closed_loop.",
    )
    layout: Layout | None = option(None, "How samples are shown. Default: that of the model's run.json, else grid.")
    max_decisions: int | None = option(
        None, "With --layout trajectory: decisions in a conversation. Default: as in training, else 16."
    )
    overlap_decisions: int | None = option(
        None,
        "With --layout trajectory: decisions repeated from the conversation before. Default: as in training, else 2.",
    )
    vision_features: str | None = option(
        None, "Folder of the vision tower's features, as in training. It is created if it does not exist."
    )
    batch_size: int = option(8, "Decisions in one forward pass. With --layout trajectory, it is always one.")
    max_samples: int | None = option(
        None, "Evaluate on about this many decisions, evenly spread. Trajectories are not cut."
    )
    dtype: Literal["auto", "float32", "bfloat16"] = option(
        "auto", "auto: bfloat16 on a GPU that supports it, else float32."
    )
    device: str | None = option(None, "cuda, cuda:1, mps or cpu. Default: the best device of this machine.")
    generate: bool = option(
        True, "Also let the model write whole answers. --no_generate only scores the buttons, which is faster."
    )
    max_new_tokens: int = option(256, "Largest number of tokens in a written answer.")
    seed: int = option(0, "Seed of the bootstrap.")
    overwrite: bool = option(False, "Replace an existing OUTPUT_DIR.")
    json: bool = option(False, "Print metrics.json instead of the table.")

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
        if self.dataset_path is None:
            raise PokegemmaError("--dataset_path or --closed_loop N is needed: what the model is measured on")
        held_out = held_out_file(Path(self.dataset_path))
        train, _ = dataset_files(held_out.parent)
        features = [] if self.vision_features is None else [Path(self.vision_features)]
        refuse_to_replace(Path(self.output_dir), held_out.parent, self.model_path, *features)
        return held_out, train
