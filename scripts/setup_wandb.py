"""Create the Weights & Biases project and sweep of wandb_config.yaml.

    python scripts/setup_wandb.py --dry_run

Without --dry_run it creates both and prints the command of an agent, which runs trials until it is stopped. Run agents
in the project's folder, on any number of machines. --trial_offline trains one trial here, without an account.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

from pokegemma import cli
from pokegemma.errors import PokegemmaError
from pokegemma.options import option


@dataclass(frozen=True)
class SetupOptions:
    """Options of setup_wandb.py."""

    wandb_config: str | None = option(None, "File to read instead of the project's wandb_config.yaml.")
    fixed: list[str] = option([], "Training flags of every trial, such as --fixed max_steps=20 layout=frames.")
    dry_run: bool = option(False, "Check the sweep and print it as JSON. Nothing is created.")
    trial_offline: bool = option(False, "Draw one configuration at random and train with it, with W&B offline.")
    seed: int = option(0, "Seed of the draw.")

    def __post_init__(self) -> None:
        if self.dry_run and self.trial_offline:
            raise PokegemmaError("--dry_run and --trial_offline contradict each other")


def main() -> None:
    (options,) = cli.parse_options(SetupOptions, description=__doc__)
    from pokegemma.training.tracking import settings, sweeps

    path = Path(options.wandb_config) if options.wandb_config else settings.WANDB_CONFIG_FILE
    tracking = settings.read_tracking(path)
    sweep = sweeps.read_sweep(tracking, fixed=options.fixed, source=str(path))
    project, entity = tracking.get("project") or "pokegemma", tracking.get("entity")
    if options.dry_run:
        json.dump({"project": project, "entity": entity, **sweep}, sys.stdout, indent=2)
        print()
    elif options.trial_offline:
        run, value = sweeps.run_trial_offline(sweep, seed=options.seed, project=project)
        print(f"{sweep['metric']['name']} {value:.4f}")
        print(f"upload: wandb sync {run}")
    else:
        print(sweeps.create_sweep(sweep, project=project, entity=entity))


if __name__ == "__main__":
    cli.run(main)
