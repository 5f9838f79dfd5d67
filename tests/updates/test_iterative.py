import dataclasses
import multiprocessing
import re
from itertools import pairwise

import numpy as np
import oracle
import pyarrow as pa
import pytest
import torch
import torch.distributed
from updates.problems import TASK, changed, problem, run

from imu_ray.config import GuardConfig
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.scopes.workers import Workers
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.stopping import StopTarget, guard_violation


@pytest.mark.parametrize("bias", [True, False])
def test_the_ascent_equals_plain_autograd_over_the_same_batches(bias):
    task = problem(bias=bias)
    outcome = run(task)
    features, labels = task.forget.gather(np.arange(90))
    kept = np.flatnonzero(task.weights)
    epochs = [epoch_batches(kept, task.forget.block_starts, task.config, 0, epoch) for epoch in range(3)]
    batches = [batch for epoch in epochs for batch in epoch]
    matrix, bias = task.start, task.start[:, 6] if bias else None
    expected = oracle.ascent(matrix[:, :6], bias, features, labels, task.weights, batches, task.config)
    drift = (expected - matrix).norm()
    assert (changed(outcome) - expected).norm() <= 1e-9 * drift
    assert outcome.status == "epochs_done"


def ascend_in_process(rank, world, folder, cases, results):
    torch.set_num_threads(1)
    where = {"init_method": f"file://{folder}/rendezvous", "rank": rank, "world_size": world}
    torch.distributed.init_process_group("gloo", **where)
    outcomes = [run(problem(**options), Workers(rank, world)) for options in cases]
    results.put([(changed(each).numpy(), each.status, each.trajectory[-1]["step"]) for each in outcomes])
    torch.distributed.destroy_process_group()


