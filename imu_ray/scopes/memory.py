"""What the memory of one worker holds at most while layers of a model move: counted, without running anything.

The pass is followed by tensors that have a shape and no numbers, so that a model without weights will do.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn

from imu_ray.config import AscentConfig
from imu_ray.influence.curvature.kronecker import factor_bytes, solve_bytes
from imu_ray.influence.projection import SLICE, Projected
from imu_ray.models.blocks import blocks_of
from imu_ray.models.copies import without_numbers
from imu_ray.models.cut import Cut
from imu_ray.scopes.base import Parameters
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.seen import layer_of

WIDE = 8  # bytes of a float64
SUMS = 3  # of a curvature, while those of blocks are merged
SCORING = 3  # matrices of a layer: sum of the gradients, of their squares, direction
UPDATE = 3  # matrices of a layer: as it was, as it is, its gradient
STATE = {"one_step": 2, "sgd": 1, "adamw": 2}  # the line and a trial on it; or what the optimiser keeps
SLICES = 4  # float64 copies of a slice of the outputs


@dataclass(frozen=True)
class LayersMemory:
    """Bytes that one worker holds at most.

    Attributes:
        weights: the model.
        activations: what a forward pass over a block keeps for the way back, and one block of the model on that way.
        activations_checkpointed: the same where the model's blocks are run again; None where it has none.
        outputs: of a block of rows, their gradient, and the slices that are worked on in float64.
        layers: copies of the layers that move, in the model's type and in float64, with the state of the update.
        curvature: sums of K-FAC's factors while they are made.
        checkpointed: whether the blocks are run again as the model is.
    """

    weights: int
    activations: int
    activations_checkpointed: int | None
    outputs: int
    layers: int
    curvature: int
    checkpointed: bool

    @property
    def peak(self) -> int:
        """All that is held at once, as the model is."""
        return self._peak(self.activations_checkpointed if self.checkpointed else self.activations)

    @property
    def peak_checkpointed(self) -> int | None:
        """The same where the model's blocks are run again."""
        return None if self.activations_checkpointed is None else self._peak(self.activations_checkpointed)

    def _peak(self, activations: int | None) -> int:
        return self.weights + (activations or 0) + self.outputs + max(self.layers, self.curvature)

    def verdict(self, size: float) -> tuple[bool, str]:
        """Whether it fits so many GB of 10⁹ bytes, and why."""
        activations = self.activations_checkpointed if self.checkpointed else self.activations
        parts = {
            "weights": self.weights,
            "activations": activations or 0,
            "logits": self.outputs,
            **({"layers": self.layers} if self.layers >= self.curvature else {"curvature": self.curvature}),
        }
        told = ", ".join(f"{name} {bytes_ / 1e9:.2f}" for name, bytes_ in parts.items())
        room, again = size * 1e9, self.peak_checkpointed
        if self.peak <= room:
            return True, f"{size:g} GB: fits, {self.peak / 1e9:.1f} GB at most ({told})"
        largest = max(parts, key=lambda name: parts[name])
        remedy = REMEDIES[largest]
        if again is not None and again <= room:
            remedy = f"with model.gradient_checkpointing {again / 1e9:.1f} GB, which fits"
        return False, f"{size:g} GB: does not fit, {self.peak / 1e9:.1f} GB at most ({told}); {remedy}"


REMEDIES = {
    "weights": "load the model in a smaller type, or take a smaller one",
    "activations": "set model.gradient_checkpointing, or a smaller influence.block_rows or forget_set.max_length",
    "logits": "set a smaller forget_set.max_length: the logits of one row, where they stand whole",
    "layers": "name fewer layers in ascent.scope, or move adapters",
    "curvature": "name fewer layers in ascent.scope, move adapters, or set ascent.preconditioner: none",
}


