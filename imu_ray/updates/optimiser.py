"""One global step of the ascent: gradient over the global batch, penalties, preconditioner, optimiser.

Shapes: B samples, C classes, D head inputs with the bias input. Everything is float64; the head is rounded to the model's
type once, at the end.
"""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from imu_ray.config import AscentConfig
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.scopes.head import Head
from imu_ray.updates.batches import FeatureStore, Positions
from imu_ray.updates.objectives import LogitGradient
from imu_ray.updates.workers import Workers


def batch_gradient(
    microbatches: list[Positions],
    features: FeatureStore,
    weights: "np.ndarray[Any, np.dtype[np.float64]]",
    objective: LogitGradient,
    matrix_CD: Tensor,
    original: Head,
    workers: Workers,
) -> Tensor:
    r"""Gradient of the weighted objective over one global batch, ``[C, D]``; the same on every worker.

    .. math:: \frac{1}{\sum_B w_i} \sum_B w_i\, r_i h_i^\top

    The divisor is that of the global batch, read off the weight table, so that the number of workers changes nothing.
    A worker without a microbatch adds zeros.
    """
    gradient = torch.zeros_like(matrix_CD)
    if not microbatches:  # no sample of the batch was kept when it was scored again
        return gradient
    start_CD = original.matrix_CD.to(workers.device)
    for positions in workers.mine(microbatches):
        inputs, labels = (part.to(workers.device) for part in features.gather(positions))
        pull = objective(original.logits(inputs, matrix_CD), labels, original.logits(inputs, start_CD))
        pull *= torch.from_numpy(weights[positions]).to(workers.device).unsqueeze(1)
        gradient += original.gradient(pull, inputs)
    return workers.sum(gradient) / float(weights[np.concatenate(microbatches)].sum())


def learning_rate(config: AscentConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step (from 0), a function of the step alone."""
    done = step / total_steps
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.learning_rate * 10.0 ** -((done >= 0.5) + (done >= 0.75))
    return config.learning_rate


class HeadOptimiser:
    """The head's matrix and its optimiser; a step is a function of (state, gradient, learning rate) alone."""

    def __init__(self, original: Head, config: AscentConfig, preconditioner: FittedCurvature | None, device: torch.device) -> None:
        self.config, self.preconditioner = config, preconditioner
        self.original = original.matrix_CD.to(device)
        self.matrix = self.original.clone()
        self.optimiser: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimiser = torch.optim.SGD([self.matrix], lr=config.learning_rate, momentum=config.momentum)
        else:
            betas = (config.momentum, 0.999)
            self.optimiser = torch.optim.AdamW([self.matrix], lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay)

    def step(self, gradient_CD: Tensor, rate: float) -> None:
        r"""Take a step along :math:`P(\nabla + \text{penalties})`.

        Penalties are added once, after the workers' sums: weight decay (SGD), the L1 subgradient
        :math:`\alpha\,\mathrm{sign}(W)` and the anchor :math:`\mu (W - W_0)`.
        """
        config = self.config
        total = gradient_CD + config.l1 * self.matrix.sign() + config.anchor * (self.matrix - self.original)
        if config.optimizer == "sgd":
            total = total + config.weight_decay * self.matrix
        self.matrix.grad = self.preconditioner.apply_inverse(total) if self.preconditioner is not None else total
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()

    def state(self) -> dict[str, Tensor]:
        """Copies of the matrix and of the optimiser's tensors, by name."""
        inner = self.optimiser.state[self.matrix]
        tensors = {key: value for key, value in inner.items() if isinstance(value, Tensor)}
        return {key: value.detach().cpu().clone() for key, value in {"matrix": self.matrix, **tensors}.items()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go back to what ``state`` returned."""
        device = self.matrix.device
        self.matrix.copy_(state["matrix"])
        # AdamW counts its steps in a tensor that stays on the CPU.
        inner = {key: value.to("cpu" if key == "step" else device, copy=True) for key, value in state.items() if key != "matrix"}
        self.optimiser.state[self.matrix] = inner
