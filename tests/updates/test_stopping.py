import logging
import math

import pytest

from imu_ray.config import StopConfig
from imu_ray.errors import ConfigError
from imu_ray.updates.stopping import looks_like_whole_classes, recipe_warning, stop_targets


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


RANDOM = dict.fromkeys(range(10), 50)


def test_auto_aims_at_one_per_cent_for_whole_classes_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        (target,) = stop_targets(StopConfig(), {1: 50}, 10, 0.9)
    assert "look like all of class 1" in caplog.text
    assert (target.metric, target.threshold) == ("forget_accuracy", 0.01)
    assert target.tolerance == 1 / 50, "an accuracy moves in steps of one sample"


def test_auto_aims_at_the_accuracy_on_unseen_samples_for_random_ones():
    assert [target.threshold for target in stop_targets(StopConfig(), RANDOM, 10, 0.83)] == [0.83]


def test_samples_of_a_class_of_which_others_are_kept_are_not_the_whole_class():
    (target,) = stop_targets(StopConfig(), {1: 50}, 10, 0.9, kept_labels={0, 1, 2})
    assert target.threshold == 0.9


def test_auto_without_unseen_samples_is_off_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        assert stop_targets(StopConfig(), RANDOM, 10, None) == []
    assert "no evaluation['test']" in caplog.text


def test_a_number_is_taken_as_it_is_and_null_switches_the_rule_off():
    assert stop_targets(StopConfig(forget_accuracy=0.4), {1: 50}, 10, 0.9)[0].threshold == 0.4
    assert stop_targets(StopConfig(forget_accuracy=None), {1: 50}, 10, 0.9) == []


def test_the_automatic_loss_target_is_the_loss_of_a_uniform_guess():
    (target,) = stop_targets(StopConfig(forget_accuracy=None, forget_loss="auto"), RANDOM, 10, None)
    assert target.threshold == pytest.approx(math.log(10))
    assert target.reached({"forget_loss": 2.4})
    assert not target.reached({"forget_loss": 2.2})


def test_the_membership_rule_needs_unseen_samples():
    config = StopConfig(forget_accuracy=None, membership=True)
    assert stop_targets(config, RANDOM, 10, 0.8, {3, 4})[0].metric == "membership_auc"
    with pytest.raises(ConfigError, match="without unseen samples of the forgotten classes"):
        stop_targets(config, {1: 50}, 10, 0.8, {3, 4})
    with pytest.raises(ConfigError, match="ascent.stop.membership is true without"):
        stop_targets(config, RANDOM, 10, None)


@pytest.mark.parametrize(
    ("recipe", "counts", "message"),
    [
        ("samples", {3: 40}, "which looks like whole classes"),
        ("samples", {3: 1}, "which looks like whole classes"),
        ("classes", dict.fromkeys(range(9), 4), "which looks like a random draw"),
        ("classes", {3: 40}, None),
        ("samples", RANDOM, None),
        ("paper", {3: 40}, None),
    ],
)
def test_a_recipe_that_the_labels_contradict_is_warned_about(recipe, counts, message):
    warning = recipe_warning(recipe, counts, 10)
    assert (message is None and warning is None) or message in warning
