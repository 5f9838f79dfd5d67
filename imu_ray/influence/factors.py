"""Kronecker factors that kronfluence has fitted, as sums of this library's own, joined to a model by layer names."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from imu_ray.errors import CheckpointError
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.influence.gradients import HEAD_DTYPE
from imu_ray.influence.layer_io import Convolution, kind_of, sizes_of

INPUTS, OUTPUTS, POSITIONS = "activation_covariance", "gradient_covariance", "num_activation_covariance_processed"
DATASET, ARGUMENTS = "covariance_dataset_metadata.json", "factor_arguments.json"


def read_factors(location: str | Path, model: nn.Module) -> dict[str, FactorSums]:
    """Sums of both factors of each layer of a model that a folder of kronfluence's has them of.

    Their sums are over positions, as ours are, and of the same layout: a weight's columns, then the bias. How many
    samples there were is told by the files on the data set and the settings: min(its size, covariance_max_examples).

    Args:
        location: ``factors_NAME`` in an output folder of kronfluence's, fitted with strategy ``kfac`` or ``ekfac``. The
            loss of its task must be the sum over the samples of a batch, as its documentation asks.
        model: the model that they were fitted on. Nothing in the folder names it; names and shapes are held against it.

    Raises:
        CheckpointError: a file is missing or broken, or the factors are not those of this model's layers.

    Source: https://github.com/pomonam/kronfluence (``module/tracker/factor.py``).
    """
    folder = Path(location)
    try:
        inputs, outputs, positions = (
            load_file(folder / f"{name}.safetensors") for name in (INPUTS, OUTPUTS, POSITIONS)
        )
        size = int(json.loads((folder / DATASET).read_text())["dataset_size"])
        most = json.loads((folder / ARGUMENTS).read_text())["covariance_max_examples"]
        found = {
            name: FactorSums(
                size if most is None else min(size, int(most)),
                int(positions[name]),
                outputs[name].to(HEAD_DTYPE),
                inputs[name].to(HEAD_DTYPE),
            )
            for name in inputs
        }
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        raise CheckpointError(
            f"{location} cannot be read ({type(error).__name__}: {error}); expected kronfluence's folder factors_NAME "
            f"with {INPUTS}.safetensors, {OUTPUTS}.safetensors, {POSITIONS}.safetensors, {DATASET} and {ARGUMENTS}, as "
            "its strategies kfac and ekfac write them; aggregate partitions first"
        ) from None
    layers = dict(model.named_modules())
    faults = [f"{name}: {fault}" for name, sums in found.items() for fault in _faults(layers.get(name), sums)]
    if faults or not found:
        raise CheckpointError(
            f"{location} does not fit {type(model).__name__}: {'; '.join(faults[:3]) or 'no layer is in it'}; expected "
            "factors of its own linear and convolutional layers; give the model that they were fitted on"
        )
    return found


def _faults(layer: Any, sums: FactorSums) -> Iterator[str]:
    """What keeps the sums from being those of a layer."""
    if layer is None or kind_of(layer) is None:
        yield "no such layer"
        return
    if isinstance(layer, Convolution) and layer.groups > 1:
        yield "has groups, whose factors kronfluence does not keep apart"
        return
    outputs, width = sizes_of(layer)
    width += layer.bias is not None
    for what, factor, wanted in (("inputs", sums.inputs_DD, width), ("outputs", sums.outputs_CC, outputs)):
        if factor.shape != (wanted, wanted):
            yield f"the factor of the {what} is {list(factor.shape)}, the layer needs [{wanted}, {wanted}]"
        elif not torch.isfinite(factor).all():
            yield f"the factor of the {what} is not finite"
    if not 0 < sums.count <= sums.positions:
        yield f"{sums.positions} positions of {sums.count} samples"
