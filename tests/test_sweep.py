"""A sweep: trials, names, choice of the best, and the whole on Ray Tune."""

import functools
import json
import shutil
import signal

import pyarrow.parquet as pq
import pytest
from architectures import named
from ray import tune
from samples import Pairs, pairs, tensors
from sweep_driver import CONFIG

from imu_ray import CheckpointError, ConfigError, SweepConfig, UnlearnConfig, sweep
from imu_ray.experiments import axes as sweep_axes
from imu_ray.experiments import sweep as module
from imu_ray.run.directory import RunDirectory

BASE = UnlearnConfig.from_recipe("paper")


def trials(axes, **settings):
    return sweep_axes.make_trials(axes, BASE, SweepConfig(**settings))


def test_every_combination_is_a_trial_under_a_name_that_says_so():
    made = trials({"forget_set.size": [0.1, 1.0], "ascent.learning_rate": [0.01, 0.1]})
    assert list(made.values())[1] == {"forget_set.size": 0.1, "ascent.learning_rate": 0.1}
    assert len(made) == 4
    assert all(name.startswith(("size-0.1_learning_rate-0.", "size-1_learning_rate-0.")) for name in made)
    assert made == trials({"forget_set.size": [0.1, 1.0], "ascent.learning_rate": [0.01, 0.1]})


def test_distributions_are_drawn_the_same_each_time():
    axes = {"ascent.learning_rate": tune.loguniform(1e-4, 1e-1), "ascent.objective": ["ascent", "npo"]}
    made = trials(axes, samples=3)
    assert made == trials(axes, samples=3)
    drawn = [overrides["ascent.learning_rate"] for overrides in made.values()]
    assert len(set(drawn)) == 6
    assert all(1e-4 <= rate <= 1e-1 for rate in drawn)


@pytest.mark.parametrize(
    ("axes", "settings", "message"),
    [
        ({}, {}, "axes is empty"),
        ({"ascent.learning_rat": [1]}, {}, "did you mean ascent.learning_rate"),
        ({"influence.block_rows": [1]}, {}, "all trials share it"),
        ({"influence.feature_dtype": ["float32", "bfloat16"]}, {}, "all trials share it"),
        ({"influence.autocast": ["none", "bfloat16"]}, {}, "all trials share it"),
        ({"forget_set.image_size": [8]}, {}, "all trials share it"),
        ({"ascent.learning_rate": 0.1}, {}, "expected a list of values"),
        ({"ascent.learning_rate": [-1]}, {}, "ascent.learning_rate is -1"),
        ({"ascent.objective": ["asent"]}, {}, "did you mean ascent"),
        ({"forget_set.size": [0.1, 0.2]}, {"scheduler": "asha"}, "answer different questions"),
    ],
)
def test_a_wrong_axis_is_refused_before_anything_runs(axes, settings, message):
    with pytest.raises(ConfigError, match=message):
        trials(axes, **settings)


def test_axes_of_a_job_file_are_lists_or_distributions():
    axes = sweep_axes.read_axes({"forget_set.size": [0.1, 1.0], "ascent.learning_rate.loguniform": ["1e-4", 0.1]})
    assert axes["forget_set.size"] == [0.1, 1.0]
    assert (axes["ascent.learning_rate"].lower, axes["ascent.learning_rate"].upper) == (1e-4, 0.1)
    with pytest.raises(ConfigError, match="did you mean loguniform"):
        sweep_axes.read_axes({"ascent.learning_rate.loguniforn": [1, 2]})


def test_the_largest_size_contains_the_others():
    assert sweep_axes.largest_size([10, 500, 20]) == 500
    assert sweep_axes.largest_size([0.1, 1.0]) == 1.0
    assert sweep_axes.largest_size([None, 10]) is None
    assert sweep_axes.largest_size([0.1, 10]) is None
    assert sweep_axes.largest_size([(1,), (1, 2)]) is None


