"""A slow, obvious IMU, written from the equations of arXiv:2508.01620: batch 1, autograd, float64, nothing in closed form."""

import copy

import numpy as np
import torch
from torch import nn

from imu_ray.influence.curvature.base import merge_tree
from imu_ray.influence.gradients import LayerIO


def head_parameters(model, head):
    layer = dict(model.named_modules())[head]
    return [layer.weight] + ([layer.bias] if layer.bias is not None else [])


def per_sample_gradients(model, head, inputs, labels):
    """Gradient of each sample's cross-entropy with respect to the head, flattened: ``[N, P]``."""
    model = copy.deepcopy(model).double().eval()
    parameters = head_parameters(model, head)
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        loss = nn.functional.cross_entropy(model(x.double().unsqueeze(0)), y.reshape(1))
        rows.append(torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, parameters)]))
    return torch.stack(rows)


def influence(model, head, inputs, labels, damping=0.01):
    """I_i = - g_i^T (F + damping)^-1 mean(g) with F = mean(g^2)."""
    gradients = per_sample_gradients(model, head, inputs, labels)
    fisher = (gradients**2).mean(0)
    mean = gradients.mean(0)
    return torch.stack([-(g * mean / (fisher + damping)).sum() for g in gradients]).numpy()


def random_layer(samples, positions, classes, width, seed=0):
    """Inputs, softmax probabilities and output gradients of a linear layer, ``[B, T, ...]``, and a reduce over blocks of 7 samples."""
    random = np.random.default_rng(seed)
    inputs, logits = (
        random.normal(size=(samples, positions, width)),
        2 * random.normal(size=(samples, positions, classes)),
    )
    p = np.exp(logits) / np.exp(logits).sum(2, keepdims=True)
    output_grads = p - np.eye(classes)[random.integers(0, classes, (samples, positions))]
    layer = torch.from_numpy(inputs), torch.from_numpy(output_grads)
    blocks = [LayerIO(*(part[start : start + 7] for part in layer)) for start in range(0, samples, 7)]
    return inputs, p, output_grads, lambda statistics: merge_tree(map(statistics, blocks))


def layer_gradients(inputs, output_grads):
    """Gradient of each sample's loss in a linear layer, ``[B, C, D]``; the loss is a sum over positions."""
    return np.array(
        [sum(np.outer(r, h) for r, h in zip(*sample, strict=True)) for sample in zip(output_grads, inputs, strict=True)]
    )


def layer_hessian(inputs, probabilities):
    """Mean over samples of the Hessian of the softmax cross-entropy in the flattened layer, ``[C D, C D]``, summed over positions."""
    total = 0
    for sample in zip(probabilities, inputs, strict=True):
        for p, h in zip(*sample, strict=True):
            total = total + np.kron(np.diag(p) - np.outer(p, p), np.outer(h, h))
    return total / len(inputs)


def kronecker_factors(inputs, probabilities):
    """Of the outputs, the mean over samples of the sum over positions; of the inputs, the mean over both."""
    samples, positions, _ = inputs.shape
    outputs = sum(np.diag(p) - np.outer(p, p) for sample in probabilities for p in sample) / samples
    return outputs, second_moment(inputs) / positions


def second_moment(inputs):
    """Mean over samples of the second moment of the layer's inputs, summed over positions."""
    return sum(np.outer(h, h) for sample in inputs for h in sample) / len(inputs)


def conv1d(inputs, outputs):
    from transformers.pytorch_utils import Conv1D

    return Conv1D(outputs, inputs)


