"""KL damping: the divergence from a frozen reference, against numpy, and the controller of its weight."""

import copy

import numpy as np
import pytest
import torch

pytest.importorskip("poke_env", reason="needs poke-env (./init.sh --with battles)")
from pokegemma.battles.offline_rl import formulas, kl_damping
from pokegemma.battles.offline_rl.losses import BattleBatch, compute_losses
from pokegemma.battles.offline_rl.model import ActorCritic
from tests.battles.small_game import SHAPE, play_game


def legal_policy(network: ActorCritic, batch: BattleBatch) -> np.ndarray:
    """Return the probabilities of the two legal actions in the transitions that are used, (N, G, 2), by numpy."""
    with torch.no_grad():
        states = network.encode(batch.features, batch.numbers)[:, :-1][batch.used]
        logits = network.heads.actor_logits(states)[..., :2].double().numpy()
    powers = np.exp(logits - logits.max(-1, keepdims=True))
    return powers / powers.sum(-1, keepdims=True)


def make_apart() -> tuple[ActorCritic, ActorCritic, BattleBatch]:
    """Return two networks of other weights, the second one frozen, and a batch."""
    torch.manual_seed(0)
    network, reference = ActorCritic(SHAPE), ActorCritic(SHAPE).requires_grad_(False)
    return network, reference, play_game(np.random.default_rng(1), 16)


def test_the_divergence_is_the_mean_over_legal_actions_gammas_and_transitions() -> None:
    network, reference, batch = make_apart()
    losses = compute_losses(network, batch, reference=reference, kl_weight=3.0)
    pi, other = legal_policy(network, batch), legal_policy(reference, batch)
    assert losses.kl.item() == pytest.approx((pi * np.log(pi / other)).sum(-1).mean(), rel=1e-5)
    plain = losses.actor + formulas.CRITIC_WEIGHT * losses.critic
    assert (losses.total - plain).item() == pytest.approx(3 * losses.kl.item(), rel=1e-4)
    assert compute_losses(network, batch).kl == 0
    losses.total.backward()
    assert all(weight.grad.isfinite().all() for weight in network.parameters() if weight.requires_grad)


def test_the_reference_has_a_trunk_of_its_own() -> None:
    """With a shared trunk, a change of the network's trunk would change both policies, and no divergence would show."""
    network, _, batch = make_apart()
    reference = copy.deepcopy(network).requires_grad_(False)
    before = legal_policy(reference, batch)
    with torch.no_grad():
        for weight in network.blocks.parameters():
            weight.add_(0.3 * torch.randn_like(weight))
    pi = legal_policy(network, batch)
    kl = compute_losses(network, batch, reference=reference, kl_weight=1.0).kl.item()
    assert kl == pytest.approx((pi * np.log(pi / before)).sum(-1).mean(), rel=1e-4) and kl > 1e-3


@pytest.mark.slow(4)
def test_with_a_large_k_the_policy_stays_at_the_reference() -> None:
    moved = {}
    for kl_weight in (0.0, 1000.0):
        torch.manual_seed(0)
        draws, network = np.random.default_rng(0), ActorCritic(SHAPE)
        reference = copy.deepcopy(network).requires_grad_(False)
        optimizer = torch.optim.Adam(network.parameters(), lr=2e-3)
        for _ in range(60):
            optimizer.zero_grad()
            compute_losses(network, play_game(draws, 32), reference=reference, kl_weight=kl_weight).total.backward()
            optimizer.step()
        moved[kl_weight] = compute_losses(network, play_game(draws, 32), reference=reference).kl.item()
    assert moved[1000.0] < 1e-3 < 0.05 < moved[0.0]


def test_kl_to_a_reference_is_that_of_the_legal_actions() -> None:
    draws = np.random.default_rng(0)
    logits, reference = torch.from_numpy(draws.normal(size=(2, 5, 13)))
    legal = torch.ones(5, 13, dtype=torch.bool)
    legal[:, 4:] = False
    result = kl_damping.kl_to_reference(formulas.log_policy(logits, legal), formulas.log_policy(reference, legal))
    pi, other = (torch.softmax(each[:, :4], -1).numpy() for each in (logits, reference))
    assert result.numpy() == pytest.approx((pi * np.log(pi / other)).sum(-1))
    assert (result > 0).all()


def test_the_controller_keeps_what_it_adapted() -> None:
    controller = kl_damping.KLController()
    assert controller.k == pytest.approx(0.05)
    for _ in range(100):
        controller.record(0.02)
    assert (controller.lr_factor, controller.factor) == (0.5, 1.5)
    controller.record(0.0)
    assert controller.k == pytest.approx(0.05 * (1 + 101 / 1e6) ** -0.5 * 1.5)
    for _ in range(99):
        controller.record(0.0)
    assert controller.lr_factor == pytest.approx(0.55)
    assert controller.factor == pytest.approx(1.35)
    for _ in range(10_000):
        controller.record(1.0)
    assert controller.k == 0.5


def test_the_state_of_the_controller_is_in_that_of_its_module() -> None:
    controller, other = kl_damping.KLController(), kl_damping.KLController()
    for _ in range(130):
        controller.record(0.02)
    other.load_state_dict(controller.state_dict())
    for _ in range(70):
        controller.record(0.03)
        other.record(0.03)
    assert (other.factor, other.lr_factor, other.step) == (controller.factor, controller.lr_factor, 200)
    assert controller.lr_factor == 0.25