def test_the_best_trial_reached_its_target():
    names = ("trial", "status", "output_change", "parameter_drift", "retain.accuracy", "label_share")
    figures = [
        ("a", "not_reached", 0.0, 0.0, 1.0, 0.1),
        ("b", "reached", 0.3, 0.1, 0.9, 0.1),
        ("c", "reached", 0.1, 0.2, 0.8, 0.1),
    ]
    rows = [dict(zip(names, row, strict=True)) for row in figures]
    assert module.best_trial(rows, "output_change") == "c"
    assert module.best_trial(rows, "retain") == "b"
    assert module.best_trial(rows, "auto") == "c", "a set of few classes"
    assert module.best_trial([row | {"label_share": 1.0} for row in rows], "auto") == "b", "a mixed set"
    met = rows[2] | {"trial": "d", "status": "already_met", "output_change": 0.0}
    assert module.best_trial([*rows, met], "auto") == "d"
    assert module.best_trial(rows[:1], "auto") is None


def test_a_choice_by_a_set_that_is_not_there_is_refused(tmp_path):
    settings = SweepConfig(choose_by="test")
    with pytest.raises(ConfigError, match="there is no such evaluation set"):
        sweep(named("fc"), pairs(10), {"seed": [1]}, settings=settings, sweep_dir=tmp_path / "sweep")


def test_another_directory_is_not_taken_for_a_sweep(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"holds files but no sweep.json"):
        sweep(named("fc"), pairs(10), {"seed": [1]}, sweep_dir=tmp_path)
    (tmp_path / "file").unlink()
    (tmp_path / "sweep.json").write_text(json.dumps({"identity": "another"}))
    with pytest.raises(CheckpointError, match="other settings or axes"):
        sweep(named("fc"), pairs(10), {"seed": [1]}, sweep_dir=tmp_path, resume=True)


def test_a_sweep_keeps_others_out_of_its_directory(tmp_path):
    with RunDirectory(tmp_path).locked(), pytest.raises(CheckpointError, match="is in use by process"):
        sweep(named("fc"), pairs(10), {"seed": [1]}, sweep_dir=tmp_path, resume=True)


def test_trials_that_differ_in_their_limits_have_directories_of_their_own():
    long = {"influence.curvature_set": ["a-name-that-fills-the-folder-name-" + 80 * "x"]}
    assert len(trials({**long, "ascent.stop.max_epochs": [5, 10]})) == 2


def test_a_sweep_goes_on_with_the_same_model_and_samples_only(tmp_path, ray_cluster, monkeypatch):
    monkeypatch.setattr(module, "run_trials", lambda *_: None)
    go_on = functools.partial(sweep, axes={"seed": [1]}, sweep_dir=tmp_path / "sweep", resume=True)
    for _ in range(2):
        assert go_on(named("fc"), pairs(10)).table["status"].to_pylist() == ["not_run"]
    with pytest.raises(CheckpointError, match="on another forget set"):
        go_on(named("fc"), pairs(11))
    with pytest.raises(CheckpointError, match="on another model"):
        go_on(named("classifier"), pairs(10))


@pytest.fixture
def swept(tmp_path, drive):
    """Runs a sweep of the driver in the test's folder."""

    def run(axes, settings=(), overrides=(), *more):
        parts = [json.dumps(dict(part)) for part in (axes, settings, overrides)]
        return drive("sweep_driver.py", tmp_path, *parts, *more)

    return run


SIZES = {"forget_set.size": [0.05, 0.2, 1.0], "ascent.learning_rate": [0.01, 0.03]}


