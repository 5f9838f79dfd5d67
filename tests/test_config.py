import pickle
import re

import pytest

from imu_ray import errors
from imu_ray.config import RECIPES, AscentConfig, StopConfig, UnlearnConfig
from imu_ray.errors import ConfigError
from imu_ray.job import parse_assignment, read_yaml


def test_the_paper_recipe_has_the_papers_settings():
    config = UnlearnConfig.from_recipe("paper")
    ascent = config.ascent
    intensity, stop = config.intensity, config.ascent.stop
    assert (config.influence.damping, intensity.clip_quantile, intensity.keep_fraction) == (0.01, 0.93, 1.0)
    assert (ascent.learning_rate, ascent.momentum, ascent.weight_decay, ascent.l1) == (0.01, 0.9, 5e-4, 5e-4)
    assert (ascent.batch_size, stop.max_epochs, stop.targets) == (256, 10, {})
    named = (intensity.scheme, ascent.update, ascent.objective, ascent.preconditioner)
    assert named == ("imu", "iterative", "ascent", "none")


@pytest.mark.parametrize("name", RECIPES)
def test_every_recipe_is_made_of_valid_settings(name):
    assert UnlearnConfig.from_recipe(name).recipe == name


@pytest.mark.parametrize(("scope", "given", "rows"), [("head", "auto", 32), ("last:2", "auto", 128), ("all", 7, 7)])
def test_pieces_of_a_batch_are_larger_for_layers_unless_their_rows_are_given(scope, given, rows):
    settings = {"ascent.scope": scope, "ascent.microbatch_rows": given}
    assert UnlearnConfig().with_overrides(settings).ascent.piece_rows == rows


def test_overrides_take_dotted_keys_and_nested_mappings_and_leave_the_original_alone():
    config = UnlearnConfig()
    changed = config.with_overrides({"ascent.stop.every_steps": 3, "influence": {"damping": 1, "block_rows": 8}})
    assert (changed.ascent.stop.every_steps, changed.influence.damping, changed.influence.block_rows) == (3, 1.0, 8)
    assert config == UnlearnConfig()


@pytest.mark.parametrize(
    ("key", "value", "message"),
    [
        ("intensity.clip_quantile", 1.3, r"intensity.clip_quantile is 1.3; expected a number in \(0, 1\]"),
        ("intensity.clip_quantile", 0, r"expected a number in \(0, 1\]"),
        ("ascent.stop.max_epochs", 0, "ascent.stop.max_epochs is 0; expected a whole number >= 1"),
        ("ascent.stop.max_epochs", 2.5, "expected a whole number"),
        ("ascent.stop.max_epochs", True, "ascent.stop.max_epochs is True"),
        ("ascent.learning_rate", "fast", "ascent.learning_rate is 'fast'; expected a number > 0"),
        ("ascent.learning_rate", float("nan"), "ascent.learning_rate is nan"),
        ("ascent.stop.targets.forget.loss", "never", 'forget.loss is .never.; expected a number, or "auto", or null'),
        ("ascent.stop.targets", 0.01, "ascent.stop.targets is 0.01; expected a mapping"),
        ("forget_set.on_bad_row", "ignore", 'forget_set.on_bad_row is \'ignore\'; expected "error" or "skip"'),
        ("ascent.guard.limits.test.accuracy", True, "ascent.guard.limits"),
        ("audit.report", 1, "audit.report is 1; expected true or false"),
        ("forget_set.mean", 0.5, "forget_set.mean is 0.5; expected a list of numbers, or null"),
        ("forget_set.std", [0.0], "forget_set.std is .0.0.; expected a list of numbers > 0, or null"),
        ("forget_set.size", 2.0, r"is 2.0; expected a whole number >= 1, or a number in \(0, 1\], or a list"),
        ("forget_set.size", [], "forget_set.size is "),
        ("forget_set.size", [True], "forget_set.size is .True."),
        ("forget_set.size", ["0002", 8], "forget_set.size is ..0002., 8.; expected .*a list of texts"),
        ("forget_set.image_size", [256], "forget_set.image_size is .256.; expected a whole number >= 1, or a list"),
        ("forget_set.mean", [float("nan")], "forget_set.mean is .nan."),
        ("influence.blocks_per_shard", 3, "influence.blocks_per_shard is 3; expected a power of two"),
        ("resources.gpus_per_worker", 1.5, "resources.gpus_per_worker is 1.5"),
        ("seed", None, "seed is None; expected a whole number >= 0"),
        ("ascent", 3, "ascent is 3; expected a mapping of settings such as ascent.scope"),
    ],
)  # fmt: skip
def test_a_value_out_of_range_is_refused_by_name(key, value, message):
    with pytest.raises(ConfigError, match=message):
        UnlearnConfig().with_overrides({key: value})


