import logging

import pytest

from imu_ray.ascent.stopping import forget_accuracy_target, looks_like_whole_classes
from imu_ray.config import StopConfig


@pytest.mark.parametrize(
    ("counts", "classes", "whole"),
    [
        ({3: 40}, 10, True),
        ({3: 1}, 10, False),
        ({3: 2, 4: 1}, 10, False),
        (dict.fromkeys(range(5), 100), 100, True),
        (dict.fromkeys(range(10), 5), 10, False),
        (dict.fromkeys(range(8), 3), 10, False),
        ({0: 40}, 2, True),
    ],
)
def test_whole_classes_are_told_from_random_draws(counts, classes, whole):
    assert looks_like_whole_classes(counts, classes) is whole


def test_auto_aims_at_one_per_cent_for_whole_classes():
    assert forget_accuracy_target(StopConfig(), {1: 50}, 10, 0.9).threshold == 0.01


def test_auto_aims_at_the_accuracy_on_unseen_samples_for_random_ones():
    assert forget_accuracy_target(StopConfig(), dict.fromkeys(range(10), 50), 10, 0.83).threshold == 0.83


def test_auto_without_unseen_samples_is_off_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert forget_accuracy_target(StopConfig(), dict.fromkeys(range(10), 50), 10, None) is None
    assert "no evaluation['test']" in caplog.text


def test_a_number_is_taken_as_it_is_and_null_switches_the_rule_off():
    assert forget_accuracy_target(StopConfig(forget_accuracy=0.4), {1: 50}, 10, 0.9).threshold == 0.4
    assert forget_accuracy_target(StopConfig(forget_accuracy=None), {1: 50}, 10, 0.9) is None
