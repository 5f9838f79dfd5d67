"""Per-sample gradients of a linear layer in closed form, without storing one.

Shapes: B samples, T positions (1 for a classifier), D inputs of the layer with the bias input included, C outputs.
All head arithmetic is float64: it costs well under a hundredth of the forward pass and takes rounding out of the
question.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence import targets
from imu_ray.influence.projection import pull_of_positions
from imu_ray.influence.targets import LogitHessian, has_positions

HEAD_DTYPE = torch.float64
IGNORE = -100  # the label of a position without one
PAIRED = 5  # positions of a sample up to which products of pairs of them are the fastest way to the squares


@dataclass(frozen=True)
class LayerIO:
    """What a linear layer saw: inputs ``[B, T, D]`` and the loss's gradients in its outputs ``[B, T, C]``.

    Of a convolution with G groups, ``[G, B, T, D]`` and ``[G, B, T, C / G]``. Of a head whose loss is another than the
    plain cross-entropy there is the loss's ``hessian`` in its outputs, ``[B, T, C]``, which gradients do not tell.
    """

    inputs_BTD: Tensor
    output_grads_BTC: Tensor
    hessian: LogitHessian | None = None


def layer_inputs(features_BD: Tensor, has_bias: bool) -> Tensor:
    """Features in float64, with the bias input if there is a bias."""
    inputs = features_BD.to(HEAD_DTYPE)
    return with_bias_input(inputs) if has_bias else inputs


def with_bias_input(inputs: Tensor) -> Tensor:
    """Inputs with the 1 that stands for the bias appended; the only place that does so."""
    return torch.cat([inputs, inputs.new_ones(*inputs.shape[:-1], 1)], dim=-1)


def output_gradient(logits: Tensor, labels: Tensor) -> Tensor:
    r"""Gradient of the loss with respect to the logits, exact for confident samples.

    .. math:: r_c = p_c \;(c \ne y), \qquad r_y = -\sum_{c \ne y} p_c

    The textbook :math:`p_y - 1` loses every digit when :math:`p_y` rounds to 1. The loss of a sample with several
    positions is the mean over those that have a label. Of other targets: ``targets.gradient``.

    Args:
        logits: ``[B, C]`` or ``[B, T, C]``.
        labels: class indices ``[B]`` or ``[B, T]``, int64, ``IGNORE`` where a position has none; or another target.

    Returns:
        In the shape of the logits, float64; of several positions in the logits' type, float32 at least, because float64
        would take several times the memory and the time. 0 where a position has no label. Of projected logits in the
        shape of what the output layer sees.
    """
    if labels.is_floating_point():
        return targets.gradient(logits, labels)
    if logits.ndim == 2:
        return _output_gradient(logits, labels)
    dtype = torch.promote_types(logits.dtype, torch.float32)

    def pull(logits: Tensor, labels: Tensor, share: Tensor) -> Tensor:
        return _output_gradient(logits, labels, dtype).mul_(share)

    return pull_of_positions(pull, logits, labels, shares(labels).to(dtype).unsqueeze(-1))


def _output_gradient(logits: Tensor, labels: Tensor, dtype: torch.dtype = HEAD_DTYPE) -> Tensor:
    """Of each position by itself."""
    gradient = torch.softmax(logits, dim=-1, dtype=dtype)
    own = classes(labels).unsqueeze(-1)
    gradient.scatter_(-1, own, 0.0)
    return gradient.scatter_(-1, own, -gradient.sum(dim=-1, keepdim=True))


def classes(labels: Tensor) -> Tensor:
    """Labels that an index takes: 0 where a position has none; of a weighted class the class."""
    if labels.is_floating_point():
        return labels.argmax(-1)
    return labels.clamp_min(0) if labels.ndim > 1 else labels


def per_sample(pull: Tensor, labels: Tensor) -> Tensor:
    """Pulls on ``[B, T, C]`` as those of each sample's mean over its labels; those on ``[B, C]`` by its scale."""
    if labels.is_floating_point():
        return pull * targets.scales(labels).to(pull).unsqueeze(-1)
    return pull * shares(labels).to(pull).unsqueeze(-1) if has_positions(labels) else pull


