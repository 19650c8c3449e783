"""Players that ask a checkpoint: whole battles, batches, draws, and what the actor-critic remembers."""

import dataclasses
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.battles.simulated import make_specs, open_seat, play

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.legal_actions import find_legal_actions
from pokegemma.battles.offline_rl.model import ActorCritic, ActorCriticShape
from pokegemma.battles.offline_rl.network_files import save_actor_critic
from pokegemma.battles.players.actor_critic_player import ActorCriticPlayer, load_actor_critic_player
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.players.player import BattleDecision
from pokegemma.battles.players.policy_player import PolicyPlayer, load_policy_player
from pokegemma.battles.players.scripted import RandomBattlePlayer
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.prompts import write_prompt
from pokegemma.battles.policy.scoring import score_actions
from pokegemma.battles.trajectories.from_battle import state_from_battle
from pokegemma.errors import PokegemmaError


@pytest.fixture
def decision(simulator) -> BattleDecision:
    seat = open_seat(simulator)
    return BattleDecision("battle-0", "p1", 0, "0", seat.battle, find_legal_actions(seat.battle))


@pytest.fixture
def actor_critic(tiny_policy: Path, tmp_path) -> Path:
    torch.manual_seed(0)
    network = ActorCritic(ActorCriticShape(feature_width=64, width=16, num_layers=1, num_heads=2, max_length=3))
    save_actor_critic(tmp_path / "rl", network, encoder=str(tiny_policy))
    return tmp_path / "rl"


def test_scores_are_those_of_the_prompt(decision, tiny_policy: Path) -> None:
    policy = open_policy(tiny_policy)
    model = policy.load_model()
    prompt = write_prompt(state_from_battle(decision.battle), "short")
    expected = score_actions(model, policy.encode([prompt]), policy.action_tokens)
    scores = PolicyPlayer(policy, model, "policy").score([decision, decision])
    assert scores.shape == (2, 13)
    assert scores[1] == pytest.approx(expected[0].numpy(), abs=1e-5)


@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
def test_draws_depend_on_the_decision_only(decision, tiny_policy: Path, actor_critic: Path, kind) -> None:
    def draw(**changes):
        load = load_policy_player if kind == "policy" else load_actor_critic_player
        path = tiny_policy if kind == "policy" else actor_critic
        player = load(path, "policy", temperature=1.0, device="cpu")
        return player.score([dataclasses.replace(decision, **changes)])[0].tolist()

    first = draw()
    assert draw() == first
    assert draw(seed="1") != first


def test_draws_follow_the_probabilities(decision, tiny_policy: Path) -> None:
    policy = open_policy(tiny_policy)
    model = policy.load_model()
    probabilities = np.exp(PolicyPlayer(policy, model, "policy").score([decision])[0])
    probabilities /= probabilities.sum()
    player = PolicyPlayer(policy, model, "policy", temperature=1.0)
    drawn = player.score([dataclasses.replace(decision, number=number) for number in range(1000)]).argmax(1)
    assert np.bincount(drawn, minlength=13) / 1000 == pytest.approx(probabilities, abs=0.06)


def test_the_actor_sees_the_states_before(decision, actor_critic: Path) -> None:
    def scores(numbers: list[int]) -> np.ndarray:
        player: ActorCriticPlayer = load_actor_critic_player(actor_critic, "rl", device="cpu")
        for number in numbers:
            decision.battle.active_pokemon.set_hp_status(f"{100 - 12 * number}/100")  # another state
            result = player.score([dataclasses.replace(decision, number=number)])
        return result[0]

    assert np.abs(scores([0, 5]) - scores([5])).max() > 1e-4
    assert scores([0, 5, 5]) == pytest.approx(scores([0, 5]), abs=1e-5)  # the choice before did not happen
    assert scores([1, 2, 3, 4]) == pytest.approx(scores([2, 3, 4]), abs=1e-5)  # a window of three states
    assert scores([7, 0]) == pytest.approx(scores([0]), abs=1e-5)  # played again from its start


def test_a_command_names_a_policy_by_its_folder(tiny_policy: Path, actor_critic: Path) -> None:
    source = PlayerSource.parse(f"new={tiny_policy}")
    drawn = PlayerSource.parse(f"new={tiny_policy}@1.5")
    assert (source.temperature, drawn.temperature, drawn.source) == (0.0, 1.5, str(tiny_policy))
    player = source.open()
    assert isinstance(player, PolicyPlayer)
    assert player.name == "new"
    assert isinstance(PlayerSource.parse(f"rl={actor_critic}").open(), ActorCriticPlayer)
    assert len({source.fingerprint(), drawn.fingerprint(), PlayerSource.parse("heuristic").fingerprint()}) == 3


@pytest.mark.parametrize("text", ["new=nowhere", "a=random@1.0", "nobody"])
def test_a_player_that_does_not_exist_is_refused(text) -> None:
    with pytest.raises(PokegemmaError, match=f"--player {text}"):
        PlayerSource.parse(text, flag="--player")


@pytest.mark.slow(5)
@pytest.mark.parametrize("kind", ["policy", "actor-critic"])
def test_every_decision_of_a_battle_is_legal(simulator, tiny_policy: Path, actor_critic: Path, kind) -> None:
    if kind == "policy":
        player = load_policy_player(tiny_policy, "policy", device="cpu")
    else:
        player = load_actor_critic_player(actor_critic, "policy", device="cpu")
    results = play(simulator, make_specs(4), (player, RandomBattlePlayer()), concurrency=4)
    assert [result.problem for result in results.values()] == [""] * 4
    assert min(len(result.seats[0].steps) for result in results.values()) > 5
