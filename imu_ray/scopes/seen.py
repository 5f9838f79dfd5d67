"""What a layer inside a model saw of a block, and the statistics of its samples' gradients."""

import functools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import cast

import torch
from torch import Tensor, nn

from imu_ray.influence.curvature.base import Moments, merge_tree
from imu_ray.influence.gradients import PAIRED, gradient_sum
from imu_ray.influence.layer_io import Layer, pieces, sample_gradients, sizes_of, squared_gradient_norms, weights_of
from imu_ray.models.copies import plain_copy


@dataclass(frozen=True)
class Seen:
    """What a layer was called with, and the gradient of each sample's own loss with respect to what it gave."""

    name: str
    layer: Layer
    inputs: Tensor
    output_grads: Tensor


def layer_moments(layer: Layer, inputs: Tensor, output_grads: Tensor) -> Moments:
    """``Moments.of`` a block of any layer: products and sums over the block in the inputs' type, float32 at least."""
    positions = output_grads[0].numel() // sizes_of(layer)[0]
    if positions <= PAIRED:
        outputs, width = sizes_of(layer)
        numbers = positions**2 * (outputs + width * getattr(layer, "groups", 1))
        found = merge_tree(map(Moments.of, pieces(layer, inputs, output_grads, numbers)))
        return Moments(found.count, found.gradient_sum_CD.double(), found.squared_sum_CD.double())
    total = functools.reduce(torch.add, map(gradient_sum, pieces(layer, inputs, output_grads)))
    squares = torch.zeros_like(total)
    for gradients in sample_gradients(layer, inputs, output_grads):
        for gradient in gradients:
            squares.addcmul_(gradient, gradient)
    return Moments(len(inputs), total.double(), squares.double())


def clipped(seen: Sequence[Seen], limit: float) -> list[Seen]:
    """With no sample's gradient over all layers beyond a norm."""
    found = [squared_gradient_norms(each.layer, each.inputs, each.output_grads) for each in seen]
    norms = torch.stack(found).sum(0).sqrt()
    scale = torch.where(norms > limit, limit / norms, 1.0)  # of two zeros, not their quotient
    return [replace(each, output_grads=weigh(each.output_grads, scale)) for each in seen]


def layer_of(model: nn.Module, name: str) -> Layer:
    """A layer by name, which was chosen for being one."""
    return cast(Layer, model.get_submodule(name))


def with_parameters(model: nn.Module, parameters: Mapping[str, Tensor]) -> nn.Module:
    """A copy of a model with other matrices of some layers; every other tensor is bit-identical."""
    changed = plain_copy(model)
    with torch.no_grad():
        for name, matrix in parameters.items():
            layer = layer_of(changed, name)
            for key, weight in weights_of(layer, matrix).items():
                getattr(layer, key).copy_(weight)
    return changed


def weigh(pull: Tensor, share: Tensor) -> Tensor:
    """Each sample's pull, or that at each of its positions, times its share."""
    return pull * share.to(pull).view(*share.shape, *[1] * (pull.ndim - share.ndim))
