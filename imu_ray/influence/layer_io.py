"""Linear and convolutional layers inside a network: their parameters as one matrix, and what they saw.

A layer's matrix ``[C, D]`` is its flattened weight, transposed where the layer is Hugging Face's ``Conv1D``, with the
bias as last column. In a layer with groups, block g of its rows sees the inputs of group g alone.

Shapes: B samples, T positions of a sample (of a convolution's output, or between the first and last dimension of a
linear layer's input), C outputs, D inputs of one output with the bias input included.
"""

import math
import sys
from collections.abc import Iterator

import torch
from torch import Tensor, nn
from torch.nn import functional

from imu_ray.influence.gradients import HEAD_DTYPE, LayerIO, with_bias_input

Convolution = nn.Conv1d | nn.Conv2d
Layer = nn.Linear | nn.Conv1d | nn.Conv2d  # or Hugging Face's ``Conv1D``
PIECE = 2**24  # numbers in the unfolded inputs that are held at once
GRADIENTS = 2**18  # numbers in gradients of samples that are made at once (one sample's at least), for a core's cache
GRAMS = 5  # to add up a number of a gradient takes as long as so many products of a Gram matrix, as measured


def kind_of(module: nn.Module) -> type[nn.Module] | None:
    """The kind of layer that a module is; None if its parameters make no matrix."""
    # Hugging Face's module is loaded where such a model is; it is not imported for others.
    conv1d = getattr(sys.modules.get("transformers.pytorch_utils"), "Conv1D", nn.Linear)
    return next((kind for kind in (nn.Linear, nn.Conv1d, nn.Conv2d, conv1d) if isinstance(module, kind)), None)


def as_matrix(layer: Layer, weight: Tensor, bias: Tensor | None) -> Tensor:
    """A copy of what has the shapes of the layer's weight and bias as one matrix ``[C, D]``, float64, on its device."""
    columns = [weight.T if _transposed(layer) else weight.flatten(1)] + ([] if bias is None else [bias.unsqueeze(1)])
    return torch.cat([column.detach().to(HEAD_DTYPE) for column in columns], dim=1)


def matrix_of(layer: Layer) -> Tensor:
    """A copy of the layer's parameters as one matrix ``[C, D]``, float64, on the layer's device."""
    return as_matrix(layer, layer.weight, layer.bias)


def weights_of(layer: Layer, matrix_CD: Tensor) -> dict[str, Tensor]:
    """``weight`` and, if there is one, ``bias`` in the layer's shapes and the matrix's type: parts of the matrix."""
    _, width = sizes_of(layer)
    weight_CD = matrix_CD[:, :width]
    weight = {"weight": weight_CD.T if _transposed(layer) else weight_CD.reshape(layer.weight.shape)}
    return weight if layer.bias is None else {**weight, "bias": matrix_CD[:, width]}


def run_layer(layer: Layer, inputs: Tensor, matrix_CD: Tensor) -> Tensor:
    """The layer's outputs under another matrix, in the inputs' type; no hook is called."""
    parts = weights_of(layer, matrix_CD.to(inputs))
    weight, bias = parts["weight"], parts.get("bias")
    if not isinstance(layer, Convolution):
        return functional.linear(inputs, weight.T if _transposed(layer) else weight, bias)
    convolve = functional.conv1d if isinstance(layer, nn.Conv1d) else functional.conv2d
    outputs: Tensor = convolve(inputs, weight, bias, layer.stride, layer.padding, layer.dilation, layer.groups)
    return outputs


def directional_scores(layer: Layer, inputs: Tensor, output_grads: Tensor, direction_CD: Tensor) -> Tensor:
    r"""A layer's part of each sample's influence, without unfolding; the parts add up over layers.

    .. math:: I_i = - \sum_t r_{it}^\top M h_{it}

    Args:
        layer: the layer; its own weights do not count.
        inputs: what it was called with, ``[B, ...]``.
        output_grads: gradient of each sample's own loss with respect to its outputs, in their shape.
        direction_CD: damped mean gradient M, ``[C, D]``.

    Returns:
        Scores ``[B]``: products in the inputs' type, their sum in float64.
    """
    pull = run_layer(layer, _detached(inputs), direction_CD) * _detached(output_grads)
    return -pull.flatten(1).sum(1, dtype=HEAD_DTYPE)


