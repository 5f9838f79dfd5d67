import pytest

from imu_ray.config import ForgetSetConfig, StopConfig
from imu_ray.errors import ConfigError
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.stopping import StopTarget, Unseen, stop_targets, verdict

METRICS = ClassificationTask(ForgetSetConfig(), "fc", 10).metrics
PER_CLASS = {"1": {"accuracy": 0.9, "loss": 0.2, "margin": 4.0}, "2": {"accuracy": 0.6, "loss": 0.8, "margin": 1.0}}
FIGURES = {"samples": 100, "accuracy": 0.7, "loss": 0.5, "margin": 2.0, "per_class": PER_CLASS}


def targets(wanted, counts=None, unseen=True, rows=50):
    counts = {1: rows} if counts is None else counts
    return stop_targets(StopConfig(targets=wanted), METRICS, rows, Unseen(FIGURES, counts) if unseen else None)


@pytest.mark.parametrize(
    ("counts", "metric", "expected"),
    [
        ({1: 50}, "accuracy", 0.9),
        ({1: 25, 2: 75}, "accuracy", 0.675),
        ({1: 1, 2: 1}, "loss", 0.5),
        ({2: 3}, "margin", 1.0),
        ({1: 1, 7: 1}, "margin", 3.0),
    ],
)
def test_auto_is_the_mean_over_unseen_samples_of_the_same_labels(counts, metric, expected):
    (target,) = targets({f"forget.{metric}": "auto"}, counts)
    assert target.threshold == pytest.approx(expected)


@pytest.mark.parametrize("counts", [{1: 50}, {}])
def test_where_unseen_samples_are_at_the_bound_the_target_is_not(counts):
    bound = METRICS["bounded_loss"].chance
    unseen = Unseen({"bounded_loss": bound, "per_class": {"1": {"bounded_loss": bound}}}, counts)
    (target,) = stop_targets(StopConfig(targets={"forget.bounded_loss": "auto"}), METRICS, 50, unseen)
    assert target.threshold == bound - 0.005
    assert target.reached({"forget.bounded_loss": bound - 1e-12}), "whatever the order of a sum"
    assert ("labels" in target.reason) == bool(counts)


def test_auto_needs_unseen_samples():
    with pytest.raises(ConfigError, match=r"forget\.accuracy is 'auto' without unseen samples; expected evaluation\["):
        targets({"forget.accuracy": "auto"}, unseen=False)


def test_a_number_is_taken_as_it_is_and_null_switches_a_target_off():
    (target,) = targets({"forget.accuracy": 0.4, "forget.loss": None}, unseen=False)
    assert (target.metric, target.threshold, target.rising) == ("forget.accuracy", 0.4, False)
    assert target.tolerance == 1 / 50, "an accuracy moves in steps of one sample"


def test_a_target_takes_the_direction_of_its_metric():
    loss, margin = targets({"forget.loss": 2.3, "forget.margin": 0.5})
    assert (loss.rising, margin.rising) == (True, False)
    assert loss.tolerance == 0.005
    assert loss.reached({"forget.loss": 2.4})
    assert not loss.reached({"forget.loss": 2.2})


@pytest.mark.parametrize("name", ["forget.acuracy", "accuracy", "test.accuracy"])
def test_a_metric_that_is_not_there_is_refused_with_the_near_ones(name):
    with pytest.raises(ConfigError, match=rf"ascent.stop.targets names '{name}'; .*forget.accuracy"):
        targets({name: 0.5})


def test_the_membership_target_needs_unseen_samples_of_the_forgotten_labels():
    (target,) = targets({"membership.auc": "auto"})
    assert (target.metric, target.threshold) == ("membership.auc", 0.5)
    with pytest.raises(ConfigError, match="without unseen samples of the forgotten labels"):
        targets({"membership.auc": "auto"}, {5: 50})
    with pytest.raises(ConfigError, match="without unseen samples of the forgotten labels"):
        targets({"membership.auc": "auto"}, unseen=False)


@pytest.mark.parametrize(
    ("accuracy", "step", "status"),
    [(0.9, 3, ""), (0.8, 3, "reached"), (0.6, 3, "not_reached"), (0.6, 0, "already_met"), (0.9, 0, "")],
)
def test_the_verdict_tells_a_target_met_before_the_first_step_from_one_that_was_reached(accuracy, step, status):
    target, record = StopTarget("forget.accuracy", 0.8, "test", 0.1), {"forget.accuracy": accuracy, "step": step}
    found, reason = verdict([target], record)
    assert (found, bool(reason)) == (status, bool(status))
