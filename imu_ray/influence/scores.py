"""Influence of each sample, from what the head saw."""

import torch
from torch import Tensor

from imu_ray.influence import targets
from imu_ray.influence.gradients import IGNORE, LayerIO, shares
from imu_ray.influence.projection import of_positions


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
    r"""Loss of each sample, ``[B]`` float64: of a class :math:`-\log p_{i,y_i}`, of a sequence their mean.

    Of other targets: ``targets.losses``.
    """
    if labels.is_floating_point():
        return targets.losses(logits, labels)
    if labels.ndim == 1:
        return torch.nn.functional.cross_entropy(logits.double(), labels, reduction="none")
    return (position_losses(logits, labels) * shares(labels)).sum(1)


def relative_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """The loss of each sample in units of its scale, so that class weights do not count, ``[B]`` float64."""
    found = sample_losses(logits, labels)
    return found / targets.scales(labels) if labels.is_floating_point() else found


def position_losses(logits: Tensor, labels: Tensor) -> Tensor:
    """Cross-entropy at each position, ``[B, T]`` float64; 0 without a label."""
    return of_positions(_position_losses, logits, labels)


def predicted_classes(outputs: Tensor) -> Tensor:
    """The likeliest class at each position, ``[B, T]``."""
    return of_positions(lambda logits: logits.argmax(-1), outputs)


def losses_and_classes(outputs: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Both at each position, from one making of the logits."""

    def both(logits: Tensor, labels: Tensor) -> Tensor:
        return torch.stack([_position_losses(logits, labels), logits.argmax(-1).double()], -1)

    losses, predicted = of_positions(both, outputs, labels).unbind(-1)
    return losses, predicted.long()


def _position_losses(logits: Tensor, labels: Tensor) -> Tensor:
    each = torch.nn.functional.cross_entropy(
        logits.double().flatten(0, 1), labels.flatten(), reduction="none", ignore_index=IGNORE
    )
    return each.view(labels.shape)


def margins(logits_BC: Tensor, labels_B: Tensor) -> Tensor:
    r"""Margin :math:`z_y - \ln \sum_{c \ne y} e^{z_c}` of each sample, the log-odds of its class, ``[B]``, float64."""
    own = labels_B.unsqueeze(1)
    logits = logits_BC.double()
    others = logits.scatter(1, own, -torch.inf)
    return (logits.gather(1, own) - others.logsumexp(1, keepdim=True)).squeeze(1)


def membership_signals(logits_BC: Tensor, labels_B: Tensor) -> dict[str, Tensor]:
    r"""What attacks tell members by, ``[B]`` float64 each, and the predicted class, int64.

    ``confidence`` :math:`p_y`, in [0, 1]; ``entropy`` :math:`-\sum_c p_c \ln p_c` in :math:`[0, \ln C]`;
    ``modified_entropy`` :math:`-(1 - p_y) \ln p_y - \sum_{c \ne y} p_c \ln(1 - p_c)` in :math:`[0, \infty)`, nats;
    ``margin`` (``margins``). Members have more confidence and margin, and less entropy of either kind.

    Source: Song and Mittal, Systematic Evaluation of Privacy Risks of Machine Learning Models, USENIX Security 2021.
    """
    own, predicted = labels_B.unsqueeze(1), logits_BC.argmax(1)
    log_BC = torch.log_softmax(logits_BC.double(), 1)
    chance_BC, margin_B = log_BC.exp(), margins(logits_BC, labels_B)
    # 1 - p has no digits left where p is almost 1, which only the largest can be: its log-odds have them all.
    rest_BC = torch.log1p(-chance_BC.clamp_max(0.5))
    first = predicted.unsqueeze(1)
    rest_BC = rest_BC.scatter(1, first, torch.nn.functional.logsigmoid(-margins(logits_BC, predicted)).unsqueeze(1))
    others_BC = (chance_BC * rest_BC).scatter(1, own, 0.0)
    own_log_B = log_BC.gather(1, own).squeeze(1)
    return {
        "confidence": own_log_B.exp(),
        "entropy": -(chance_BC * log_BC.clamp_min(torch.finfo(log_BC.dtype).min)).sum(1),
        "modified_entropy": -(torch.sigmoid(-margin_B) * own_log_B) - others_BC.sum(1),
        "margin": margin_B,
        "predicted": predicted,
    }
