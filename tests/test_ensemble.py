"""Ensembles of models, end to end on small digits' nets: margins, failures, and what is not made twice."""

import functools
import json
import signal
from pathlib import Path

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from faults import kill_once, once

from imu_ray import (
    CheckpointError,
    ConfigError,
    EnsembleConfig,
    ModelSpec,
    StageFailedError,
    UnlearnConfig,
    ensemble,
    unlearn,
)
from imu_ray.demo import digits, digits_cnn, fit_digits, write_digits
from imu_ray.experiments.ensemble import method_config
from imu_ray.models.checkpoint import load_checkpoint

pytestmark = [pytest.mark.slow, pytest.mark.usefixtures("ray_cluster")]
SPEC = ModelSpec("imu_ray.demo:digits_cnn")
GREY = UnlearnConfig().with_overrides(
    {"forget_set.image_mode": "L", "influence.block_rows": 64, "resources.workers": 2}
)
METHODS = {
    "samples": {"recipe": "samples"},
    "nothing at all": {"call": "test_ensemble:leave_alone", "needs": "nothing"},
}


def train(model, inputs, labels, seed, folder=None, fault=None):
    """One epoch; some seeds fail, once or always."""
    if fault == "crash" and seed == 1:
        kill_once(folder, "crash")
    if fault == "once" and seed == 1 and once(folder, "raised"):
        raise RuntimeError("not this time")
    if fault == "always" and seed == 1:
        raise RuntimeError("never")
    fit_digits(model, inputs, labels, seed, epochs=1)


def leave_alone(model, forget, retain, unseen, seed):
    return model


@pytest.fixture(scope="module")
def sets(tmp_path_factory):
    folder = tmp_path_factory.mktemp("digits")
    _, _, rows, test = digits()
    parts = {"forget": rows[:40], "retain": rows[40:340], "test": test[:120]}
    return {name: str(write_digits(folder / f"{name}.parquet", each)) for name, each in parts.items()}


def run(sets, run_dir, models=2, methods=METHODS, **fault):
    return ensemble(
        SPEC,
        sets["forget"],
        train_fn=functools.partial(train, **fault),
        evaluation={name: sets[name] for name in ("retain", "test")},
        methods=methods,
        config=GREY,
        settings=EnsembleConfig(models=models, retain_points=20),
        run_dir=run_dir,
    )


def contents(folder):
    """Of every model's file when it was written and what is in it."""
    files = [path for part in ("models", "margins", "figures") for path in (folder / part).rglob("*") if path.is_file()]
    files = [path for path in files if not path.name.startswith(".part-")]  # of a process that was killed
    return {str(path.relative_to(folder)): (path.stat().st_mtime_ns, path.read_bytes()) for path in files}


@pytest.fixture(scope="module")
def finished(sets, tmp_path_factory):
    folder = tmp_path_factory.mktemp("ensemble") / "run"
    return folder, run(sets, folder)


def test_margins_and_accuracies_are_those_of_the_models_that_lie_there(finished, sets):
    folder, result = finished
    model = digits_cnn().eval()
    load_checkpoint(model, folder / "models" / "retrained-00001.safetensors")
    pixels, labels, rows, test = digits()
    margins = pq.read_table(folder / "margins" / "models" / "retrained-00001.parquet").to_pandas()
    for name, chosen in (("forget", rows[:40]), ("test", test[60:120])):
        with torch.no_grad():
            logits = model(torch.from_numpy(pixels[chosen]).unsqueeze(1) / 255).double().numpy()
        own = logits[np.arange(len(chosen)), labels[chosen]]
        others = np.where(np.eye(10, dtype=bool)[labels[chosen]], -np.inf, logits)
        expected = own - np.log(np.exp(others).sum(1))
        found = margins[margins["set"] == name]
        assert found["point"].tolist() == [f"digit-{row:04d}" for row in chosen]
        np.testing.assert_allclose(found["margin"], expected, rtol=1e-5, atol=1e-5)
        figures = json.loads((folder / "figures" / "models" / "retrained-00001.json").read_text())
        assert figures[name]["accuracy"] == pytest.approx((logits.argmax(1) == labels[chosen]).mean())
    assert not result.failed
    assert [row["method"] for row in result.table] == ["do nothing", "retrain", *METHODS]
    assert [row["needs"] for row in result.table] == ["nothing", "retain", "forget", "nothing"]


def test_a_run_of_the_library_in_a_task_is_the_same_as_one_by_itself(finished, sets):
    folder, _ = finished
    model = digits_cnn().eval()
    load_checkpoint(model, folder / "models" / "original-00000.safetensors")
    config = method_config(GREY, {"recipe": "samples"})
    unseen = pq.read_table(sets["test"]).slice(0, 60)
    alone = unlearn(
        model, sets["forget"], evaluation={"test": unseen}, config=config, run_dir=folder.parent / "alone"
    ).model
    pixels, labels, _, test = digits()
    with torch.no_grad():
        logits = alone(torch.from_numpy(pixels[test[60:120]]).unsqueeze(1) / 255).double()
    own = logits.gather(1, torch.from_numpy(labels[test[60:120]])[:, None])[:, 0].numpy()
    others = np.where(np.eye(10, dtype=bool)[labels[test[60:120]]], -np.inf, logits.numpy())
    found = pq.read_table(folder / "margins" / "samples" / "unlearned-00000.parquet").to_pandas()
    kept = found[found["set"] == "test"]["margin"].to_numpy()
    np.testing.assert_allclose(kept, own - np.log(np.exp(others).sum(1)), atol=1e-4)


