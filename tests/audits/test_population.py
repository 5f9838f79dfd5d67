import math
import sys

import numpy as np
import pytest
from scipy.special import expit
from scipy.stats import norm, spearmanr, t
from sklearn.metrics import roc_auc_score

from imu_ray.audits import POPULATION, competition, lira
from imu_ray.audits.competition import forgetting_quality, largest_epsilon
from imu_ray.audits.gaps import loss_changes, utility_paid
from imu_ray.audits.klom import klom, margin_divergence
from imu_ray.audits.lira import held_out_ratios, likelihood_attack, ulira
from imu_ray.audits.margins import Margins
from imu_ray.audits.population import attack_figures, interval
from imu_ray.audits.rmia import pairwise_scores, rmia, rmia_scores
from imu_ray.errors import ForgetSetError

SETS = {"forget": 40, "retain": 60, "test": 120}


def population(models=32, seed=0, **shifts):
    """Margins of kinds by how far each is shifted on the forget set; every point has a level of its own."""
    random = np.random.default_rng(seed)
    sets = np.repeat(list(SETS), list(SETS.values()))
    level = random.normal(2.0, 1.0, len(sets))
    of = {}
    for kind, shift in shifts.items():
        of[kind] = level + random.normal(size=(models, len(sets))) + np.where(sets == "forget", shift, 0.0)
    return Margins([str(at) for at in range(len(sets))], sets, {kind: list(range(models)) for kind in of}, of)


def with_kind(margins, kind, values):
    return Margins(margins.points, margins.sets, margins.seeds, {**margins.of, kind: values})


def forgotten(**shifts):
    """All kinds; those that are not named behave as retrained models do."""
    kinds = ("original", "retrained", "unlearned", "control")
    return population(**{kind: shifts.get(kind, 0.0) for kind in kinds})


@pytest.fixture(autouse=True)
def fewer_exchanges(monkeypatch):
    monkeypatch.setattr(lira, "EXCHANGES", 80)


def divergence_by_hand(some, others):
    """KLOM of one point, written out."""
    some, others = np.clip(some, -100, 100), np.clip(others, -100, 100)
    edges = np.linspace(min(some.min(), others.min()), max(some.max(), others.max()), 21)
    p, q = (np.histogram(each, edges)[0] / len(each) for each in (some, others))  # its last bin is closed
    total = 0.0
    for share, other in zip(p, q, strict=True):
        if share > 0:
            total += share * math.log(share / max(other, 1e-5))
    return total


def test_klom_is_that_of_histograms_written_out():
    random = np.random.default_rng(3)
    some, others = random.normal(size=(50, 7)) * 30, random.normal(1, 2, size=(40, 7)) * 30
    found = margin_divergence(some, others)
    assert found == pytest.approx([divergence_by_hand(some[:, at], others[:, at]) for at in range(7)], rel=1e-12)


def test_klom_of_the_same_margins_is_zero_and_of_separate_ones_the_logarithm_of_eps():
    margins = np.random.default_rng(0).normal(size=(30, 5))
    # Bins that the oracles leave empty have no weight, so that nothing but rounding remains.
    assert np.abs(margin_divergence(margins, margins)).max() < 1e-15
    far = margin_divergence(np.full((30, 1), -5.0), np.full((20, 1), 5.0))
    assert far == pytest.approx(math.log(1e5))
    assert margin_divergence(np.full((3, 1), 2.0), np.full((4, 1), 2.0)) == 0.0


def test_the_largest_margin_is_in_the_last_bin():
    # 9 of 10 in the first bin on both sides; the tenth is the joint maximum on one side alone.
    some, others = np.array([[0.0]] * 9 + [[20.0]]), np.zeros((10, 1))
    assert margin_divergence(some, others) == pytest.approx(0.9 * math.log(0.9) + 0.1 * math.log(0.1 / 1e-5))


def test_margins_beyond_a_hundred_are_alike():
    assert margin_divergence(np.full((5, 1), 150.0), np.full((5, 1), 9000.0)) == 0.0


def test_klom_of_a_population_that_retraining_made_is_within_its_floor():
    found = klom(forgotten(original=4.0))
    floor = found["floor"]
    assert (found["direction"], floor["models"], found["all"]["models"]) == ("KL(unlearned || oracle)", 16, 32)
    forget = floor["sets"]["forget"]
    assert forget["oracle"]["low"] <= forget["unlearned"]["mean"] <= forget["oracle"]["high"]
    assert forget["do_nothing"]["low"] > 1.2 * forget["oracle"]["high"]
    for name in ("retain", "test"):
        assert floor["sets"][name]["do_nothing"]["mean"] == pytest.approx(
            floor["sets"][name]["oracle"]["mean"], rel=0.2
        )
    # More models leave less to chance.
    assert found["all"]["sets"]["test"]["unlearned"] < floor["sets"]["test"]["unlearned"]["low"]


