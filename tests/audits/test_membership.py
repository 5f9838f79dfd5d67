import numpy as np
import pytest
import torch
from scipy.special import softmax
from scipy.stats import entropy
from sklearn.svm import SVC

from imu_ray.audits import membership
from imu_ray.audits.attacks import roc_points, svc_efficacy, threshold_attack
from imu_ray.audits.base import Predictions
from imu_ray.audits.destinations import Destinations
from imu_ray.audits.membership import Membership, membership_inference
from imu_ray.config import AuditConfig
from imu_ray.influence.scores import membership_signals

RANDOM = np.random.default_rng(0)


def test_samples_from_one_distribution_lie_within_the_band_of_chance():
    found = membership_inference(RANDOM.exponential(size=600), RANDOM.exponential(size=500), AuditConfig(), 0)
    low, high = found["band"]
    assert low < 0.5 < high
    assert low <= found["balanced_accuracy"] <= high


@pytest.mark.parametrize("sign", [1, -1])
def test_separate_distributions_are_told_apart_on_either_side(sign):
    found = membership_inference(5 - sign * np.ones(100), 5 + sign * np.ones(80), AuditConfig(), 0)
    assert found["balanced_accuracy"] == 1.0


def test_a_known_overlap_gives_its_balanced_accuracy():
    # Members below 0 in 3 of 4 cases, others in 1 of 4: the best threshold gets (0.75 + 0.75) / 2.
    members = np.tile([-1.0, -1.0, -1.0, 1.0], 2000)
    found = membership_inference(members, -members, AuditConfig(permutations=20), 0)
    assert found["balanced_accuracy"] == pytest.approx(0.75, abs=0.03)


def draw(monkeypatch, measured, seed=0):
    """Losses of either side that the figures are made from."""
    monkeypatch.setattr(membership, "membership_inference", lambda members, others, config, seed: (members, others))
    measured = {name: Predictions(labels, {"loss": losses}, 8) for name, (labels, losses) in measured.items()}
    return Membership().run(measured, AuditConfig(), seed)["membership"]


def test_unseen_samples_of_other_classes_are_not_drawn(monkeypatch):
    forget, unseen = (np.array([0, 3]), np.array([0.5, 1.5])), np.repeat([0, 7, 3], [50, 70, 20])
    members, others = draw(monkeypatch, {"forget": forget, "test": (unseen, unseen.astype(float))})
    assert members.tolist() == [0.5, 1.5]
    assert others.tolist() == [0.0] * 50 + [3.0] * 20


def test_of_many_samples_a_part_is_drawn_evenly(monkeypatch):
    monkeypatch.setattr(membership, "LIMIT", 100)
    many = np.zeros(1000, int), np.arange(1000.0)
    counts = np.zeros(10)
    for seed in range(200):
        drawn, _ = draw(monkeypatch, {"forget": many, "test": many}, seed)
        assert len(drawn) == 100
        assert (np.diff(drawn) > 0).all(), "in order"
        counts += np.histogram(drawn, 10, (0, 1000))[0]
    # 2,000 draws in each tenth, give or take: the deviation of each is below sqrt(2000 x 0.9) = 42.
    assert np.abs(counts - 2000).max() < 5 * 42


def test_too_few_rows_are_not_measured_and_the_reason_is_given():
    assert "5 forget and 60 unseen" in membership_inference(np.ones(5), np.ones(60), AuditConfig(), 0)["skipped"]


def classifier(losses, labels=None, predicted=None, scale=1.0):
    """Predictions with signals that go with the losses."""
    labels = np.arange(len(losses)) % 4 if labels is None else labels
    confidence = np.exp(-losses)
    signals = {
        "confidence": confidence,
        "entropy": scale * losses,
        "modified_entropy": 2 * losses,
        "margin": np.log(confidence / (1 - confidence)),
        "predicted": labels if predicted is None else predicted,
    }
    return Predictions(labels, {"loss": losses}, 4, signals=signals)


def measured(**sets):
    return Membership().run(
        {name: classifier(losses) for name, losses in sets.items()}, AuditConfig(permutations=40), 0
    )["membership"]


