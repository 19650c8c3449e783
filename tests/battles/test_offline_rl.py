"""The offline actor-critic: a small game with a known value, windows, features, and whole runs."""

import csv
import json
import shlex
import shutil
from dataclasses import replace
from pathlib import Path
from typing import get_args

import numpy as np
import pytest
import torch

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.offline_rl import formulas, kl_damping
from pokegemma.battles.offline_rl.features import prepare_features
from pokegemma.battles.offline_rl.losses import BattleBatch, compute_losses, judge_batch
from pokegemma.battles.offline_rl.model import ActorCritic
from pokegemma.battles.offline_rl.network_files import load_actor_critic, save_actor_critic
from pokegemma.battles.offline_rl.options import OfflineRLTrainingOptions, RewardName
from pokegemma.battles.offline_rl.train import warn_of_collapse
from pokegemma.battles.offline_rl.trainer import OfflineRLTrainer, TrainableActorCritic
from pokegemma.battles.offline_rl.windows import BattleWindows, collate_windows
from pokegemma.battles.players.opening import PlayerSource
from pokegemma.battles.policy.checkpoint import open_policy
from pokegemma.battles.policy.scoring import last_hidden_states
from pokegemma.battles.policy.tiny import make_tiny_policy
from pokegemma.battles.trajectories.packed import PackedTrajectories
from pokegemma.battles.trajectories.rewards import REWARDS
from pokegemma.errors import PokegemmaError
from tests.battles.small_game import SHAPE, play_game
from tests.processes import call_script


@pytest.mark.slow(6)
@pytest.mark.parametrize(
    ("td_lambda", "known"),
    [
        # Temporal differences: of the policy that is learned, which takes action 0.
        (0, {0.5: [[5, 3], [10, 0]], 0.9: [[9, 3], [10, 0]]}),
        # Returns: of the players, who take either action in the second state.
        (1, {0.5: [[2.5, 3], [10, 0]], 0.9: [[4.5, 3], [10, 0]]}),
    ],
)
def test_a_small_game_with_known_values_is_learned(td_lambda: float, known: dict[float, list]) -> None:
    torch.manual_seed(0)
    draws, network = np.random.default_rng(0), ActorCritic(SHAPE)
    optimizer = torch.optim.Adam(network.parameters(), lr=5e-3)
    for _ in range(400):
        optimizer.zero_grad()
        compute_losses(network, play_game(draws, 64), td_lambda=td_lambda).total.backward()
        optimizer.step()
        formulas.update_target(network.target_heads, network.heads, tau=0.05)
    batch = play_game(draws, 64)
    goes_on = batch.actions[:, 0] == 0
    with torch.no_grad():
        states = network.encode(batch.features, batch.numbers)[goes_on][0, :2]
        values = network.heads.action_values(states, network.bins, critics=torch.arange(3))
        best = formulas.log_policy(network.heads.actor_logits(states), batch.legal[0, 0]).exp()
    for factor, gamma in enumerate(SHAPE.gammas):
        assert values[:, factor, :2].numpy() == pytest.approx(np.array(known[gamma]), abs=0.8)
        for state, action in enumerate(np.argmax(known[gamma], axis=-1)):
            assert best[state, factor, action] > 0.9
    judged = judge_batch(network, batch)
    assert judged[:, 0].mean() == pytest.approx(0.5, abs=0.15)  # half the actions are bad ones
    assert judged[:, 3].mean() == pytest.approx((1 / batch.legal[:, :-1].sum(-1)[batch.used]).mean())


def test_an_action_that_was_never_played_has_the_value_of_its_state() -> None:
    torch.manual_seed(0)
    network = ActorCritic(SHAPE)
    states = torch.randn(5, 16)
    values = network.heads.action_values(states, network.bins, critics=torch.arange(3))
    assert values.numpy() == pytest.approx(values[..., :1].expand_as(values).numpy(), abs=1e-5)
    assert values.shape == (5, 2, 13)


def test_logits_of_played_actions_are_those_of_all_actions() -> None:
    torch.manual_seed(0)
    network = ActorCritic(SHAPE)
    torch.nn.init.normal_(network.heads.difference)
    states, actions = torch.randn(9, 16), torch.tensor([3, 0, 12, 3, 3, 0, 7, 1, 12])
    logits = network.heads.played_logits(states, actions)
    assert logits.shape == (9, 2, 3, 41)
    values = network.heads.action_values(states, network.bins, critics=torch.tensor([1]))
    expected = values.gather(-1, actions[:, None, None].expand(-1, 2, 1))[..., 0]
    assert formulas.expected_value(logits[:, :, 1], network.bins).detach().numpy() == pytest.approx(
        expected.numpy(), abs=1e-4
    )