def test_the_floor_of_klom_is_over_draws_of_models_of_which_none_stands_beside_itself(monkeypatch):
    margins, drawn = forgotten(original=1.0), []

    def watched(some, others):
        drawn.append((some, others))
        return margin_divergence(some, others)

    monkeypatch.setattr(sys.modules[klom.__module__], "margin_divergence", watched)
    found = klom(margins)["floor"]
    oracles = {row.tobytes() for row in margins.of["retrained"]}
    floors = [pair for pair in drawn if {row.tobytes() for row in pair[0]} <= oracles]
    assert len(floors) == found["draws"] == 40
    for some, others in floors:
        rows = {row.tobytes() for row in (*some, *others)}
        assert len(some) == len(others) == 16
        assert rows == oracles
    tests = margins.sets == "test"
    values = [np.percentile(margin_divergence(*pair)[tests], 95) for pair in floors]
    side = found["sets"]["test"]["oracle"]
    wanted = [np.mean(values), *np.percentile(values, [2.5, 97.5])]
    assert [side["mean"], side["low"], side["high"]] == pytest.approx(wanted)


def test_klom_is_the_95th_percentile_of_each_set():
    margins = forgotten(original=1.0)
    found = klom(margins)["all"]["sets"]
    for name in SETS:
        part = margins.subset(name).of
        points = [divergence_by_hand(part["unlearned"][:, at], part["retrained"][:, at]) for at in range(SETS[name])]
        assert found[name]["unlearned"] == pytest.approx(np.percentile(points, 95))


def test_ratios_are_of_models_that_the_gaussians_were_not_fitted_on():
    random = np.random.default_rng(5)
    some, others = random.normal(1, 2, (8, 3)), random.normal(size=(8, 3))
    found = held_out_ratios(some, others)
    for model in range(8):
        rest = [at for at in range(8) if at % 4 != model % 4]
        for side, ratios in zip((some, others), found, strict=True):
            for point in range(3):
                fits = [norm(each[rest, point].mean(), each[rest, point].std(ddof=1)) for each in (some, others)]
                wanted = fits[0].logpdf(side[model, point]) - fits[1].logpdf(side[model, point])
                assert ratios[model, point] == pytest.approx(wanted)


def test_identical_populations_lie_within_the_band_in_nineteen_of_twenty_cases():
    inside, areas = 0, []
    for seed in range(30):
        random = np.random.default_rng(seed)
        found = likelihood_attack(random.normal(size=(12, 5)), random.normal(size=(12, 5)))
        low, high = found["band"]
        inside += low <= found["auc"]["mean"] <= high
        areas.append(found["auc"]["mean"])
    # Of 30 with a share of 0.95, fewer than 25 are seen once in 300 series.
    assert inside >= 25
    assert np.mean(areas) == pytest.approx(0.5, abs=4 * np.std(areas) / np.sqrt(30))


def test_separate_populations_are_told_apart_in_either_reading_of_out():
    found = ulira(forgotten(original=20.0, unlearned=15.0))
    for reading in ("untouched", "unlearned_alike", "do_nothing"):
        assert found[reading]["auc"]["mean"] == 1.0
        assert found[reading]["tpr_at_1_fpr"]["mean"] == 1.0
        assert found[reading]["accuracy"] == 1.0
        assert found[reading]["band"][1] < 0.99
    assert (found["points"], found["constant"]) == (40, 0)


def test_the_two_readings_of_out_differ_where_the_call_itself_leaves_a_trace():
    # Unlearned and control models are both pushed down: alike, but unlike those that were left alone.
    found = ulira(forgotten(original=3.0, unlearned=-12.0, control=-12.0))
    assert found["untouched"]["auc"]["mean"] == 1.0
    low, high = found["unlearned_alike"]["band"]
    assert low <= found["unlearned_alike"]["auc"]["mean"] <= high
    without = forgotten(original=3.0)
    seeds = {kind: each for kind, each in without.seeds.items() if kind != "control"}
    told = ulira(Margins(without.points, without.sets, seeds, {kind: without.of[kind] for kind in seeds}))
    assert told["unlearned_alike"] == {"skipped": "0 models are control; fewer than 8"}