LAYERS = {
    "linear": (lambda: nn.Linear(5, 4), (5,)),
    "linear over tokens, no bias": (lambda: nn.Linear(5, 4, bias=False), (3, 5)),
    "linear over tokens, more outputs than inputs": (lambda: nn.Linear(3, 6), (4, 3)),
    "linear over a grid": (lambda: nn.Linear(5, 4), (2, 3, 5)),
    "transposed linear over tokens": (lambda: conv1d(5, 4), (3, 5)),
    "1d, stride, padding, dilation": (lambda: nn.Conv1d(3, 4, 3, stride=2, padding=2, dilation=2), (3, 9)),
    "1d, same, even kernel": (lambda: nn.Conv1d(3, 4, 4, padding="same", bias=False), (3, 5)),
    "2d, uneven stride, padding, dilation": (
        lambda: nn.Conv2d(3, 4, (3, 2), stride=(2, 1), padding=(1, 0), dilation=(1, 2)),
        (3, 6, 5),
    ),
    "2d, same, even kernel": (lambda: nn.Conv2d(2, 4, (2, 3), padding="same", dilation=(3, 1)), (2, 4, 5)),
    "2d, valid": (lambda: nn.Conv2d(2, 4, 2, padding="valid"), (2, 4, 5)),
    "groups": (lambda: nn.Conv2d(4, 6, 3, padding=1, stride=2, groups=2), (4, 5, 6)),
    "depthwise": (lambda: nn.Conv2d(4, 8, 3, padding=1, groups=4, bias=False), (4, 3, 4)),
    "depthwise 1d": (lambda: nn.Conv1d(4, 4, 3, groups=4), (4, 7)),
}


def called_layer(kind, samples=7, seed=0):
    """A layer, what it was called with, and gradients with respect to its outputs."""
    torch.manual_seed(seed)
    make, shape = LAYERS[kind]
    layer = make().double()
    inputs = torch.randn(samples, *shape, dtype=torch.float64)
    return layer, inputs, torch.randn_like(layer(inputs)).detach()


def layer_positions(layer, inputs, output_grads):
    """What each group of a layer saw at each position, by indexing: ``[G, B, T, D]`` and ``[G, B, T, C / G]``."""
    one = [] if layer.bias is None else [1.0]
    if not hasattr(layer, "kernel_size"):
        places, groups = list(np.ndindex(*inputs.shape[1:-1])), 1
        seen = lambda sample, place, group: sample[place]
        pull = lambda grads, place, group: grads[place]
    else:
        places, groups = list(np.ndindex(*output_grads.shape[2:])), layer.groups
        channels, outputs = inputs.shape[1] // groups, output_grads.shape[1] // groups

        def seen(sample, place, group):
            values = []
            for index in np.ndindex(channels, *layer.kernel_size):
                at = [p * s + k * d - left for p, s, k, d, left in zip(place, layer.stride, index[1:], layer.dilation, before(layer), strict=True)]  # fmt: skip
                inside = all(0 <= a < size for a, size in zip(at, sample.shape[1:], strict=True))
                values.append(sample[(group * channels + index[0], *at)] if inside else 0.0)
            return values

        pull = lambda grads, place, group: grads[(slice(group * outputs, (group + 1) * outputs), *place)]
    samples = list(zip(inputs.numpy(), output_grads.numpy(), strict=True))
    return (
        np.array([[[[*seen(x, place, g), *one] for place in places] for x, _ in samples] for g in range(groups)]),
        np.array([[[pull(r, place, g) for place in places] for _, r in samples] for g in range(groups)]),
    )


