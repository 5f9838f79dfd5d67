r"""What each objective does to a sample's outputs: the gradient that a descent step is taken along.

Every objective maps current logits ``[B, C]`` or ``[B, T, C]``, targets and the logits before unlearning to a gradient
in the shape of the logits, float64 (at many positions in their type, float32 at least). Not every useful one is the
gradient of a loss. p is the softmax of the current logits, p0 that of the original ones, :math:`\ell` the loss of a
sample, the mean over its T labelled positions. Of outputs that are made in slices (``influence.projection``) the
gradient is that in what the output layer sees. They hold in every scope: on the head the gradient is multiplied by the
features, deeper it is back-propagated.

Targets are classes ``[B]`` or ``[B, T]``, or another form of ``influence.targets``. There :math:`\ell` is the loss in
units of the sample's scale s, and the gradient is s times that of the objective: class weights say how much a sample
counts, not when it is forgotten. Of several labels a sample :math:`\ell` is the mean over them.
"""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.gradients import IGNORE, classes, output_gradient, per_sample
from imu_ray.influence.projection import pull_of_positions
from imu_ray.influence.scores import relative_losses
from imu_ray.influence.targets import guess_loss, has_positions
from imu_ray.scopes.base import OutputGradient
from imu_ray.scopes.seen import weigh


def ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""The gradient of minus the cross-entropy (arXiv:2508.01620): :math:`-(p - \mathrm{onehot}(y))`."""
    return -output_gradient(outputs, labels)


def bounded_ascent(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent where the loss is below :math:`\ln C`, the loss of a uniform guess; 0 where it is above.

    The gradient of :math:`-\min(\ell, \ln C)`; of several labels a sample with :math:`\ln 2`.
    """
    below = relative_losses(outputs, labels) < guess_loss(labels, outputs.shape[-1])
    return _weighed(outputs, labels, original, below)


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
        beta = self.token_beta if has_positions(labels) else self.beta
        log_ratio = (relative_losses(original, labels) - relative_losses(outputs, labels)) * _positions(labels)
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
        weight = 2 * torch.sigmoid(-self.beta * relative_losses(outputs, labels) - self.gamma)
        return _weighed(outputs, labels, original, weight)


def renormalise(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the original prediction with the true class removed: :math:`p - q`.

    :math:`q = \mathrm{softmax}(z^0)` with :math:`z^0_y = -\infty`; from logits, because from probabilities it is 0/0
    where :math:`p^0_y` rounds to 1.
    """

    def pull(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
        without = original.scatter(-1, classes(labels).unsqueeze(-1), -math.inf)
        return _softmax(outputs) - _softmax(without)

    return per_sample(pull_of_positions(pull, outputs, labels, original), labels)


def row_mask(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Ascent through the true class's logit: :math:`1 - p_y` at y, 0 elsewhere. No scalar loss has this gradient."""

    def pull(outputs: Tensor, labels: Tensor) -> Tensor:
        own = classes(labels).unsqueeze(-1)
        whole = -output_gradient(outputs, labels)
        return torch.zeros_like(whole).scatter(-1, own, whole.gather(-1, own))

    def at_positions(outputs: Tensor, labels: Tensor) -> Tensor:
        return pull(outputs.flatten(0, 1), classes(labels).flatten()).view(outputs.shape)

    if not has_positions(labels):
        return pull(outputs, labels)
    return per_sample(pull_of_positions(at_positions, outputs, labels), labels)


def uniform_target(outputs: Tensor, labels: Tensor, original: Tensor) -> Tensor:
    r"""Cross-entropy to the uniform distribution: :math:`p - 1/C`; of several labels :math:`(\sigma - 1/2) / C`."""
    if labels.ndim == 3:
        return per_sample((torch.sigmoid(outputs) - 0.5) / outputs.shape[-1], labels)
    pull = pull_of_positions(lambda logits: _softmax(logits) - 1 / logits.shape[-1], outputs)
    return per_sample(pull, labels)


def _softmax(logits: Tensor) -> Tensor:
    return torch.softmax(logits, dim=-1, dtype=torch.promote_types(logits.dtype, torch.float32))


def _weighed(outputs: Tensor, labels: Tensor, original: Tensor, weight_B: Tensor) -> Tensor:
    """Ascent, with a weight for each sample."""
    return weigh(ascent(outputs, labels, original), weight_B)


def _positions(labels: Tensor) -> Tensor | int:
    """T, the labelled positions of each sample."""
    return (labels != IGNORE).sum(-1) if has_positions(labels) else 1


OBJECTIVES: dict[str, OutputGradient] = {
    "ascent": ascent,
    "bounded_ascent": bounded_ascent,
    "npo": NPO(),
    "renormalise": renormalise,
    "row_mask": row_mask,
    "simnpo": SimNPO(),
    "uniform_target": uniform_target,
}
# Those of one true class a sample.
OF_CLASSES = frozenset({"renormalise", "row_mask"})