def test_constant_margins_are_named_and_no_number_is_printed():
    margins = forgotten(original=3.0)
    constant = np.full_like(margins.of["unlearned"], -2.2)
    gamed = with_kind(with_kind(margins, "unlearned", constant), "control", constant.copy())
    found = ulira(gamed)
    assert list(found) == ["skipped"]
    assert "40 of 40 forgotten points have constant margins" in found["skipped"]
    some = margins.of["unlearned"].copy()
    some[:, :5] = -2.2
    assert ulira(with_kind(margins, "unlearned", some))["constant"] == 5


def test_right_and_wrong_are_no_margins():
    margins = forgotten()
    right = (margins.of["unlearned"] > 2).astype(float)
    with pytest.raises(ForgetSetError, match="margins of the unlearned models take the values 0 and 1 only"):
        ulira(with_kind(margins, "unlearned", right))


def test_a_broken_population_says_so(monkeypatch):
    monkeypatch.setattr(lira, "EXCHANGES", 2)
    margins = forgotten(original=3.0)
    # Noise that never saw a sample: sure of nothing.
    noise = np.random.default_rng(9).normal(-4, 0.5, margins.of["unlearned"].shape)
    broken = with_kind(margins, "unlearned", noise)
    for name, audit in POPULATION.items():
        assert "sure of 0.0% of unseen points" in audit(broken)["warning"], name
        assert "warning" not in audit(margins), name


def scores_by_hand(margins, seed, online):
    """RMIA of one unlearned model, sample by sample and pair by pair."""
    chances = {kind: expit(each) for kind, each in margins.of.items()}
    others = [at for at, each in enumerate(margins.seeds["original"]) if each != seed]
    found = []
    population = np.flatnonzero(margins.sets == "test")[::2]

    def ratio(point):
        out = chances["retrained"][:, point].mean()
        prior = (1.3 * out + 0.7) / 2
        if online:
            prior = (chances["original"][others, point].mean() + out) / 2
        return chances["unlearned"][margins.seeds["unlearned"].index(seed), point] / prior

    for point in range(len(margins.points)):
        pairs = [z == point or ratio(point) / ratio(z) >= 1 for z in population]
        found.append(np.mean(pairs))
    return found


@pytest.mark.parametrize("online", [False, True])
def test_rmia_scores_are_those_of_pairs_written_out(online):
    margins = population(models=4, original=1.0, retrained=0.0, unlearned=1.0)
    found = rmia_scores(margins, "unlearned", online)
    assert found[2] == pytest.approx(scores_by_hand(margins, 2, online), abs=1e-12)


def test_a_retrained_model_is_no_reference_for_itself():
    margins = population(models=3, retrained=0.0)
    chances = expit(margins.of["retrained"])
    every_second = np.isin(np.arange(len(margins.points)), np.flatnonzero(margins.sets == "test")[::2])
    wanted = pairwise_scores(chances[1] / ((1.3 * chances[[0, 2]].mean(0) + 0.7) / 2), every_second)
    assert np.array_equal(rmia_scores(margins, "retrained")[1], wanted)


@pytest.mark.parametrize("form", ["offline", "online"])
def test_rmia_tells_members_and_cannot_tell_what_retraining_left(form):
    random = np.random.default_rng(2)
    margins = forgotten()
    # Unseen samples are hard (a probability of a tenth or less), members are remembered.
    hard = {kind: random.normal(-3, 0.3, each.shape) for kind, each in margins.of.items()}
    hard["original"][:, margins.sets == "forget"] += 8
    found = rmia(Margins(margins.points, margins.sets, margins.seeds, hard))[form]
    assert found["do_nothing"]["auc"]["mean"] > 0.98
    if form == "online":
        assert found["do_nothing"]["tpr_at_1_fpr"]["mean"] > 0.95
    assert found["do_nothing"]["auc"]["models"] == 32
    for side in ("unlearned", "retrained"):
        # Mean of 32 areas of 40 against 60 or more: each has a deviation of 0.06 at most.
        assert found[side]["auc"]["mean"] == pytest.approx(0.5, abs=5 * 0.06 / np.sqrt(32))
        assert found[side].get("tpr_at_1_fpr", {"mean": 0})["mean"] < 0.1


def test_rmia_cannot_tell_samples_that_every_model_is_sure_of():
    # All but a few points are alike to the last digit, so that a share of another size would decide.
    margins = forgotten()
    sure = {
        kind: np.where(np.arange(each.shape[1]) % 9 == 0, -3.0, 60.0) + 0 * each for kind, each in margins.of.items()
    }
    found = rmia(Margins(margins.points, margins.sets, margins.seeds, sure))
    for form in ("offline", "online"):
        for side in ("unlearned", "do_nothing", "retrained"):
            assert found[form][side]["auc"]["mean"] == pytest.approx(0.5, abs=0.02)


