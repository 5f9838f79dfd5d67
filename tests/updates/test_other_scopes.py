"""Updates know no head: a scope of two layers, written with autograd, goes through the same code."""

import numpy as np
import pytest
import torch
from torch import nn
from updates.problems import CLASSES, PAPER, TASK, store

from imu_ray.config import AscentConfig, StopConfig
from imu_ray.scopes.workers import Workers
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.stopping import StopTarget

HIDDEN = 5


class TwoLayers:
    """A multilayer perceptron whose both layers move (``Scope``)."""

    metrics = TASK.metrics

    def __init__(self):
        self.workers, self.forget = Workers(), store()
        self.rows, self.block_starts = len(self.forget), self.forget.block_starts
        generator = torch.Generator().manual_seed(0)
        make = lambda *shape: torch.randn(shape, generator=generator, dtype=torch.float64)
        self.start = {"hidden": make(HIDDEN, 7), "out": make(CLASSES, HIDDEN + 1)}

    def parameters(self):
        return {name: tensor.clone() for name, tensor in self.start.items()}

    def outputs(self, parameters, features):
        hidden = torch.tanh(features @ parameters["hidden"][:, :-1].T + parameters["hidden"][:, -1])
        return hidden @ parameters["out"][:, :-1].T + parameters["out"][:, -1]

    def batch_gradient(self, parameters, batch, weights, objective, pieces):
        leaves = {name: tensor.clone().requires_grad_() for name, tensor in parameters.items()}
        features, labels = self.forget.gather(batch)
        outputs, start = self.outputs(leaves, features), self.outputs(self.start, features)
        share = torch.from_numpy(weights[batch] / weights[batch].sum()).unsqueeze(1)
        outputs.backward(share * objective(outputs.detach(), labels, start))
        return {name: leaf.grad for name, leaf in leaves.items()}

    def probe(self, parameters, sets):
        return None

    def measure(self, parameters, sets=None):
        features, labels = self.forget.gather(np.arange(self.rows))
        found = TASK.sample_metrics(self.outputs(parameters, features), labels)
        return {f"forget.{name}": float(values.mean()) for name, values in found.items()}


def update(name, targets=(), **settings):
    scope = TwoLayers()
    config = AscentConfig(**{**PAPER, "batch_size": 30, "stop": StopConfig(max_epochs=2, every_steps=1), **settings})
    return scope, UPDATES[name](scope, UpdateProblem(np.ones(scope.rows), config, 0, targets))


def test_both_layers_take_the_steps_of_plain_autograd():
    scope, outcome = update("iterative")
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in scope.start.items()}
    optimiser = torch.optim.SGD(leaves.values(), lr=0.01, momentum=0.9, weight_decay=5e-4)
    config = AscentConfig(**{**PAPER, "batch_size": 30})
    for epoch in range(2):
        for batch in epoch_batches(np.arange(scope.rows), scope.block_starts, config, 0, epoch):
            features, labels = scope.forget.gather(batch)
            penalty = 5e-4 * sum(leaf.abs().sum() for leaf in leaves.values())
            loss = penalty - nn.functional.cross_entropy(scope.outputs(leaves, features), labels)
            optimiser.zero_grad()
            loss.backward()
            optimiser.step()
    for name, leaf in leaves.items():
        torch.testing.assert_close(outcome.parameters[name], leaf.detach(), rtol=1e-9, atol=1e-12)
    assert {"parameter_drift.hidden", "parameter_drift.out"} <= outcome.record.keys()


@pytest.mark.parametrize("name", UPDATES)
def test_every_update_brings_two_layers_to_a_target(name):
    start = TwoLayers().measure(TwoLayers().start)["forget.loss"]
    target = StopTarget("forget.loss", start + 0.2, "test", tolerance=0.01, rising=True)
    scope, outcome = update(name, [target], learning_rate=0.1, stop=StopConfig(max_epochs=100))
    assert outcome.status == "reached"
    assert 0 <= target.overshoot(scope.measure(outcome.parameters)) <= target.tolerance
    assert all(not torch.equal(outcome.parameters[key], scope.start[key]) for key in scope.start), "both layers moved"