def before(layer):
    """Zeros in front of each axis."""
    if layer.padding == "valid":
        return (0,) * len(layer.kernel_size)
    if layer.padding == "same":
        return [d * (k - 1) // 2 for d, k in zip(layer.dilation, layer.kernel_size, strict=True)]
    return layer.padding


def layer_sample_gradients(layer, inputs, output_grads):
    """By autograd, one sample at a time: ``[B, C, D]``."""
    rows = []
    for x, r in zip(inputs, output_grads, strict=True):
        parts = torch.autograd.grad(layer(x.unsqueeze(0)), list(layer.parameters()), r.unsqueeze(0))
        rows.append(gradient_matrix(layer, parts))
    return torch.stack(rows)


def gradient_matrix(layer, parts):
    """Gradients of a layer's weight and bias, ``[C, D]``."""
    weight, *bias = parts
    weight = weight.T if hasattr(layer, "nf") else weight.reshape(len(weight), -1)
    return torch.cat([weight, *[part.reshape(-1, 1) for part in bias]], dim=1)


def layer_factors(layer, inputs, output_grads):
    """Of each group: the mean over samples of the outputs' sum over positions, and the mean of the inputs over both."""
    seen, pull = layer_positions(layer, inputs, output_grads)
    samples, positions = seen.shape[1:3]
    outputs = [sum(np.outer(g, g) for sample in group for g in sample) / samples for group in pull]
    return np.array(outputs), np.array([second_moment(group) / positions for group in seen])


def intensities(scores, keep_fraction=1.0, quantile=0.93):
    """w_i = min(sqrt|I_i|, quantile of the kept sqrt|I|), over the top fraction of the negative scores; else 0."""
    negative = [i for i in range(len(scores)) if scores[i] < 0]
    negative.sort(key=lambda i: (-abs(scores[i]), i))
    kept = negative[: max(1, round(keep_fraction * len(negative)))]
    limit = np.quantile([abs(scores[i]) ** 0.5 for i in kept], quantile)
    weights = [0.0] * len(scores)
    for i in kept:
        weights[i] = min(abs(scores[i]) ** 0.5, limit)
    return np.array(weights)


def ascent(weight, bias, features, labels, weights, batches, config):
    """Plain autograd ascent of the weighted loss on a head: SGD with momentum, weight decay and L1; float64.

    ``batches`` is a list of index lists. Returns the head as ``[C, D (+1)]``.
    """
    parameters = [weight.double().clone().requires_grad_()] + (
        [bias.double().clone().requires_grad_()] if bias is not None else []
    )
    optimiser = torch.optim.SGD(
        parameters, lr=config.learning_rate, momentum=config.momentum, weight_decay=config.weight_decay
    )
    weights = torch.as_tensor(weights)
    for rows in batches:
        logits = nn.functional.linear(features[rows].double(), *parameters)
        losses = nn.functional.cross_entropy(logits, labels[rows], reduction="none")
        loss = -(weights[rows] * losses).sum() / weights[rows].sum() + config.l1 * sum(
            p.abs().sum() for p in parameters
        )
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
    return torch.cat([p.detach().reshape(len(weight), -1) for p in parameters], dim=1)


def target_loss(kind, class_weights=None):
    """The loss of one sample, from its logits ``[1, C]`` and its label: torch's own, by ``forget_set.target``."""
    weight = None if class_weights is None else torch.tensor(class_weights, dtype=torch.float64)
    if kind == "multi_label":
        return nn.BCEWithLogitsLoss(pos_weight=weight)
    return nn.CrossEntropyLoss(weight=weight, reduction="sum")


def target_gradients(model, layer, inputs, labels, loss):
    """Gradient of each sample's loss in a layer as a matrix, ``[N, C, D]``: batch 1, autograd, float64."""
    model = copy.deepcopy(model).double().eval()
    own = dict(model.named_modules())[layer]
    rows = []
    for x, y in zip(inputs, labels, strict=True):
        found = torch.autograd.grad(loss(model(x.double().unsqueeze(0)), y.unsqueeze(0)), list(own.parameters()))
        rows.append(gradient_matrix(own, found))
    return torch.stack(rows)


def damped_influence(gradients, damping=0.01):
    """I_i = - g_i^T (F + damping)^-1 mean(g) with F = mean(g^2)."""
    direction = gradients.mean(0) / ((gradients**2).mean(0) + damping)
    return torch.stack([-(gradient * direction).sum() for gradient in gradients]).numpy()


def logit_hessians(logits, labels, loss):
    """Hessian of each sample's loss in its logits, by differentiating twice: ``[N, C, C]``."""
    return torch.stack(
        [
            torch.autograd.functional.hessian(lambda z, y=y: loss(z.unsqueeze(0), y.unsqueeze(0)), z)
            for z, y in zip(logits.double(), labels, strict=True)
        ]
    )
