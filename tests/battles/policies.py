"""What tests of policies need: made-up battles, packed, and a tiny policy that knows their words."""

from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import MakeOnce


@pytest.fixture(scope="session")
def packed_battles(make_once: MakeOnce) -> Path:
    """Return a folder of 24 packed battles of eight states, both players' views of twelve."""
    pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
    import random

    from benchmarks.battles_reading import make_battle
    from pokegemma.battles.trajectories.files import TrajectoryName, write_trajectory
    from pokegemma.battles.trajectories.packing import pack_trajectories

    def make(folder: Path) -> None:
        for number in range(24):
            names = ("A", "B") if number % 2 else ("B", "A")
            day = 1 + number // 2
            name = TrajectoryName(
                f"made-gen1ou-{number // 2}", f"{1000 + number}", *names, f"11-{day:02d}-2026", number % 2 == 1
            )
            write_trajectory(folder / "files", name, make_battle(random.Random(number), 8))
        pack_trajectories(folder / "files", folder / "packed")

    return make_once("packed_battles", make) / "packed"


@pytest.fixture(scope="session")
def tiny_policy(packed_battles: Path, make_once: MakeOnce) -> Path:
    """Return a tiny Gemma 3 for text alone, with a tokenizer of whole words."""
    from pokegemma.battles.policy.tiny import make_tiny_policy
    from pokegemma.battles.trajectories.packed import PackedTrajectories

    return make_once("tiny_policy", lambda folder: make_tiny_policy(folder, PackedTrajectories(packed_battles).words))


@pytest.fixture(scope="session")
def spelled_policy(packed_battles: Path, make_once: MakeOnce) -> Path:
    """Return a tiny Gemma 3 for text alone as the published ones are, which has learned the first decisions.

    It has SentencePiece's tokens, and full attention in every sixth layer.
    """
    import torch
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig

    from pokegemma.battles.cloning.batches import TrainingBatches
    from pokegemma.battles.cloning.rows import make_rows
    from pokegemma.battles.policy.checkpoint import open_policy
    from pokegemma.battles.trajectories.packed import PackedTrajectories
    from pokegemma.gemma.tiny.tokenizer import train_tokenizer

    def make(folder: Path) -> None:
        tokenizer = train_tokenizer(folder, seed=0)
        torch.manual_seed(0)
        config = Gemma3TextConfig(
            vocab_size=64 * -(-len(tokenizer) // 64),
            hidden_size=64,
            intermediate_size=128,
            num_hidden_layers=6,
            num_attention_heads=4,
            num_key_value_heads=1,
            head_dim=16,
            query_pre_attn_scalar=16,
            max_position_embeddings=2048,
            sliding_window=64,
        )
        model = Gemma3ForCausalLM(config)
        torch.nn.init.normal_(model.get_input_embeddings().weight, std=config.hidden_size**-0.5)
        model.save_pretrained(folder)
        batch = TrainingBatches(0)(list(make_rows(PackedTrajectories(packed_battles), [0, 2], open_policy(folder))))
        optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
        for _ in range(200):
            loss = model(**batch, use_cache=False).loss
            if loss.item() < 0.1:
                break
            loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            optimizer.zero_grad()
        assert loss.item() < 0.1, loss
        model.eval().save_pretrained(folder)

    return make_once("spelled_policy", make)


@pytest.fixture(scope="session")
def spelled_adapter(packed_battles: Path, spelled_policy: Path, make_once: MakeOnce) -> Path:
    """Return an adapter of it with random weights, and the run.json of a training."""
    from pokegemma.battles.policy.checkpoint import open_policy
    from pokegemma.provenance import write_run_record
    from tests.battles.adapters import write_random_adapter

    def make(folder: Path) -> None:
        write_random_adapter(folder, spelled_policy)
        write_run_record(
            folder,
            stage="train",
            options={"text": "short"},
            status="completed",
            base_model=str(spelled_policy),
            base_fingerprint=open_policy(spelled_policy).weights_fingerprint(),
            dataset={"path": str(packed_battles)},
        )

    return make_once("spelled_adapter", make)


@pytest.fixture(scope="session")
def policy_gguf(spelled_policy: Path, to_gguf: Callable[..., object], make_once: MakeOnce) -> Path:
    """Return the policy as f16 and q8_0."""
    return make_once("policy_gguf", lambda folder: to_gguf(spelled_policy, folder / "gguf", "f16", "q8_0")) / "gguf"


@pytest.fixture(scope="session")
def gemma270m(gemma270m_file: Path, make_once: MakeOnce) -> Path:
    """Return the checkpoint of a real Gemma 3 270M."""
    from pokegemma.gemma.gemma270m.conversion import convert_gguf

    return make_once("gemma270m", lambda folder: convert_gguf(gemma270m_file, folder))
