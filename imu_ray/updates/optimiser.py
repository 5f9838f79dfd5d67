"""One global step: penalties, preconditioner and optimiser on named parameters.

Everything is float64; parameters are rounded to the model's type once, at the end.
"""

import math
from collections.abc import Mapping

import torch
from torch import Tensor

from imu_ray.config import AscentConfig
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.scopes.base import Parameters


def learning_rate(config: AscentConfig, step: int, total_steps: int) -> float:
    """Learning rate of a step (from 0), a function of the step alone."""
    done = step / total_steps
    if config.schedule == "cosine":
        return config.learning_rate * (1 + math.cos(math.pi * done)) / 2
    if config.schedule == "step":
        return config.learning_rate * 10.0 ** -((done >= 0.5) + (done >= 0.75))
    return config.learning_rate


class Optimiser:
    """Parameters and their optimiser; a step is a function of (state, gradient, learning rate) alone."""

    def __init__(
        self, parameters: Parameters, config: AscentConfig, preconditioners: Mapping[str, FittedCurvature]
    ) -> None:
        self.config, self.preconditioners = config, preconditioners
        self.original, self.parameters = parameters, {name: tensor.clone() for name, tensor in parameters.items()}
        tensors = list(self.parameters.values())
        self.optimiser: torch.optim.Optimizer
        if config.optimizer == "sgd":
            self.optimiser = torch.optim.SGD(tensors, lr=config.learning_rate, momentum=config.momentum)
        else:
            betas = (config.momentum, 0.999)
            self.optimiser = torch.optim.AdamW(
                tensors, lr=config.learning_rate, betas=betas, weight_decay=config.weight_decay
            )

    def step(self, gradient: Mapping[str, Tensor], rate: float) -> None:
        r"""Take a step along :math:`P(\nabla + \text{penalties})`.

        Penalties are added once, after the workers' sums: weight decay (SGD), the L1 subgradient
        :math:`\alpha\,\mathrm{sign}(W)` and the anchor :math:`\mu (W - W_0)`.
        """
        config = self.config
        for name, tensor in self.parameters.items():
            total = gradient[name]  # a penalty that is not there would still read every parameter
            if config.l1:
                total = total + config.l1 * tensor.sign()
            if config.anchor:
                total = total + config.anchor * (tensor - self.original[name])
            if config.optimizer == "sgd" and config.weight_decay:
                total = total + config.weight_decay * tensor
            tensor.grad = self.preconditioners[name].apply_inverse(total) if name in self.preconditioners else total
        self.optimiser.param_groups[0]["lr"] = rate
        self.optimiser.step()

    def set(self, parameters: Mapping[str, Tensor]) -> None:
        """Take over the values of other parameters."""
        for name, tensor in self.parameters.items():
            tensor.copy_(parameters[name])

    def state(self) -> dict[str, Tensor]:
        """Copies of the parameters and of the optimiser's tensors, by ``parameters.<layer>`` and ``<key>.<layer>``."""
        found = {f"parameters.{name}": tensor for name, tensor in self.parameters.items()}
        for name, tensor in self.parameters.items():
            inner = self.optimiser.state[tensor]
            found |= {f"{key}.{name}": value for key, value in inner.items() if isinstance(value, Tensor)}
        return {key: value.detach().cpu().clone() for key, value in found.items()}

    def load_state(self, state: Mapping[str, Tensor]) -> None:
        """Go back to what ``state`` returned."""
        self.set(part_of(state, "parameters"))
        for name, tensor in self.parameters.items():
            # AdamW counts its steps in a tensor that stays on the CPU.
            inner = {key.removesuffix(f".{name}"): value for key, value in state.items() if key.endswith(f".{name}")}
            self.optimiser.state[tensor] = {
                key: value.to("cpu" if key == "step" else tensor.device, copy=True)
                for key, value in inner.items()
                if key in ("step", "momentum_buffer", "exp_avg", "exp_avg_sq")
            }


def part_of(state: Mapping[str, Tensor], prefix: str) -> Parameters:
    """What stands in a state under ``<prefix>.<layer>``, by layer."""
    return {key.removeprefix(f"{prefix}."): value for key, value in state.items() if key.startswith(f"{prefix}.")}
