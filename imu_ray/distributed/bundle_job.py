"""What is kept of a training set while it is there, and the curvature that a bundle of it gives later."""

import functools
from collections.abc import Mapping, Sequence
from typing import Any

import ray
import torch
from ray.exceptions import RayError
from torch import Tensor

from imu_ray.audits.accuracy import ClassSums
from imu_ray.audits.base import predict_shard
from imu_ray.config import AscentConfig
from imu_ray.distributed.factor_job import check_memory, kind_of, solve_all, split_sums
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.distributed.tasks import TaskRunner, explain_failure
from imu_ray.errors import ConfigError
from imu_ray.influence.curvature import LAYER_CURVATURES, PRECONDITIONERS
from imu_ray.influence.curvature.base import FittedCurvature, merge_tree
from imu_ray.influence.curvature.ggn import MatrixSum
from imu_ray.influence.curvature.kronecker import FactorSums
from imu_ray.influence.gradients import LayerIO
from imu_ray.run.bundle import Bundle
from imu_ray.scopes.base import ByLayer, Part
from imu_ray.scopes.features import FeatureShard

SUMS: dict[str, type[Any]] = {"kfac": FactorSums, "block_ggn": MatrixSum}
# Which of a bundle's sums a preconditioner of the head is made from.
HEAD_SUMS = {"block_ggn": "block_ggn", "feature_second_moment": "kfac"}
FIGURES = "figures per class"  # stands among the layers


def remember(features: FeatureSet, part: Part, settings: AscentConfig) -> tuple[dict[str, Any], dict[str, Any]]:
    """Sums of each layer as tensors, by kind, and the figures of a sample set, overall and per class.

    Of the head the Gauss-Newton matrix without the coupling between classes is among them where there is room.
    """
    kinds = {name: list(dict.fromkeys(["kfac", kind_of(name, part, settings)])) for name in part.parameters}
    names = [*kinds, FIGURES]
    refs = split_sums(features, "curvature", functools.partial(_all_sums, part=part, kinds=kinds), names)
    try:  # one layer after the other: the driver holds the sums of all, and a few copies of one
        found = {name: merge_tree(ray.get(ref) for ref in refs.pop(name)).parts[name] for name in names}
    except RayError as error:
        raise explain_failure("curvature", error) from None
    figures = found.pop(FIGURES).figures()
    sums = {name: {kind: to_tensors(found[name].parts[kind]) for kind in wanted} for name, wanted in kinds.items()}
    return sums, figures


def fit_bundle(bundle: Bundle, part: Part, settings: AscentConfig, runner: TaskRunner) -> dict[str, FittedCurvature]:
    """The damped inverse curvature of each layer, from the sums of a bundle that ``check_bundle`` has passed."""
    kinds = _bundle_kinds(bundle, part, settings)
    sums = {name: _from_tensors(kinds[name], tensors) for name, tensors in bundle.load(kinds).items()}
    if part.deep:
        return solve_all(
            {name: [[ray.put(ByLayer({name: each}))]] for name, each in sums.items()}, kinds, settings, runner
        )
    ((name, found),) = sums.items()
    if isinstance(found, FactorSums):
        found = MatrixSum(found.count, found.inputs_DD)
    return {name: PRECONDITIONERS[settings.curvature].fit(lambda _: found, settings.preconditioner_damping)}


def check_bundle(bundle: Bundle, part: Part, settings: AscentConfig, model_hash: str) -> None:
    """Refuse a bundle of another model (``CheckpointError``), or without what these settings need (``ConfigError``)."""
    bundle.require_model(model_hash)
    _bundle_kinds(bundle, part, settings)


def _bundle_kinds(bundle: Bundle, part: Part, settings: AscentConfig) -> dict[str, str]:
    """The kind of sums that each layer takes from a bundle."""
    held = bundle.record.sums
    missing = [name for name in part.parameters if name not in held]
    if missing:
        raise ConfigError(
            f"ascent.scope is {settings.scope!r}, of which bundle {bundle.location} has no sums for "
            f"{', '.join(missing)}; expected layers among {', '.join(held)}; choose a smaller scope"
        )
    if part.deep:
        kinds = {name: kind_of(name, part, settings) for name in part.parameters}
        return {name: kind if kind in held[name] else "kfac" for name, kind in kinds.items()}
    (name,) = part.parameters
    kind = HEAD_SUMS.get(settings.curvature, "")
    if kind not in held[name]:
        served = [kind for kind, needed in HEAD_SUMS.items() if needed in held[name]]
        raise ConfigError(
            f"ascent.preconditioner is {settings.curvature!r}, which bundle {bundle.location} has no sums for; "
            f"expected {' or '.join(served)}, or no ascent.bundle"
        )
    check_memory(settings.curvature, PRECONDITIONERS[settings.curvature].memory(*part.parameters[name].shape), settings)
    return {name: kind}


def _all_sums(shard: FeatureShard, part: Part, kinds: Mapping[str, Sequence[str]]) -> ByLayer[Any]:
    """Sums of every kind for each layer, and figures."""
    statistics = {
        name: functools.partial(_of_kinds, kinds=wanted) if len(wanted) > 1 else LAYER_CURVATURES[wanted[0]].statistics
        for name, wanted in kinds.items()
    }
    parts = part.statistics(shard, statistics).parts
    sums = {name: each if isinstance(each, ByLayer) else ByLayer({"kfac": each}) for name, each in parts.items()}
    return ByLayer({**sums, FIGURES: ClassSums.of(predict_shard(shard, part))})


def _of_kinds(layer_io: LayerIO, kinds: Sequence[str]) -> ByLayer[Any]:
    return ByLayer({kind: LAYER_CURVATURES[kind].statistics(layer_io) for kind in kinds})


def to_tensors(sums: Any) -> dict[str, Tensor]:
    """The fields of sums by name; a count is a tensor without dimensions."""
    return {name: torch.as_tensor(each) for name, each in vars(sums).items()}


def _from_tensors(kind: str, tensors: Mapping[str, Tensor]) -> Any:
    return SUMS[kind](**{name: tensor if tensor.ndim else int(tensor) for name, tensor in tensors.items()})
