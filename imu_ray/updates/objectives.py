r"""What each objective does to a sample's outputs: the gradient that a descent step is taken along.

Every objective maps current logits ``[B, C]`` or ``[B, T, C]``, labels and the logits before unlearning to a gradient
in the shape of the logits, float64 (at many positions in their type). Not every useful one is the gradient of a loss. p
is the softmax of the current logits, p0 that of the original ones, :math:`\ell` the loss of a sample, the mean over its
T labelled positions. They hold in every scope: on the head the gradient is multiplied by the features, deeper it is
back-propagated.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.gradients import IGNORE, classes, output_gradient, per_sample
from imu_ray.influence.scores import sample_losses
from imu_ray.scopes.base import OutputGradient
from imu_ray.scopes.seen import weigh


def ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""The gradient of minus the cross-entropy (arXiv:2508.01620): :math:`-(p - \mathrm{onehot}(y))`."""
    return -output_gradient(outputs, labels)


def bounded_ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent where the loss is below :math:`\ln C`, the loss of a uniform guess; 0 where it is above.

    The gradient of :math:`-\min(\ell, \ln C)`.
    """
    return _weighed(outputs, labels, original, sample_losses(outputs, labels) < math.log(outputs.shape[-1]))


@dataclass(frozen=True)
class NPO:
    r"""Negative preference optimisation (arXiv:2404.05868): ascent weighted down as a sample is forgotten.

    The gradient of :math:`\frac{2}{\beta T} \ln\bigl(1 + r\bigr)` with :math:`r = (\pi / \pi^0)^\beta` and :math:`\pi`
    the probability of the sample's labels together, which is that of :math:`-\ell` times :math:`2 r / (1 + r)`.
    """

    beta: float = 4.0
    token_beta: float = 0.1  # of sequences, whose tokens add up; as published

    def __call__(self, outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
        """Gradient in the shape of the outputs."""
        beta = self.beta if labels.ndim == 1 else self.token_beta
        log_ratio = (sample_losses(original, labels) - sample_losses(outputs, labels)) * _positions(labels)
        # 2 r / (1 + r) = 2 sigmoid(ln r), finite for any r.
        return _weighed(outputs, labels, original, 2 * torch.sigmoid(beta * log_ratio))


@dataclass(frozen=True)
class SimNPO:
    r"""NPO without the original model, by the mean over positions (arXiv:2410.07163).

    The gradient of :math:`\frac{2}{\beta} \ln\bigl(1 + e^{-\beta \ell - \gamma}\bigr)`, which is that of :math:`-\ell`
    times :math:`2 \, \mathrm{sigmoid}(-\beta \ell - \gamma)`.
    """

    beta: float = 2.5
    gamma: float = 0.0

    def __call__(self, outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
        """Gradient in the shape of the outputs."""
        weight = 2 * torch.sigmoid(-self.beta * sample_losses(outputs, labels) - self.gamma)
        return _weighed(outputs, labels, original, weight)


def renormalise(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the original prediction with the true class removed: :math:`p - q`.

    :math:`q = \mathrm{softmax}(z^0)` with :math:`z^0_y = -\infty`; from logits, because from probabilities it is 0/0
    where :math:`p^0_y` rounds to 1.
    """
    without = original.scatter(-1, classes(labels).unsqueeze(-1), -math.inf)
    return per_sample(torch.softmax(outputs, dim=-1) - torch.softmax(without, dim=-1), labels)


def row_mask(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent through the true class's logit: :math:`1 - p_y` at y, 0 elsewhere. No scalar loss has this gradient."""
    own = classes(labels).unsqueeze(-1)
    pull = ascent(outputs, labels, original)
    return torch.zeros_like(pull).scatter(-1, own, pull.gather(-1, own))


def uniform_target(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the uniform distribution: :math:`p - 1/C`."""
    return per_sample(torch.softmax(outputs, dim=-1) - 1 / outputs.shape[-1], labels)


def _weighed(outputs: Tensor, labels: Tensor, original: Tensor, weight_B: Tensor) -> Tensor:
    """Ascent, with a weight for each sample."""
    return weigh(ascent(outputs, labels, original), weight_B)


def _positions(labels: Tensor) -> Tensor | int:
    """T, the labelled positions of each sample."""
    return 1 if labels.ndim == 1 else (labels != IGNORE).sum(-1)


OBJECTIVES: dict[str, OutputGradient] = {
    "ascent": ascent,
    "bounded_ascent": bounded_ascent,
    "npo": NPO(),
    "renormalise": renormalise,
    "row_mask": row_mask,
    "simnpo": SimNPO(),
    "uniform_target": uniform_target,
}
