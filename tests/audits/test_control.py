import re

import numpy as np
import pytest

from imu_ray.audits.base import Predictions
from imu_ray.audits.control import Moved, as_far, draw_control, moved, paid
from imu_ray.tasks.base import Metric
from imu_ray.updates.base import UpdateOutcome
from imu_ray.updates.stopping import StopTarget

ACCURACY, LOSS = Metric(rises=False, counted=True, chance=0.1), Metric(rises=True, chance=np.log(10))


def labels(**counts):
    return np.repeat([int(name[1:]) for name in counts], list(counts.values()))


def test_as_many_rows_of_each_label_are_drawn_and_half_of_each_is_left():
    forget, unseen = labels(c0=10, c1=6, c2=4), np.random.default_rng(0).permutation(labels(c0=40, c1=12, c2=9, c3=50))
    marks = draw_control(forget, unseen, seed=0)
    assert {label: int((unseen[marks] == label).sum()) for label in range(4)} == {0: 10, 1: 6, 2: 4, 3: 0}
    assert (draw_control(forget, unseen, seed=0) == marks).all()
    assert (draw_control(forget, unseen, seed=1) != marks).any()


@pytest.mark.parametrize(
    ("forget", "unseen", "why"),
    [
        (labels(c0=9), labels(c0=50), "9 rows are forgotten; of fewer than 10"),
        (labels(c0=20), labels(c1=100), "has 0 rows to spare of the labels of the 20 rows"),
        (labels(c0=20), labels(c0=35), "has 17 rows to spare .* fewer than 90% of them"),
        (labels(c0=10, c1=10), labels(c0=100, c1=15), "has 17 rows to spare"),
    ],
)
def test_too_few_rows_of_the_labels_are_a_reason(forget, unseen, why):
    found = draw_control(forget, unseen, seed=0)
    assert isinstance(found, str)
    assert re.search(why, found)


def test_a_row_less_of_a_label_is_enough():
    assert draw_control(labels(c0=20), labels(c0=37), 0).sum() == 18


def test_sequences_are_drawn_whatever_their_labels():
    marks = draw_control(np.zeros((10, 7), np.int64), np.ones((30, 7), np.int64), seed=0)
    assert (marks.shape, marks.sum()) == ((30,), 10)


def outcome(status="reached", **metrics):
    first, last = ({f"forget.{name}": values[at] for name, values in metrics.items()} for at in (0, 1))
    return UpdateOutcome({}, {**last, "membership.auc": 0.5}, status, "", [{**first, "membership.auc": 0.9}, last])


def target(metric, threshold, rising):
    return StopTarget(metric, threshold, "", rising=rising)


def test_the_metric_is_that_of_the_target_that_was_met():
    found = outcome(accuracy=(1.0, 0.4), bounded_loss=(0.1, 0.6))
    targets = [target("forget.bounded_loss", 0.9, True), target("forget.accuracy", 0.5, False)]
    assert moved(found, targets) == Moved("forget.accuracy", 1.0, 0.4, aim=0.5)
    for others in ([target("membership.auc", 0.5, False)], []):
        assert moved(found, others) == Moved("forget.bounded_loss", 0.1, 0.6, aim=0.6)


@pytest.mark.parametrize("status", ["already_met", "not_reached", "stopped_by_guard"])
def test_a_run_that_forgot_nothing_has_no_control(status):
    assert f"the run ended {status}" in moved(outcome(status, bounded_loss=(0.1, 0.2)), [])


@pytest.mark.parametrize(
    ("metric", "kind", "before", "after", "control", "threshold"),
    [
        ("forget.bounded_loss", LOSS, 0.1, 0.6, 0.4, 0.9),
        ("forget_views.bounded_loss", LOSS, 0.1, 0.6, 0.4, 0.9),
        ("forget.loss", LOSS, 0.1, 3.0, 0.4, 3.3),
        ("forget.accuracy", ACCURACY, 0.95, 0.55, 0.8, 0.4),
        ("forget.accuracy", ACCURACY, 1.0, 0.01, 0.9, 0.01),  # by 99 points would be below nothing
        ("forget.bounded_loss", LOSS, 0.1, 2.25, 0.4, 2.25),  # ln 10 is the most
    ],
)
def test_the_control_is_moved_as_far_or_to_where_the_forget_set_came(metric, kind, before, after, control, threshold):
    found = as_far(Moved(metric, before, after, after), control, kind, 40, 0.005)
    assert found.threshold == pytest.approx(threshold)
    assert (found.metric, found.rising) == (metric, kind.rises)
    assert found.tolerance == (1 / 40 if kind.counted else 0.005)


def test_what_cannot_be_moved_has_its_reason():
    assert "which is no forgetting" in as_far(Moved("forget.loss", 0.5, 0.5, 0.5), 0.6, LOSS, 40, 0.005)
    assert "which is no forgetting" in as_far(Moved("forget.accuracy", 0.5, 0.6, 0.6), 0.6, ACCURACY, 40, 0.005)
    assert "is 0.3 already" in as_far(Moved("forget.accuracy", 0.9, 0.4, 0.4), 0.3, ACCURACY, 40, 0.005)


def predictions(accuracy, loss, of=(0, 0, 1, 1)):
    columns = {"accuracy": np.array(accuracy, float), "loss": np.array(loss, float), "margin": np.zeros(4)}
    return {"test": Predictions(np.array(of), columns, 2)}


def test_the_price_is_the_accuracy_lost_and_the_loss_risen_for_each_forgotten_row():
    before, after = predictions([1, 1, 1, 0], [0.1, 0.2, 0.3, 1.0]), predictions([1, 0, 0, 1], [0.1, 0.8, 0.9, 0.8])
    found = paid(before, after, 5)["test"]
    lost, risen = np.array([0, 1, 1, -1]) / 5, np.array([0, 0.6, 0.6, -0.2]) / 5
    assert found["samples"] == 4
    for key, changes in (("accuracy", lost), ("loss", risen)):
        error = np.sqrt(((changes - changes.mean()) ** 2).sum() / 3 / 4)
        assert found[key] == pytest.approx({"mean": changes.sum() / 4, "standard_error": error})
    of_ones = paid(before, after, 5, np.array([0]))["test"]
    assert (of_ones["samples"], of_ones["accuracy"]["mean"]) == (2, 0.0)
    assert paid(before, after, 5, np.array([0, 1])) == {}


def test_a_model_that_is_left_alone_costs_nothing():
    same = predictions([1, 0, 1, 0], [0.5, 1.5, 0.1, 2.0])
    for figures in (paid(same, same, 3)["test"][key] for key in ("accuracy", "loss")):
        assert figures == {"mean": 0.0, "standard_error": 0.0}


def test_one_row_has_no_standard_error():
    (name, part), *_ = predictions([1, 0, 1, 0], [0, 0, 0, 0]).items()
    one = {name: Predictions(part.labels[:1], {key: each[:1] for key, each in part.metrics.items()}, 2)}
    assert paid(one, one, 3)[name]["loss"] == {"mean": 0.0, "standard_error": None}