def test_a_state_sees_no_later_one() -> None:
    torch.manual_seed(0)
    network = ActorCritic(SHAPE)
    features, numbers = torch.randn(1, 4, 3), torch.randn(1, 4, 48)
    before = network.encode(features, numbers)
    features[:, 3] += 1
    after = network.encode(features, numbers)
    assert torch.equal(before[:, :3], after[:, :3])
    assert not torch.equal(before[:, 3], after[:, 3])


def test_padding_changes_no_loss() -> None:
    torch.manual_seed(0)
    network, batch = ActorCritic(SHAPE), play_game(np.random.default_rng(1), 8)
    padded = BattleBatch(
        **{
            name: torch.nn.functional.pad(value, (*[0] * (2 * (value.ndim - 2)), 0, 1))
            for name, value in vars(batch).items()
        }
    )
    losses = []
    for each in (batch, padded):
        torch.manual_seed(1)  # of the choice of critics
        losses.append(compute_losses(network, each).total)
    assert losses[0].item() == pytest.approx(losses[1].item(), rel=1e-5)


@pytest.mark.parametrize("td_lambda", [0, 0.5, 1])
def test_targets_of_a_window_that_ends_within_a_battle_go_on_with_the_critics(td_lambda: float) -> None:
    torch.manual_seed(0)
    network, batch = ActorCritic(SHAPE), play_game(np.random.default_rng(1), 8)
    cut = replace(batch, done=batch.done & torch.tensor([True, False]))
    losses = {}
    for name, bias in (("before", 0.0), ("after", 5.0)):
        with torch.no_grad():
            network.target_heads.shared[..., -1] += bias  # the target critics' values of all states grow
        torch.manual_seed(1)
        losses[name] = [compute_losses(network, each, td_lambda=td_lambda).critic.item() for each in (batch, cut)]
    assert losses["before"][1] != losses["after"][1]
    assert (losses["before"][0] == losses["after"][0]) is (td_lambda == 1)


def test_cloning_learns_every_action() -> None:
    torch.manual_seed(0)
    network, batch = ActorCritic(SHAPE), play_game(np.random.default_rng(1), 8)
    plain = compute_losses(network, batch, clone=True).actor
    assert plain.item() == pytest.approx(np.log(2), abs=0.2)


@pytest.fixture
def cache(packed_battles: Path, tiny_policy: Path, tmp_path):
    battles = PackedTrajectories(packed_battles)
    return battles, prepare_features(tmp_path / "features", battles, open_policy(tiny_policy), device="cpu")


def test_features_are_what_the_policy_makes_of_each_state(cache, tiny_policy: Path) -> None:
    battles, features = cache
    policy = open_policy(tiny_policy)
    assert features[3]["features"].shape == (8, 64)
    prompts = policy.encode([f"{text} action" for text in battles.short_texts(3)])
    with torch.inference_mode():
        plain = torch.cat([last_hidden_states(policy.load_model(), [prompt]) for prompt in prompts])
    assert features[3]["features"] == pytest.approx(plain.numpy(), abs=1e-5)


def test_features_of_another_encoder_are_refused(cache, tiny_policy: Path, tmp_path) -> None:
    battles, _ = cache
    (tmp_path / "other").mkdir()
    make_tiny_policy(tmp_path / "other", battles.words, seed=1)
    with pytest.raises(PokegemmaError, match="features of another model"):
        prepare_features(tmp_path / "features", battles, open_policy(tmp_path / "other"), device="cpu")


def make_trainer(tmp_path: Path, **options) -> OfflineRLTrainer:
    fixed = {"output_dir": str(tmp_path), "report_to": "none", "use_cpu": True, "eval_strategy": "no"}
    training = OfflineRLTrainingOptions(**fixed, **options)
    model = TrainableActorCritic(ActorCritic(SHAPE), clone=False)
    return OfflineRLTrainer(model, args=training, difference_decay=0.75)