def test_rmia_says_what_few_unseen_points_or_references_cannot_show():
    margins = population(models=3, retrained=0.0, unlearned=0.0)
    kept = [at for at, name in enumerate(margins.sets) if name != "test" or at < 150]
    few = Margins(
        [margins.points[at] for at in kept],
        margins.sets[kept],
        margins.seeds,
        {k: v[:, kept] for k, v in margins.of.items()},
    )
    found = rmia(few)
    assert "25 figures of non-members" in found["offline"]["skipped"]["tpr_at_1_fpr"]
    assert list(found["offline"]["unlearned"]) == ["auc"]
    assert found["online"] == {"skipped": "0 models are original; fewer than 3"}
    assert rmia(population(models=2, retrained=0.0, unlearned=0.0)) == {
        "skipped": "2 models are retrained; fewer than 3"
    }


def epsilon_by_hand(unlearned, retrained, buffer):
    """The largest epsilon over thresholds on a fine grid, as the competition's code goes through them."""
    upper, lower = sorted((unlearned, retrained), key=np.median, reverse=True)
    rates = [((lower >= cut).mean(), (upper < cut).mean()) for cut in np.arange(-9.005, 9, 0.01)]
    narrow, wide = sorted((unlearned, retrained), key=np.ptp)
    for right in np.arange(narrow.max() - buffer + 0.005, narrow.max() + buffer, 0.02):
        for left in np.arange(right - np.ptp(narrow) - buffer + 0.005, right - np.ptp(narrow) + buffer, 0.02):
            guess = [((left <= side) & (side <= right)).mean() for side in (narrow, wide)]
            rates.append((guess[1], 1 - guess[0]))
    best = 0.0
    for false_positive, missed in rates:
        if false_positive == 0 and missed == 0:
            return math.inf
        for one, other in ((false_positive, missed), (missed, false_positive)):
            if min(one, other) > 0 and 1 - 1e-5 - one > 0:
                best = max(best, math.log((1 - 1e-5 - one) / other))
    return best


def test_epsilon_is_the_largest_over_the_competitions_attacks(monkeypatch):
    # Margins are tenths, and the buffer is not: so that the grid meets every set of thresholds.
    monkeypatch.setattr(competition, "BUFFER", 0.95)
    random = np.random.default_rng(4)
    for _ in range(4):
        some, others = random.normal(0.5, 1.5, 9).round(1), random.normal(size=9).round(1)
        assert largest_epsilon(some, others) == pytest.approx(epsilon_by_hand(some, others, 0.95))


def test_epsilon_is_infinite_where_an_attack_never_fails_or_margins_are_constant():
    assert largest_epsilon(np.array([1.0, 2.0, 9.0]), np.array([3.0, 4.0, 5.0])) == math.inf
    assert largest_epsilon(np.array([1.0, 2.0, 2.5]), np.array([3.0, 40.0, 5.0])) == math.inf
    assert largest_epsilon(np.full(4, 0.5), np.array([0.0, 0.4, 0.6, 1.0])) == math.inf
    assert largest_epsilon(np.full(4, 0.5), np.full(4, 0.5)) == 0.0


def test_the_competition_score_has_its_extremes_and_tells_its_cap():
    found = forgetting_quality(forgotten(original=30.0, unlearned=30.0))
    assert (found["unlearned"], found["do_nothing"]) == (0.0, 0.0)
    assert found["models"] == 32
    # One model of either side is taken for the other: (1 - delta - 1/32) / (1/32).
    assert found["largest_finite_epsilon"] == pytest.approx(math.log((1 - 1e-5 - 1 / 32) * 32))
    # ln 31 = 3.43: bins of 0.5 up to 4, and 2 / 2^8 in the last.
    assert (found["bins"], found["smallest"]) == (8, 2 / 2**8)
    same = population(original=3.0, retrained=0.0)
    copied = Margins(
        same.points,
        same.sets,
        {**same.seeds, "unlearned": same.seeds["retrained"]},
        {**same.of, "unlearned": same.of["retrained"]},
    )
    assert forgetting_quality(copied)["unlearned"] == 1.0


def test_the_competition_score_of_retrained_models_is_that_of_its_floor():
    found = forgetting_quality(forgotten(original=3.0))["floor"]
    assert found["models"] == 16
    assert 0 < found["oracle"] < 1
    assert found["unlearned"] == pytest.approx(found["oracle"], abs=0.15)
    assert found["do_nothing"] < found["unlearned"] / 2


