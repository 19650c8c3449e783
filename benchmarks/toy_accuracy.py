"""Train the toy game's tiny Gemma 3 in each layout on the same number of decisions, and compare what it learned.

    python benchmarks/toy_accuracy.py

One game, one dataset, one tiny Gemma 3 with random weights; training_configs/toy.yaml decides the rest. A frame has
112 px in every layout: a grid of four has 224. Accuracy is of scored buttons on unseen sessions, with 95 % intervals
over sessions.
"""

import json
import os
import platform
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from pokegemma import cli
from pokegemma.data.samples import read_samples
from pokegemma.data.trajectories import cut_trajectories
from pokegemma.errors import PokegemmaError
from pokegemma.gemma.tiny.gemma3 import make_tiny_gemma3
from pokegemma.options import option
from pokegemma.provenance import git_commit

ROOT = Path(__file__).resolve().parents[1]
DECISIONS_A_STEP = 16


@dataclass(frozen=True)
class ToyOptions:
    """How long each layout is trained."""

    num_steps: int = option(120, f"optimizer steps of {DECISIONS_A_STEP} decisions")
    max_decisions: int = option(4, "decisions of a trajectory")
    work_dir: str | None = option(None, "keep everything here; default: a temporary folder")
    layouts: list[str] = option(["frames", "grid", "grid 4 a row", "trajectory"], "which, in order")
    json: bool = option(False, "print the result as JSON")


def run_script(name: str, **options: object) -> None:
    """Run a script of the project; its output goes to stderr."""
    words = [text for key, value in options.items() for text in (f"--{key}", str(value))]
    command = [sys.executable, str(ROOT / "scripts" / f"{name}.py"), *words]
    if subprocess.run(command, stdout=sys.stderr, check=False).returncode:
        raise PokegemmaError(f"scripts/{name}.py failed")


def train_and_evaluate(name: str, folder: Path, options: ToyOptions) -> dict[str, object]:
    """Return accuracy, its interval and the seconds of training of one layout."""
    layout, _, rows = name.partition(" ")
    flags: dict[str, object] = {"layout": layout}
    if rows:
        flags["samples_per_row"] = int(rows.split()[0])
    num_steps = options.num_steps
    if layout == "trajectory":  # no overlap: a decision that is shown again would count as none
        batch = DECISIONS_A_STEP // options.max_decisions
        flags |= {"max_decisions": options.max_decisions, "overlap_decisions": 0, "per_device_train_batch_size": batch}
        samples = list(read_samples(folder / "dataset" / "train.jsonl"))
        cut = list(cut_trajectories(samples, max_decisions=options.max_decisions, overlap=0))
        num_steps = int(num_steps * DECISIONS_A_STEP / (batch * len(samples) / len(cut)))
    adapter, output = folder / f"adapter_{name.replace(' ', '_')}", folder / f"evaluation_{name.replace(' ', '_')}"
    began = time.perf_counter()
    base = folder / ("base_grid" if layout == "grid" else "base")
    run_script(
        "sft_pokemon_gemma3",
        config=ROOT / "training_configs" / "toy.yaml",
        model_name_or_path=base,
        dataset_path=folder / "dataset",
        output_dir=adapter,
        max_steps=num_steps,
        eval_strategy="no",
        save_strategy="no",
        report_to="none",
        overwrite=True,
        **flags,
    )
    seconds = time.perf_counter() - began
    run_script(
        "evaluate",
        model_path=adapter,
        dataset_path=folder / "dataset",
        output_dir=output,
        generate=False,
        overwrite=True,
    )
    rows = json.loads((output / "metrics.json").read_text())["rows"]
    scored = next(row for row in rows if row["key"] == "scored")
    return {
        "name": name,
        "steps": num_steps,
        "train_s": seconds,
        "accuracy": scored["accuracy"],
        "interval": scored["accuracy_interval"],
    }


def main() -> None:
    (options,) = cli.parse_options(ToyOptions, description=__doc__)
    with tempfile.TemporaryDirectory(prefix="pokegemma_toy_") as temporary:
        folder = Path(options.work_dir or temporary)
        if not (folder / "base").is_dir():
            run_script("record_toy_game", output_dir=folder / "recorded", seed=0)
            run_script(
                "convert_eevee_data_v2", eevee_data_dir=folder / "recorded" / "runs", output_dir=folder / "dataset"
            )
            for name, size_px in (("base", 112), ("base_grid", 224)):
                (folder / name).mkdir()
                make_tiny_gemma3(folder / name, image_size_px=size_px, num_image_tokens=(size_px // 14) ** 2)
        results = [train_and_evaluate(name, folder, options) for name in options.layouts]
    if options.json:
        print(json.dumps({"results": results, "options": asdict(options), "commit": git_commit()}, indent=2))
        return
    print("| layout | steps | training, with start | accuracy | 95 % interval |\n|---|---|---|---|---|")
    for one in results:
        low, high = (f"{100 * bound:.1f}" for bound in one["interval"])
        accuracy = f"{100 * one['accuracy']:.1f} %"
        print(f"| {one['name']} | {one['steps']} | {one['train_s']:.0f} s | {accuracy} | {low}-{high} |")
    print(f"{platform.platform()}, {os.cpu_count()} cores, commit {git_commit()}")


if __name__ == "__main__":
    cli.run(main)