def test_the_options_of_the_optimizer_act_and_differences_decay_by_their_own(tmp_path: Path) -> None:
    options = {"adam_beta1": 0.8, "adam_beta2": 0.95, "adam_epsilon": 1e-6, "weight_decay": 0.25, "learning_rate": 0.5}
    trainer = make_trainer(tmp_path, **options)
    optimizer = trainer.create_optimizer()
    names = {id(weight): name for name, weight in trainer.model.named_parameters() if weight.requires_grad}
    decays = {
        names[id(weight)]: group["weight_decay"] for group in optimizer.param_groups for weight in group["params"]
    }
    assert set(decays) == set(names.values())
    assert {name for name, decay in decays.items() if decay == 0.75} == {"network.heads.difference"}
    assert decays["network.heads.shared"] == decays["network.features.weight"] == 0.25
    assert decays["network.features.bias"] == 0.0
    for group in optimizer.param_groups:
        assert (group["betas"], group["eps"], group["lr"]) == ((0.8, 0.95), 1e-6, 0.5)
    assert type(make_trainer(tmp_path, optim="sgd").create_optimizer()) is torch.optim.SGD


def test_windows_cover_each_transition_once(cache) -> None:
    battles, features = cache
    windows = BattleWindows(battles, features, [0, 5], length=4, reward="binary")
    assert [len(windows[number]["actions"]) for number in range(len(windows))] == [3, 3, 1, 3, 3, 1]
    joined = np.concatenate([windows[number]["actions"] for number in range(3)])
    assert joined.tolist() == battles[0].actions[:-1].tolist()
    assert [windows[number]["done"].any() for number in range(3)] == [False, False, True]
    assert windows[1]["numbers"].tolist() == battles[0].numbers[3:7].tolist()
    assert windows[5]["rewards"].tolist() == battles[5].rewards[6:, 2].tolist()
    batch = collate_windows([windows[0], windows[2]])
    assert batch["features"].shape == (2, 4, 64)
    assert batch["used"].tolist() == [[True] * 3, [True, False, False]]


TRAINING = shlex.split(
    "--eval_fraction 0.3 --report_to none --logging_steps 1 --eval_steps 2 --save_steps 2 --warmup_steps 0 --width 16 "
    "--num_heads 2 --num_layers 1 --gammas 0.9 --num_critics 2 --window 6 --per_device_train_batch_size 4"
)


@pytest.fixture
def train(packed_battles: Path, tiny_policy: Path, tmp_path):
    """Return a function that trains in a folder of the test and returns what run.json records."""

    def train_in(name: str, *more: object, error: str | None = None) -> dict:
        options = ("--trajectories_dir", packed_battles, "--encoder", tiny_policy, "--output_dir", tmp_path / name)
        done = call_script("rl_battles", *options, "--features_dir", tmp_path / "features", *TRAINING, *more)
        if error is not None:
            assert done.returncode == 2 and error in done.stderr
        else:
            assert done.returncode == 0, done.stderr
        return json.loads((tmp_path / name / "run.json").read_text())

    return train_in


def read_log(folder: Path) -> list[dict[str, str]]:
    """Return the log entries of training steps."""
    with open(folder / "metrics.csv", newline="") as file:
        return [row for row in csv.DictReader(file) if row["critic_loss"]]


def assert_same_network(folder: Path, other: Path) -> None:
    states = load_actor_critic(other)[0].state_dict()
    assert all(torch.equal(weight, states[name]) for name, weight in load_actor_critic(folder)[0].state_dict().items())


def test_an_actor_that_is_worse_than_a_uniform_choice_is_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    warn_of_collapse({"eval_action_accuracy": 0.2, "eval_uniform_accuracy": 0.19})
    assert caplog.text == ""
    warn_of_collapse({"eval_action_accuracy": 0.108, "eval_uniform_accuracy": 0.19})
    assert "10.8 %" in caplog.text and "19.0 %" in caplog.text and "--actor clone" in caplog.text


@pytest.mark.slow(8)
def test_training_resumes_exactly(train, tiny_policy: Path, tmp_path) -> None:
    record = train("whole", "--max_steps", "4")
    assert 0 <= record["evaluation"]["eval_rank_of_played"] <= 1
    assert 1 / 13 <= record["evaluation"]["eval_uniform_accuracy"] <= 1 / 2
    assert record["status"] == "completed"
    rows = read_log(tmp_path / "whole")
    assert [row["step"] for row in rows] == ["1", "2", "3", "4"] and "kl" not in rows[0]
    train("part", "--max_steps", "2")
    for option, error in (("--learning_rate", "learning_rate was"), ("--td_lambda", "td_lambda was 1.0, is 0.5")):
        train("part", option, "0.5", "--max_steps", "4", "--resume_from_checkpoint", error=error)
    moved = shutil.copytree(tiny_policy, tmp_path / "moved")
    train("part", "--encoder", moved, "--max_steps", "4", "--resume_from_checkpoint")
    assert load_actor_critic(tmp_path / "part")[1].text == "short"
    assert_same_network(tmp_path / "whole", tmp_path / "part")


