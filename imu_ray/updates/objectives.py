r"""What each objective does to a sample's logits: the gradient that a descent step is taken along.

Every objective maps current logits ``[B, C]``, labels ``[B]`` and the logits before unlearning ``[B, C]`` to a gradient
``[B, C]``, float64. Not every useful one is the gradient of a loss. p is the softmax of the current logits, p0 that of the
original ones. They hold in every scope: on the head the gradient is multiplied by the features, deeper it is back-propagated.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.gradients import output_gradient

LogitGradient = Callable[[Tensor, Tensor, Tensor], Tensor]


def ascent(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Ascent on the cross-entropy (arXiv:2508.01620): :math:`-(p - \mathrm{onehot}(y))`, the gradient of :math:`-\ell`."""
    return -output_gradient(logits_BC, labels_B)


def bounded_ascent(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Ascent where the loss is below :math:`\ln C`, the loss of a uniform guess; 0 where it is above.

    The gradient of :math:`-\min(\ell, \ln C)`.
    """
    losses = torch.nn.functional.cross_entropy(logits_BC, labels_B, reduction="none")
    below = losses < math.log(logits_BC.shape[1])
    return ascent(logits_BC, labels_B, original_logits_BC) * below.unsqueeze(1)


@dataclass(frozen=True)
class NPO:
    r"""Negative preference optimisation (arXiv:2404.05868): ascent weighted down as a sample is forgotten.

    The gradient of :math:`\frac{2}{\beta} \ln\bigl(1 + r\bigr)` with :math:`r = (p_y / p^0_y)^\beta`, which is that of
    :math:`-\ell` times :math:`2 r / (1 + r)`.
    """

    beta: float = 4.0

    def __call__(self, logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
        """Gradient ``[B, C]``."""
        log_ratio = _log_confidence(logits_BC, labels_B) - _log_confidence(original_logits_BC, labels_B)
        # 2 r / (1 + r) = 2 sigmoid(ln r), finite for any r.
        weight = 2 * torch.sigmoid(self.beta * log_ratio)
        return ascent(logits_BC, labels_B, original_logits_BC) * weight.unsqueeze(1)


def renormalise(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Cross-entropy to the original prediction with the true class removed: :math:`p - q`.

    :math:`q = \mathrm{softmax}(z^0)` with :math:`z^0_y = -\infty`; from logits, because from probabilities it is 0/0 where
    :math:`p^0_y` rounds to 1.
    """
    without = original_logits_BC.scatter(1, labels_B.unsqueeze(1), -math.inf)
    return torch.softmax(logits_BC, dim=1) - torch.softmax(without, dim=1)


def row_mask(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Ascent through the true-class logit only: :math:`1 - p_y` at y, 0 elsewhere. No scalar loss has this gradient."""
    own = labels_B.unsqueeze(1)
    pull = ascent(logits_BC, labels_B, original_logits_BC)
    return torch.zeros_like(pull).scatter(1, own, pull.gather(1, own))


def uniform_target(logits_BC: Tensor, labels_B: Tensor, original_logits_BC: Tensor) -> Tensor:
    r"""Cross-entropy to the uniform distribution: :math:`p - 1/C`."""
    return torch.softmax(logits_BC, dim=1) - 1 / logits_BC.shape[1]


def _log_confidence(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    return torch.log_softmax(logits_BC, dim=1).gather(1, labels_B.unsqueeze(1)).squeeze(1)


OBJECTIVES: dict[str, LogitGradient] = {
    "ascent": ascent,
    "bounded_ascent": bounded_ascent,
    "npo": NPO(),
    "renormalise": renormalise,
    "row_mask": row_mask,
    "uniform_target": uniform_target,
}
