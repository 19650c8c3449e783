"""The toy game as a Gymnasium environment."""

import subprocess
import sys
import warnings

import pytest

from pokegemma.data.prompts import BUTTONS
from pokegemma.play.toy.world import ToyWorld
from pokegemma.provenance import PROJECT_ROOT

gymnasium = pytest.importorskip("gymnasium", reason="needs gymnasium (./init.sh --with play)")
NAME = "pokegemma.play.toy_env:PokegemmaToy-v0"


@pytest.mark.parametrize("options", [{}, {"level": 2}, {"render_mode": "rgb_array"}])
def test_it_passes_the_checks_of_gymnasium_without_a_warning(options: dict) -> None:
    from gymnasium.utils.env_checker import check_env

    env = gymnasium.make(NAME, **options)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        check_env(env.unwrapped, skip_render_check="render_mode" not in options)


def test_the_expert_ends_an_episode_with_the_reward_of_the_door() -> None:
    env = gymnasium.make(NAME)
    observation, info = env.reset(options={"room": 5})
    assert observation.tobytes() == ToyWorld(5).render().tobytes()
    rewards, terminated = [], False
    while not terminated:
        observation, reward, terminated, truncated, info = env.step(info["expert_action"])
        rewards.append(reward)
        assert not truncated
    assert rewards == [*[-0.01] * (len(rewards) - 1), 0.99]
    assert info["situation"] == "done"
    assert 20 < len(rewards) < 60


def test_an_episode_is_truncated_after_200_presses() -> None:
    env = gymnasium.make(NAME)
    env.reset(seed=1)
    ends = [env.step(BUTTONS.index("b"))[2:4] for _ in range(200)]
    assert ends == [(False, False)] * 199 + [(False, True)]


def test_a_seed_gives_the_same_rooms_again_and_another_seed_others() -> None:
    env = gymnasium.make(NAME)

    def rooms(seed: int) -> list[int]:
        return [env.reset(seed=seed)[1]["room"], *(env.reset()[1]["room"] for _ in range(3))]

    first = rooms(3)
    assert len(set(first)) == 4
    assert rooms(3) == first
    assert set(rooms(4)).isdisjoint(first)


def test_playing_needs_no_gymnasium() -> None:
    code = (
        "import sys\nsys.modules['gymnasium'] = None\n"
        "import pokegemma.play.emulators.open, pokegemma.play.toy.world\n"
        "from pokegemma.play.emulators.emulator import PressTiming\n"
        "pokegemma.play.emulators.open.open_emulator('toy', timing=PressTiming()).press('up')"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=PROJECT_ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")
