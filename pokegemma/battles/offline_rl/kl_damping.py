"""Keep a policy near a frozen reference: the loss gets k times their KL divergence, and a controller sets k.

Three defects of the published version are not repeated: it overwrites the k that it adapted in the next step, it leaves
out the policy's own entropy term, and it runs the reference's head on the new trunk.
"""

from dataclasses import dataclass, field

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


@dataclass
class KLController:
    """Sets k, and a factor of the learning rate, from the mean KL of each 100 steps.

    k is the scheduled min(k0 (1 + t / T)^-alpha, k_max) times what was adapted so far. Above 1.5 of the target KL the
    learning rate is halved and k grows by a half; below 2/3 the learning rate grows by a tenth and k falls by a tenth.

    Attributes:
        factor: of k, adapted.
        lr_factor: of the learning rate, adapted.
    """

    factor: float = 1.0
    lr_factor: float = 1.0
    step: int = 0
    _seen: list[float] = field(default_factory=list)

    @property
    def k(self) -> float:
        return min(K_START * (1 + self.step / HORIZON) ** -DECAY * self.factor, K_MAX)

    def record(self, kl: float) -> None:
        """Count a step and its mean KL; adapt after each 100."""
        self.step += 1
        self._seen.append(kl)
        if len(self._seen) < EVERY_STEPS:
            return
        mean = sum(self._seen) / len(self._seen)
        self._seen.clear()
        if mean > _HIGH * KL_TARGET:
            # From k as it is, limited: else many high means would have to be taken back before k falls again.
            limit = K_MAX / (K_START * (1 + self.step / HORIZON) ** -DECAY)
            self.lr_factor, self.factor = self.lr_factor * 0.5, min(self.factor * 1.5, limit)
        elif mean < _LOW * KL_TARGET:
            self.lr_factor, self.factor = self.lr_factor * 1.1, self.factor * 0.9
