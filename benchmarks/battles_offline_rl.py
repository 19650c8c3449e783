"""Time a step of offline reinforcement learning with cached features against one that encodes its states itself.

    python benchmarks/battles_offline_rl.py --encoder outputs/battles_policy --trajectories_dir outputs/packed

Both ways train the same network on the same batches, by turns in one run; the losses are compared first. Times are CPU
seconds of this process a step, medians of the repeats.
"""

import json
import platform
import statistics
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from pokegemma.battles.offline_rl.features import prepare_features
from pokegemma.battles.offline_rl.formulas import GAMMAS
from pokegemma.battles.offline_rl.losses import BattleBatch, compute_losses
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.windows import BattleWindows, collate_windows
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.prompts import read_texts
from pokegemma.battles.policy.scoring import encode_prompts
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, check_ranges
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table


@dataclass(frozen=True)
class OfflineRLBenchmarkOptions:
    encoder: str = option(..., "Policy that encodes states.")
    trajectories_dir: str = option(..., "Folder of packed trajectories.")
    num_battles: int = option(16, "Battles in a batch.")
    gammas: list[float] = option([*GAMMAS], "Discount factors.", nargs="+")
    repeats: int = option(5, "Steps of each way; medians are printed.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "repeats", at_least=1)


def measure(options: OfflineRLBenchmarkOptions, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each step.

    Raises:
        CheckFailedError: the losses of both ways differ.
    """
    battles, policy = PackedTrajectories(Path(options.trajectories_dir)), open_policy(options.encoder)
    indices = list(range(options.num_battles))
    cache = prepare_features(folder, battles, policy, device="cpu")
    length = max(len(battles[index].actions) for index in indices)
    windows = BattleWindows(battles, cache, indices, length=length, reward="default_shaped")
    batch = BattleBatch(**collate_windows([windows[number] for number in range(len(windows))]))
    encoder = policy.load_model()
    torch.manual_seed(0)
    shape = ActorCriticShape(feature_width=cache.width, max_length=length, gammas=tuple(options.gammas))
    network = ActorCritic(shape)
    optimizer = torch.optim.AdamW(network.parameters(), lr=1e-4)

    def encode() -> torch.Tensor:
        rows = [encode_prompts(encoder, policy.encode(read_texts(battles, index, policy.text))) for index in indices]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)

    def step(features: Callable[[], torch.Tensor]) -> float:
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = compute_losses(network, replace(batch, features=features().clone())).total
        loss.backward()
        optimizer.step()
        return loss.item()

    ways = {"encoded": encode, "cached": lambda: batch.features}
    if (encode() - batch.features).abs().max() > 1e-4:
        raise CheckFailedError("cached features differ from those that are encoded")
    times: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(options.repeats):
        for name, features in ways.items():
            start = time.process_time()
            step(features)
            times[name].append(time.process_time() - start)
    return times


def main() -> None:
    (options,) = parse_options(OfflineRLBenchmarkOptions, description=__doc__)
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        times = measure(options, Path(folder) / "features")
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {"machine": platform.platform(), "commit": git_commit(), "cpu_s_a_step": medians, "all": times}
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("features", "CPU seconds a step"), *((name, f"{value:.3f}") for name, value in medians.items())]
    print(format_table(rows))
    print(f"{medians['encoded'] / medians['cached']:.1f} times; {record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