def test_what_is_finished_is_not_made_again_where_models_and_methods_are_added(finished, sets):
    folder, _ = finished
    before = contents(folder)
    result = run(sets, folder, models=3, methods={**METHODS, "another": METHODS["nothing at all"]})
    after = contents(folder)
    assert {name: after[name] for name in before} == before
    made = 2 * (1 + 2 * (1 + len(METHODS)))  # a checkpoint, margins and figures for each base and method
    assert len(after) - len(before) == made + 3 * 2 * 2
    assert [row["models"] for row in result.table] == [3] * 5
    with pytest.raises(CheckpointError, match="another model, training, samples or settings"):
        run({**sets, "forget": sets["test"]}, folder)
    with pytest.raises(CheckpointError, match="another model, training, samples or settings"):
        run(sets, folder, methods={"samples": {"recipe": "paper"}})


@pytest.mark.parametrize("fault", ["once", "crash"])
def test_a_model_that_fails_once_is_tried_again(fault, finished, sets, tmp_path):
    result = run(sets, tmp_path / "run", methods={}, folder=str(tmp_path), fault=fault)
    assert not result.failed
    found, expected = contents(tmp_path / "run"), contents(finished[0])
    margins = [name for name in found if name.startswith("margins")]
    assert len(margins) == 4
    assert {name: found[name][1] for name in margins} == {name: expected[name][1] for name in margins}


def test_a_model_that_fails_each_time_is_left_out_and_named(sets, tmp_path):
    result = run(sets, tmp_path / "run", models=3, methods={}, fault="always")
    assert set(result.failed) == {"original 1", "retrained 1"}
    assert all("RuntimeError: never" in reason for reason in result.failed.values())
    assert result.table[0]["models"] == 2
    assert "Failed: original 1" in (tmp_path / "run" / "table.md").read_text()
    with pytest.raises(StageFailedError, match="1 models are original; fewer than 2"):
        run(sets, tmp_path / "few", models=2, methods={}, fault="always")


def break_off(model, forget, retain, unseen, seed, first=1):
    if seed >= first:
        raise RuntimeError("not this one")
    return model


def test_a_method_that_fails_on_a_model_leaves_the_other_methods_alone(sets, tmp_path):
    broken = {"call": "test_ensemble:break_off"}
    methods = {"broken": broken, "no model left": {**broken, "first": 0}, "nothing": METHODS["nothing at all"]}
    result = run(sets, tmp_path / "run", methods=methods)
    found = {row["method"]: row["models"] for row in result.table[2:]}
    assert found == {"broken": 1, "no model left": 0, "nothing": 2}
    assert set(result.failed) == {f"{base} {seed}" for base in ("original", "retrained") for seed in range(2)}
    assert "broken failed: RuntimeError: not this one" in result.failed["original 1"]


def test_wrong_inputs_are_refused_before_a_model_is_trained(sets, tmp_path):
    for changed, message in (
        ({"evaluation": {"retain": sets["retain"]}}, "evaluation lacks test"),
        ({"train_fn": "nowhere:train"}, "ensemble.train_fn 'nowhere:train' cannot be imported"),
        ({"methods": {"m": {"recipe": "nosuch"}}}, "recipe is 'nosuch'"),
        ({"methods": {"m": {"call": "nowhere:f"}}}, "ensemble.methods.m.call 'nowhere:f' cannot be imported"),
        ({"model": digits_cnn()}, "expected a ModelSpec"),
    ):
        given = {
            "model": SPEC,
            "train_fn": train,
            "evaluation": {name: sets[name] for name in ("retain", "test")},
            **changed,
        }
        with pytest.raises(ConfigError, match=message):
            ensemble(given.pop("model"), sets["forget"], config=GREY, run_dir=tmp_path / "run", **given)
        assert not (tmp_path / "run").exists()


@pytest.mark.long
def test_after_the_driver_was_killed_no_finished_model_is_made_again(finished, sets, tmp_path, drive):
    place = Path(sets["forget"]).parent
    assert drive("ensemble_driver.py", tmp_path, place).returncode == -signal.SIGKILL
    before = contents(tmp_path / "run")
    assert "models/original-00000.safetensors" in before
    ended = drive("ensemble_driver.py", tmp_path, place)
    assert ended.returncode == 0, ended.stderr
    after, whole = contents(tmp_path / "run"), contents(finished[0])
    assert {name: after[name] for name in before} == before
    margins = [name for name in after if name.startswith("margins")]
    assert {name: after[name][1] for name in margins} == {name: whole[name][1] for name in margins}
