"""imu_ray's own updates as methods of the study of layers: the functions that its tasks run, in this process, on kept features.

All are forget-only but where ``needs`` says otherwise. Lengths of a one-step update grow by a third from check to check; the harness interpolates
between them. Views are drawn as in training, with a seed of their own: the study's figures are on other views.
"""

import functools
import itertools
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from imu_ray.config import AscentConfig, ForgetSetConfig, UnlearnConfig
from imu_ray.influence.curvature import LAYER_CURVATURES
from imu_ray.influence.curvature.base import FittedCurvature
from imu_ray.influence.curvature.ggn import BlockGGN
from imu_ray.influence.intensity import SCHEMES
from imu_ray.models.choice import choose_layers
from imu_ray.scopes.base import FORGET_VIEWS, Parameters
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.workers import Workers
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.one_step import Line
from imu_ray.updates.optimiser import Optimiser
from tests.benchmarks.baselines import Method, Problem, Progress, grid, head_of, inputs_of
from tests.benchmarks.train_cifar import augment

GROWTH, FACTOR_ROWS, BLOCK = 1.33, 4096, 256


def layers_of(problem: Problem, scope: Any) -> Layers:
    """The part of the problem's model that a scope means."""
    model, example = problem.model.eval().requires_grad_(True), inputs_of(problem.images[:8])
    head = next(name for name, module in model.named_modules() if module is head_of(model))
    names = [head] if scope == "head" else choose_layers(model, example, scope, head)
    task = ClassificationTask(ForgetSetConfig(), head, head_of(model).out_features)
    return Layers.of_names(model, task, names, example, UnlearnConfig())


@torch.no_grad()
def shard_of(part: Layers, images: Tensor, labels: Tensor, name: str) -> FeatureShard:
    """What crosses the cut, of some images."""
    kept = torch.cat([part.cut.join(part.cut.prefix(inputs_of(rows))) for rows in images.split(500)])
    sizes = tuple(len(rows) for rows in labels.split(BLOCK))
    return FeatureShard(kept.numpy(), labels.numpy(), pa.array([f"{name}{i}" for i in range(len(labels))]), sizes)


def sets_of(part: Layers, problem: Problem, views: int) -> dict[str, FeatureShard]:
    """The forget set, and so many views of each row, which stand together."""
    sets = {"forget": shard_of(part, problem.images, problem.labels, "row")}
    if views:
        generator = torch.Generator().manual_seed(77)
        images = problem.images.repeat_interleave(views, 0)
        labels = problem.labels.repeat_interleave(views)
        sets[FORGET_VIEWS] = shard_of(part, augment(images, generator, problem.crop), labels, "view")
    return sets


def spaced(shard: FeatureShard, rows: int) -> FeatureShard:
    """Evenly spaced rows."""
    chosen = np.unique(np.linspace(0, len(shard.labels_n) - 1, min(rows, len(shard.labels_n))).astype(int))
    sizes = tuple(len(chosen[i : i + BLOCK]) for i in range(0, len(chosen), BLOCK))
    return FeatureShard(shard.features_nF[chosen], shard.labels_n[chosen], shard.ids.take(pa.array(chosen)), sizes)


def fit(part: Layers, shard: FeatureShard, damping: float) -> dict[str, FittedCurvature]:
    """K-FAC of the layers, block GGN of the head, from at most ``FACTOR_ROWS`` rows."""
    kinds = dict.fromkeys(part.parameters, LAYER_CURVATURES["kfac"])
    if BlockGGN().memory(*part.parameters[part.task.head].shape) < 2**31:
        kinds[part.task.head] = LAYER_CURVATURES["block_ggn"]
    sums = part.statistics(spaced(shard, FACTOR_ROWS), {name: kind.statistics for name, kind in kinds.items()}).parts
    return {name: kind.solve(sums[name], damping) for name, kind in kinds.items()}


def set_parameters(problem: Problem, part: Layers, parameters: Parameters) -> None:
    """Write parameters into the model in place."""
    changed = part.changed(parameters).apply(problem.model)
    problem.model.load_state_dict(changed.state_dict())


