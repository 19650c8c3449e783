"""Keep a policy near a frozen reference: the loss gets k times their KL divergence, and a controller sets k.

Three defects of the published version are not repeated: it overwrites the k that it adapted in the next step, it leaves
out the policy's own entropy term, and it runs the reference's head on the new trunk.
"""

import torch

K_START, DECAY, HORIZON, K_MAX = 0.05, 0.5, 1e6, 0.5
KL_TARGET, EVERY_STEPS = 0.01, 100
_HIGH, _LOW = 1.5, 1 / 1.5


def kl_to_reference(log_probabilities: torch.Tensor, reference: torch.Tensor) -> torch.Tensor:
    """Return the sum over the legal actions of pi (log pi - log pi_ref), (..., A) -> (...,).

    Both are -inf at illegal actions. The reference is another model's, trunk and head, on the same states.
    """
    legal = log_probabilities.isfinite()
    difference = (log_probabilities - reference).masked_fill(~legal, 0)
    return (log_probabilities.exp() * difference).sum(-1)


class KLController(torch.nn.Module):
    """Sets k, and a factor of the learning rate, from the mean KL of each 100 steps.

    k is the scheduled min(k0 (1 + t / T)^-alpha, k_max) times what was adapted so far. Above 1.5 of the target KL the
    learning rate is halved and k grows by a half; below 2/3 the learning rate grows by a tenth and k falls by a tenth.
    It is a module without weights, so that its state is in the checkpoints of what contains it.

    Args:
        k_start: k0.
        kl_target: mean KL of a decision, in nats.

    Attributes:
        factor: of k, adapted.
        lr_factor: of the learning rate, adapted.
        step: how many steps were recorded.
    """

    def __init__(self, *, k_start: float = K_START, k_max: float = K_MAX, kl_target: float = KL_TARGET) -> None:
        super().__init__()
        self.k_start, self.k_max, self.kl_target = k_start, k_max, kl_target
        self.factor = self.lr_factor = 1.0
        self.step = self._num_seen = 0
        self._sum_seen = 0.0

    @property
    def k(self) -> float:
        return min(self._scheduled_k() * self.factor, self.k_max)

    def _scheduled_k(self) -> float:
        return self.k_start * (1 + self.step / HORIZON) ** -DECAY

    def record(self, kl: float) -> None:
        """Count a step and its mean KL; adapt after each 100."""
        self.step += 1
        self._sum_seen, self._num_seen = self._sum_seen + kl, self._num_seen + 1
        if self._num_seen < EVERY_STEPS:
            return
        mean = self._sum_seen / self._num_seen
        self._sum_seen, self._num_seen = 0.0, 0
        if mean > _HIGH * self.kl_target:
            # From k as it is, limited: else many high means would have to be taken back before k falls again.
            limit = self.k_max / self._scheduled_k()
            self.lr_factor, self.factor = self.lr_factor * 0.5, min(self.factor * 1.5, limit)
        elif mean < _LOW * self.kl_target:
            self.lr_factor, self.factor = self.lr_factor * 1.1, self.factor * 0.9

    def get_extra_state(self) -> torch.Tensor:
        """Return what is adapted, for `state_dict`; safetensors takes tensors only."""
        values = (self.factor, self.lr_factor, self.step, self._sum_seen, self._num_seen)
        return torch.tensor(values, dtype=torch.float64)

    def set_extra_state(self, state: torch.Tensor) -> None:
        self.factor, self.lr_factor, step, self._sum_seen, num_seen = state.tolist()
        self.step, self._num_seen = int(step), int(num_seen)
