"""The losses of a batch of battles, and how well the critics rank what was played."""

from dataclasses import dataclass

import torch

from pokegemma.battles.offline_rl import formulas
from pokegemma.battles.offline_rl.kl_damping import kl_to_reference
from pokegemma.battles.offline_rl.model import ActorCritic

NUM_TARGET_CRITICS = 2


@dataclass(frozen=True)
class BattleBatch:
    """Windows of T transitions, padded at their ends; there is one state more.

    features (B, T + 1, width), numbers (B, T + 1, 48), legal (B, T + 1, 13) bool, actions (B, T) int64 with 0 where
    `used` is false, rewards (B, T), done (B, T) bool, used (B, T) bool: a transition whose action was revealed.
    """

    features: torch.Tensor
    numbers: torch.Tensor
    legal: torch.Tensor
    actions: torch.Tensor
    rewards: torch.Tensor
    done: torch.Tensor
    used: torch.Tensor


@dataclass(frozen=True)
class Losses:
    """Of a batch: losses to minimise, and figures to log (each a scalar).

    Attributes:
        kl: the mean divergence from the reference; 0 without one.
        kl_weight: k, of that divergence in the total.
    """

    actor: torch.Tensor
    critic: torch.Tensor
    passed: torch.Tensor
    value: torch.Tensor
    kl: torch.Tensor
    kl_weight: float

    @property
    def total(self) -> torch.Tensor:
        return self.actor + formulas.CRITIC_WEIGHT * self.critic + self.kl_weight * self.kl


def choose_critics(num_critics: int, *, number: int = NUM_TARGET_CRITICS) -> torch.Tensor:
    """Return the numbers of random critics, drawn by torch's generator of the CPU, which checkpoints contain."""
    return torch.randperm(num_critics)[: min(number, num_critics)]


def compute_losses(
    model: ActorCritic,
    batch: BattleBatch,
    *,
    clone: bool = False,
    td_lambda: float = formulas.TD_LAMBDA,
    reference: ActorCritic | None = None,
    reference_features: torch.Tensor | None = None,
    kl_weight: float = 0.0,
) -> Losses:
    """Return the losses of a batch.

    Args:
        clone: the actor learns every action, not only those above the average.
        td_lambda: of the critics' targets, see `formulas.lambda_returns`.
        reference: a frozen network of the same gammas, whose policy of each gamma that of `model` stays near.
        reference_features: of the states for it, as `BattleBatch.features`; None: these.
        kl_weight: k of the KL divergence from the reference, the mean over gammas and the transitions that are used.
    """
    states = model.encode(batch.features, batch.numbers)
    used = batch.used
    played = states[:, :-1][used]
    actions, legal = batch.actions[used], batch.legal[:, :-1][used]
    every = torch.arange(model.shape.num_critics)
    targets = _targets(model, states, batch, td_lambda)[used]
    logits = model.heads.played_logits(played, actions) if len(actions) else played.new_zeros(0, 1, 1, len(model.bins))
    ones = torch.ones_like(actions, dtype=torch.bool)
    critic = formulas.critic_loss(logits[None], targets[None], model.bins, ones[None])

    log_policy = formulas.log_policy(model.heads.actor_logits(played), legal[:, None])
    values = model.heads.action_values(played.detach(), model.bins, critics=every)
    advantages = _pick(values, actions) - formulas.state_value(values, log_policy.detach())
    actor = formulas.actor_loss(_pick(log_policy, actions)[None], advantages[None], ones[None], clone=clone)
    kl = actor.new_zeros(())
    if reference is not None:
        features = batch.features if reference_features is None else reference_features
        log_reference = formulas.log_policy(_actor_logits(reference, batch, features), legal[:, None])
        kl = formulas.masked_mean(kl_to_reference(log_policy, log_reference).mean(-1), ones)
    return Losses(
        actor=actor,
        critic=critic,
        passed=formulas.masked_mean((advantages[:, -1] > 0).float(), ones),
        value=formulas.masked_mean(_pick(values, actions)[:, -1], ones),
        kl=kl,
        kl_weight=kl_weight,
    )


@torch.no_grad()
def _actor_logits(reference: ActorCritic, batch: BattleBatch, features: torch.Tensor) -> torch.Tensor:
    """Return what another network's actor makes of the transitions that are used, by its own trunk, (N, G, A)."""
    return reference.heads.actor_logits(reference.encode(features, batch.numbers)[:, :-1][batch.used])


@torch.no_grad()
def _targets(model: ActorCritic, states: torch.Tensor, batch: BattleBatch, td_lambda: float) -> torch.Tensor:
    """Return the targets of all transitions, (B, T, G), with V of the target heads in the next states."""
    first = -1 if td_lambda == 1 else 1  # returns need only the value after the last transition
    after, legal = states[:, first:].flatten(0, 1), batch.legal[:, first:].flatten(0, 1)
    values = model.target_heads.action_values(after, model.bins, critics=choose_critics(model.shape.num_critics))
    log_policy = formulas.log_policy(model.target_heads.actor_logits(after), legal[:, None])
    known = formulas.state_value(values, log_policy).unflatten(0, (len(states), -1))
    next_values = known.new_zeros(*batch.rewards.shape, known.shape[-1])
    next_values[:, -known.shape[1] :] = known
    return formulas.lambda_returns(batch.rewards, batch.done, next_values, model.gammas, td_lambda=td_lambda)


def _pick(values: torch.Tensor, actions: torch.Tensor) -> torch.Tensor:
    """Return the entry of each action that was played, (N, G, A) -> (N, G)."""
    return values.gather(-1, actions[:, None, None].expand(-1, values.shape[1], 1))[..., 0]


@torch.no_grad()
def judge_batch(model: ActorCritic, batch: BattleBatch) -> torch.Tensor:
    """Return a row for each decision between actions, (N, 5).

    Its rank, 1 if it has one, 1 if the actor takes the action that was played, the share of right actions of a uniform
    choice, and 1. The rank is that of the action played among the other legal ones by the critics of the last gamma.
    """
    used = batch.used & (batch.legal[:, :-1].sum(-1) > 1)  # as in cloning: one legal action is no decision
    states = model.encode(batch.features, batch.numbers)[:, :-1][used]
    actions, legal = batch.actions[used], batch.legal[:, :-1][used]
    every = torch.arange(model.shape.num_critics)
    rank = formulas.rank_played(model.heads.action_values(states, model.bins, critics=every)[:, -1], actions, legal)
    has_rank = rank.isfinite()
    chosen = formulas.log_policy(model.heads.actor_logits(states)[:, -1], legal).argmax(-1)
    uniform = 1 / legal.sum(-1)
    columns = (rank.masked_fill(~has_rank, 0), has_rank, chosen == actions, uniform, torch.ones_like(rank))
    return torch.stack([column.float() for column in columns], 1)