@pytest.mark.slow
@pytest.mark.long
def test_sizes_and_rates_share_one_forward_pass_and_a_killed_sweep_goes_on(tmp_path, swept):
    died = swept(SIZES, (), (), int(signal.SIGKILL), 2)
    assert died.returncode == -signal.SIGKILL, died.stderr
    begun = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    finished = {path: path.stat().st_mtime_ns for path in tmp_path.glob("sweep/trials/*/model.safetensors")}
    rows = list(tmp_path.glob("sweep/rows/*.json"))
    assert len(rows) == 2
    lost = rows[0].read_text()
    rows[0].unlink()  # as if the driver had died between the end of a run and its row
    forward = (tmp_path / "forward").stat().st_size

    done = swept(SIZES)
    assert done.returncode == 0, done.stderr
    for row in rows:
        model = tmp_path / "sweep" / "trials" / row.stem / "model.safetensors"
        assert model.stat().st_mtime_ns == finished[model], "a finished trial is not repeated"
    assert rows[0].read_text() == lost
    result = json.loads(done.stdout.splitlines()[-1])
    assert len(result["rows"]) == 6
    assert {row["status"] for row in result["rows"]} <= {"reached", "not_reached"}
    assert sorted({row["rows"] for row in result["rows"]}) == [30, 120, 600]
    assert all(row["seconds"] > 0 and 0 <= row["retain.accuracy"] <= 1 for row in result["rows"])
    # 600 forget, 691 retain and 360 test rows in blocks of 64, once for each of the two calls.
    assert forward == 10 + 11 + 6 + 2 * 3, "and the first block of every set twice more"
    assert (tmp_path / "forward").stat().st_size == 2 * forward

    assert pq.read_table(tmp_path / "sweep" / "results.parquet").to_pylist() == result["rows"]
    page = (tmp_path / "sweep" / "sweep.html").read_text()
    assert "<svg" in page
    assert "src=" not in page
    assert "digit-" not in page, "no sample is named"
    assert list(tmp_path.glob("sweep/tune*/*/events.out.tfevents*")), "TensorBoard files"

    record = json.loads((tmp_path / "sweep" / "sweep.json").read_text())
    assert record == {**begun, "resumed": record["resumed"]}
    assert len(record["resumed"]) == 1

    paths = {path.stem: str(path) for path in tmp_path.glob("*.parquet")}
    again = sweep(None, paths.pop("forget"), SIZES, evaluation=paths, config=CONFIG, sweep_dir=tmp_path / "sweep")
    assert again.table.to_pylist() == result["rows"], "nothing is left to do, not even to look at the model"


@pytest.mark.slow
@pytest.mark.long
@pytest.mark.parametrize(("workers", "rates"), [(1, [3.0, 0.0001, 0.0002]), (2, [3.0, 0.0001])])
def test_trials_that_are_stopped_early_leave_room_for_the_others(workers, rates, swept):
    # Steps that forget in two, where halving first looks.
    overrides = {
        "forget_set.size": 64, "resources.workers": workers, "resources.ascent_workers": workers,
        "ascent.stop.targets": {"forget.accuracy": None}, "ascent.stop.max_epochs": 2,
        "ascent.guard.max_forget_loss": 1e6,
    }  # fmt: skip
    done = swept({"ascent.learning_rate": rates}, {"scheduler": "asha"}, overrides)
    assert done.returncode == 0, done.stderr
    rows = json.loads(done.stdout.splitlines()[-1])["rows"]
    assert rows[0]["status"] == "epochs_done"
    # Halving is asynchronous: a trial beside the first may come to each rung before it, and is not stopped then.
    beside = 2 // workers - 1
    assert {row["status"] for row in rows[1 : 1 + beside]} <= {"stopped_early", "epochs_done"}
    assert {row["status"] for row in rows[1 + beside :]} == {"stopped_early"}
    assert all(row["forget.accuracy"] > rows[0]["forget.accuracy"] for row in rows[1:])
    assert {row["rows"] for row in rows} == {64}


@pytest.mark.slow
def test_a_trial_that_fails_is_listed_and_tried_again_on_resume(tmp_path, ray_cluster):
    inputs, labels = tensors(32)
    axes = {"forget_set.size": [[1], [3]]}  # there is no 3 among the samples
    settings = {
        "config": BASE.with_overrides({"resources.workers": 1, "ascent.stop.max_epochs": 1}),
        "settings": SweepConfig(max_retries=0),
    }
    for _ in range(2):
        samples = Pairs(inputs, labels % 3)
        result = sweep(named("fc"), samples, axes, sweep_dir=tmp_path, resume=True, **settings)
        good, bad = result.table.to_pylist()
        assert good["status"] in ("reached", "not_reached", "already_met")
        assert bad["status"] == "failed"
        assert "ConfigError: forget_set.size names classes [3]" in bad["reason"]
        assert "1 failed" in (tmp_path / "sweep.html").read_text()
        (tmp_path / "trials" / good["trial"] / "model.safetensors").stat()
        assert len(list(tmp_path.glob("tune/*/error.txt"))) >= 1
        shutil.rmtree(tmp_path / "tune")