def test_the_price_of_unlearning_is_the_rise_of_the_loss_for_each_forgotten_point():
    margins = forgotten(original=2.0)
    worse = margins.of["original"] - np.where(margins.sets == "test", 1.0, 0.0)
    found = utility_paid(with_kind(margins, "unlearned", worse))
    test = margins.sets == "test"
    losses = [-np.log(expit(each[:, test])).mean(1) for each in (worse, margins.of["original"])]
    prices = (losses[0] - losses[1]) / 40
    half = t.ppf(0.975, 31) * prices.std(ddof=1) / np.sqrt(32)
    told = found["members"]["test"]
    assert [told["mean"], told["low"], told["high"]] == pytest.approx(
        [prices.mean(), prices.mean() - half, prices.mean() + half]
    )
    assert found["members"]["retain"]["mean"] == 0.0
    assert found["others"]["test"]["low"] < 0 < found["others"]["test"]["high"]
    assert found["forgotten"] == 40


def test_loss_changes_are_ranked_beside_models_that_had_no_part_in_them():
    margins = population(models=4, original=2.0, retrained=0.0, unlearned=0.5)
    losses = {kind: np.log1p(np.exp(-each[:, :40])) for kind, each in margins.of.items()}
    values = []
    for seed in range(4):
        rest = [at for at in range(4) if at != seed]
        wanted = losses["retrained"][rest].mean(0) - losses["original"][rest].mean(0)
        values.append(spearmanr(losses["unlearned"][seed] - losses["original"][seed], wanted)[0])
    assert loss_changes(margins)["unlearned"]["mean"] == pytest.approx(np.mean(values))


def test_loss_changes_as_by_retraining_reach_the_ceiling_and_none_are_not_measured():
    random = np.random.default_rng(6)
    margins = forgotten()
    fall = np.zeros(len(margins.points))
    fall[:40] = random.exponential(3.0, 40)  # what each forgotten sample owes to having been trained on
    noise = lambda: random.normal(size=(32, len(fall))) * 0.3
    original = margins.of["retrained"] * 0 + 1 + fall + noise()
    lost = {
        "original": original,
        "retrained": 1 + noise(),
        "unlearned": original - fall + noise(),
        "control": 1 + noise(),
    }
    made = Margins(margins.points, margins.sets, margins.seeds, lost)
    found = loss_changes(made)
    assert found["unlearned"]["mean"] == pytest.approx(found["retrained"]["mean"], abs=0.1)
    assert found["retrained"]["mean"] > 0.4
    alike = loss_changes(with_kind(made, "unlearned", original - 1 + noise()))
    # A push that is the same for all says nothing of each.
    assert alike["unlearned"]["mean"] < found["retrained"]["mean"] - 0.1
    untouched = loss_changes(with_kind(made, "unlearned", original))
    assert untouched["unlearned"] == {"skipped": "0 seeds in which losses moved"}


@pytest.mark.parametrize("name", ["klom", "ulira", "forgetting_quality"])
def test_too_few_models_are_not_measured_and_the_reason_is_given(name):
    assert POPULATION[name](population(models=7, original=1.0, retrained=0.0, unlearned=0.0))["skipped"].endswith(
        "fewer than 8"
    )


def test_attack_figures_are_those_of_counted_pairs():
    random = np.random.default_rng(8)
    members, others = random.normal(1, 1, 60).round(1), random.normal(size=200).round(1)
    found = attack_figures(members, others)
    pairs = np.subtract.outer(members, others)
    assert found["auc"] == pytest.approx((pairs > 0).mean() + (pairs == 0).mean() / 2)
    rates = [((members >= cut).mean(), (others >= cut).mean()) for cut in np.unique(others).tolist() + [99]]
    # A threshold may lie between two values of the others, at a member's.
    rates += [((members >= cut).mean(), (others >= cut).mean()) for cut in np.unique(members)]
    assert found["tpr_at_1_fpr"] == pytest.approx(max(true for true, false in rates if false <= 0.01))
    assert "tpr_at_1_fpr" not in attack_figures(members, others[:99])
    assert found["auc"] == pytest.approx(roc_auc_score(np.repeat([1, 0], [60, 200]), np.concatenate([members, others])))


def test_an_interval_is_students():
    found = interval([1.0, 2.0, 4.0])
    low, high = t.interval(0.95, 2, 7 / 3, np.std([1, 2, 4], ddof=1) / np.sqrt(3))
    assert [found["mean"], found["low"], found["high"], found["models"]] == pytest.approx([7 / 3, low, high, 3])
    assert interval([0.5]) == {"mean": 0.5, "models": 1}