def start(problem: Problem, scope: Any, views: int, curvature: str, damping: float) -> tuple[Any, Any, dict[str, Any]]:
    """The scope on its samples, its part, and the curvature."""
    part = layers_of(problem, scope)
    sets = sets_of(part, problem, views)
    moved = sets.get(FORGET_VIEWS, sets["forget"])
    if curvature == "bundle":
        moved = shard_of(part, problem.train_images[:FACTOR_ROWS], problem.train_labels[:FACTOR_ROWS], "train")
    fitted = {} if curvature == "none" else fit(part, moved, damping)
    return part.scope({name: FeatureStore([shard]) for name, shard in sets.items()}, Workers()), part, fitted


def one_step(
    problem: Problem, scope: Any = "last:3", views: int = 0, curvature: str = "kfac", objective: str = "bounded_ascent",
    damping: float = 0.01,
) -> Progress:  # fmt: skip
    """theta + eps P^-1 grad of the bounded forget loss, eps growing."""
    on, part, fitted = start(problem, scope, views, curvature, damping)
    settings = AscentConfig(objective=objective, microbatch_rows=BLOCK)
    line = Line.of(on, UpdateProblem(np.ones(on.rows), settings, 0, preconditioners=fitted), on.parameters())
    length = 1e-3 * float(torch.stack([tensor.norm() for tensor in line.origin.values()]).norm())
    while True:
        set_parameters(problem, part, line.at(length))
        yield {"epochs": float(max(views, 1)), "length": length}
        length *= GROWTH


def iterative(
    problem: Problem, scope: Any = "last:3", views: int = 0, curvature: str = "kfac", objective: str = "bounded_ascent",
    damping: float = 0.01, lr: float = 0.01, scheme: str = "uniform",
) -> Progress:  # fmt: skip
    """Steps over batches with momentum, preconditioned by the curvature of the original model."""
    on, part, fitted = start(problem, scope, views, curvature, damping)
    settings = AscentConfig(
        update="iterative", objective=objective, microbatch_rows=BLOCK, learning_rate=lr, batch_size=256
    )
    weights = np.ones(on.rows) if scheme == "uniform" else imu_weights(on, part)
    kept = np.flatnonzero(weights > 0)
    optimiser = Optimiser(on.parameters(), settings, fitted)
    done = 0
    for epoch in itertools.count():
        for batch in epoch_batches(kept, on.block_starts, settings, problem.seed, epoch):
            gradient = on.batch_gradient(optimiser.parameters, batch, weights, OBJECTIVES[objective], BLOCK)
            optimiser.step(gradient, lr)
            done += len(batch) * max(views, 1)
            set_parameters(problem, part, optimiser.parameters)
            yield {"epochs": done / on.rows}


def imu_weights(on: Any, part: Layers) -> np.ndarray:
    """The paper's intensities from the influence of all layers of the scope under the diagonal Fisher."""
    from imu_ray.influence.direction import fit_directions

    (shard,) = on.sets["forget"].shards
    config = UnlearnConfig.from_recipe("paper")
    reduce = lambda statistics: part.statistics(shard, dict.fromkeys(part.parameters, statistics)).parts
    directions, _ = fit_directions(config.influence, list(part.parameters), reduce, None, lambda level: 0.0)
    table = part.scores(shard, directions)
    return SCHEMES["imu"](table["influence"].to_numpy(), table["loss"].to_numpy(), config.intensity, 0)


def method(run: Any, *settings: dict[str, object], needs: str = "forget set", **fixed: Any) -> Method:
    return Method(functools.partial(run, **fixed), settings or ({},), needs)


METHODS = {
    "one step, head": method(one_step, scope="head"),
    "one step, head, 6 views": method(one_step, scope="head", views=6),
    "one step, last:3": method(one_step),
    "one step, last:3, 6 views": method(one_step, views=6),
    "one step, last:3, no curvature": method(one_step, curvature="none"),
    "one step, last:3, 6 views, bundle": method(one_step, views=6, curvature="bundle", needs="bundle"),
    "one step, last:3, bundle": method(one_step, curvature="bundle", needs="bundle"),
    "one step, last:6, 6 views": method(one_step, scope="last:6", views=6),
    "iterative, last:3": method(iterative, *grid(lr=(3e-5, 3e-4))),
    "iterative, last:3, 6 views": method(iterative, *grid(lr=(3e-5, 3e-4)), views=6),
    "iterative IMU, last:3, no curvature": method(
        iterative, *grid(lr=(3e-4, 3e-3)), curvature="none", objective="ascent", scheme="imu"
    ),
}
