import dataclasses
import multiprocessing
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
import torch.distributed

sys.path.insert(0, str(Path(__file__).parent))

from problems import problem

from imu_ray.ascent.batches import epoch_batches
from imu_ray.ascent.loop import run_ascent
from imu_ray.ascent.step import Workers
from imu_ray.ascent.stopping import StopTarget
from imu_ray.influence.scores import sample_losses


@pytest.mark.parametrize("bias", [True, False])
def test_the_ascent_equals_plain_autograd_over_the_same_batches(bias):
    task = problem(bias=bias)
    outcome = run_ascent(task, Workers())
    features, labels = task.forget.gather(np.arange(90))
    kept = np.flatnonzero(task.weights)
    batches = [
        np.concatenate(batch) for epoch in range(3) for batch in epoch_batches(kept, task.forget.block_starts, task.config, 0, epoch)
    ]
    matrix = task.head.matrix_CD
    expected = oracle.ascent(matrix[:, :6], matrix[:, 6] if bias else None, features, labels, task.weights, batches, task.config)
    drift = (expected - matrix).norm()
    assert (outcome.head.matrix_CD - expected).norm() <= 1e-9 * drift
    assert outcome.status == "epochs_done"


def ascend_in_process(rank, world, folder, options, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous{world}", rank=rank, world_size=world)
    outcome = run_ascent(problem(**options), Workers(rank, world))
    results.put((rank, outcome.head.matrix_CD.numpy(), outcome.status, outcome.trajectory[-1]["step"]))
    torch.distributed.destroy_process_group()


def distributed(world, folder, options):
    """Heads of a group of plain gloo processes."""
    context = multiprocessing.get_context("spawn")
    results = context.Queue()
    group = [context.Process(target=ascend_in_process, args=(rank, world, folder, options, results)) for rank in range(world)]
    for process in group:
        process.start()
    found = sorted((results.get(timeout=120) for _ in group), key=lambda item: item[0])
    for process in group:
        process.join(timeout=60)
    return found


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "tolerance"), [(np.float64, 1e-9), (np.float32, 1e-4)])
@pytest.mark.parametrize("world", [2, 4])
def test_any_number_of_workers_takes_the_same_steps(world, dtype, tolerance, tmp_path):
    # 72 kept rows: batches of 20, 20, 20 and 12 in microbatches of 6, the last of 2; four workers leave one idle at times.
    options = {"dtype": dtype, "microbatch_rows": 6}
    alone = run_ascent(problem(**options), Workers())
    start = problem(**options).head.matrix_CD
    for _, matrix, status, step in distributed(world, tmp_path, options):
        difference = np.linalg.norm(matrix - alone.head.matrix_CD.numpy())
        assert difference <= tolerance * float((alone.head.matrix_CD - start).norm())
        assert (status, step) == (alone.status, alone.trajectory[-1]["step"])


@pytest.mark.slow
def test_more_workers_than_rows_in_a_batch_change_nothing(tmp_path):
    options = {"batch_size": 2, "microbatch_rows": 1, "epochs": 1}
    alone = run_ascent(problem(**options), Workers())
    for _, matrix, *_ in distributed(4, tmp_path, options):
        np.testing.assert_allclose(matrix, alone.head.matrix_CD.numpy(), rtol=1e-9)


def test_the_divisor_is_the_weight_of_the_global_batch():
    task = problem(epochs=1, momentum=0.0, weight_decay=0.0, l1=0.0, batch_size=1000, every_steps=1)
    doubled = dataclasses.replace(task, weights=2 * task.weights)
    torch.testing.assert_close(run_ascent(task, Workers()).head.matrix_CD, run_ascent(doubled, Workers()).head.matrix_CD)


def test_ascent_raises_the_weighted_forget_loss():
    task = problem(l1=0.0, weight_decay=0.0)
    outcome = run_ascent(task, Workers())
    features, labels = task.forget.gather(np.arange(90))
    losses = [(sample_losses(head.logits(features), labels).numpy() * task.weights).sum() for head in (task.head, outcome.head)]
    assert losses[1] > losses[0]


def test_a_target_ends_the_ascent_at_the_first_check_that_meets_it():
    outcome = run_ascent(problem(target=StopTarget("forget_accuracy", 0.5, "test"), epochs=200, learning_rate=0.05), Workers())
    accuracies = [record["forget_accuracy"] for record in outcome.trajectory]
    assert outcome.status == "reached"
    assert accuracies[-1] <= 0.5
    assert all(accuracy > 0.5 for accuracy in accuracies[:-1])


def test_a_target_that_is_never_met_is_reported_as_not_reached():
    outcome = run_ascent(problem(target=StopTarget("forget_accuracy", 0.0, "test"), epochs=1, learning_rate=1e-6), Workers())
    assert outcome.status == "not_reached"
    assert "target 0.0000" in outcome.reason


def test_a_model_that_is_at_the_target_already_is_not_touched():
    task = problem(target=StopTarget("forget_accuracy", 1.0, "test"))
    outcome = run_ascent(task, Workers())
    assert outcome.status == "reached"
    assert torch.equal(outcome.head.matrix_CD, task.head.matrix_CD)


def test_a_step_far_too_long_ends_at_the_last_finite_head():
    outcome = run_ascent(problem(learning_rate=1e200, epochs=50), Workers())
    assert outcome.status == "stopped_by_guard"
    assert torch.isfinite(outcome.head.matrix_CD).all()


def test_going_on_from_any_saved_state_gives_the_same_bits():
    states = []
    whole = run_ascent(
        problem(), Workers(), save=lambda state: states.append(dataclasses.replace(state, trajectory=list(state.trajectory)))
    )
    assert len(states) > 3
    for state in states:
        rest = run_ascent(problem(), Workers(), resume=state)
        assert torch.equal(rest.head.matrix_CD, whole.head.matrix_CD)
        assert [record["step"] for record in rest.trajectory] == [record["step"] for record in whole.trajectory]


def test_each_check_records_every_set_and_the_drift():
    record = run_ascent(problem(), Workers()).trajectory[-1]
    assert record.keys() >= {
        "step", "epoch", "forget_loss", "forget_accuracy", "test_loss", "test_accuracy", "parameter_drift", "gradient_norm",
        "effective_sample_size", "seconds",
    }  # fmt: skip
    assert record["parameter_drift"] > 0
