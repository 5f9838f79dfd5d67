"""Quantisation: whether forgotten answers come back where the weights are rounded to few bits."""

from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from imu_ray.audits.relearning import mean_figures
from imu_ray.influence.layer_io import kind_of
from imu_ray.models.copies import plain_copy
from imu_ray.tasks.base import Batch, Task

BITS = (8, 4)


def rounded(weight: Tensor, bits: int, channel: int) -> Tensor:
    r"""A weight on the grid that so many bits have, each output channel with its own.

    .. math:: \hat w = s_c \, \mathrm{round}(w / s_c), \qquad s_c = \frac{\max_j |w_{cj}|}{2^{b-1} - 1}

    Symmetric, to the nearest (of two the even one). With as many bits as the weight's own type, or more, there is
    nothing to round, and the weight is as it was.

    Args:
        weight: any shape.
        bits: b, 2 or more.
        channel: which of its dimensions counts the output channels.
    """
    if bits >= 8 * weight.itemsize:
        return weight
    rows = weight.detach().double().movedim(channel, 0)
    largest = rows.flatten(1).abs().amax(1).view(-1, *[1] * (rows.ndim - 1))
    scale = largest / (2 ** (bits - 1) - 1)
    grid = torch.where(scale > 0, (rows / scale).round() * scale, 0.0)
    return grid.movedim(0, channel).to(weight.dtype)


def quantised(model: nn.Module, bits: int) -> nn.Module:
    """A copy whose linear and convolutional layers have ``rounded`` weights, in their own type; all else is as it was.

    A weight that such a layer shares with an embedding is rounded for both. Transposed convolutions have their output
    channels second, Hugging Face's ``Conv1D`` last.
    """
    copied = plain_copy(model)
    done = set[int]()
    for module in copied.modules():
        kind = kind_of(module)
        if kind is None and not isinstance(module, nn.modules.conv._ConvNd):
            continue
        weight = module.weight
        if not isinstance(weight, nn.Parameter) or not weight.is_floating_point() or id(weight) in done:
            continue
        transposed = getattr(module, "transposed", kind is not None and kind.__name__ == "Conv1D")
        with torch.no_grad():
            weight.copy_(rounded(weight, bits, 1 if transposed else 0))
        done.add(id(weight))
    return copied


def quantisation(model: nn.Module, task: Task, measured: Mapping[str, Iterable[Batch]]) -> dict[str, Any]:
    """By number of bits the figures of ``quantised`` models: on the ``forget`` rows, and below other sets' names.

    Accuracy is in [0, 1]. Rounding undoes a small change of the weights: where the forgotten answers come back while
    the other set stays as it was, the change was smaller than the grid.

    Source: Zhang et al., arXiv:2410.16454.
    """
    found = {}
    for bits in BITS:
        changed = quantised(model, bits)
        figures = {name: mean_figures(changed, task, sample) for name, sample in measured.items()}
        found[str(bits)] = figures.pop("forget") | figures
    return found
