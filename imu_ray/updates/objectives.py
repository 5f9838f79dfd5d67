r"""What each objective does to a sample's outputs: the gradient that a descent step is taken along.

Every objective maps current logits ``[B, C]`` or ``[B, T, C]``, labels and the logits before unlearning to a gradient in the shape of
the logits, float64. Not every useful one is the gradient of a loss. p is the softmax of the current logits, p0 that of the original
ones. They hold in every scope: on the head the gradient is multiplied by the features, deeper it is back-propagated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.gradients import output_gradient
from imu_ray.scopes.base import OutputGradient


def ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent on the cross-entropy (arXiv:2508.01620): :math:`-(p - \mathrm{onehot}(y))`, the gradient of :math:`-\ell`."""
    return -output_gradient(outputs, labels)


def bounded_ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent where the loss is below :math:`\ln C`, the loss of a uniform guess; 0 where it is above.

    The gradient of :math:`-\min(\ell, \ln C)`.
    """
    below = -_log_confidence(outputs, labels) < math.log(outputs.shape[-1])
    return ascent(outputs, labels, original) * below.unsqueeze(-1)


@dataclass(frozen=True)
class NPO:
    r"""Negative preference optimisation (arXiv:2404.05868): ascent weighted down as a sample is forgotten.

    The gradient of :math:`\frac{2}{\beta} \ln\bigl(1 + r\bigr)` with :math:`r = (p_y / p^0_y)^\beta`, which is that of
    :math:`-\ell` times :math:`2 r / (1 + r)`.
    """

    beta: float = 4.0

    def __call__(self, outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
        """Gradient ``[B, C]``."""
        log_ratio = _log_confidence(outputs, labels) - _log_confidence(original, labels)
        # 2 r / (1 + r) = 2 sigmoid(ln r), finite for any r.
        weight = 2 * torch.sigmoid(self.beta * log_ratio)
        return ascent(outputs, labels, original) * weight.unsqueeze(-1)


def renormalise(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the original prediction with the true class removed: :math:`p - q`.

    :math:`q = \mathrm{softmax}(z^0)` with :math:`z^0_y = -\infty`; from logits, because from probabilities it is 0/0 where
    :math:`p^0_y` rounds to 1.
    """
    without = original.scatter(-1, labels.unsqueeze(-1), -math.inf)
    return torch.softmax(outputs, dim=-1) - torch.softmax(without, dim=-1)


def row_mask(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent through the true-class logit only: :math:`1 - p_y` at y, 0 elsewhere. No scalar loss has this gradient."""
    own = labels.unsqueeze(-1)
    pull = ascent(outputs, labels, original)
    return torch.zeros_like(pull).scatter(-1, own, pull.gather(-1, own))


def uniform_target(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the uniform distribution: :math:`p - 1/C`."""
    return torch.softmax(outputs, dim=-1) - 1 / outputs.shape[-1]


def _log_confidence(outputs: Tensor, labels: Tensor) -> Tensor:
    return torch.log_softmax(outputs, dim=-1).gather(-1, labels.unsqueeze(-1)).squeeze(-1)


OBJECTIVES: dict[str, OutputGradient] = {
    "ascent": ascent,
    "bounded_ascent": bounded_ascent,
    "npo": NPO(),
    "renormalise": renormalise,
    "row_mask": row_mask,
    "uniform_target": uniform_target,
}