@pytest.mark.parametrize(
    ("key", "near"),
    [
        ("ascent.stop.max_epoch", "ascent.stop.max_epochs"),
        ("influence.dampin", "influence.damping"),
        ("learning_rate", "ascent.learning_rate"),
        ("ascent.stop.target.forget.loss", "ascent.stop.targets"),
    ],
)
def test_an_unknown_setting_names_the_nearest(key, near):
    with pytest.raises(ConfigError, match=f"unknown setting '{key}'.*{re.escape(near)}"):
        UnlearnConfig().with_overrides({key: 1})


def test_an_unknown_recipe_names_the_nearest():
    with pytest.raises(ConfigError, match="recipe is 'papper'; did you mean paper"):
        UnlearnConfig.from_recipe("papper")


def test_a_recipe_is_chosen_and_not_overridden():
    with pytest.raises(ConfigError, match="recipe cannot be overridden .*from_recipe"):
        UnlearnConfig().with_overrides({"recipe": "classes"})


def test_assignments_are_read_as_yaml_and_scientific_notation_is_a_number():
    assert UnlearnConfig().with_overrides(parse_assignment("ascent.l1=1e-3")).ascent.l1 == 1e-3
    assert parse_assignment("forget_set.mean=[0.5]") == {"forget_set.mean": [0.5]}
    with pytest.raises(ConfigError, match="expected dotted.key=value"):
        parse_assignment("ascent.l1")


def test_yaml_cannot_run_code_and_must_be_a_mapping(tmp_path):
    path = tmp_path / "job.yaml"
    for text in ("!!python/object/apply:os.system ['true']", "- 1", "a: [", ""):
        path.write_text(text)
        with pytest.raises(ConfigError, match="job.yaml"):
            read_yaml(path)


def test_identity_ignores_what_cannot_change_a_result_and_nothing_else():
    base = UnlearnConfig()
    assert base.with_overrides({"ascent.stop.max_epochs": 20, "ascent.stop.max_steps": 5}).identity() == base.identity()
    assert base.with_overrides({"resources.workers": 4, "influence.blocks_per_shard": 16}).identity() == base.identity()
    for key, value in {"seed": 1, "influence.block_rows": 8, "resources.cpus_per_worker": 2, "ascent.l1": 0.1}.items():
        assert base.with_overrides({key: value}).identity() != base.identity()


@pytest.mark.parametrize(
    "kind", [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, errors.ImuError)]
)
def test_every_error_survives_pickling(kind):
    error = pickle.loads(pickle.dumps(kind("what, expected, remedy")))
    assert type(error) is kind
    assert str(error) == "what, expected, remedy"


def test_a_configuration_is_made_of_sections_compared_and_pickled():
    config = UnlearnConfig(ascent=AscentConfig(batch_size=20, stop=StopConfig(max_epochs=3)))
    assert config == UnlearnConfig().with_overrides({"ascent": {"batch_size": 20, "stop.max_epochs": 3}})
    assert pickle.loads(pickle.dumps(config)) == config
    assert type(UnlearnConfig().with_overrides({"forget_set.size": 1.0}).forget_set.size) is float
    with pytest.raises(
        ConfigError, match="unknown setting 'ascent.stop.max_epoch'; did you mean ascent.stop.max_epochs"
    ):
        StopConfig(max_epoch=3)


@pytest.mark.parametrize(
    "overrides",
    [
        {"ascent.stop.targets.forget.loss": "1e-2"},
        {"ascent": {"stop": {"targets": {"forget.loss": 0.01}}}},
        {"ascent": {"stop": {"targets": {"forget": {"loss": 0.01}}}}},
        {"ascent.stop.targets": {"forget.loss": 0.01}},
    ],
)
def test_a_setting_that_is_a_mapping_takes_dotted_names_and_keeps_its_other_entries(overrides):
    base = UnlearnConfig().with_overrides({"ascent.stop.targets": {"forget.accuracy": 0.5}})
    targets = base.with_overrides(overrides).ascent.stop.targets
    assert targets == {**base.ascent.stop.targets, "forget.loss": 0.01}
    assert targets["forget.accuracy"] == 0.5


def test_classes_to_forget_may_be_named_and_digits_in_a_name_stay_text():
    config = UnlearnConfig().with_overrides({"forget_set.classes": ["0002", "0010"], "forget_set.size": ["0010"]})
    assert (config.forget_set.size, config.forget_set.chosen) == (("0010",), (1,))
    assert config.with_overrides({"forget_set.size": [1]}).forget_set.chosen == (1,)
    with pytest.raises(
        ConfigError, match="forget_set.size names '0003', which is not among the 2 of forget_set.classes"
    ):
        _ = config.with_overrides({"forget_set.size": ["0002", "0003"]}).forget_set.chosen
