import pytest

from imu_ray.config import RECIPES, ForgetSetConfig, UnlearnConfig
from imu_ray.errors import ConfigError
from imu_ray.recipes import choose_recipe, looks_like_whole_classes, resolve_targets, warnings_of
from imu_ray.tasks.classification import ClassificationTask
from imu_ray.updates.stopping import Unseen

METRICS = ClassificationTask(ForgetSetConfig(), "fc", 10).metrics
RANDOM = dict.fromkeys(range(10), 50)
FIGURES = {"samples": 100, "accuracy": 0.7, "loss": 0.5, "margin": 2.0, "per_class": {}}


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


def test_samples_of_a_class_of_which_others_are_kept_are_not_the_whole_class():
    assert not looks_like_whole_classes({1: 50}, 10, kept_labels={0, 1, 2})


@pytest.mark.parametrize("counts", [{3: 1}, {3: 7}, {3: 40}, {3: 400, 4: 400}])
def test_auto_never_guesses_what_rows_of_few_classes_stand_for(counts):
    with pytest.raises(ConfigError, match="recipe 'classes' when the model .* recipe 'samples' when these rows"):
        choose_recipe("auto", counts, 10)
    for name in ("samples", "classes", "paper"):
        assert choose_recipe(name, counts, 10) == (name, "named in the settings")


@pytest.mark.parametrize("counts", [{3: 1, 4: 1}, RANDOM, {0: 40, 1: 40}])
def test_auto_takes_mixed_labels_for_samples_and_says_why(counts):
    name, reason = choose_recipe("auto", counts, 2 if max(counts) < 2 else 10)
    assert name == "samples"
    assert f"{len(counts)} of" in reason


def test_auto_has_the_settings_of_samples():
    auto, samples = (UnlearnConfig.from_recipe(name).to_dict() for name in ("auto", "samples"))
    assert {**auto, "recipe": "samples"} == samples


def resolve(recipe, counts, unseen=None, kept=(), **overrides):
    changes = {key.replace("__", "."): value for key, value in overrides.items()}
    config = UnlearnConfig.from_recipe(recipe).with_overrides(changes)
    return resolve_targets(config, METRICS, counts, 10, Unseen(FIGURES, counts) if unseen else None, kept)


@pytest.mark.parametrize("recipe", sorted(set(RECIPES) - {"paper", "classes"}))
@pytest.mark.parametrize("overrides", [{}, {"ascent__stop__targets": {"forget.accuracy": None}}])
def test_a_run_without_a_target_is_refused_with_the_ways_to_give_one(recipe, overrides):
    with pytest.raises(ConfigError, match=r"have no target, .* expected evaluation=\{'test': .*\}.* or a number in"):
        resolve(recipe, RANDOM, **overrides)


def test_only_the_papers_recipe_runs_without_a_target(caplog):
    with caplog.at_level("WARNING"):
        assert resolve("paper", RANDOM) == []
    assert "no target" in caplog.text


def test_the_papers_recipe_aims_at_one_per_cent_of_what_looks_like_a_whole_class():
    (target,) = resolve("paper", {1: 50}, unseen=True)
    assert (target.metric, target.threshold) == ("forget.accuracy", 0.01)
    (target,) = resolve("paper", {1: 50}, unseen=True, kept={1})
    assert target.threshold == pytest.approx(0.7)


def test_classes_bring_their_own_target():
    (target,) = resolve("classes", {1: 50})
    assert (target.metric, target.threshold) == ("forget.accuracy", 0.01)


@pytest.mark.parametrize(
    ("recipe", "counts", "message"),
    [
        ("samples", {3: 40}, None),
        ("samples", {3: 1}, None),
        ("classes", dict.fromkeys(range(9), 4), "which look like a random draw"),
        ("classes", {3: 40}, None),
        ("samples", RANDOM, None),
        ("paper", {3: 40}, None),
    ],
)
def test_a_recipe_that_the_labels_contradict_is_doubted_in_the_headline(recipe, counts, message):
    found = warnings_of(recipe, counts, 10, METRICS, {})
    assert (message is None and not found) or message in found[0]


@pytest.mark.parametrize(
    ("accuracy", "rows", "doubted"), [(0.12, 100, True), (0.22, 100, True), (0.35, 100, False), (0.0, 3, False)]
)
def test_a_model_near_chance_is_told_in_the_headline(accuracy, rows, doubted):
    found = warnings_of("samples", RANDOM, 10, METRICS, {"test": {**FIGURES, "accuracy": accuracy, "samples": rows}})
    assert bool(found) is doubted
    assert not found or "near chance (10.0 %): check" in found[0]


def test_rows_of_no_one_class_have_targets_that_go_by_their_number():
    soft = ClassificationTask(ForgetSetConfig(target="soft"), "fc", 10).metrics
    several = ClassificationTask(ForgetSetConfig(target="multi_label"), "fc", 10).metrics
    paper = UnlearnConfig.from_recipe("paper")
    unseen = Unseen({"accuracy": 0.7, "bounded_loss": 0.5, "per_class": {}}, {})
    (target,) = resolve_targets(paper, soft, {}, 10, unseen, set(), 50)
    assert (target.metric, target.threshold, target.tolerance) == ("forget.accuracy", 0.7, 1 / 50)
    (target,) = resolve_targets(paper, several, {}, 10, unseen, set(), 50)
    assert (target.metric, target.threshold) == ("forget.bounded_loss", 0.5)
    assert choose_recipe("auto", {}, 10)[0] == "samples"
