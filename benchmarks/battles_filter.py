"""Compare what the binary filter, cloning, and cloning won battles only make of the same mixed battles.

    python benchmarks/battles_filter.py --output_dir outputs/battles_filter

Battles of the heuristic, the random player and MaxBasePower with each other are recorded and packed, as many of each
pair; a tiny Gemma 3 clones them all, and its features are those of the states. scripts/rl_battles.py then learns from
them with `--actor filter`, `--actor clone`, and `--actor clone --won_only`, with each seed. Each result plays
MaxBasePower with actions drawn at temperature 1 and, next to it, with the likeliest ones. The same command continues an
interrupted run. Results are in result.json; the table is printed.
"""

import json
import platform
import sys
from dataclasses import asdict, dataclass
from itertools import combinations
from pathlib import Path
from typing import Any

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.steps import Progress, format_rate
from pokegemma.cli import parse_options, run
from pokegemma.environment import usable_cores
from pokegemma.errors import check_range, check_ranges
from pokegemma.options import option
from pokegemma.outputs import atomic_file
from pokegemma.provenance import git_commit, read_run_record
from pokegemma.tables import format_percent, format_table

_PLAYERS = ("heuristic", "random", "max-base-power")
_OPPONENT = "max-base-power"
_WAYS: dict[str, dict[str, Any]] = {
    "filter": {"actor": "filter"},
    "clone": {"actor": "clone"},
    "won only": {"actor": "clone", "won_only": True},
}


@dataclass(frozen=True)
class FilterOptions:
    output_dir: str = option(..., "Folder for everything; continued where it exists.")
    seeds: list[int] = option([0, 1, 2], "Seeds of training.", nargs="+")
    num_battles: int = option(170, "Battles of each pair of players.")
    num_epochs: float = option(1.5, "Passes of the encoder over all battles.")
    max_steps: int = option(1000, "Steps of scripts/rl_battles.py.")
    td_lambda: float = option(1.0, "Lambda of the critics' targets.")
    num_rounds: int = option(100, "Rounds of each arena, of two battles.")
    battle_format: str = option("gen1ou", "Format to record and play.")
    teams_file: str = option("training_configs/battles_team.txt", "Teams of both players.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "max_steps", "num_rounds", at_least=1)
        check_ranges(self, "num_epochs", above=0)
        check_range("--td_lambda", self.td_lambda, at_least=0, at_most=1)


def prepare(options: FilterOptions, folder: Path, progress: Progress) -> None:
    """Record and pack the battles, and train the encoder."""
    game = {"battle_format": options.battle_format, "teams_file": options.teams_file}
    for number, pair in enumerate(combinations(_PLAYERS, 2), start=1):
        progress.script(
            f"record {number}",
            "battles_record",
            players=list(pair),
            num_battles=options.num_battles,
            seed=100 + number,
            output_dir=folder / "trajectories" / str(number),
            **game,
        )
    packed, base, encoder = folder / "packed", folder / "base", folder / "encoder"
    progress.script("pack", "battles_pack", trajectories_dir=folder / "trajectories", output_dir=packed)
    progress.script("base", "battles_tiny_model", trajectories_dir=packed, output_dir=base, overwrite=True)
    progress.script(
        "encoder",
        "sft_battles",
        config="training_configs/battles.yaml",
        trajectories_dir=packed,
        model_name_or_path=base,
        output_dir=encoder,
        num_train_epochs=options.num_epochs,
        report_to="none",
        overwrite=True,
    )


def learn(name: str, seed: int, options: FilterOptions, folder: Path, progress: Progress) -> dict[str, Any]:
    """Train in one of the ways and play; return the figures."""
    output = folder / f"{name}-{seed}".replace(" ", "-")
    progress.script(
        f"{name} {seed}",
        "rl_battles",
        trajectories_dir=folder / "packed",
        encoder=folder / "encoder",
        features_dir=folder / "features",
        output_dir=output,
        max_steps=options.max_steps,
        td_lambda=options.td_lambda,
        seed=seed,
        teacher="heuristic",
        report_to="none",
        overwrite=True,
        **_WAYS[name],
    )
    evaluation = read_run_record(output)["evaluation"]
    drawn, likeliest = (
        play(kind, f"{output}{suffix}", output, options, progress)
        for kind, suffix in (("drawn", "@1.0"), ("likeliest", ""))
    )
    return {"way": name, "seed": seed, "evaluation": evaluation, "drawn": drawn, "likeliest": likeliest}


def play(kind: str, player: str, output: Path, options: FilterOptions, progress: Progress) -> dict[str, Any]:
    """Let a result play; return its battles."""
    battles = progress.arena(
        f"arena {output.name} {kind}",
        output.with_name(f"{output.name}_{kind}"),
        player=f"learned={player}",
        opponents=[_OPPONENT],
        battle_format=options.battle_format,
        teams_file=options.teams_file,
        num_rounds=options.num_rounds,
    )
    return battles[_OPPONENT]


def format_result(results: list[dict[str, Any]]) -> str:
    """Return the table."""
    rows = [("way", "seed", "actions drawn", "likeliest", "action accuracy", "rank of played")]
    for result in results:
        rates = [format_rate(result[kind]) for kind in ("drawn", "likeliest")]
        figures = [result["evaluation"][f"eval_{name}"] for name in ("action_accuracy", "rank_of_played")]
        rows.append((result["way"], str(result["seed"]), *rates, *map(format_percent, figures)))
    return format_table(rows)


def main() -> None:
    (options,) = parse_options(FilterOptions, description=__doc__)
    folder = Path(options.output_dir).absolute()
    folder.mkdir(parents=True, exist_ok=True)
    progress = Progress.read(folder / "progress.json")
    prepare(options, folder, progress)
    results = [learn(name, seed, options, folder, progress) for seed in options.seeds for name in _WAYS]
    record = {"options": asdict(options), "machine": platform.platform(), "cores": usable_cores()}
    record |= {"commit": git_commit(), "results": results, "steps": progress.steps}
    with atomic_file(folder / "result.json") as temporary:
        temporary.write_text(json.dumps(record, indent=2), encoding="utf-8")
    print(format_result(results))
    print(f"{record['machine']}, {record['cores']} cores, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
