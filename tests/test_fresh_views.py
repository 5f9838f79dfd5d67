"""Fresh views see through a model that fails on the stored pixels alone; no step of an update sees them."""

import hashlib

import numpy as np
import pytest
import torch
from figures import check_metrics
from fingerprints import fitted, shift, textures
from safetensors.torch import save_file
from samples import Pairs, pairs

from imu_ray import ConfigError, UnlearnConfig, audit, unlearn
from imu_ray.inputs import Inputs
from imu_ray.recipes import resolve_settings
from imu_ray.updates.stopping import stop_targets

VIEWS = 3


def settings(**changes):
    more = {key.replace("__", "."): value for key, value in changes.items()}
    return UnlearnConfig.from_recipe("samples").with_overrides(
        {"ascent.view_transform": "fingerprints:shift", "audit.views": VIEWS, "audit.recovery": [], **more}
    )


def drawn_anew(samples, seed=0):
    """The fresh views of all rows, written out."""
    images = []
    for row, image in enumerate(samples.inputs):
        for view in range(VIEWS):
            digest = hashlib.blake2b(f"audit {seed} {row} {view}".encode(), digest_size=8).digest()
            with torch.random.fork_rng(devices=[]):
                torch.manual_seed(int.from_bytes(digest, "big") // 2)
                images.append(shift(image))
    return Pairs(torch.stack(images), samples.labels.repeat_interleave(VIEWS))


def figures_of(model, samples):
    with torch.no_grad():
        outputs = model(samples.inputs)
    losses = torch.nn.functional.cross_entropy(outputs.double(), samples.labels, reduction="none")
    return {
        "samples": len(samples),
        "accuracy": float((outputs.argmax(1) == samples.labels).double().mean()),
        "loss": float(losses.mean()),
    }


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_forgetting_of_the_stored_pixels_alone_is_contained(tmp_path):
    whole, test = textures(400, 1), textures(300, 2)
    part = lambda rows: Pairs(whole.inputs[rows], whole.labels[rows])
    model, retrained = fitted(whole), fitted(part(slice(40, None)))
    save_file(retrained.state_dict(), tmp_path / "retrained.safetensors")
    forget, sets = part(slice(40)), {"test": test}
    reached = settings(ascent__stop__targets={"forget.accuracy": 0.5}, resources__workers=2, influence__block_rows=16)
    config = reached.with_overrides({"audit.reference": str(tmp_path / "retrained.safetensors")})
    result = unlearn(model, forget, evaluation=sets, config=config, run_dir=tmp_path / "run")
    after = check_metrics(result.run_dir, *result.metrics["after"])["after"]
    assert result.status == "reached"
    assert after["forget"]["accuracy"] <= 0.5
    assert after["forget_fresh_views"]["accuracy"] > 0.8
    assert after["test"]["accuracy"] > 0.95

    verdict = result.record.verdict
    assert verdict.word == "contained"
    assert "fresh views: " in verdict.reason
    assert "right, the rows themselves" in verdict.reason
    assert any("those of the retrained model" in each for each in verdict.checked)
    assert not any("fresh views" in each for each in verdict.not_checked)
    assert "views of each row that no step has seen" in (tmp_path / "run" / "report.html").read_text()
    assert result.record.data_access["forget_fresh_views"] == ["measured"]
    assert result.record.evaluation["test_fresh_views"].rows_used == VIEWS * 300
    assert not [name for name in result.trajectory.column_names if "fresh" in name]

    for side, each in {"before": model, "after": result.model, "retrained": retrained}.items():
        for name, samples in {"forget_fresh_views": forget, "test_fresh_views": test}.items():
            found, wanted = result.metrics[side][name], figures_of(each, drawn_anew(samples))
            assert {key: found[key] for key in wanted} == pytest.approx(wanted, abs=1e-6)

    alone = reached.with_overrides({"resources.workers": 1, "influence.blocks_per_shard": 1})
    again = audit(result.model, forget, original=model, evaluation=sets, config=alone)
    for side in ("before", "after"):
        assert again[side] == result.metrics[side]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_views_that_change_nothing_have_the_figures_of_the_rows_that_were_chosen():
    forget, test = textures(40, 1), textures(30, 2)
    config = settings(ascent__view_transform="torch:clone", forget_set__size=[0, 2])
    found = audit(fitted(forget, 30), forget, evaluation={"test": test}, config=config)["after"]
    assert set(found["forget_fresh_views"]["per_class"]) == {"0", "2"}
    for name in ("forget", "test"):
        views = found[f"{name}_fresh_views"]
        assert views.pop("samples") == VIEWS * found[name].pop("samples")
        assert {key: value for key, value in views.items() if key != "per_class"} == pytest.approx(
            {key: value for key, value in found[name].items() if key != "per_class"}, rel=1e-12
        )


@pytest.mark.parametrize("name", ["forget_fresh_views", "test_fresh_views"])
def test_no_target_guard_or_curvature_looks_at_fresh_views(name):
    rows = textures(12, 1)
    inputs = Inputs.open(fitted(rows, 1), rows, "classification", {"test": textures(9, 2)}, settings())
    assert {"forget", "test", "forget_fresh_views", "test_fresh_views"} == inputs.sources.keys()
    assert inputs.names == {"forget", "test"}
    stop = settings(ascent__stop__targets={f"{name}.accuracy": 0.5}).ascent.stop
    with pytest.raises(ConfigError, match=f"targets names '{name}.accuracy', which is measured in the audit alone"):
        stop_targets(stop, inputs.task.metrics, 12, None)
    for key, value in {
        "ascent.guard.limits": {f"{name}.accuracy": 0.5},
        "ascent.max_change": {f"{name}.accuracy": 0.5},
        "ascent.preconditioner_sets": ["forget", name],
        "influence.curvature_set": name,
    }.items():
        message = f"{key} names .*'{name}.*', which is measured in the audit alone"
        with pytest.raises(ConfigError, match=message):
            inputs.require_sets(settings(**{key.replace(".", "__"): value}))


@pytest.mark.parametrize("name", ["forget_fresh_views", "test_fresh_views"])
def test_an_evaluation_set_cannot_have_the_name_of_fresh_views(name):
    rows = textures(12, 1)
    with pytest.raises(ConfigError, match=f"is named '{name}'"):
        Inputs.open(fitted(rows, 1), rows, "classification", {name: rows}, settings())


def test_fresh_views_are_other_draws_than_those_of_the_update_for_all_seeds():
    draws = {"views": set(), "fresh_views": set()}
    rows = pairs(20)
    for seed in range(5):
        config = settings(ascent__views=4, audit__views=4, seed=seed)
        sources = Inputs.open(fitted_like(rows), rows, "classification", {"test": rows}, config).sources
        for name, seen in draws.items():
            for base in ("forget", "test"):
                source = sources[f"{base}_{name}"]
                seen.update(view.draw for view in source.read(0, source.num_rows).inputs)
    assert {name: len(seen) for name, seen in draws.items()} == {"views": 5 * 80, "fresh_views": 5 * 80}
    assert not draws["views"] & draws["fresh_views"]


def fitted_like(rows):
    torch.manual_seed(0)
    return torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(int(np.prod(rows.inputs.shape[1:])), 5))


def test_recipe_views_audits_with_a_fresh_view_and_the_others_with_none():
    views = {name: UnlearnConfig.from_recipe(name).audit.views for name in ("samples", "views", "classes", "paper")}
    assert views == {"samples": 0, "views": 1, "classes": 0, "paper": 0}


def test_a_transform_that_is_not_there_is_refused_before_anything_runs():
    with pytest.raises(ConfigError, match="ascent.view_transform is 'crop_flop'"):
        resolve_settings(None, settings(ascent__view_transform="crop_flop"), "classification")
