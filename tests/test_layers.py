"""A request on layers on one Ray session: the same bits for any number of workers, and what is refused before it begins."""

import functools

import pytest
import torch
from architectures import Residual, lively
from samples import image_table, pairs

from imu_ray import ConfigError, NonFiniteError, UnlearnConfig, unlearn
from imu_ray.distributed import feature_job
from imu_ray.inputs import Inputs

pytestmark = pytest.mark.usefixtures("ray_cluster")
SETTINGS = {
    "ascent.scope": "last:2",
    "ascent.views": 2,
    "ascent.objective": "ascent",
    "ascent.stop.targets": {"forget_views.loss": 2.5},
    "ascent.stop.tolerance": 0.05,
    "influence.block_rows": 8,
    "influence.blocks_per_shard": 2,
    "audit.report": False,
}


def config(**changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return UnlearnConfig.from_recipe("samples").with_overrides(SETTINGS | more)


@pytest.fixture(scope="module")
def forgotten(tmp_path_factory):
    """The outcome of one step on 50 rows, in shards of 16, by a number of workers."""

    @functools.cache
    def run(workers, features="cache"):
        sets = {"test": pairs(40, seed=1), "retain": pairs(30, seed=2)}
        settings = config(resources__workers=workers, influence__features=features)
        folder = tmp_path_factory.mktemp("run") / "out"
        return unlearn(lively(Residual), pairs(50), evaluation=sets, config=settings, run_dir=folder)

    return run


@pytest.mark.parametrize(("workers", "features"), [(2, "cache"), pytest.param(4, "recompute", marks=pytest.mark.slow)])
def test_one_step_gives_the_same_bits_for_any_number_of_workers(forgotten, workers, features):
    alone, several = forgotten(1), forgotten(workers, features)
    assert alone.manifest["ascent"]["status"] == "reached"
    expected = alone.model.state_dict()
    assert all(torch.equal(value, expected[key]) for key, value in several.model.state_dict().items())
    assert several.trajectory.drop_columns("seconds").equals(alone.trajectory.drop_columns("seconds"))
    assert several.metrics == alone.metrics


def test_only_the_scope_moves_and_views_are_measured(forgotten):
    original, changed = lively(Residual).state_dict(), forgotten(1).model.state_dict()
    moved = {key for key, value in original.items() if not torch.equal(value, changed[key])}
    assert moved == {"conv.weight", "fc.weight", "fc.bias"}
    figures = forgotten(1).metrics["after"]
    assert {name: figures[name]["samples"] for name in ("forget", "forget_views", "test", "test_views", "retain")} == {
        "forget": 50, "forget_views": 100, "test": 40, "test_views": 40, "retain": 30,
    }  # fmt: skip
    assert figures["forget_views"]["loss"] == pytest.approx(2.5, abs=0.06)
    columns = forgotten(1).trajectory.column_names
    assert {"forget.accuracy", "forget_views.accuracy", "test_views.loss", "parameter_drift.conv"} <= set(columns)
    assert forgotten(1).manifest["model"]["layers"] == ["conv", "fc"]


def ids_of(made):
    return [sample_id for ids in made.map("ids", lambda shard: shard.ids) for sample_id in ids.to_pylist()]


@pytest.mark.parametrize("size", [[1, 3], 20])
@pytest.mark.parametrize("before", [True, False])
def test_views_follow_the_part_that_is_forgotten(size, before):
    chosen = config(forget_set__size=size)
    base = chosen if before else config()  # a sweep selects from the features of all rows
    opened = Inputs.open(lively(Residual), pairs(50), "classification", {"test": pairs(8, seed=1)}, base)
    inputs = opened.extract(base.with_overrides({"resources.workers": 2})).select(
        chosen.with_overrides({"resources.workers": 2})
    )
    forget, views = (ids_of(inputs.features[name]) for name in ("forget", "forget_views"))
    labels = pairs(50).labels.tolist()
    assert views == [f"{sample_id}#{view}" for sample_id in forget for view in range(2)]
    assert len(forget) == (20 if size == 20 else sum(label in size for label in labels))
    described = {name: inputs.described[name].rows_used for name in ("forget", "forget_views", "test_views")}
    assert described == {"forget": len(forget), "forget_views": len(views), "test_views": 8}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"influence__curvature": "hessian"}, "influence.curvature is 'hessian' with ascent.scope 'last:2'"),
        ({"ascent__preconditioner": "full_ggn"}, "'full_ggn' with ascent.scope 'last:2'; expected none or kfac"),
        ({"ascent__scope": ["conf"]}, r"ascent.scope names 'conf', which matches no layer of Residual; did you mean conv\?"),
        ({"ascent__scope": "last:99"}, "ascent.scope is 'last:99'; expected at most last:3"),
        ({"ascent__preconditioner_memory": 1e-6}, "ascent.preconditioner kfac of conv takes .* ascent.preconditioner_memory"),
        ({"ascent__view_transform": "crop"}, "ascent.view_transform is 'crop'; .* did you mean crop_flip"),
    ],
)  # fmt: skip
def test_what_cannot_be_done_is_refused_before_any_features_are_made(changes, message, monkeypatch, tmp_path):
    monkeypatch.setattr(feature_job, "extract", lambda *_: pytest.fail("features were made"))
    with pytest.raises(ConfigError, match=message):
        unlearn(lively(Residual), pairs(50), config=config(**changes), run_dir=tmp_path / "run")


def spoil(pixels):
    """A view without numbers, of some samples."""
    return pixels + torch.where(pixels.mean() > 0.1, torch.nan, 0.0)


def test_a_view_that_is_lost_alone_is_an_error(tmp_path):
    settings = config(ascent__view_transform=f"{__name__}:spoil", forget_set__on_bad_row="skip")
    with pytest.raises(NonFiniteError, match="views"):
        unlearn(lively(Residual), pairs(50), config=settings, run_dir=tmp_path / "run")


def test_shards_without_a_usable_row_change_nothing(tmp_path):
    table, kept = image_table(50), [row for row in range(50) if row != 3 and not 16 <= row < 32]
    images = [image if row in kept else None for row, image in enumerate(table["image"].to_pylist())]
    settings = config(
        forget_set__on_bad_row="skip",
        forget_set__image_mode="L",
        ascent__views=0,
        ascent__stop__targets={"forget.loss": 3.0},
    )
    holes, without = (
        unlearn(lively(Residual), samples, config=settings, run_dir=tmp_path / f"run{place}")
        for place, samples in enumerate([table.set_column(1, "image", [images]), table.take(kept)])
    )
    assert len(holes.manifest["forget_set"]["bad_rows"]) == 17
    assert holes.manifest["ascent"]["status"] == "reached"
    expected, found = without.model.state_dict(), holes.model.state_dict()
    moved = expected["conv.weight"] - lively(Residual).conv.weight
    assert (found["conv.weight"] - expected["conv.weight"]).norm() <= 1e-4 * moved.norm()
