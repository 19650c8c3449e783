"""Train a real Gemma 3 270M for an hour and, next to it, a tiny one on the same battles; let both play the arena.

    python benchmarks/battles_gemma270m.py --output_dir outputs/gemma270m_hour --minutes 60

It needs ./init.sh --with battles --with gemma270m --accept-gemma-terms. Battles of poke-env's heuristic are recorded
and packed; a few steps measure how many decisions a second each model learns, and so how many steps fit into the
minutes. The real one learns with LoRA and is merged; the tiny one learns with all of its weights, once for
--tiny_minutes and once on as many decisions as the real one has seen. Each plays --num_rounds rounds of two battles
with each scripted player. The same command continues an interrupted run. Results are in result.json; the table is
printed.
"""

import csv
import json
import math
import platform
import sys
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.steps import Progress, format_rate
from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import check_ranges
from pokegemma.options import option
from pokegemma.outputs import atomic_file
from pokegemma.provenance import git_commit, read_run_record
from pokegemma.tables import format_percent, format_table

OPPONENTS = ("random", "max-base-power", "heuristic")


@dataclass(frozen=True)
class HourOptions:
    output_dir: str = option(..., "Folder for everything; continued where it exists.")
    minutes: float = option(60.0, "Time of training of the real model, on all cores.")
    tiny_minutes: float = option(10.0, "That of the tiny one.")
    num_battles: int = option(500, "Battles to record.")
    num_rounds: int = option(50, "Rounds of the arena, of two battles with each scripted player.")
    battle_format: str = option("gen1ou", "Format to record and play.")
    teams_file: str = option("training_configs/battles_team.txt", "Teams of both players.")
    model_name_or_path: str | None = option(None, "Model in place of the real one, for a rehearsal.")
    batch_size: int = option(16, "Decisions in a step of the real model.")
    learning_rate: float = option(5e-4, "Peak learning rate of its adapter.")
    dtype: str = option("bfloat16", "Type of its frozen weights.")
    eval_fraction: float = option(0.05, "Share of the battles that are held out.")
    max_eval_decisions: int = option(512, "Held-out decisions to measure accuracy on.")

    def __post_init__(self) -> None:
        check_ranges(self, "minutes", "tiny_minutes", above=0)
        check_ranges(self, "num_battles", "num_rounds", "batch_size", "max_eval_decisions", at_least=1)


@dataclass(frozen=True)
class Learner:
    """A model to train.

    Attributes:
        flags: of scripts/sft_battles.py.
        minutes: of training; with evaluations it may take a quarter more.
        num_decisions: to learn from; None: as many as fit into the minutes.
    """

    name: str
    base: Path
    batch_size: int
    flags: dict[str, Any]
    minutes: float
    num_decisions: int | None = None


def prepare(options: HourOptions, folder: Path, progress: Progress) -> tuple[Path, Path]:
    """Record and pack battles and make both models; return the folders of the real one and of the tiny one."""
    real = Path(options.model_name_or_path or folder / "gemma-3-270m").absolute()
    if options.model_name_or_path is None:
        progress.script("real model", "make_gemma270m", output_dir=real, overwrite=True)
    progress.script(
        "record",
        "battles_record",
        battle_format=options.battle_format,
        teams_file=options.teams_file,
        num_battles=options.num_battles,
        output_dir=folder / "trajectories",
    )
    packed = folder / "packed"
    progress.script("pack", "battles_pack", trajectories_dir=folder / "trajectories", output_dir=packed)
    tiny = folder / "tiny_model"
    progress.script("tiny model", "battles_tiny_model", trajectories_dir=packed, output_dir=tiny, overwrite=True)
    return real, tiny


