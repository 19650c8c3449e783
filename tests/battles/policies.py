"""What tests of policies need: made-up battles, packed, and a tiny policy that knows their words."""

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