def test_attacks_cannot_tell_samples_of_one_distribution_and_tell_separate_ones():
    random = np.random.default_rng(1)
    alike = measured(forget=random.exponential(size=400), test=random.exponential(size=300))
    apart = measured(forget=random.uniform(0.01, 0.1, 400), test=random.uniform(1, 2, 300))
    assert set(alike["attacks"]) == {"confidence", "entropy", "modified_entropy", "loss"}
    for attack in alike["attacks"].values():
        low, high = attack["band"]
        assert low <= attack["balanced_accuracy"] <= high
        assert low < 0.5 < high
    for attack in apart["attacks"].values():
        assert attack["balanced_accuracy"] == 1.0
        assert attack["band"][1] < 0.7
    assert alike["auc"] == pytest.approx(0.5, abs=4 * 0.022)  # the deviation of an area of 400 against 300
    assert apart["auc"] == 1.0


def halves(values, seed):
    """The halves of either side that an attack is fitted and scored on."""
    random = np.random.default_rng(seed)
    sides = [each[random.permutation(len(each))] for each in values]
    return [[side[half::2] for side in sides] for half in range(2)]


def test_every_sample_is_scored_by_a_threshold_of_the_other_half():
    random = np.random.default_rng(2)
    values = random.normal(size=31).round(1), random.normal(0.7, 1, size=24).round(1)
    parts, figures = halves(values, 5), []
    for fit, held in ((0, 1), (1, 0)):
        best = (0.0, None, None)
        values_there = np.unique(np.concatenate(parts[fit]))
        for cut in [*(values_there[:-1] + values_there[1:]) / 2, values_there[-1]]:
            rates = [(side <= cut).mean() for side in parts[fit]]
            if abs(rates[0] - rates[1]) > best[0] + 1e-12:
                best = abs(rates[0] - rates[1]), cut, rates[0] > rates[1]
        _, cut, below = best
        right = [
            ((side <= cut) == (below == member)).mean() for side, member in zip(parts[held], (True, False), strict=True)
        ]
        figures.append(np.mean(right))
    assert threshold_attack(*values, 20, 5)["balanced_accuracy"] == pytest.approx(np.mean(figures))


def test_what_was_measured_before_is_measured_still():
    random = np.random.default_rng(3)
    losses = random.exponential(size=100), random.exponential(1.5, size=100)
    config = AuditConfig(permutations=40)
    plain = Membership().run(
        {
            name: Predictions(np.arange(100) % 4, {"loss": each}, 4)
            for name, each in zip(("forget", "test"), losses, strict=True)
        },
        config,
        0,
    )["membership"]
    assert set(plain) == {"balanced_accuracy", "band", "members", "non_members"}
    more = measured(forget=losses[0], test=losses[1])
    assert {name: more[name] for name in plain} == plain


def test_the_curve_is_that_of_counted_shares():
    random = np.random.default_rng(4)
    members, others = random.exponential(0.5, 500), random.exponential(1.0, 1000)
    found = roc_points(members, others)
    for rate, true in zip(found["roc"]["fpr"], found["roc"]["tpr"], strict=True):
        # The grid falls on whole counts of the 1,000 others: the largest threshold with so many false alarms.
        alarms = round(rate * 1000)
        cut = np.sort(others)[alarms] if alarms < 1000 else np.inf
        assert true == pytest.approx((members < cut).mean(), abs=1e-12)
    pairs = np.subtract.outer(others, members)
    assert found["auc"] == pytest.approx((pairs > 0).mean())


def test_the_svc_efficacy_is_that_of_a_plain_classifier():
    random = np.random.default_rng(5)
    retain, test, forget = random.beta(9, 1, 80), random.beta(3, 2, 60), random.beta(6, 2, 50)
    found = svc_efficacy(forget, retain, test, 7)
    order = np.random.default_rng(7).permutation(80)[:60]
    plain = SVC(C=3, gamma="auto").fit(np.concatenate([retain[order], test]).reshape(-1, 1), [1] * 60 + [0] * 60)
    assert found["non_members"] == pytest.approx(np.mean(plain.predict(forget.reshape(-1, 1)) == 0))
    assert found["trained_on"] == {"retain": 60, "test": 60}
    assert "retain" in found["reads"]