def memory_of(part: Layers, settings: AscentConfig, rows: int) -> LayersMemory:
    """Count for a pass over so many rows, of as many tokens as the longest one has."""
    model = part.cut.model
    kept = {again: saved(part, rows, again) for again in ({False, True} if blocks_of(model) else {False})}
    plain, outputs = kept[False]
    numbers, item = outputs.numel(), outputs.dtype.itemsize
    if part.output:  # beside what the output layer sees a slice of logits
        at_once = Projected(outputs, cast(nn.Linear, model.get_submodule(part.output)))
        numbers += max(rows * part.task.num_classes * (each.stop - each.start) for each in at_once.parts())
    fewer = kept[True][0] if True in kept else None
    share = 0 if fewer is None else (plain - fewer) // _blocks_from(model, part.parameters)
    return LayersMemory(
        weights=sum(tensor.nbytes for tensor in (*model.parameters(), *model.buffers())),
        activations=plain + share,
        activations_checkpointed=None if fewer is None else fewer + share,
        outputs=numbers * (2 * item + 2 * max(item, 4)) + min(SLICE, numbers) * WIDE * SLICES,
        layers=layers_bytes(part.parameters, settings, part.dtype.itemsize),
        curvature=curvature_bytes(part.parameters, settings),
        checkpointed=any(block.gradient_checkpointing for block in blocks_of(model)),
    )


def layers_bytes(parameters: Parameters, settings: AscentConfig, item: int) -> int:
    """Copies of layers in the model's type and float64, with the update's state and the curvature that steers it."""
    numbers = sum(matrix.numel() for matrix in parameters.values())
    state = STATE["one_step" if settings.update == "one_step" else settings.optimizer]
    scoring, update = WIDE * SCORING, WIDE * (UPDATE + state) + 4
    fitted = _factors(parameters) if settings.curvature == "kfac" else 0
    return numbers * (item + max(scoring, update)) + fitted


def curvature_bytes(parameters: Parameters, settings: AscentConfig) -> int:
    """Sums of the factors of all layers in one process while they are merged, or one layer while it is solved."""
    if settings.curvature != "kfac":
        return 0
    return max(SUMS * _factors(parameters), *(solve_bytes(*matrix.shape) for matrix in parameters.values()))


def _factors(parameters: Parameters) -> int:
    return sum(factor_bytes(*matrix.shape) for matrix in parameters.values())


def _blocks_from(model: nn.Module, layers: Mapping[str, Any]) -> int:
    """How many blocks gradients go through: those from the first that holds a layer on; 1 at least."""
    names = {id(block): name for name, block in model.named_modules()}
    held = [any(layer.startswith(f"{names[id(block)]}.") for layer in layers) for block in blocks_of(model)]
    return max(1, len(held) - held.index(True) if True in held else 0)


def saved(part: Layers, rows: int, again: bool) -> tuple[int, Tensor]:
    """Bytes that a forward pass keeps for the way back, parameters left out; and what it gives, without numbers."""
    model, mode = without_numbers(part.cut.model)
    with mode:
        for block in blocks_of(model):
            block.gradient_checkpointing = again
        weights = {
            f"{name}.{key}": parameter.detach().requires_grad_()
            for name in part.parameters
            for key, parameter in layer_of(model, name).named_parameters(recurse=False)
        }
        own = {storage_of(tensor)._cdata for tensor in (*model.parameters(), *model.buffers())}
        kept: dict[int, Any] = {}

        def keep(tensor: Tensor) -> Tensor:
            storage = storage_of(tensor)
            if storage._cdata not in own:
                kept[storage._cdata] = storage
            return tensor

        values = tuple(torch.zeros(rows, *shape, dtype=part.cut.dtype) for shape in _shapes(part))
        with torch.enable_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            outputs = Cut(model, part.cut.plan).suffix(values, weights, part.output)
        return sum(storage.nbytes() for storage in kept.values()), outputs


def storage_of(tensor: Tensor) -> Any:
    """Where a tensor's numbers are, which views of it share."""
    return tensor.untyped_storage()


def _shapes(part: Layers) -> list[tuple[int, ...]]:
    """Of what crosses the cut, for one sample; of tokens as many as the longest sample has."""
    return [(part.task.positions,)] if part.cut.trivial and part.task.positions else list(part.cut.shapes)
