import numpy as np
import pytest
import torch
from scipy.spatial.distance import jensenshannon
from scipy.special import softmax
from scipy.stats import t

from imu_ray.audits.accuracy import divergence
from imu_ray.audits.gaps import average_gap, reference_gaps, tug_of_war, tug_of_war_membership
from imu_ray.audits.guard import figures_warning, prediction_warning
from imu_ray.config import ForgetSetConfig
from imu_ray.scopes.features import FeatureShard
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask


def figures(forget=0.5, retain=1.0, test=0.9, efficacy=0.2, loss=1.0):
    part = lambda accuracy: {
        "samples": 7,
        "accuracy": accuracy,
        "loss": loss,
        "per_class": {str(each): {} for each in range(10)},
    }
    attack = {"balanced_accuracy": 0.5, "members": 20, "svc_efficacy": {"non_members": efficacy}}
    return {"forget": part(forget), "retain": part(retain), "test": part(test), "membership": attack}


def test_scores_of_the_literature_are_their_formulas():
    after, reference = figures(0.25, 0.9, 0.8, 0.6), figures(0.5, 1.0, 0.9, 0.3)
    assert average_gap(after, reference) == pytest.approx((0.25 + 0.1 + 0.1 + 0.3) / 4)
    assert tug_of_war(after, reference) == pytest.approx(0.75 * 0.9 * 0.9)
    assert tug_of_war_membership(after, reference) == pytest.approx(0.7 * 0.9 * 0.9)


def test_a_retrained_model_has_no_gap_to_itself():
    found = reference_gaps(figures(), [figures()])
    side = found["sides"]["unlearned"]
    assert side["average_gap"] == {"mean": 0.0, "models": 1}
    assert side["tug_of_war"]["mean"] == side["tug_of_war_membership"]["mean"] == 1.0
    assert found["floor"] == {"skipped": "one retrained reference; expected two or more"}


def test_gaps_are_signed_and_have_intervals_over_the_references():
    references = [figures(forget, loss=loss) for forget, loss in ((0.5, 1.0), (0.6, 2.0), (0.9, 4.0))]
    found = reference_gaps(figures(0.4, loss=3.0), references, before=figures(1.0))
    gap = found["sides"]["unlearned"]["metrics"]["forget"]
    assert set(gap) == {"accuracy", "loss"}
    assert gap["loss"]["mean"] == pytest.approx(3 - 7 / 3)
    wanted = np.array([0.4 - 0.5, 0.4 - 0.6, 0.4 - 0.9])
    low, high = t.interval(0.95, 2, wanted.mean(), wanted.std(ddof=1) / np.sqrt(3))
    assert [gap["accuracy"]["low"], gap["accuracy"]["high"]] == pytest.approx([low, high])
    assert found["sides"]["do_nothing"]["tug_of_war"]["mean"] == pytest.approx((0.5 + 0.6 + 0.9) / 3)
    # Each reference beside the next: 0.1, 0.3 and 0.4 apart in one accuracy of three.
    assert found["floor"]["tug_of_war"]["mean"] == pytest.approx((0.9 + 0.7 + 0.6) / 3)
    assert found["sides"]["unlearned"]["metrics"]["membership"] == {
        "balanced_accuracy": {"mean": 0.0, "models": 3, "low": 0.0, "high": 0.0}
    }


def test_what_was_not_measured_is_named():
    after = figures()
    del after["retain"]
    found = reference_gaps(after, [figures(), figures()])["sides"]["unlearned"]
    assert found["tug_of_war"] == {"skipped": "retain.accuracy was not measured on both sides"}
    assert "retain" not in found["metrics"]
    without = figures()
    without["membership"]["svc_efficacy"] = {"skipped": "no retain"}
    found = reference_gaps(without, [figures()])["sides"]["unlearned"]
    assert found["average_gap"] == {"skipped": "membership.svc_efficacy.non_members was not measured on both sides"}
    assert found["tug_of_war"]["mean"] == 1.0
    assert reference_gaps(after, []) == {"skipped": "there is no retrained reference"}


def test_divergences_of_several_references_have_intervals():
    each = [{"test": {"kl": value, "agreement": 1.0, "js": value / 4}} for value in (0.1, 0.3)]
    found = reference_gaps(figures(), [figures(), figures()], each)["predictions"]
    assert found["test"]["kl"]["mean"] == pytest.approx(0.2)
    assert found["test"]["js"]["high"] == pytest.approx(0.05 + t.ppf(0.975, 1) * 0.025)


def test_divergences_are_scipys():
    random = np.random.default_rng(0)
    features, labels = random.normal(size=(6, 3)) * 4, random.integers(0, 4, 6)
    some, others = (
        Head("fc", torch.from_numpy(random.normal(size=(4, 3))), False, ClassificationTask(ForgetSetConfig(), "fc", 4))
        for _ in range(2)
    )
    shard = FeatureShard(features, labels, [], (4, 2))
    found = divergence(shard, shard, some, others)
    for row in range(6):
        p, q = (softmax(head.matrix_CD.numpy() @ features[row]) for head in (some, others))
        same = float(p.argmax() == q.argmax())
        assert found[row] == pytest.approx([(q * np.log(q / p)).sum(), same, jensenshannon(p, q) ** 2])
    assert divergence(shard, shard, some, some)[:, [0, 2]] == pytest.approx(0, abs=1e-12)


def test_a_model_far_below_another_warns():
    assert figures_warning(figures(test=0.8), {"before": figures(test=0.9), "retrained": None}) == {}
    found = figures_warning(figures(test=0.4), {"retrained": figures(test=0.9)})
    assert "test accuracy is 40.0%, that of retrained 90.0%" in found["warning"]
    assert "warning" in reference_gaps(figures(test=0.2), [figures()])
    assert figures_warning({"forget": {}}, {"before": figures()}) == {}


def test_predictions_of_one_class_or_hardly_better_than_a_guess_warn():
    labels = np.arange(100) % 10
    assert "is called class 3" in prediction_warning(labels, np.full(100, 3), 10)["warning"]
    guess = np.where(np.arange(100) < 15, labels, (labels + 1) % 10)
    assert "accuracy on unseen samples is 15.0%, a guess has 10.0%" in prediction_warning(labels, guess, 10)["warning"]
    assert prediction_warning(labels, np.where(np.arange(100) < 30, labels, (labels + 1) % 10), 10) == {}
    assert prediction_warning(labels[:0], labels[:0], 10) == {}
    # Unseen samples of one class are rightly called by one name.
    assert prediction_warning(np.full(90, 3), np.full(90, 3), 10) == {}


def test_without_classes_a_small_loss_of_accuracy_is_no_warning():
    of_test = lambda accuracy: {"test": {"accuracy": accuracy, "per_class": {}}}
    assert figures_warning(of_test(0.9), {"retrained": of_test(0.95)}) == {}
    assert "warning" in figures_warning(of_test(0.4), {"retrained": of_test(0.95)})