def test_the_svc_efficacy_has_its_extremes_and_needs_retained_rows():
    random = np.random.default_rng(6)
    low, high = random.uniform(0.001, 0.05, 200), random.uniform(1.5, 3.0, 200)
    assert measured(forget=low, retain=low, test=high)["svc_efficacy"]["non_members"] == 0.0
    assert measured(forget=high, retain=low, test=high)["svc_efficacy"]["non_members"] == 1.0
    assert "no evaluation['retain']" in measured(forget=low, test=high)["svc_efficacy"]["skipped"]
    assert "9 rows of retain" in measured(forget=low, retain=low[:9], test=high)["svc_efficacy"]["skipped"]


def test_a_broken_model_warns_and_a_working_one_does_not():
    losses = np.random.default_rng(7).exponential(size=200)
    assert "warning" not in measured(forget=losses, test=losses)
    broken = {name: classifier(losses, predicted=np.full(200, 2)) for name in ("forget", "test")}
    found = Membership().run(broken, AuditConfig(permutations=20), 0)["membership"]
    assert "every one of 200 unseen samples is called class 2" in found["warning"]


def test_a_forgotten_class_alone_does_not_make_a_model_broken():
    # Of four classes one is forgotten, and its unseen samples are all that is wrong.
    labels = np.arange(200) % 4
    gone = np.where(labels == 0, 1, labels)
    forget = classifier(np.full(40, 0.5), labels=np.zeros(40, int), predicted=np.ones(40, int))
    test = classifier(np.random.default_rng(0).exponential(size=200), labels=labels, predicted=gone)
    assert (
        "warning"
        not in Membership().run({"forget": forget, "test": test}, AuditConfig(permutations=20), 0)["membership"]
    )
    ruined = classifier(test.metrics["loss"], labels=labels, predicted=np.full(200, 1))
    found = Membership().run({"forget": forget, "test": ruined}, AuditConfig(permutations=20), 0)["membership"]
    assert "every one of 150 unseen samples is called class 1" in found["warning"]


def test_signals_are_their_formulas():
    random = np.random.default_rng(8)
    logits, labels = random.normal(size=(50, 5)) * 3, random.integers(0, 5, 50)
    found = membership_signals(torch.from_numpy(logits), torch.from_numpy(labels))
    p = softmax(logits, 1)
    own = p[np.arange(50), labels]
    assert found["confidence"].numpy() == pytest.approx(own)
    assert found["entropy"].numpy() == pytest.approx(entropy(p, axis=1))
    others = [sum(p[row, c] * np.log(1 - p[row, c]) for c in range(5) if c != labels[row]) for row in range(50)]
    assert found["modified_entropy"].numpy() == pytest.approx(-(1 - own) * np.log(own) - np.array(others))
    assert found["margin"].numpy() == pytest.approx(np.log(own / (1 - own)))
    assert found["predicted"].tolist() == logits.argmax(1).tolist()


def test_signals_of_sure_predictions_keep_their_digits():
    # p of the others is e^-100, which 1 - p of the first has no room for.
    logits = torch.tensor([[100.0, 0.0], [-100.0, 0.0], [800.0, 0.0]])
    found = membership_signals(logits, torch.zeros(3, dtype=torch.int64))
    assert found["modified_entropy"][:2].tolist() == pytest.approx(
        [2 * np.exp(-100.0) ** 2 * 50 + np.exp(-200.0), 200.0], abs=1e-60
    )
    assert all(torch.isfinite(each).all() for each in found.values())


def test_forgotten_samples_are_counted_from_class_to_class():
    forget = classifier(np.ones(5), labels=np.array([0, 0, 0, 2, 2]), predicted=np.array([0, 3, 3, 2, 1]))
    found = Destinations().run({"forget": forget}, AuditConfig(), 0)
    assert found == {"destinations": {"0": {"0": 1, "3": 2}, "2": {"1": 1, "2": 1}}}
    assert (
        Destinations().run({"forget": Predictions(np.zeros((2, 3), int), {"loss": np.ones(2)}, 4)}, AuditConfig(), 0)
        == {}
    )
