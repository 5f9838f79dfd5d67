"""Trackers: what they are told, that they are told no id, and that one that fails costs a warning alone.

MLflow (in a folder) and Weights & Biases (offline) themselves are tried where they are installed.
"""

import importlib.util
import json
from types import SimpleNamespace

import pyarrow as pa
import pytest
from architectures import named
from ray import tune
from samples import SMALL, image_table, paper

from imu_ray import ConfigError, UnlearnConfig, sweep, unlearn
from imu_ray.distributed import tracking
from imu_ray.distributed.tracking import numbers_of, require_tracker, shown_settings, track_run
from imu_ray.experiments.tracked import Tracked

PERSONS = [f"person-{row:03d}" for row in range(30)]
TABLE = image_table(30).set_column(0, "id", pa.array(PERSONS))
REAL = [
    pytest.param(name, marks=pytest.mark.skipif(not importlib.util.find_spec(name), reason="not installed"))
    for name in ("mlflow", "wandb")
]


def config(**changes):
    return paper(SMALL, forget_set__image_mode="L", ascent__stop__max_epochs=2, audit__report=False, **changes)


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A folder that both trackers write to."""
    folder = tmp_path / "tracked"
    folder.mkdir()
    for name, value in {
        "MLFLOW_TRACKING_URI": f"file://{folder}/mlruns", "MLFLOW_ALLOW_FILE_STORE": "true",
        "WANDB_MODE": "offline", "WANDB_DIR": str(folder), "WANDB_SILENT": "true",
    }.items():  # fmt: skip
        monkeypatch.setenv(name, value)
    return folder


def packages(spec):
    """A stand-in for importlib that says so of every package."""
    return SimpleNamespace(util=SimpleNamespace(find_spec=lambda name: spec))


def written(folder):
    return b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())


def test_settings_that_may_name_a_sample_or_a_person_are_not_sent():
    given = UnlearnConfig().with_overrides(
        {"forget_set.ids": ["jane", "doe"], "forget_set.where": "name == 'jane'", "forget_set.classes": ["jane", "doe"],
         "forget_set.size": ["jane"], "record.key": "/keys/jane"}
    )  # fmt: skip
    shown = shown_settings(given)
    assert "jane" not in json.dumps(shown)
    assert (shown["forget_set.size"], shown["ascent.batch_size"]) == ("1 classes", 256)


def test_of_figures_every_finite_number_is_sent_but_those_of_single_classes():
    figures = {
        "after": {
            "forget": {"loss": 2, "per_class": {"0": {"loss": 1}}, "status": "x", "met": True},
            "odd": float("nan"),
        }
    }
    assert numbers_of(figures) == {"after.forget.loss": 2.0}


def test_the_extra_of_a_tracker_is_named_before_anything_runs(monkeypatch, tmp_path):
    monkeypatch.setattr(tracking, "importlib", packages(None))
    for call in (
        lambda: require_tracker("wandb"),
        lambda: sweep(None, None, {"seed": [1]}, config=config(tracking="wandb")),
    ):
        with pytest.raises(
            ConfigError, match=r"tracking is 'wandb', .*; expected the extra: pip install imu-ray\[wandb\]"
        ):
            call()
    with pytest.raises(ConfigError, match=r"pip install imu-ray\[mlflow\]"):
        unlearn(named("fc"), TABLE, config=config(tracking="mlflow"), run_dir=tmp_path / "run")
    assert not (tmp_path / "run").exists()


@pytest.mark.usefixtures("ray_cluster")
def test_a_tracker_that_fails_leaves_a_warning_in_the_record_and_the_same_results(monkeypatch, tmp_path):
    def failing(*arguments):
        raise ConnectionError("https://user:secret@host")

    monkeypatch.setattr(tracking, "_to_mlflow", failing)
    monkeypatch.setattr(tracking, "importlib", packages("here"))
    plain = unlearn(named("fc"), TABLE, config=config(), run_dir=tmp_path / "plain")
    found = unlearn(named("fc"), TABLE, config=config(tracking="mlflow"), run_dir=tmp_path / "run")
    assert found.record.ascent.warnings[-1].startswith("tracking by mlflow failed (ConnectionError); the results are")
    assert found.record.status == "complete"
    assert found.record.model.hash_after == plain.record.model.hash_after
    assert "secret" not in (tmp_path / "run" / "manifest.json").read_text()


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", REAL)
def test_a_run_is_told_by_its_trajectory_and_figures_without_an_id(name, place, tmp_path):
    settings = config(tracking=name).with_overrides({"forget_set.ids": PERSONS[5:]})
    result = unlearn(named("fc"), TABLE, config=settings, run_dir=tmp_path / "run-7")
    assert not [warning for warning in result.record.ascent.warnings if "tracking" in warning]
    assert not [one for one in PERSONS if one.encode() in written(place)]
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        (run,) = client.search_runs([client.get_experiment_by_name("imu_ray").experiment_id])
        assert (run.info.run_name, run.info.status, run.data.params["ascent.batch_size"]) == ("run-7", "FINISHED", "16")
        losses = [(each.step, each.value) for each in client.get_metric_history(run.info.run_id, "forget.loss")]
        assert losses == [(row["step"], row["forget.loss"]) for row in result.trajectory.to_pylist()]
        assert run.data.metrics["after.forget.loss"] == result.metrics["after"]["forget"]["loss"]
    else:
        assert b"after.forget.loss" in written(place)


def tuned(tracked, tmp_path):
    """Two trials that report a figure, what is none, and one that is not asked for."""
    told = PERSONS[0]

    def trial(config):
        tune.report({"forget.loss": len(config["trial"]["name"]), "reason": told, "other": 1.0})

    trials = [{"name": name, "overrides": {"ascent.l1": l1}} for name, l1 in (("a", 0.5), ("bb", 0.25))]
    results = tune.Tuner(
        tune.with_resources(trial, {"CPU": 0, "memory": 1}),
        param_space={"trial": tune.grid_search(trials)},
        run_config=tune.RunConfig(name="tune", storage_path=str(tmp_path), callbacks=[tracked], verbose=0),
    ).fit()
    assert sorted(result.metrics["forget.loss"] for result in results) == [1, 2]


@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("name", REAL)
def test_the_trials_of_a_sweep_are_told_by_rays_callback_without_what_is_no_figure(name, place, tmp_path):
    tracked = Tracked(name, config(), ["forget.loss"], "sweep-1")
    tuned(tracked, tmp_path)
    assert tracked.warning is None
    if name == "mlflow":
        from mlflow.tracking import MlflowClient

        client = MlflowClient()
        runs = client.search_runs([client.get_experiment_by_name("imu_ray").experiment_id])
        assert {run.info.run_name: run.data.params["ascent.l1"] for run in runs} == {"a": "0.5", "bb": "0.25"}
        assert {run.info.run_name: run.data.metrics["forget.loss"] for run in runs} == {"a": 1, "bb": 2}
        assert {run.info.status for run in runs} == {"FINISHED"}
        assert PERSONS[0].encode() not in written(place)
        assert all(set(run.data.metrics) <= {"forget.loss", "training_iteration"} for run in runs)
    else:
        said = b"".join(path.read_bytes() for path in tmp_path.rglob("*.wandb"))
        assert b"forget.loss" in said
        assert PERSONS[0].encode() not in said


@pytest.mark.usefixtures("ray_cluster")
def test_a_tracker_that_fails_in_a_sweep_costs_a_warning_and_is_not_called_again(tmp_path, monkeypatch):
    class Failing:
        calls = 0

        def setup(self):
            self.calls += 1
            raise ConnectionError("secret")

    monkeypatch.setattr(Tracked, "_make", lambda self, group: setattr(self, "inner", Failing()))
    tracked = Tracked("mlflow", config(), ["forget.loss"], "sweep-1")
    tuned(tracked, tmp_path)
    assert tracked.warning == "tracking by mlflow failed (ConnectionError); the results are complete without it"
    assert tracked.inner.calls == 1


def test_a_tracker_that_is_broken_is_told_in_words(monkeypatch):
    monkeypatch.setattr(tracking, "_to_wandb", lambda *arguments: 1 / 0)
    assert track_run("wandb", "run", config(), [{"step": 1}], {}).startswith(
        "tracking by wandb failed (ZeroDivisionError)"
    )
