"""Influence of each sample, from what the head saw."""

import torch
from torch import Tensor

from imu_ray.influence.gradients import IGNORE, LayerIO, position_slices, shares


def influence_scores(layer_io: LayerIO, direction_CD: Tensor) -> Tensor:
    r"""Influence of each sample on the mean forget-set loss, at fixed features.

    .. math:: I_i = -\langle g_i,\,(F + \lambda)^{-1}\,\bar g \rangle = -\sum_t r_{it}^\top M h_{it}

    Args:
        layer_io: inputs ``[B, T, D]`` and output gradients ``[B, T, C]``; T = 1 for a classifier.
        direction_CD: damped mean gradient M, ``[C, D]``, float64.

    Returns:
        Scores ``[B]``, float64; negative: training on the sample lowered the forget-set loss.

    Source: Fan et al., IMU, arXiv:2508.01620.
    """
    pull = (direction_CD @ layer_io.inputs_BTD.flatten(0, 1).T).T  # faster this way round where classes are few
    return -(layer_io.output_grads_BTC.flatten(0, 1) * pull).sum(1).view(layer_io.output_grads_BTC.shape[:2]).sum(1)


def sample_losses(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Cross-entropy :math:`-\log p_{i,y_i}` of each sample, ``[B]`` float64; of a sequence their mean."""
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return (position_losses(logits, labels) * shares(labels)).sum(1)


def position_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at each position, ``[B, T]`` float64; 0 without a label."""
    each = [
        torch.nn.functional.cross_entropy(
            logits[:, part].double().flatten(0, 1), labels[:, part].flatten(), reduction="none", ignore_index=IGNORE
        ).view(len(labels), -1)
        for part in position_slices(logits)
    ]
    return torch.cat(each, 1)


def margins(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    r"""Margin :math:`z_y - \ln \sum_{c \ne y} e^{z_c}` of each sample, the log-odds of its class, ``[B]``, float64."""
    own = labels_B.unsqueeze(1)
    logits = logits_BC.double()
    others = logits.scatter(1, own, -torch.inf)
    return (logits.gather(1, own) - others.logsumexp(1, keepdim=True)).squeeze(1)