@pytest.mark.slow(10)
def test_training_near_a_reference_starts_there_and_resumes_exactly(train, tmp_path, monkeypatch) -> None:
    monkeypatch.setattr(kl_damping, "EVERY_STEPS", 3)  # adapts once before the stop and once after
    train("before", "--max_steps", "2")
    weights = (tmp_path / "before" / "actor_critic.safetensors").read_bytes()
    near = ("--reference", tmp_path / "before", "--kl_target", "1e-9", "--kl_start", "0.1", "--learning_rate", "1e-3")
    train("whole", *near, "--max_steps", "6")
    rows = read_log(tmp_path / "whole")
    assert float(rows[0]["kl"]) == 0 < float(rows[1]["kl"])
    assert [float(row["lr_factor"]) for row in rows] == [1, 1, 0.5, 0.5, 0.5, 0.25]
    assert [float(row["kl_weight"]) for row in rows] == pytest.approx([0.1, 0.1, 0.15, 0.15, 0.15, 0.225], rel=1e-4)
    assert [float(row["learning_rate"]) for row in rows] == pytest.approx([1e-3] * 3 + [5e-4] * 3, rel=1e-4)
    train("part", *near, "--max_steps", "4")
    train("part", *near, "--max_steps", "6", "--resume_from_checkpoint")
    assert_same_network(tmp_path / "whole", tmp_path / "part")
    assert (tmp_path / "before" / "actor_critic.safetensors").read_bytes() == weights


@pytest.mark.slow(4)
def test_a_reference_of_other_sizes_is_refused_before_anything_is_deleted(
    train, packed_battles: Path, tiny_policy: Path, tmp_path
) -> None:
    train("before", "--max_steps", "1")
    options = ("--trajectories_dir", packed_battles, "--encoder", tiny_policy, "--features_dir", tmp_path / "features")
    near = (*TRAINING, "--reference", tmp_path / "before")
    done = call_script("rl_battles", *options, *near, "--output_dir", tmp_path / "out", "--width", 32)
    assert done.returncode == 2 and "width is 16 instead of 32" in done.stderr
    done = call_script("rl_battles", *options, *near, "--output_dir", tmp_path / "before", "--overwrite")
    assert done.returncode == 2 and "contains the input" in done.stderr
    assert (tmp_path / "before" / "actor_critic.safetensors").is_file()


@pytest.fixture
def pair(tiny_policy: Path, tmp_path) -> Path:
    """Return a folder with a policy and an actor-critic that it encodes states for."""
    shutil.copytree(tiny_policy, tmp_path / "pair" / "policy")
    save_actor_critic(tmp_path / "pair" / "rl", ActorCritic(SHAPE), encoder=str(tmp_path / "pair" / "policy"))
    return tmp_path / "pair"


def test_an_actor_critic_finds_its_encoder_after_both_were_moved_or_it_alone(pair: Path, tmp_path) -> None:
    shutil.copytree(pair / "rl", tmp_path / "alone" / "rl")
    assert load_actor_critic(tmp_path / "alone" / "rl")[1].path == str(pair / "policy")
    fingerprint = PlayerSource.parse(f"rl={pair / 'rl'}").fingerprint()
    pair.rename(tmp_path / "moved")
    assert load_actor_critic(tmp_path / "moved" / "rl")[1].path == str(tmp_path / "moved" / "policy")
    assert PlayerSource.parse(f"rl={tmp_path / 'moved' / 'rl'}").fingerprint() == fingerprint
    with pytest.raises(PokegemmaError, match=f"encoder is not at .*alone/policy or {pair}/policy"):
        load_actor_critic(tmp_path / "alone" / "rl")


def test_a_changed_encoder_is_noticed(pair: Path) -> None:
    source = PlayerSource.parse(f"rl={pair / 'rl'}")
    before = source.fingerprint()
    make_tiny_policy(pair / "policy", ["another", "vocabulary"], seed=1)
    with pytest.raises(PokegemmaError, match=r"trained with another encoder than .*policy is now: its model differs"):
        load_actor_critic(pair / "rl")
    assert source.fingerprint() != before


def test_every_reward_is_an_option() -> None:
    assert list(get_args(RewardName)) == list(REWARDS)


def test_a_folder_without_a_network_is_refused(tmp_path) -> None:
    with pytest.raises(PokegemmaError, match="not the result of"):
        load_actor_critic(tmp_path)
