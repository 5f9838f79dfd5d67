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
