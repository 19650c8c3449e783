"""Each formula of the offline actor-critic against numpy, and the traps that were measured."""

import numpy as np
import pytest
import torch

from pokegemma.battles.offline_rl import formulas


@pytest.fixture
def draws() -> np.random.Generator:
    return np.random.default_rng(0)


def softmax(values: np.ndarray) -> np.ndarray:
    powers = np.exp(values - values.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def two_hot_in_numpy(value: float, bins: np.ndarray) -> np.ndarray:
    row = np.zeros(len(bins))
    value = min(max(value, bins[0]), bins[-1])
    upper = int(np.searchsorted(bins, value))
    if bins[upper] == value:
        row[upper] = 1
    else:
        row[upper] = (value - bins[upper - 1]) / (bins[upper] - bins[upper - 1])
        row[upper - 1] = 1 - row[upper]
    return row


def test_two_hot_is_a_distribution_with_the_mean_of_the_value(draws) -> None:
    bins = formulas.make_bins()
    values = np.concatenate([draws.uniform(-1200, 1200, 50), [-1100, 1100, -5000, 5000, 0, bins[17].item()]])
    result = formulas.two_hot(torch.tensor(values, dtype=torch.float32), bins).numpy()
    expected = np.stack([two_hot_in_numpy(value, bins.numpy().astype(float)) for value in values])
    assert result == pytest.approx(expected, abs=1e-4)
    assert result @ bins.numpy() == pytest.approx(np.clip(values, -1100, 1100), abs=1e-2)


def test_expected_value_is_the_mean_of_the_bins(draws) -> None:
    logits = draws.normal(size=(4, 3, 96)).astype(np.float32)
    bins = formulas.make_bins()
    result = formulas.expected_value(torch.from_numpy(logits), bins).numpy()
    assert result == pytest.approx((softmax(logits) * bins.numpy()).sum(-1), abs=1e-2)


def test_illegal_actions_have_no_probability(draws) -> None:
    logits = draws.normal(size=(5, 13)).astype(np.float32)
    legal = draws.random((5, 13)) < 0.5
    legal[0] = False  # no legal action
    result = formulas.log_policy(torch.from_numpy(logits), torch.from_numpy(legal)).exp().numpy()
    assert np.isfinite(result).all()
    for row, allowed, values in zip(result[1:], legal[1:], logits[1:], strict=True):
        assert row[allowed] == pytest.approx(softmax(values[allowed]), abs=1e-6)
        assert (row[~allowed] == 0).all()
    assert result[0] == pytest.approx(softmax(logits[0]), abs=1e-6)


def test_the_value_of_a_state_is_exact(draws) -> None:
    logits, values = draws.normal(size=(2, 6, 13)).astype(np.float32)
    legal = np.ones((6, 13), dtype=bool)
    legal[:, 3] = False
    log_policy = formulas.log_policy(torch.from_numpy(logits), torch.from_numpy(legal))
    result = formulas.state_value(torch.from_numpy(values), log_policy).numpy()
    probabilities = softmax(np.where(legal, logits, -np.inf))
    assert result == pytest.approx((probabilities * values).sum(-1), abs=1e-5)


def returns_in_numpy(rewards, done, values, gamma: float, td_lambda: float) -> np.ndarray:
    """Return the mean of the n-step returns of a battle, n = 1, 2, ..., with weights (1 - lambda) lambda^(n - 1)."""
    result = np.zeros(len(rewards))
    for start in range(len(rewards)):
        end = next((step for step in range(start, len(rewards)) if done[step]), len(rewards) - 1)
        weight = 1.0
        for last in range(start, end + 1):
            steps = range(start, last + 1)
            total = sum(10 * rewards[step] * gamma ** (step - start) for step in steps)
            total += 0 if done[last] else gamma ** len(steps) * values[last]
            share = weight if last == end else weight * (1 - td_lambda)
            result[start] += share * total
            weight *= td_lambda
    return result


@pytest.mark.parametrize("td_lambda", [0, 0.7, 1])
def test_targets_are_the_mean_of_all_n_step_returns(draws, td_lambda: float) -> None:
    rewards, values = draws.normal(size=(3, 6)), draws.normal(size=(3, 6, 7))
    done = np.zeros((3, 6), dtype=bool)
    done[0, 5] = done[1, [2, 5]] = True  # the third one goes on after the window
    gammas = np.array(formulas.GAMMAS)
    inputs = map(torch.from_numpy, (rewards, done, values, gammas))
    result = formulas.lambda_returns(*inputs, td_lambda=td_lambda).numpy()
    for battle, factor in np.ndindex(3, 7):
        expected = returns_in_numpy(rewards[battle], done[battle], values[battle, :, factor], gammas[factor], td_lambda)
        assert result[battle, :, factor] == pytest.approx(expected)
    if td_lambda == 0:  # AMAGO's: the reward and the discounted value
        assert result == pytest.approx(10 * rewards[..., None] + gammas * (1 - done[..., None]) * values)
    assert result[0, 5] == pytest.approx(10 * rewards[0, 5])


def test_the_critics_loss_is_the_cross_entropy_of_what_is_used(draws) -> None:
    bins = formulas.make_bins()
    logits = draws.normal(size=(2, 3, 2, 4, 96)).astype(np.float32)
    targets = draws.uniform(-1300, 1300, size=(2, 3, 2)).astype(np.float32)
    used = np.array([[True, False, True], [False, False, True]])
    result = formulas.critic_loss(*map(torch.from_numpy, (logits, targets)), bins, torch.from_numpy(used)).item()
    losses = np.zeros((2, 3, 2, 4))
    for place in np.ndindex(2, 3, 2):
        wanted = two_hot_in_numpy(targets[place], bins.numpy().astype(float))
        losses[place] = -(wanted * np.log(softmax(logits[place]))).sum(-1)
    assert result == pytest.approx(losses.mean((-1, -2))[used].mean(), rel=1e-5)


@pytest.mark.parametrize("clone", [False, True])
def test_the_actors_loss_counts_actions_above_the_average(draws, clone) -> None:
    log_probabilities = -draws.random((2, 3, 4)).astype(np.float32)
    log_probabilities[0, 1] = -np.inf  # an illegal action, not used
    advantages = draws.normal(size=(2, 3, 4)).astype(np.float32)
    used = np.array([[True, False, True], [True, True, False]])
    result = formulas.actor_loss(*map(torch.from_numpy, (log_probabilities, advantages, used)), clone=clone).item()
    weights = np.ones_like(advantages) if clone else advantages > 0
    expected = -(weights[used] * log_probabilities[used]).mean(-1).mean()
    assert result == pytest.approx(expected, rel=1e-5)


def test_a_batch_without_actions_has_a_loss_of_zero() -> None:
    used = torch.zeros(1, 2, dtype=torch.bool)
    logits = torch.zeros(1, 2, 1, 1, 96)
    assert formulas.critic_loss(logits, torch.zeros(1, 2, 1), formulas.make_bins(), used) == 0
    assert formulas.actor_loss(torch.full((1, 2, 1), -torch.inf), torch.ones(1, 2, 1), used) == 0


def test_the_rank_of_an_action_is_among_the_other_legal_ones() -> None:
    values = torch.tensor([[5.0, 1.0, 5.0, 9.0], [1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0, 4.0]])
    legal = torch.tensor([[True, True, True, False], [True, True, True, True], [True, False, False, False]])
    rank = formulas.rank_played(values, torch.tensor([0, 2, 0]), legal)
    assert rank[:2].tolist() == pytest.approx([0.75, 2 / 3])
    assert rank[2].isnan()


def test_a_target_network_follows_slowly() -> None:
    target, source = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)
    before = target.weight.detach().clone().numpy()
    formulas.update_target(target, source, tau=0.25)
    assert target.weight.detach().numpy() == pytest.approx(0.75 * before + 0.25 * source.weight.detach().numpy())
