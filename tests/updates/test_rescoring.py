import numpy as np
import oracle
import pytest
import torch
from torch import nn
from updates.problems import changed, problem, run

from imu_ray.config import InfluenceConfig, IntensityConfig
from imu_ray.updates.batches import epoch_batches
from imu_ray.updates.rescoring import Rescoring
from imu_ray.updates.stopping import StopTarget

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
    matrix, weights = task.start, task.weights
    for epoch in range(3):
        batches = epoch_batches(np.arange(90), task.forget.block_starts, task.config, 0, epoch)
        if refresh == "epoch" and epoch:
            weights = oracle_weights(matrix, features, labels, np.arange(90))
        for batch in batches:
            if refresh == "step":
                weights = oracle_weights(matrix, features, labels, batch)
            matrix = oracle.ascent(matrix[:, :6], matrix[:, 6], features, labels, weights, [batch], task.config)
    outcome = run(task)
    assert outcome.trajectory[-1]["step"] == 15
    assert (changed(outcome) - matrix).norm() <= 1e-8 * (matrix - task.start).norm()
    assert (changed(run(problem(**PLAIN))) - matrix).norm() > 1e-3 * (matrix - task.start).norm()


def test_going_back_over_the_start_of_an_epoch_takes_the_weights_of_the_epoch_before():
    """An overshoot is taken back to a check in the epoch before, and the same path is walked again."""
    free = run(problem(refresh="epoch", learning_rate=0.5, stop={"every_steps": 1, "max_epochs": 3})).trajectory
    crossing = next(i for i, record in enumerate(free) if record["epoch"] > 1)
    between = (free[crossing]["forget.loss"] + free[crossing - 1]["forget.loss"]) / 2
    target = StopTarget("forget.loss", between, "test", tolerance=1e-6, rising=True)
    options = {"refresh": "epoch", "learning_rate": 0.5, "targets": [target]}
    # 4: from step 4, in the first epoch, to step 8, in the second, and back
    outcomes = [run(problem(**options, stop={"every_steps": every, "max_epochs": 3})) for every in (1, 4)]
    assert outcomes[0].status == outcomes[1].status == "reached"
    assert torch.equal(changed(outcomes[0]), changed(outcomes[1]))


def test_the_curvature_may_be_that_of_other_samples_at_every_scoring():
    task = problem(refresh="epoch", **PLAIN)
    other = task.but(
        curvature_set="test", rescoring=Rescoring(InfluenceConfig(refresh="epoch"), IntensityConfig(scheme="imu"))
    )
    heads = [changed(run(each)) for each in (task, other)]
    assert not torch.allclose(*heads, rtol=1e-9)


@pytest.mark.parametrize("refresh", ["epoch", "step"])
@pytest.mark.parametrize("rate", [1e100, 1e199, 1e300])
@pytest.mark.parametrize(
    "influence", [{}, {"robust": "clip"}, {"curvature": "kfac"}, {"curvature": "hessian"}], ids=str
)
def test_a_head_that_explodes_before_it_is_scored_again_is_taken_back(refresh, rate, influence):
    task = problem(refresh=refresh, learning_rate=rate, stop={"every_steps": 50}, influence=influence)
    outcome = run(task)
    assert outcome.status == "stopped_by_guard"
    assert torch.equal(changed(outcome), task.start)


def test_a_batch_without_weight_is_a_step_of_the_penalties_alone(monkeypatch):
    monkeypatch.setattr(Rescoring, "weights", lambda _, __, ___, ____, batch, *_____: np.zeros(len(batch)))
    task = problem(refresh="step", l1=0.0, weight_decay=0.0, **PLAIN)
    outcome = run(task)
    assert torch.equal(changed(outcome), task.start)
    assert outcome.trajectory[-1]["effective_sample_size"] == 0
