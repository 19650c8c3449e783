"""Time a step of offline reinforcement learning with cached features against steps that encode their states.

    python benchmarks/battles_offline_rl.py --encoder outputs/battles_policy --trajectories_dir outputs/packed
    python benchmarks/battles_offline_rl.py --like_270m --num_battles 1 --repeats 2

cached: features of a frozen encoder, computed before. encoded: the same features, computed in the step. lora: the
encoder is trained, too, with LoRA of rank 16. All ways train the same network on the same batch, by turns in one run;
features and losses are compared first. Times are CPU seconds of this process a step, medians of the repeats.
"""

import json
import platform
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from transformers import Gemma3ForCausalLM, Gemma3TextConfig, set_seed

if __name__ == "__main__":  # a script has only its own folder on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from benchmarks.battles_reading import write_battles
from pokegemma.battles.cloning.options import PolicyModelOptions
from pokegemma.battles.cloning.train import make_lora_config
from pokegemma.battles.offline_rl.features import prepare_features
from pokegemma.battles.offline_rl.formulas import GAMMAS
from pokegemma.battles.offline_rl.losses import BattleBatch, compute_losses
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.trained_encoder import StateTokens, make_trained_encoder
from pokegemma.battles.offline_rl.windows import BattleWindows, collate_windows
from pokegemma.battles.policy.checkpoint import PolicyCheckpoint, open_policy
from pokegemma.battles.policy.prompts import read_texts
from pokegemma.battles.policy.scoring import encode_prompts
from pokegemma.battles.policy.tiny import make_tiny_policy, make_word_tokenizer
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.packing import pack_trajectories
from pokegemma.cli import parse_options, run
from pokegemma.errors import CheckFailedError, check_ranges
from pokegemma.options import option
from pokegemma.provenance import git_commit
from pokegemma.tables import format_table

_MAX_DIFFERENCE = 1e-4


@dataclass(frozen=True)
class OfflineRLBenchmarkOptions:
    encoder: str | None = option(None, "Policy that encodes states. Default: a tiny one with random weights.")
    like_270m: bool = option(False, "Encode with random weights that have the widths and layers of Gemma 3 270M.")
    trajectories_dir: str | None = option(None, "Folder of packed trajectories. Default: made-up ones.")
    num_battles: int = option(16, "Battles in a batch.")
    num_states: int = option(32, "States of a made-up battle.")
    gammas: list[float] = option([*GAMMAS], "Discount factors.", nargs="+")
    repeats: int = option(5, "Steps of each way; medians are printed.")
    json: bool = option(False, "Print JSON instead of a table.")

    def __post_init__(self) -> None:
        check_ranges(self, "num_battles", "repeats", at_least=1)
        check_ranges(self, "num_states", at_least=2)


def make_battles(options: OfflineRLBenchmarkOptions, folder: Path) -> PackedTrajectories:
    """Return the battles, which are made up where none are given."""
    if options.trajectories_dir is not None:
        return PackedTrajectories(Path(options.trajectories_dir))
    write_battles(folder / "files", num_battles=options.num_battles, num_states=options.num_states)
    pack_trajectories(folder / "files", folder / "packed")
    return PackedTrajectories(folder / "packed")


def make_encoder(options: OfflineRLBenchmarkOptions, folder: Path, words: list[str]) -> PolicyCheckpoint:
    """Return the encoder, which has random weights where none is given."""
    if options.encoder is not None:
        return open_policy(options.encoder)
    (folder / "encoder").mkdir()
    if not options.like_270m:
        make_tiny_policy(folder / "encoder", words)
        return open_policy(folder / "encoder")
    set_seed(0)
    tokenizer = make_word_tokenizer(words)
    config = Gemma3TextConfig(
        vocab_size=len(tokenizer),  # of 262,144; the LM head does not run
        hidden_size=640,
        intermediate_size=2048,
        num_hidden_layers=18,
        num_attention_heads=4,
        num_key_value_heads=1,
        head_dim=256,
        query_pre_attn_scalar=256,
        sliding_window=512,
        max_position_embeddings=32768,
    )
    Gemma3ForCausalLM(config).save_pretrained(folder / "encoder")
    tokenizer.save_pretrained(folder / "encoder")
    return open_policy(folder / "encoder")


def measure(options: OfflineRLBenchmarkOptions, folder: Path) -> dict[str, list[float]]:
    """Return the seconds of each step.

    Raises:
        CheckFailedError: the features or losses of two ways differ.
    """
    battles = make_battles(options, folder)
    policy = make_encoder(options, folder, battles.words)
    indices = list(range(options.num_battles))
    length = max(len(battles[index].actions) for index in indices)
    cache = prepare_features(folder / "features", battles, policy, device="cpu")
    cached, tokens = (
        collate_windows([windows[number] for number in range(len(windows))])
        for windows in (
            BattleWindows(battles, states, indices, length=length, reward="default_shaped")
            for states in (cache, StateTokens(battles, policy))
        )
    )
    batch = BattleBatch(**cached)
    frozen = policy.load_model()
    lora = make_lora_config(PolicyModelOptions(finetuning="lora", lora_dropout=0.0))
    trained = make_trained_encoder(policy, lora, batch_size=64, device="cpu").train()
    torch.manual_seed(0)
    network = ActorCritic(ActorCriticShape(cache.width, max_length=length, gammas=tuple(options.gammas)))
    weights = [weight for part in (network, trained) for weight in part.parameters() if weight.requires_grad]
    optimizer = torch.optim.AdamW(weights, lr=1e-4)

    def encode() -> torch.Tensor:
        rows = [encode_prompts(frozen, policy.encode(read_texts(battles, index, policy.text))) for index in indices]
        return torch.nn.utils.rnn.pad_sequence(rows, batch_first=True).clone()

    def step(features: Callable[[], torch.Tensor]) -> float:
        torch.manual_seed(0)
        optimizer.zero_grad()
        loss = compute_losses(network, replace(batch, features=features())).total
        loss.backward()
        optimizer.step()
        return loss.item()

    ways = {
        "cached": lambda: batch.features,
        "encoded": encode,
        "lora": lambda: trained(tokens["tokens"], tokens["lengths"]),
    }
    for name in ("encoded", "lora"):
        if not (ways[name]() - batch.features).abs().max() <= _MAX_DIFFERENCE:
            raise CheckFailedError(f"cached features differ from those of {name}")
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
        times = measure(options, Path(folder))
    medians = {name: statistics.median(values) for name, values in times.items()}
    record = {"machine": platform.platform(), "commit": git_commit(), "cpu_s_a_step": medians, "all": times}
    if options.json:
        print(json.dumps(record, indent=2))
        return
    rows = [("features", "CPU seconds a step", "times cached")]
    rows += [(name, f"{value:.3f}", f"{value / medians['cached']:.1f}") for name, value in medians.items()]
    print(format_table(rows))
    print(f"{record['machine']}, commit {record['commit']}")


if __name__ == "__main__":
    run(main)
