import dataclasses
import sys
from pathlib import Path

import numpy as np
import oracle
import pytest
import torch
from torch import nn

sys.path.insert(0, str(Path(__file__).parent))

from problems import problem

from imu_ray.config import InfluenceConfig, IntensityConfig
from imu_ray.updates import iterative as loop
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.iterative import run_ascent
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget
from imu_ray.updates.workers import Workers

PLAIN = {"momentum": 0.0, "stop": {"max_epochs": 3, "every_steps": 1}}


def oracle_weights(matrix, features, labels, rows):
    """Intensities of the oracle for some rows under a head ``[C, D]``, 0 elsewhere."""
    layer = nn.Linear(6, 4).double()
    with torch.no_grad():
        layer.weight.copy_(matrix[:, :6])
        layer.bias.copy_(matrix[:, 6])
    weights = np.zeros(len(labels))
    weights[rows] = oracle.intensities(oracle.influence(nn.Sequential(layer), "0", features[rows], labels[rows]))
    return weights


@pytest.mark.parametrize("refresh", ["epoch", "step"])
def test_weights_are_those_of_the_present_head(refresh):
    task = problem(refresh=refresh, **PLAIN)
    features, labels = (part.clone() for part in task.forget.gather(np.arange(90)))
    matrix, weights = task.head.matrix_CD, task.weights
    for epoch in range(3):
        batches = [np.concatenate(batch) for batch in epoch_batches(np.arange(90), task.forget.block_starts, task.config, 0, epoch)]
        if refresh == "epoch" and epoch:
            weights = oracle_weights(matrix, features, labels, np.arange(90))
        for batch in batches:
            if refresh == "step":
                weights = oracle_weights(matrix, features, labels, batch)
            matrix = oracle.ascent(matrix[:, :6], matrix[:, 6], features, labels, weights, [batch], task.config)
    outcome = run_ascent(task, Workers())
    assert outcome.trajectory[-1]["step"] == 15
    assert (outcome.head.matrix_CD - matrix).norm() <= 1e-8 * (matrix - task.head.matrix_CD).norm()
    assert (run_ascent(problem(**PLAIN), Workers()).head.matrix_CD - matrix).norm() > 1e-3 * (matrix - task.head.matrix_CD).norm()


def test_a_batch_that_loses_samples_is_cut_anew_so_that_no_worker_gets_what_is_left_of_a_piece(monkeypatch):
    seen, gradient = [], loop.batch_gradient
    monkeypatch.setattr(
        loop, "batch_gradient", lambda batch, *rest: (seen.append([len(piece) for piece in batch]), gradient(batch, *rest))[1]
    )
    run_ascent(problem(refresh="step", batch_size=30, microbatch_rows=6, **PLAIN), Workers())
    assert len(seen) == 9
    assert any(sum(sizes) < 30 for sizes in seen), "samples were lost"
    assert all(size == 6 for sizes in seen for size in sizes[:-1])


def test_going_back_over_the_start_of_an_epoch_takes_the_weights_of_the_epoch_before():
    """An overshoot is taken back to a check in the epoch before, and the same path is walked again."""
    free = run_ascent(problem(refresh="epoch", learning_rate=0.5, stop={"every_steps": 1, "max_epochs": 3}), Workers()).trajectory
    crossing = next(i for i, record in enumerate(free) if record["epoch"] > 1)
    between = (free[crossing]["forget_loss"] + free[crossing - 1]["forget_loss"]) / 2
    target = StopTarget("forget_loss", between, "test", tolerance=1e-6, rising=True)
    outcomes = []
    for every in (1, 4):  # 4: from step 4, in the first epoch, to step 8, in the second, and back
        options = {"refresh": "epoch", "learning_rate": 0.5, "targets": [target], "stop": {"every_steps": every, "max_epochs": 3}}
        outcomes.append(run_ascent(problem(**options), Workers()))
    assert outcomes[0].status == outcomes[1].status == "reached"
    assert torch.equal(outcomes[0].head.matrix_CD, outcomes[1].head.matrix_CD)


def test_the_curvature_may_be_that_of_other_samples_at_every_scoring():
    task = problem(refresh="epoch", **PLAIN)
    other = dataclasses.replace(task, curvature_set="test", rescoring=Rescoring(InfluenceConfig(refresh="epoch"), IntensityConfig()))
    heads = [run_ascent(each, Workers()).head.matrix_CD for each in (task, other)]
    assert not torch.allclose(*heads, rtol=1e-9)


class Second(Workers):
    """The second of two workers, whose sums are its own and who is told the first one's weights."""

    def __init__(self):
        super().__init__(rank=1, world=2)

    def sum(self, tensor):
        return tensor

    def agree(self, value):
        assert not len(value), "it has none of its own"
        return np.ones(90)


def test_one_worker_scores_for_all(monkeypatch):
    monkeypatch.setattr(Rescoring, "weights", lambda *_: pytest.fail("the second worker scored"))
    outcome = run_ascent(problem(refresh="epoch", **PLAIN), Second())
    assert outcome.trajectory[-1]["effective_sample_size"] == 90


@pytest.mark.parametrize("refresh", ["epoch", "step"])
@pytest.mark.parametrize("rate", [1e100, 1e199, 1e300])
@pytest.mark.parametrize("influence", [{}, {"robust": "clip"}, {"curvature": "kfac"}, {"curvature": "hessian"}], ids=str)
def test_a_head_that_explodes_before_it_is_scored_again_is_taken_back(refresh, rate, influence):
    task = problem(refresh=refresh, learning_rate=rate, stop={"every_steps": 50}, influence=influence)
    outcome = run_ascent(task, Workers())
    assert outcome.status == "stopped_by_guard"
    assert torch.equal(outcome.head.matrix_CD, task.head.matrix_CD)


def test_a_batch_without_weight_is_a_step_of_the_penalties_alone(monkeypatch):
    monkeypatch.setattr(Rescoring, "weights", lambda _, shards, *__: np.zeros(sum(len(shard.labels_n) for shard in shards)))
    task = problem(refresh="step", l1=0.0, weight_decay=0.0, **PLAIN)
    outcome = run_ascent(task, Workers())
    assert torch.equal(outcome.head.matrix_CD, task.head.matrix_CD)
    assert outcome.trajectory[-1]["effective_sample_size"] == 0
