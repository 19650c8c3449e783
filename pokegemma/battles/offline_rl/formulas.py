"""The formulas of the offline actor-critic, as functions of tensors; they are AMAGO 3.3's, but for the targets.

Letters of the shapes: B battles, T transitions, G discount factors, C critics, A = 13 actions, K bins. AMAGO estimates
the value of a state by three sampled actions. With 13 actions the sum over all of them is exact, and costs nothing.
"""

import torch

GAMMAS = (0.1, 0.9, 0.95, 0.97, 0.99, 0.995, 0.999)
"""Discount factors; the last one plays."""

REWARD_SCALE = 10.0
NUM_BINS, MAX_RETURN = 96, 1100.0
"""The critics predict returns as a distribution over bins from -MAX_RETURN to MAX_RETURN."""

TD_LAMBDA = 1.0
"""How far targets follow the recorded battle instead of the critics. AMAGO's are those of 0: with them the filter
collapsed onto one action in all runs of up to 1,500 steps (benchmarks/README.md).
"""

TARGET_TAU = 0.004
"""Share of the new weights that the target networks take over in each step."""

CRITIC_WEIGHT = 10.0


def make_bins(num_bins: int = NUM_BINS, max_return: float = MAX_RETURN) -> torch.Tensor:
    """Return the returns that the bins stand for, (K,) float32."""
    return torch.linspace(-max_return, max_return, num_bins)


def two_hot(values: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Return values as distributions over the two nearest bins, (...,) -> (..., K), whose mean is the value.

    A value outside the bins counts as the nearest edge.
    """
    values = values.clamp(bins[0], bins[-1])
    low = (torch.searchsorted(bins, values.contiguous(), right=True) - 1).clamp(0, len(bins) - 2)
    upper_share = (values - bins[low]) / (bins[low + 1] - bins[low])
    result = torch.zeros(*values.shape, len(bins), dtype=values.dtype, device=values.device)
    result.scatter_(-1, low[..., None], (1 - upper_share)[..., None])
    return result.scatter_(-1, low[..., None] + 1, upper_share[..., None])


def expected_value(logits: torch.Tensor, bins: torch.Tensor) -> torch.Tensor:
    """Return the mean of distributions over bins, (..., K) -> (...,)."""
    return logits.softmax(-1) @ bins


def log_policy(logits: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Return the log-probabilities of actions, (..., A); illegal ones have -inf.

    Args:
        legal: bool, broadcast to `logits`. A state without a legal action counts as one in which all are legal:
            otherwise its probabilities would be NaN, also where nothing of it is used.
    """
    allowed = legal | ~legal.any(-1, keepdim=True)
    return logits.masked_fill(~allowed, -torch.inf).log_softmax(-1)


def state_value(action_values: torch.Tensor, log_probabilities: torch.Tensor) -> torch.Tensor:
    """Return V(s), the sum of pi(a|s) Q(s, a) over the legal actions, (..., A) -> (...,)."""
    return (log_probabilities.exp() * action_values).sum(-1)


def lambda_returns(
    rewards: torch.Tensor, done: torch.Tensor, next_values: torch.Tensor, gammas: torch.Tensor, *, td_lambda: float
) -> torch.Tensor:
    """Return y = 10 r + gamma (1 - done) ((1 - lambda) V(s') + lambda y'), (B, T, G); y' is the next transition's.

    After the last transition of a window y' is V(s'). With lambda 0 this is the target of temporal differences with a
    step of one, as AMAGO has it; with lambda 1 the discounted rewards up to the end of the battle.

    Args:
        rewards: (B, T), not scaled yet.
        done: (B, T) bool: the next state is the end of the battle.
        next_values: (B, T, G). With lambda 1 only those after the last transition are read.
        gammas: (G,).
        td_lambda: from 0 to 1.
    """
    returns, following = torch.empty_like(next_values), next_values[:, -1]
    for step in reversed(range(rewards.shape[1])):
        after = following if td_lambda == 1 else torch.lerp(next_values[:, step], following, td_lambda)
        following = REWARD_SCALE * rewards[:, step, None] + gammas * (~done[:, step, None]) * after
        returns[:, step] = following
    return returns


def critic_loss(logits: torch.Tensor, targets: torch.Tensor, bins: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Return the mean cross-entropy of the critics with the two-hot targets over the transitions that are used.

    Args:
        logits: of the actions that were played, (B, T, G, C, K).
        targets: (B, T, G).
        used: (B, T) bool. Without any, the loss is 0.
    """
    wanted = two_hot(targets, bins)[..., None, :]
    losses = -(wanted * logits.log_softmax(-1)).sum(-1).mean((-1, -2))
    return masked_mean(losses, used)


def actor_loss(
    log_probabilities: torch.Tensor, advantages: torch.Tensor, used: torch.Tensor, *, clone: bool = False
) -> torch.Tensor:
    """Return -1[A > 0] log pi(a|s), the mean over factors and the transitions that are used.

    Args:
        log_probabilities: of the actions that were played, (B, T, G).
        advantages: A(s, a) = Q(s, a) - V(s), (B, T, G).
        clone: plain behaviour cloning: every action counts.
    """
    weights = torch.ones_like(advantages) if clone else (advantages > 0).to(log_probabilities.dtype)
    # Of a transition that is not used the action may be illegal, and infinity times 0 is NaN.
    log_probabilities = log_probabilities.masked_fill(~used[..., None], 0)
    return masked_mean(-(weights * log_probabilities).mean(-1), used)


def masked_mean(values: torch.Tensor, used: torch.Tensor) -> torch.Tensor:
    """Return the mean of the values that are used, 0 without any."""
    return values.masked_fill(~used, 0).sum() / used.sum().clamp(min=1)


def rank_played(action_values: torch.Tensor, actions: torch.Tensor, legal: torch.Tensor) -> torch.Tensor:
    """Return for each decision the share of the other legal actions with a lower value than the one played, (...,).

    A tie counts half. NaN where there is no other legal action. A critic that has learned nothing has a mean of 1/2.

    Args:
        action_values: (..., A).
        actions: (...,) int64.
        legal: (..., A) bool.
    """
    played = action_values.gather(-1, actions[..., None])
    others = legal.scatter(-1, actions[..., None], False)
    better = (action_values < played).float() + 0.5 * (action_values == played).float()
    return (better * others).sum(-1) / others.sum(-1)


@torch.no_grad()
def update_target(target: torch.nn.Module, source: torch.nn.Module, *, tau: float = TARGET_TAU) -> None:
    """Move the weights of a target network towards those of its source: (1 - tau) target + tau source."""
    for old, new in zip(target.parameters(), source.parameters(), strict=True):
        old.lerp_(new.detach(), tau)
