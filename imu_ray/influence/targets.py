r"""What a sample's target makes of its logits z: loss, gradient, Hessian, and labels drawn from the model.

A target is a label with the class weights in it (``target_of``), and its form says which loss is meant:

- classes ``[B]``, or ``[B, T]`` of sequences, int64: the cross-entropy :math:`-\ln p_y`;
- shares ``[B, C]``, of soft labels or of a weighted class: :math:`-\sum_c \tau_c \ln p_c`;
- pairs ``[B, C, 2]``, of several labels a sample: :math:`-\sum_c a_c \ln \sigma(z_c) + b_c \ln \sigma(-z_c)`.

This module is of the latter two, in float64; those of classes are beside it, in ``gradients`` and ``scores``. p is the
softmax, :math:`\sigma` the logistic function.
"""

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional


class LogitHessian(NamedTuple):
    r"""Hessian of each sample's loss in its logits, ``[..., C]`` each: :math:`\mathrm{diag}(d) - u u^\top`.

    ``variances`` are its diagonal :math:`d - u \circ u` without the rounding of that difference.
    """

    variances: Tensor
    diagonal: Tensor
    factor: Tensor

    @classmethod
    def of_probabilities(cls, p: Tensor) -> "LogitHessian":
        r"""Of the plain cross-entropy: :math:`\mathrm{diag}(p) - p p^\top`."""
        return cls(p * (1 - p), p, p)


def target_of(labels: Tensor, kind: str, class_weights: Sequence[float] | None) -> Tensor:
    r"""The target of labels as they are stored.

    Args:
        labels: classes ``[B]`` (``class``), probabilities ``[B, C]`` that sum to 1 (``soft``), or zeros and ones
            ``[B, C]`` (``multi_label``).
        kind: ``forget_set.target``.
        class_weights: w, C positive numbers: of ``class`` and ``soft`` as ``CrossEntropyLoss(weight=w)`` takes them,
            :math:`\tau_c = w_c t_c`; of ``multi_label`` as ``BCEWithLogitsLoss(pos_weight=w)``, :math:`a_c = w_c t_c /
            C` and :math:`b_c = (1 - t_c) / C`, so that a sample's loss is the mean over its labels.

    Returns:
        Classes as they are where they have no weights; else shares or pairs, float64.
    """
    if kind == "class" and class_weights is None:
        return labels
    if kind == "class":
        labels = functional.one_hot(labels, len(class_weights or ()))
    shares = labels.double()
    weighted = shares if class_weights is None else shares * shares.new_tensor(class_weights)
    return weighted if kind != "multi_label" else torch.stack([weighted, 1 - shares], -1) / shares.shape[-1]


def has_positions(labels: Tensor) -> bool:
    """Whether labels, or targets, are those of sequences: a class at each position."""
    return labels.ndim > 1 and not labels.is_floating_point()


def scales(target: Tensor) -> Tensor:
    r"""What a sample counts, ``[B]``: :math:`\sum_c \tau_c` or :math:`\sum_c a_c + b_c`.

    A uniform guess has a loss of this times ``guess_loss``; without class weights it is 1.
    """
    return target.flatten(1).sum(1)


def guess_loss(target: Tensor, classes: int) -> float:
    r"""The loss of a uniform guess on a sample of scale 1, nats: :math:`\ln C`, or :math:`\ln 2` of pairs."""
    return math.log(2 if target.ndim == 3 else classes)


def losses(logits: Tensor, target: Tensor) -> Tensor:
    """Loss of each sample, ``[B]``."""
    if target.ndim == 2:
        return functional.cross_entropy(logits.double(), target, reduction="none")
    of_labels = torch.stack([functional.logsigmoid(logits.double()), functional.logsigmoid(-logits.double())], -1)
    return -(target * of_labels).sum((1, 2))


def gradient(logits: Tensor, target: Tensor) -> Tensor:
    r"""Gradient of each sample's loss in its logits, ``[B, C]``, exact for confident samples.

    Of shares :math:`r_c = s p_c - \tau_c` with :math:`s = \sum_c \tau_c`, of the largest share minus the sum of the
    others; of pairs :math:`r_c = b_c \sigma(z_c) - a_c \sigma(-z_c)`.
    """
    if target.ndim == 3:
        return target[..., 1] * torch.sigmoid(logits.double()) - target[..., 0] * torch.sigmoid(-logits.double())
    pull = torch.softmax(logits.double(), -1) * scales(target).unsqueeze(1) - target
    largest = target.argmax(1, keepdim=True)
    pull = pull.scatter(1, largest, 0.0)
    return pull.scatter(1, largest, -pull.sum(1, keepdim=True))


def hessian(logits: Tensor, target: Tensor) -> LogitHessian:
    r"""Hessian of each sample's loss in its logits.

    Of shares :math:`s (\mathrm{diag}(p) - p p^\top)`; of pairs :math:`\mathrm{diag}((a + b) \sigma (1 - \sigma))`.
    """
    if target.ndim == 3:
        variances = target.sum(-1) * torch.sigmoid(logits.double()) * torch.sigmoid(-logits.double())
        return LogitHessian(variances, variances, torch.zeros_like(variances))
    p, scale = torch.softmax(logits.double(), -1), scales(target).unsqueeze(1)
    return LogitHessian(scale * p * (1 - p), scale * p, scale.sqrt() * p)


def position_hessian(logits: Tensor, target: Tensor) -> LogitHessian | None:
    """That of a head, which has one position, ``[B, 1, C]``; None of classes, whose gradient tells it."""
    if not target.is_floating_point():
        return None
    return LogitHessian(*(part.unsqueeze(1) for part in hessian(logits, target)))


def drawn_gradient(logits: Tensor, target: Tensor, drawn: Tensor) -> Tensor:
    r"""A pull ``[B, C]`` with mean 0 whose second moment, over labels drawn from the model, is the Hessian.

    :math:`\sqrt s\,(p - \mathrm{onehot}(\hat y))` with a class :math:`\hat y` of ``drawn`` ``[B]``; of pairs
    :math:`\sqrt{a_c + b_c}\,(\sigma_c - \hat y_c)` with ``drawn`` zeros and ones ``[B, C]``.
    """
    if target.ndim == 3:
        signs = torch.where(drawn > 0, logits.double(), -logits.double())  # sigma - 1 is -sigma(-z)
        return target.sum(-1).sqrt() * torch.sigmoid(-signs) * torch.where(drawn > 0, -1.0, 1.0)
    shares = functional.one_hot(drawn, logits.shape[-1]).double()
    return gradient(logits, shares) * scales(target).sqrt().unsqueeze(1)