def distributed(world, folder, cases):
    """Of each case, the heads of a group of plain gloo processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    start = lambda rank: context.Process(target=ascend_in_process, args=(rank, world, folder, cases, results))
    group = [start(rank) for rank in range(world)]
    for process in group:
        process.start()
    found = [results.get(timeout=120) for _ in group]
    for process in group:
        process.join(timeout=60)
    return zip(*found, strict=True)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("world", "cases"),
    [
        (2, [({}, 1e-9), ({"dtype": np.float32}, 1e-4), ({"refresh": "epoch"}, 1e-9), ({"refresh": "step"}, 1e-9)]),
        # More workers than rows, last.
        (4, [({}, 1e-9), ({"batch_size": 2, "microbatch_rows": 1, "stop": {"max_epochs": 1}}, 1e-9)]),
    ],
)
def test_any_number_of_workers_takes_the_same_steps(world, cases, tmp_path):
    # 72 kept rows: batches of 20, 20, 20 and 12 in microbatches of 6, the last of 2; of four workers one may idle.
    found = distributed(world, tmp_path, [options for options, _ in cases])
    for (options, tolerance), outcomes in zip(cases, found, strict=True):
        alone, start = run(problem(**options)), problem(**options).start
        for matrix, status, step in outcomes:
            assert np.array_equal(matrix, outcomes[0][0]), "to the bit on every worker"
            difference = np.linalg.norm(matrix - changed(alone).numpy())
            assert difference <= tolerance * float((changed(alone) - start).norm())
            assert (status, step) == (alone.status, alone.trajectory[-1]["step"])


def accuracy_target(threshold, tolerance=0.02):
    return (StopTarget("forget.accuracy", threshold, "test", tolerance),)


def test_a_target_ends_the_ascent_at_the_first_check_that_meets_it():
    outcome = run(problem(targets=accuracy_target(0.5), stop={"max_epochs": 200}, learning_rate=0.05))
    accuracies = [record["forget.accuracy"] for record in outcome.trajectory]
    assert outcome.status == "reached"
    assert 0.48 <= accuracies[-1] <= 0.5
    assert all(accuracy > 0.5 for accuracy in accuracies[:-1])


@pytest.mark.parametrize("rate", [0.01, 0.1, 1.0, 10.0])
@pytest.mark.parametrize(
    "target",
    [
        StopTarget("forget.accuracy", 0.5, "test", 1 / 90),
        StopTarget("forget.loss", 1.4, "test", 0.01, rising=True),
        StopTarget("membership.auc", 0.45, "test", 0.005),
    ],
    ids=lambda target: target.metric,
)
def test_an_overshot_target_is_bisected_back_to_within_the_tolerance(target, rate):
    limits = {"stop": {"max_epochs": 400, "every_steps": 7}, "guard": GuardConfig(max_forget_loss=1e6)}
    task = problem(targets=(target,), learning_rate=rate, **limits)
    outcome = run(task)
    assert outcome.status == "reached"
    assert 0 <= target.overshoot(outcome.trajectory[-1]) <= target.tolerance
    assert outcome.record is outcome.trajectory[-1]
    at_the_end = task.scope().measure(outcome.parameters)
    assert at_the_end[target.metric] == pytest.approx(outcome.trajectory[-1][target.metric], abs=1e-9)


def test_a_target_that_can_only_be_jumped_over_says_so():
    # All rows are one sample, so that its accuracy goes from 1 to 0 at once.
    task = problem(learning_rate=1.0, targets=accuracy_target(0.5, 0.1), stop={"max_epochs": 50})
    shard = task.forget.shards[0]
    features, labels = np.repeat(shard.features_nF[:1], 90, 0), np.repeat(shard.labels_n[:1], 90)
    one = FeatureShard(features, labels, pa.array(["x"] * 90), (90,))
    outcome = run(dataclasses.replace(task, forget=FeatureStore([one])))
    assert outcome.status == "not_reached"
    assert "jumped over" in outcome.reason


def test_steps_at_most_end_the_ascent_in_the_middle_of_an_epoch():
    assert run(problem(stop={"max_steps": 5, "max_epochs": 9})).trajectory[-1]["step"] == 5


def test_a_gradient_beyond_the_largest_norm_is_scaled_down_to_it():
    first = {"stop": {"max_steps": 1, "every_steps": 1}, "l1": 0.0, "weight_decay": 0.0}
    plain = run(problem(**first))
    moved, norm = changed(plain) - problem().start, plain.trajectory[-1]["gradient_norm"]
    clipped = changed(run(problem(max_gradient_norm=norm / 4, **first))) - problem().start
    torch.testing.assert_close(4 * clipped, moved, rtol=1e-9, atol=1e-13)
    assert torch.equal(changed(run(problem(max_gradient_norm=2 * norm, **first))), changed(plain))


@pytest.mark.parametrize("rate", [10.0, 1e4, 1e200])
def test_a_learning_rate_far_too_high_never_leaves_a_head_that_is_not_finite(rate):
    outcome = run(problem(learning_rate=rate, stop={"max_epochs": 50}))
    assert outcome.status == "stopped_by_guard"
    assert torch.isfinite(changed(outcome)).all()
    assert outcome.trajectory[-1]["forget.loss"] <= 100


@pytest.mark.parametrize(
    ("guard", "message"),
    [
        (GuardConfig(max_parameter_drift=0.05), "parameter drift .* above ascent.guard.max_parameter_drift 0.05"),
        (GuardConfig(limits={"test.accuracy": 0.6}), "test.accuracy .* below ascent.guard.limits 0.6"),
        (GuardConfig(max_forget_loss=1.0), "forget.loss .* above ascent.guard.max_forget_loss 1"),
    ],
)
def test_a_guard_goes_back_to_the_last_check_that_stood(guard, message):
    task = problem(guard=guard, learning_rate=0.05, stop={"max_epochs": 100})
    outcome = run(task)
    assert outcome.status == "stopped_by_guard"
    assert re.search(message, outcome.reason)
    assert guard_violation(outcome.trajectory[-1], guard, TASK.metrics) is None
    drift = (changed(outcome) - task.start).norm() / task.start.norm()
    assert float(drift) == pytest.approx(outcome.trajectory[-1]["parameter_drift"])


@pytest.mark.parametrize("rate", [1e-6, 0.01, 100.0])
def test_a_trust_region_reaches_its_target_at_any_learning_rate_and_is_never_left(rate):
    limits = {"forget.accuracy": 0.05, "forget.loss": 0.2}
    stop = {"every_steps": 1, "max_epochs": 100}
    task = problem(learning_rate=rate, max_change=limits, targets=accuracy_target(0.3), stop=stop)
    outcome = run(task)
    steps = outcome.trajectory
    assert outcome.status == "reached"
    for name, limit in limits.items():
        assert max(abs(a[name] - b[name]) for a, b in pairwise(steps)) <= limit + 1e-9


def test_the_anchor_holds_the_head_near_the_original():
    free, held = (run(problem(anchor=mu)).trajectory[-1]["parameter_drift"] for mu in (0.0, 5.0))
    assert held < free


STEPPERS = {
    "sgd": {},
    "adamw": {"optimizer": "adamw", "learning_rate": 0.003},
    "cosine": {"schedule": "cosine"},
    "trust region": {"learning_rate": 1.0, "max_change": {"forget.loss": 0.1}},
    "best": {"keep": "best"},
    "scored again each epoch": {"refresh": "epoch"},
    "scored again each step": {"refresh": "step"},
}


@pytest.mark.parametrize("kind", STEPPERS)
def test_going_on_from_any_saved_state_gives_the_same_bits(kind):
    states = []
    options = STEPPERS[kind]
    whole = run(problem(**options), save=states.append)
    assert len(states) > 3
    for state in states:
        rest = run(problem(**options), resume=state)
        assert torch.equal(changed(rest), changed(whole))
        assert [record["step"] for record in rest.trajectory] == [record["step"] for record in whole.trajectory]


def test_an_overshoot_that_also_exploded_is_bisected_back_before_the_guard_speaks():
    limits = {"stop": {"every_steps": 10, "max_epochs": 40}, "guard": GuardConfig(max_forget_loss=20)}
    task = problem(targets=accuracy_target(0.5), learning_rate=20.0, **limits)
    outcome = run(task)
    assert outcome.status == "reached"
    assert outcome.trajectory[-1]["forget.loss"] < 20
