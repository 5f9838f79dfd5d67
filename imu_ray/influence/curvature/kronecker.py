r"""Kronecker-factored curvature of a layer: :math:`F \approx G \otimes A` (Martens and Grosse, arXiv:1503.05671).

A is the second moment of the layer's inputs and G that of the gradient with respect to its outputs, of n samples with
T positions each (for convolutions Grosse and Martens, arXiv:1602.01407; "expand" of Eschenhagen et al.,
arXiv:2311.00636):

.. math:: A = \frac1{nT} \sum_{i,t} h_{it} h_{it}^\top, \qquad G = \frac1n \sum_{i,t} \mathrm{E}[g_{it} g_{it}^\top]

The expectation is over labels that follow the model's own predictions. For the head it has a closed form, the Hessian
in the logits, of the plain cross-entropy :math:`\mathrm{diag}(p_{it}) - p_{it} p_{it}^\top`; a layer further inside
takes one label per sample, drawn (of other losses ``targets.drawn_gradient``).

Shapes: C outputs, D inputs with the bias input; of one group, after a leading dimension where a layer has groups.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from imu_ray.errors import NonFiniteError
from imu_ray.influence.curvature.base import Damping, Reduce
from imu_ray.influence.gradients import HEAD_DTYPE, LayerIO, logit_hessian
from imu_ray.influence.layer_io import Layer, pieces

# Of the factors while they are solved: their sum, its part that is not 0, its eigenvectors, and twice that to work.
COPIES = 5
STRIP = 256  # columns of a factor that are multiplied at once


def uniform_draws(ids: Sequence[str], seed: int, positions: int = 0) -> Tensor:
    """A number in [0, 1) of every sample, ``[B]`` float64, or position, ``[B, T]``, from its id and the seed alone."""
    if positions:
        streams = [hashlib.shake_128(f"{seed}:{sample_id}".encode()).digest(8 * positions) for sample_id in ids]
        numbers = np.frombuffer(b"".join(streams), ">u8").reshape(-1, positions) >> np.uint64(11)
        return torch.from_numpy(numbers.astype(np.float64) / 2**53)
    digests = (hashlib.blake2b(f"{seed}:{sample_id}".encode(), digest_size=8).digest() for sample_id in ids)
    return torch.tensor([(int.from_bytes(digest, "big") >> 11) / 2**53 for digest in digests], dtype=torch.float64)


def sampled_labels(logits: Tensor, draws: Tensor) -> Tensor:
    """Labels ``[...]`` from logits ``[..., C]``: the first class whose cumulated probability exceeds the draw."""
    cumulated = torch.softmax(logits.detach().to(HEAD_DTYPE), dim=-1).cumsum(-1)
    reached = draws.to(cumulated).unsqueeze(-1) * cumulated[..., -1:]
    return (cumulated[..., :-1] <= reached).sum(-1)


def second_moment(rows: Tensor) -> Tensor:
    """``[..., D, D]`` from ``[..., n, D]``: the lower triangle in strips, and its mirror image."""
    width = rows.shape[-1]
    product = rows.new_empty(*rows.shape[:-2], width, width)
    for start in range(0, width, STRIP):
        strip = slice(start, start + STRIP)
        below = rows[..., start:].mT @ rows[..., strip]
        product[..., start:, strip] = below
        product[..., strip, start:] = below.mT
    return product


@dataclass(frozen=True)
class FactorSums:
    """Numbers of samples and of their positions, and sums of both factors; float64."""

    count: int
    positions: int
    outputs_CC: Tensor
    inputs_DD: Tensor

    @classmethod
    def of(cls, layer_io: LayerIO) -> "FactorSums":
        """Sums of one block of the head, with the exact factor of the outputs."""
        inputs = layer_io.inputs_BTD.flatten(0, 1)
        _, diagonal, factor = (part.flatten(0, 1) for part in logit_hessian(layer_io))
        outputs = torch.diag(diagonal.sum(0)) - factor.T @ factor
        return cls(len(layer_io.inputs_BTD), len(inputs), outputs, inputs.T @ inputs)

    @classmethod
    def of_layer(cls, layer: Layer, inputs: Tensor, output_grads: Tensor, used: Tensor | None = None) -> "FactorSums":
        """Sums of one block of any layer: products in the inputs' type, float32 at least, added in float64.

        Args:
            layer: the layer.
            inputs: what it was called with, ``[B, ...]``.
            output_grads: gradient of each sample's own loss under a sampled label with respect to its outputs.
            used: which of the positions ``[B, T]`` of a linear layer are more than padding; None: all.
        """
        count = len(inputs)
        if used is not None:  # as samples of one position each
            inputs, output_grads = inputs[used], output_grads[used]
        positions = 0
        sums: list[Tensor] = []
        for layer_io in pieces(layer, inputs, output_grads):
            flat = [part.flatten(-3, -2) for part in (layer_io.output_grads_BTC, layer_io.inputs_BTD)]
            products = [second_moment(part) for part in flat]
            if sums:
                for total, product in zip(sums, products, strict=True):
                    total += product
            else:
                sums = [product.to(HEAD_DTYPE) for product in products]
            positions += flat[0].shape[-2]
        return cls(count, positions, *sums)

    def merge(self, other: "FactorSums") -> "FactorSums":
        """Sums of both."""
        return FactorSums(
            self.count + other.count,
            self.positions + other.positions,
            self.outputs_CC + other.outputs_CC,
            self.inputs_DD + other.inputs_DD,
        )

    @property
    def means(self) -> "FactorSums":
        """The factors themselves, as sums over one sample with one position."""
        return FactorSums(1, 1, self.outputs_CC / self.count, self.inputs_DD / self.positions)


@dataclass(frozen=True)
class Eigenbasis:
    """Eigenvectors of a factor within its K rows that are not 0, and the places of these; of groups a basis each."""

    places_K: Tensor
    basis_KK: Tensor
    eigenvalues_K: Tensor

    @classmethod
    def of(cls, sum_DD: Tensor, count: int) -> "Eigenbasis":
        """Of a factor as a sum: an input that was always 0 (padding, a dead unit) is an eigenvector by itself."""
        width = sum_DD.shape[-1]
        places = sum_DD.diagonal(dim1=-2, dim2=-1).reshape(-1, width).any(0).nonzero().squeeze(1)
        part = sum_DD if len(places) == width else sum_DD[..., places.unsqueeze(1), places]
        eigenvalues, basis = torch.linalg.eigh(part)
        return cls(places, basis, eigenvalues.clamp_min(0) / count)

    def to(self, device: torch.device) -> "Eigenbasis":
        """The same on a device."""
        return Eigenbasis(*(part.to(device) for part in vars(self).values()))


@dataclass(frozen=True)
class DampedKronecker:
    r""":math:`(G \otimes A + \lambda)^{-1}` in the eigenbases of both factors, exact for the product; not rescaled."""

    outputs: Eigenbasis
    inputs: Eigenbasis
    damping: float

    @classmethod
    def of(cls, sums: FactorSums, damping: Damping) -> "DampedKronecker":
        """Solve both factors; a relative damping is a share of the mean eigenvalue over the whole layer.

        Raises:
            NonFiniteError: a factor is NaN or infinite.
        """
        diagonals = [factor.diagonal(dim1=-2, dim2=-1) for factor in (sums.outputs_CC, sums.inputs_DD)]
        for diagonal in diagonals:
            if not torch.isfinite(diagonal).all():
                raise NonFiniteError(
                    f"a Kronecker factor of size {diagonal.shape[-1]} is NaN or infinite; expected finite inputs and "
                    "gradients of the layer; check the model's weights and the scale of its inputs"
                )
        diagonal = (diagonals[0] / sums.count).unsqueeze(-1) * (diagonals[1] / sums.positions).unsqueeze(-2)
        outputs, inputs = Eigenbasis.of(sums.outputs_CC, sums.count), Eigenbasis.of(sums.inputs_DD, sums.positions)
        return cls(outputs, inputs, damping.of(diagonal))

    @property
    def figures(self) -> dict[str, float]:
        """The damping."""
        return {"damping": self.damping}

    def apply_inverse(self, gradient_CD: Tensor) -> Tensor:
        """The damped inverse times a gradient, ``[C, D]`` of all groups."""
        outputs, inputs = self.outputs.to(gradient_CD.device), self.inputs.to(gradient_CD.device)
        gradient = gradient_CD.reshape(*outputs.basis_KK.shape[:-2], -1, gradient_CD.shape[-1])
        inverse, places = gradient / self.damping, (..., outputs.places_K.unsqueeze(1), inputs.places_K)
        eigenvalues = outputs.eigenvalues_K.unsqueeze(-1) * inputs.eigenvalues_K.unsqueeze(-2)
        turned = outputs.basis_KK.mT @ gradient[places] @ inputs.basis_KK / (eigenvalues + self.damping)
        inverse[places] = outputs.basis_KK @ turned @ inputs.basis_KK.mT
        return inverse.reshape(gradient_CD.shape)


def factor_bytes(outputs: int, width: int, groups: int = 1) -> int:
    """Bytes of both factors of a layer with a matrix ``[outputs, width]``."""
    return 8 * groups * ((outputs // groups) ** 2 + width**2)


def solve_bytes(outputs: int, width: int, groups: int = 1) -> int:
    """Bytes that the damped inverse of such a layer takes at most while it is made and applied in one process."""
    return COPIES * factor_bytes(outputs, width, groups) + COPIES * 8 * outputs * width


class KFAC:
    """Both factors in one round."""

    statistics = FactorSums.of

    def memory(self, outputs: int, width: int) -> int:
        """Bytes that it takes at most while it is made and applied; less where the layer has groups."""
        return solve_bytes(outputs, width)

    def solve(self, sums: FactorSums, damping: float) -> DampedKronecker:
        """The inverse of a layer among several."""
        return DampedKronecker.of(sums, Damping(damping, relative=True))

    def fit(self, reduce: Reduce[FactorSums], damping: Damping) -> DampedKronecker:
        """Fit on the samples behind ``reduce``."""
        return DampedKronecker.of(reduce(FactorSums.of).means, damping)
