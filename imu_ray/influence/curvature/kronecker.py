r"""Kronecker-factored curvature of the head: :math:`F \approx G \otimes A` (Martens and Grosse, arXiv:1503.05671).

For a linear head A is the second moment of its inputs and G that of the gradient with respect to its outputs, expected
under the model's own predictions, of n samples with T positions each (Eschenhagen et al., arXiv:2311.00636, "expand"):

.. math:: A = \frac1{nT} \sum_{i,t} h_{it} h_{it}^\top, \qquad
          G = \frac1n \sum_{i,t} \mathrm{diag}(p_{it}) - p_{it} p_{it}^\top

Shapes: C classes, D head inputs with the bias input.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from imu_ray.influence.curvature.base import Damping, Reduce
from imu_ray.influence.gradients import LayerIO, probabilities


@dataclass(frozen=True)
class FactorSums:
    """Numbers of samples and of their positions, and sums of both factors; float64."""

    count: int
    positions: int
    outputs_CC: Tensor
    inputs_DD: Tensor

    @classmethod
    def of(cls, layer_io: LayerIO) -> "FactorSums":
        """Sums of one block."""
        inputs = layer_io.inputs_BTD.flatten(0, 1)
        p = probabilities(layer_io.output_grads_BTC).flatten(0, 1)
        return cls(len(layer_io.inputs_BTD), len(inputs), torch.diag(p.sum(0)) - p.T @ p, inputs.T @ inputs)

    def merge(self, other: "FactorSums") -> "FactorSums":
        """Sums of both."""
        return FactorSums(
            self.count + other.count,
            self.positions + other.positions,
            self.outputs_CC + other.outputs_CC,
            self.inputs_DD + other.inputs_DD,
        )


@dataclass(frozen=True)
class DampedKronecker:
    r""":math:`(G \otimes A + \lambda)^{-1}` in the eigenbases of both factors, exact for the product."""

    outputs_CC: Tensor
    inputs_DD: Tensor
    eigenvalues_CD: Tensor
    damping: float

    @property
    def figures(self) -> dict[str, float]:
        """The damping."""
        return {"damping": self.damping}

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """The damped inverse times a gradient."""
        turned = self.outputs_CC.T @ gradient_CD @ self.inputs_DD / (self.eigenvalues_CD + self.damping)
        return self.outputs_CC @ turned @ self.inputs_DD.T


class KFAC:
    """Both factors in one round."""

    def fit(self, reduce: Reduce[FactorSums], damping: Damping) -> DampedKronecker:
        """Fit on the samples behind ``reduce``."""
        sums = reduce(FactorSums.of)
        outputs, outputs_basis = torch.linalg.eigh(sums.outputs_CC / sums.count)
        inputs, inputs_basis = torch.linalg.eigh(sums.inputs_DD / sums.positions)
        eigenvalues = torch.outer(outputs.clamp_min(0), inputs.clamp_min(0))
        return DampedKronecker(outputs_basis, inputs_basis, eigenvalues, damping.of(eigenvalues))