def train(learner: Learner, options: HourOptions, folder: Path, progress: Progress) -> Path:
    """Train a model for the minutes, or on its number of decisions; return the policy's folder."""
    output = folder / learner.name
    common = {
        "trajectories_dir": folder / "packed",
        "model_name_or_path": learner.base,
        "per_device_train_batch_size": learner.batch_size,
        "per_device_eval_batch_size": 32,
        "gradient_checkpointing": False,
        "report_to": "none",
        "eval_fraction": options.eval_fraction,
        "max_eval_decisions": options.max_eval_decisions,
        **learner.flags,
    }
    if learner.num_decisions is None:
        rate = measure_rate(learner, common, folder, progress)
        num_steps = max(2, int(60 * learner.minutes * rate / learner.batch_size))
    else:
        num_steps = max(2, learner.num_decisions // learner.batch_size)
    resume = {"resume_from_checkpoint": True} if any(output.glob("checkpoint-*")) else {"overwrite": True}
    every = math.ceil(num_steps / 4)
    progress.script(
        f"train {learner.name}",
        "sft_battles",
        output_dir=output,
        max_steps=num_steps,
        max_minutes=1.25 * learner.minutes,  # evaluation takes some of it, and other programs may
        eval_on_start=True,
        eval_steps=every,
        save_steps=every,
        logging_steps=max(1, num_steps // 40),
        resume=resume,
        **common,
    )
    return output


def measure_rate(learner: Learner, common: dict[str, Any], folder: Path, progress: Progress) -> float:
    """Return decisions a second, from the second half of a short training."""
    output = folder / f"{learner.name}_rate"
    progress.script(
        f"rate {learner.name}",
        "sft_battles",
        output_dir=output,
        max_steps=12,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=6,
        overwrite=True,
        **common,
    )
    with open(output / "metrics.csv", encoding="utf-8", newline="") as file:
        rates = [row["decisions_per_second"] for row in csv.DictReader(file) if row.get("decisions_per_second")]
    return float(rates[-1])


def play(name: str, policy: Path, options: HourOptions, folder: Path, progress: Progress) -> dict[str, Any]:
    """Let a policy play the scripted players; return its battles with each."""
    return progress.arena(
        f"arena {name}",
        folder / f"{name}_arena",
        player=f"{name}={policy}",
        opponents=OPPONENTS,
        battle_format=options.battle_format,
        teams_file=options.teams_file,
        num_rounds=options.num_rounds,
    )


def describe(learner: Learner, battles: dict[str, Any], folder: Path, progress: Progress) -> dict[str, Any]:
    """Return the figures of a policy."""
    record = read_run_record(folder / learner.name) or {}
    with open(folder / learner.name / "metrics.csv", encoding="utf-8", newline="") as file:
        curve = [
            (int(row["step"]), float(row["eval_action_accuracy"]))
            for row in csv.DictReader(file)
            if row.get("eval_action_accuracy")
        ]
    return {
        "name": learner.name,
        "trained_weights": record["num_trained_weights"],
        "decisions": record["global_step"] * learner.batch_size,
        "available_decisions": record["num_decisions"],
        "accuracy": record["accuracy"],
        "accuracy_by_step": curve,
        "baselines": record["baselines"],
        **{f"training_{name}": progress.steps[f"train {learner.name}"][name] for name in ("seconds", "cpu_s")},
        "arena_cpu_s": progress.steps[f"arena {learner.name}"]["cpu_s"],
        "battles": battles,
    }


def run_all(options: HourOptions) -> list[dict[str, Any]]:
    """Do every step that is not done yet, and return the figures of each policy."""
    folder = Path(options.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress.read(folder / "progress.json")
    real, tiny = prepare(options, folder, progress)
    adapter = {"finetuning": "lora", "learning_rate": options.learning_rate, "dtype": options.dtype}
    tiny_flags = {"finetuning": "full", "learning_rate": 3e-3}
    results = []

    def measure(learner: Learner) -> None:
        policy = train(learner, options, folder, progress)
        if learner.flags["finetuning"] == "lora":
            merged = folder / f"{learner.name}_merged"
            flags = {"lora_path": policy, "output_path": merged, "dtype": "float32"}
            progress.script(f"merge {learner.name}", "merge_qlora", verify=True, overwrite=True, **flags)
            policy = merged
        results.append(describe(learner, play(learner.name, policy, options, folder, progress), folder, progress))

    measure(Learner("gemma270m", real, options.batch_size, adapter, options.minutes))
    measure(Learner("tiny", tiny, 64, tiny_flags, options.tiny_minutes))
    decisions = results[0]["decisions"]
    measure(Learner("tiny-as-many", tiny, options.batch_size, tiny_flags, options.minutes, num_decisions=decisions))
    return results


def format_result(results: list[dict[str, Any]]) -> str:
    """Return the table."""
    rows = [("policy", "trained weights", "decisions", "CPU s", "accuracy", "switches", *OPPONENTS)]
    for result in results:
        accuracy = result["accuracy"]
        rates = [format_rate(result["battles"][opponent]) for opponent in OPPONENTS]
        rows.append(
            (
                result["name"],
                f"{result['trained_weights']:,}",
                f"{result['decisions']:,}",
                f"{result['training_cpu_s']:,.0f}",
                format_percent(accuracy["action_accuracy"]),
                format_percent(accuracy["switch_accuracy"]),
                *rates,
            )
        )
    baselines = ", ".join(f"{name} {format_percent(value)}" for name, value in results[0]["baselines"].items())
    return f"{format_table(rows)}\naccuracy without a model: {baselines}"


def main() -> None:
    (options,) = parse_options(HourOptions, description=__doc__)
    results = run_all(options)
    record = {"options": asdict(options), "machine": platform.platform(), "cores": usable_cores()}
    record |= {"commit": git_commit(), "results": results}
    with atomic_file(Path(options.output_dir) / "result.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(format_result(results))
    print(f"{record['machine']}, {record['cores']} cores, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