def layer_io(layer: Layer, inputs: Tensor, output_grads: Tensor) -> LayerIO:
    """What the layer saw, one row per position: the inputs of a convolution unfolded, with the 1 for the bias appended.

    Args:
        layer: the layer.
        inputs: what it was called with, ``[B, ...]``.
        output_grads: gradient of each sample's own loss with respect to its outputs, in their shape.

    Returns:
        ``[B, T, D]`` and ``[B, T, C]``; with groups ``[G, B, T, D]`` and ``[G, B, T, C / G]``. In the inputs' type,
        float32 at least.
    """
    inputs, output_grads = _detached(inputs), _detached(output_grads)
    if isinstance(layer, Convolution):
        inputs, output_grads = (_by_group(part, layer.groups) for part in (_unfolded(layer, inputs), output_grads))
    else:
        inputs, output_grads = (part.reshape(len(part), -1, part.shape[-1]) for part in (inputs, output_grads))
    return LayerIO(inputs if layer.bias is None else with_bias_input(inputs), output_grads)


def pieces(layer: Layer, inputs: Tensor, output_grads: Tensor, numbers: int = 0) -> Iterator[LayerIO]:
    """``layer_io`` of a few samples after another, so that their inputs, or ``numbers`` each, take little memory."""
    outputs, width = sizes_of(layer)
    width *= layer.groups if isinstance(layer, Convolution) else 1
    positions = output_grads[0].numel() // outputs
    rows = max(1, PIECE // max(positions * width, numbers))
    for part in zip(torch.split(inputs, rows), torch.split(output_grads, rows), strict=True):
        yield layer_io(layer, *part)


def sample_gradients(layer: Layer, inputs: Tensor, output_grads: Tensor, transposed: bool = False) -> Iterator[Tensor]:
    """Gradients ``[b, C, D]`` of a few samples after another, in the inputs' type, float32 at least.

    They hold until the next ones are taken, and may be changed. Of a layer without groups also transposed.
    """
    rows, buffer = max(1, GRADIENTS // math.prod(sizes_of(layer))), torch.empty(0)
    for part in pieces(layer, inputs, output_grads):
        sides = (torch.split(side, rows, -3) for side in (part.output_grads_BTC, part.inputs_BTD))
        for end, *group in zip(_ends(layer, part.output_grads_BTC, rows), *sides, strict=True):
            left, right = (side[..., :end, :] for side in (reversed(group) if transposed else group))
            same = buffer.shape[:-2] == left.shape[:-2]
            buffer = torch.matmul(left.mT, right, out=buffer if same else None)
            yield buffer if buffer.ndim == 3 else buffer.transpose(0, 1).flatten(1, 2)


def _ends(layer: Layer, output_grads_BTC: Tensor, rows: int) -> list[int]:
    """How many positions so many samples after another have before those without a gradient, as padding has none."""
    samples, positions = output_grads_BTC.shape[-3:-1]
    if samples <= rows or isinstance(layer, Convolution):  # to look would take longer than what it saves
        return [positions] * math.ceil(samples / rows)
    used_BT = (output_grads_BTC.amax(-1) != 0) | (output_grads_BTC.amin(-1) != 0)  # NaN is not 0
    ends_B = (used_BT * torch.arange(1, positions + 1, device=used_BT.device)).amax(1)
    return [int(each.max()) for each in torch.split(ends_B.cpu(), rows)]


def layer_scores(layer: Layer, inputs: Tensor, output_grads: Tensor, direction_CD: Tensor) -> tuple[Tensor, Tensor]:
    """A layer's parts of each sample's influence and squared gradient norm, ``[B]`` float64 each.

    From the gradients themselves, where they have to be made for the norms. Products and sums over the longer side of
    the gradient are in the inputs' type, float32 at least, what they add up to in float64.
    """
    if _few_positions(layer, output_grads):
        return (
            directional_scores(layer, inputs, output_grads, direction_CD),
            squared_gradient_norms(layer, inputs, output_grads),
        )
    products, norms, tall = [], [], _tall(layer)
    direction = direction_CD.to(inputs.device, torch.promote_types(inputs.dtype, torch.float32))
    direction = (direction.mT if tall else direction).contiguous()
    for gradients in sample_gradients(layer, inputs, output_grads, tall):
        norms.append(torch.linalg.vector_norm(gradients, dim=2))
        products.append(gradients.mul_(direction).sum(2))
    return -torch.cat(products).sum(1, dtype=HEAD_DTYPE), _squared(norms)


def squared_gradient_norms(layer: Layer, inputs: Tensor, output_grads: Tensor) -> Tensor:
    r"""Squared norm of each sample's gradient, ``[B]`` float64.

    .. math:: \|g_i\|^2 = \sum_{s,t} (r_{is}^\top r_{it})(h_{is}^\top h_{it})

    is used where that takes less work than to add up the gradient itself, which scores need in any case.
    """
    if not _few_positions(layer, output_grads):
        gradients = sample_gradients(layer, inputs, output_grads, _tall(layer))
        return _squared([torch.linalg.vector_norm(each, dim=2) for each in gradients])
    found = []
    for part in pieces(layer, inputs, output_grads):
        grams = [side.to(HEAD_DTYPE) @ side.to(HEAD_DTYPE).mT for side in (part.inputs_BTD, part.output_grads_BTC)]
        squares = (grams[0] * grams[1]).sum((-2, -1))
        found.append(squares.sum(0) if squares.ndim > 1 else squares)
    return torch.cat(found)


def _squared(norms_bC: list[Tensor]) -> Tensor:
    """Squared norms of gradients, ``[B]``, from the norms of their rows."""
    return torch.cat(norms_bC).to(HEAD_DTYPE).square().sum(1)


def _tall(layer: Layer) -> bool:
    """Whether gradients are transposed for norms and scores: long rows are made and added up faster than short ones."""
    outputs, width = sizes_of(layer)
    return outputs > width and getattr(layer, "groups", 1) == 1


def _few_positions(layer: Layer, output_grads: Tensor) -> bool:
    """Whether Gram matrices of the positions take less work than the gradients of samples."""
    outputs, width = sizes_of(layer)
    positions = output_grads[0].numel() // outputs
    return positions**2 * (outputs + width) < GRAMS * outputs * width


def _transposed(layer: nn.Module) -> bool:
    """Whether the weight is ``[in, out]``, as that of Hugging Face's ``Conv1D``."""
    return not isinstance(layer, Layer)


def sizes_of(layer: Layer) -> tuple[int, int]:
    """C, and the inputs of one output without the bias input."""
    outputs, inputs = len(layer.weight), layer.weight[0].numel()
    return (inputs, outputs) if _transposed(layer) else (outputs, inputs)


def _detached(part: Tensor) -> Tensor:
    return part.detach().to(torch.promote_types(part.dtype, torch.float32))


def _unfolded(layer: Convolution, inputs: Tensor) -> Tensor:
    """Patches ``[B, inputs x kernel, T]``, in the order of the flattened weight."""
    if isinstance(layer.padding, str):
        totals = [
            d * (k - 1) if layer.padding == "same" else 0
            for k, d in zip(layer.kernel_size, layer.dilation, strict=True)
        ]
        sides = [(total // 2, total - total // 2) for total in totals]
    else:
        sides = [(side, side) for side in layer.padding]
    inputs = functional.pad(inputs, [side for pair in reversed(sides) for side in pair])
    if isinstance(layer, nn.Conv1d):
        inputs = inputs.unsqueeze(2)
    above = (1,) * (2 - len(layer.kernel_size))  # unfold takes images only
    kernel, dilation, stride = ((*above, *part) for part in (layer.kernel_size, layer.dilation, layer.stride))
    return functional.unfold(inputs, kernel, dilation, 0, stride)


def _by_group(channels_first: Tensor, groups: int) -> Tensor:
    batch, channels = channels_first.shape[:2]
    positions = math.prod(channels_first.shape[2:])
    grouped = channels_first.reshape(batch, groups, channels // groups, positions).permute(1, 0, 3, 2)
    return grouped.squeeze(0) if groups == 1 else grouped
