import re

import numpy as np
import pytest
import torch
from updates.problems import changed, problem

from imu_ray.config import GuardConfig
from imu_ray.influence.curvature import PRECONDITIONERS
from imu_ray.influence.curvature.base import merge_tree
from imu_ray.scopes.head import shard_statistics
from imu_ray.updates.one_step import run_one_step
from imu_ray.updates.stopping import StopTarget

UNREACHABLE = StopTarget("forget.bounded_loss", 5.0, "test", rising=True)
LOSS = StopTarget("forget.bounded_loss", 1.2, "test", 1e-6, rising=True)


def case(target=LOSS, curvature="block_ggn", objective="bounded_ascent", **settings):
    plain = problem(targets=[target], update="one_step", objective=objective, **settings)
    if curvature is None:
        return plain
    shards, head = plain.forget.shards, plain.head
    reduce = lambda statistics: merge_tree(shard_statistics(shard, head, statistics) for shard in shards)
    return plain.but(preconditioners={"fc": PRECONDITIONERS[curvature].fit(reduce, 0.01)})


def step(task, **options):
    return run_one_step(task.scope(), task.problem, **options)


def loss_along(task, direction, length):
    """Mean bounded loss of the forget set at a length of the direction, written out."""
    features, labels = task.forget.gather(np.arange(90))
    matrix = task.start + length * direction
    logits = features @ matrix[:, :-1].T + matrix[:, -1]
    return float(torch.nn.functional.cross_entropy(logits, labels, reduction="none").clamp_max(np.log(4)).mean())


@pytest.mark.parametrize("curvature", [None, "feature_second_moment", "block_ggn", "full_ggn"])
def test_the_step_is_the_shortest_along_the_preconditioned_gradient_that_meets_the_target(curvature):
    task = case(curvature=curvature)
    outcome = step(task)
    features, labels = task.forget.gather(np.arange(90))
    matrix = task.start.clone().requires_grad_()
    losses = torch.nn.functional.cross_entropy(features @ matrix[:, :-1].T + matrix[:, -1], labels, reduction="none")
    weights = torch.from_numpy(task.weights)
    (weights / weights.sum() * losses.clamp_max(np.log(4))).sum().backward()
    fitted = task.problem.preconditioners.get("fc")
    direction = matrix.grad if fitted is None else fitted.apply_inverse(matrix.grad)
    moved = changed(outcome) - task.start
    length = float(moved.norm() / direction.norm())
    torch.testing.assert_close(moved, length * direction, rtol=1e-9, atol=1e-12)
    assert outcome.status == "reached"
    assert 0 <= loss_along(task, direction, length) - 1.2 <= 1e-6
    assert loss_along(task, direction, 0.999 * length) < 1.2
    assert outcome.record is outcome.trajectory[-1]


@pytest.mark.parametrize(
    "target",
    [
        StopTarget("forget.accuracy", 0.5, "test", 1 / 90),
        StopTarget("forget.margin", 0.0, "test", 0.01),
        StopTarget("membership.auc", 0.5115, "test"),
    ],
    ids=lambda target: target.metric,
)
def test_any_metric_can_be_the_target(target):
    outcome = step(case(target))
    assert outcome.status == "reached"
    assert 0 <= target.overshoot(outcome.record) <= target.tolerance


@pytest.mark.parametrize(
    ("target", "guard", "reason"),
    [
        (UNREACHABLE, GuardConfig(), "forget.loss .* where forget.bounded_loss is .*; target 5"),
        (LOSS, GuardConfig(max_parameter_drift=0.01), "parameter drift .* is above"),
        (LOSS, GuardConfig(limits={"test.accuracy": 0.6}), "test.accuracy .* is below"),
    ],
)
def test_a_target_that_cannot_be_met_leaves_the_parameters_as_they_were(target, guard, reason):
    task = case(target, guard=guard)
    outcome = step(task)
    assert outcome.status == "stopped_by_guard"
    assert re.search(f"{reason}.*the parameters are as they were", outcome.reason)
    assert torch.equal(changed(outcome), task.start)
    assert outcome.record["parameter_drift"] == 0


def test_a_model_that_meets_the_target_is_not_touched():
    task = case(StopTarget("forget.bounded_loss", 0.0, "test", rising=True))
    outcome = step(task)
    assert outcome.status == "already_met"
    assert torch.equal(changed(outcome), task.start)


def test_every_trial_that_stands_is_told_with_its_parameters():
    told = []
    outcome = step(case(), checked=lambda record, parameters: told.append((record, parameters)))
    assert [record for record, _ in told] == outcome.trajectory[1:]
    assert torch.equal(told[-1][1]["fc"], changed(outcome))
    assert [record["step"] for record in outcome.trajectory] == list(range(len(outcome.trajectory)))


@pytest.mark.parametrize(
    ("share", "most"), [(0.5, 13), (0.9, 9), (0.99, 4), (1.0, 1), (1.01, 5), (1.1, 9), (2.0, 13)], ids=str
)
def test_the_search_on_all_rows_ends_at_the_target_wherever_that_on_a_part_of_them_ended(share, most, monkeypatch):
    task = case(StopTarget("forget.bounded_loss", 1.2, "test", 1e-3, rising=True))
    plain, scope = step(task), task.scope()

    def probe(parameters, sets):  # rows that are as far after this share of the way
        return scope.measure({name: start + share * (parameters[name] - start) for name, start in origin.items()}, sets)

    origin = scope.parameters()
    monkeypatch.setattr(scope, "probe", probe)
    outcome = run_one_step(scope, task.problem)
    assert outcome.status == plain.status == "reached"
    assert 0 <= outcome.record["forget.bounded_loss"] - 1.2 <= 1e-3
    assert outcome.record["length"] == pytest.approx(plain.record["length"], rel=0.01)
    assert len(outcome.trajectory) - 1 <= most < len(plain.trajectory) - 1


def test_where_no_length_suits_a_part_of_the_rows_all_of_them_decide(monkeypatch):
    task = case(guard=GuardConfig(max_parameter_drift=10.0))
    scope, probes = task.scope(), []

    def probe(parameters, sets):  # rows that drift and are not forgotten
        probes.append(sets)
        return scope.measure(origin, sets)

    origin = scope.parameters()
    monkeypatch.setattr(scope, "probe", probe)
    outcome = run_one_step(scope, task.problem)
    assert outcome.status == "reached"
    assert len(probes) > 5
    assert 0 <= outcome.record["forget.bounded_loss"] - 1.2 <= 1e-6
