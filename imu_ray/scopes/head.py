"""The scope of a classifier's last linear layer, as one matrix over cached features.

Shapes: B samples, C classes, D head inputs with the bias input included, F features without it.
"""

import copy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from imu_ray.influence.gradients import HEAD_DTYPE, layer_inputs
from imu_ray.models.layers import linear_layers


@dataclass(frozen=True)
class Head:
    """A linear classifier head as one matrix ``[C, D]``, float64, on the CPU; the bias, if any, is its last column."""

    name: str
    matrix_CD: Tensor
    has_bias: bool

    @classmethod
    def of(cls, model: nn.Module, name: str) -> "Head":
        """A copy of the head of ``model``."""
        layer = linear_layers(model)[name]
        columns = [layer.weight.detach()] + ([layer.bias.detach().unsqueeze(1)] if layer.bias is not None else [])
        return cls(name, torch.cat([column.cpu().to(HEAD_DTYPE) for column in columns], dim=1), layer.bias is not None)

    def inputs(self, features_BF: Tensor) -> Tensor:
        """Head inputs ``[B, D]`` of features without the bias input ``[B, F]``; float64."""
        return layer_inputs(features_BF, self.has_bias)

    def logits(self, features_BF: Tensor, matrix_CD: Tensor | None = None) -> Tensor:
        """Logits ``[B, C]`` of cached features, under another matrix if one is given; float64, without copying the features."""
        matrix = self.matrix_CD if matrix_CD is None else matrix_CD
        width = features_BF.shape[1]
        # The head on the left: a third faster than features @ matrix.T where classes are few.
        product = (matrix[:, :width] @ features_BF.to(HEAD_DTYPE).T).T
        return product + matrix[:, -1] if self.has_bias else product

    def gradient(self, output_grads_BC: Tensor, features_BF: Tensor) -> Tensor:
        """Sum of the samples' head gradients ``[C, D]``, without copying the features."""
        weight = output_grads_BC.T @ features_BF.to(HEAD_DTYPE)
        return torch.cat([weight, output_grads_BC.sum(0).unsqueeze(1)], dim=1) if self.has_bias else weight


def with_head(model: nn.Module, head: Head) -> nn.Module:
    """A copy of the model with another head; every other tensor is bit-identical."""
    changed = copy.deepcopy(model)
    layer = linear_layers(changed)[head.name]
    with torch.no_grad():
        layer.weight.copy_(head.matrix_CD[:, : layer.in_features])
        if layer.bias is not None:
            layer.bias.copy_(head.matrix_CD[:, -1])
    return changed