def shares(labels: Tensor) -> Tensor:
    """What each position counts in its sample's mean, ``[B, T]`` float64; 0 without a label."""
    labelled = (labels != IGNORE).to(HEAD_DTYPE)
    return labelled / labelled.sum(-1, keepdim=True).clamp_min(1)


def probabilities(output_grads_BTC: Tensor) -> Tensor:
    r"""Softmax probabilities from output gradients: :math:`p_y = 1 + r_y`, the only negative; else :math:`p_c = r_c`.

    Where :math:`r = 0` throughout (a sample beyond the last digit), all are 0, which is right wherever only
    :math:`p_c (1 - p_c)` or :math:`p_c p_d` counts.
    """
    return torch.where(output_grads_BTC < 0, 1 + output_grads_BTC, output_grads_BTC)


def logit_hessian(layer_io: LayerIO) -> LogitHessian:
    """The loss's Hessian in the outputs of a head: as it is given, or by the probabilities that the gradients tell."""
    if layer_io.hessian is not None:
        return layer_io.hessian
    return LogitHessian.of_probabilities(probabilities(layer_io.output_grads_BTC))


def gradient_sum(layer_io: LayerIO) -> Tensor:
    r""":math:`\sum_i g_i = \sum_{i,t} r_{it} h_{it}^\top`, ``[C, D]``."""
    return torch.einsum("...btc,...btd->...cd", layer_io.output_grads_BTC, layer_io.inputs_BTD).flatten(0, -2)


def squared_gradient_sum(layer_io: LayerIO) -> Tensor:
    r""":math:`\sum_i g_i \circ g_i`, ``[C, D]``.

    For one position this is :math:`(R \circ R)^\top (H \circ H)`, and for a few the same over pairs of them:
    :math:`\sum_i \sum_{s,t} (r_{is} \circ r_{it}) (h_{is} \circ h_{it})^\top`. For more that takes longer than the
    gradients do, which are squared one after another in one buffer (memory ``2 C D``).
    """
    inputs, grads = layer_io.inputs_BTD, layer_io.output_grads_BTC
    positions = inputs.shape[-2]
    if positions <= PAIRED:
        if positions == 1:
            return (grads[..., 0, :].square().mT @ inputs[..., 0, :].square()).flatten(0, -2)
        first, second = torch.triu_indices(positions, positions, device=inputs.device)
        twice = (1.0 + (first < second)).to(inputs).unsqueeze(1)
        of_inputs = (inputs[..., first, :] * inputs[..., second, :]).flatten(-3, -2)
        of_grads = (grads[..., first, :] * grads[..., second, :] * twice).flatten(-3, -2)
        # Where the terms of a square cancel, rounding may leave less than nothing.
        found: Tensor = (of_grads.mT @ of_inputs).flatten(0, -2)
        return found.clamp_min_(0)
    total = inputs.new_zeros(*grads.shape[:-3], grads.shape[-1], inputs.shape[-1])
    for sample_inputs, sample_grads in zip(inputs.unbind(-3), grads.unbind(-3), strict=True):
        total += (sample_grads.mT @ sample_inputs).square_()
    return total.flatten(0, -2)


def gradient_norms(layer_io: LayerIO) -> Tensor:
    r"""Norm of each sample's gradient, ``[B]``; :math:`\|r_i\| \, \|h_i\|` where T is 1."""
    if layer_io.inputs_BTD.ndim == 3 and layer_io.inputs_BTD.shape[1] == 1:
        outputs, inputs = layer_io.output_grads_BTC.flatten(1), layer_io.inputs_BTD.flatten(1)
        product: Tensor = torch.linalg.vector_norm(outputs, dim=1) * torch.linalg.vector_norm(inputs, dim=1)
        return product
    gradients = torch.einsum("...btc,...btd->b...cd", layer_io.output_grads_BTC, layer_io.inputs_BTD)
    norms: Tensor = torch.linalg.vector_norm(gradients.flatten(1), dim=1)
    return norms
