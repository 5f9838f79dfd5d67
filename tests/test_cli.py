"""The entry points in jobs/ as a user runs them."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from architectures import named
from safetensors.torch import save_file
from samples import write_images

from imu_ray import ConfigError, JobConfig
from imu_ray.cli import _warn_of_credentials

ROOT = Path(__file__).resolve().parents[1]


@pytest.fixture
def job_file(tmp_path):
    model = named("fc")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_images(tmp_path / "forget.parquet", 40)
    write_images(tmp_path / "test.parquet", 50, seed=3)
    values = {
        "model": {"factory": "architectures:named", "kwargs": {"name": "fc"}, "checkpoint": str(tmp_path / "model.safetensors")},
        "forget_set": {"path": str(tmp_path / "forget.parquet"), "image_mode": "L"},
        "evaluation": {"test": str(tmp_path / "test.parquet")},
        "run_dir": str(tmp_path / "run"),
        "recipe": "paper",
        "ascent": {"stop": {"forget_accuracy": None, "max_epochs": 2}},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "job.yaml"


def test_a_job_file_is_read_with_its_assignments_last(job_file):
    job = JobConfig.load(job_file, ["ascent.stop.max_epochs=7", "run_dir=/elsewhere", "model.kwargs.name=head"])
    assert job.config.ascent.stop.max_epochs == 7
    assert job.config.forget_set.image_mode == "L"
    assert job.config.ascent.stop.forget_accuracy is None
    assert (str(job.run_dir), job.model.kwargs["name"], job.original) == ("/elsewhere", "head", None)


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ascent.stop.max_epoch=7", "did you mean ascent.stop.max_epochs"),
        ("modell.factory=x", "unknown setting 'modell.factory'"),
        ("model.factori=x", "unknown setting 'model.factori'.*did you mean factory"),
        ("forget_set.path=3", "forget_set.path in .* is 3; expected text"),
        ("original.checkpoint=x", "no original.factory"),
        ("recipe=papper", "did you mean paper"),
        ("recipe=null", "recipe in .* is None; expected text"),
        ("run_dir=5", "run_dir in .* is 5; expected text"),
        ("evaluation=/x", "evaluation in .* expected a path per name"),
        ("evaluation.test.path=/x", "evaluation.test.path in .* expected a path per name"),
        ("original=/x", "original in .* expected original: {factory"),
    ],
)
def test_a_bad_job_file_is_refused_by_name(job_file, assignment, message):
    with pytest.raises(ConfigError, match=message):
        JobConfig.load(job_file, [assignment])


@pytest.fixture
def submitted(monkeypatch):
    """As under ``ray job submit``."""

    def submit(**runtime_env):
        config = {"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": runtime_env}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))

    submit()
    return submit


@pytest.mark.parametrize("run_dir", ["run_dir=runs/here", "run_dir="])
def test_a_submitted_job_needs_an_absolute_output_path(job_file, submitted, run_dir):
    with pytest.raises(ConfigError, match="working directory is temporary.*expected an absolute path"):
        JobConfig.load(job_file, [run_dir] if run_dir != "run_dir=" else _without_run_dir(job_file))


def _without_run_dir(job_file):
    values = yaml.safe_load(job_file.read_text())
    del values["run_dir"]
    job_file.write_text(yaml.safe_dump(values))
    return []


@pytest.mark.parametrize("run_dir", ["/shared/runs/1", "s3://bucket/runs/1"])
def test_a_submitted_job_takes_an_absolute_path_or_a_uri(job_file, submitted, run_dir):
    assert str(JobConfig.load(job_file, [f"run_dir={run_dir}"]).run_dir) == run_dir


def test_a_credential_in_the_runtime_environment_is_pointed_out(submitted, caplog):
    submitted(env_vars={"AWS_SECRET_ACCESS_KEY": "hidden", "OMP_NUM_THREADS": "1"})
    _warn_of_credentials()
    assert "AWS_SECRET_ACCESS_KEY" in caplog.text
    assert "hidden" not in caplog.text
    assert "OMP_NUM_THREADS" not in caplog.text


def run(job, job_file, python_environment, *assignments, more=()):
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    return subprocess.run(
        [sys.executable, ROOT / "jobs" / f"{job}.py", "--config", job_file, *sets, *more],
        env=python_environment, capture_output=True, text=True, timeout=200, cwd=job_file.parent,
    )  # fmt: skip


@pytest.mark.slow
def test_the_jobs_run_one_after_the_other_and_end_in_a_json_line(job_file, python_environment):
    done = run("unlearn", job_file, python_environment)
    assert done.returncode == 0, done.stderr
    last = json.loads(done.stdout.splitlines()[-1])
    unlearned = Path(last["run_dir"])
    assert unlearned == job_file.parent / "run"
    assert last["metrics"]["after"]["forget"]["samples"] == 40

    scored = run("score", job_file, python_environment, "run_dir=scores")
    assert json.loads(scored.stdout.splitlines()[-1])["metrics"]["samples"] == 40, scored.stderr
    assert (job_file.parent / "scores" / "intensities.parquet").exists()

    original = [f"original.{key}={value}" for key, value in yaml.safe_load(job_file.read_text())["model"].items() if key != "kwargs"]
    audited = run(
        "audit", job_file, python_environment, "run_dir=audit", f"model.checkpoint={unlearned}/model.safetensors",
        *original, "original.kwargs.name=fc",
    )  # fmt: skip
    assert json.loads(audited.stdout.splitlines()[-1])["metrics"] == last["metrics"], audited.stderr


@pytest.mark.slow
def test_a_plan_runs_nothing(job_file, python_environment):
    done = run("unlearn", job_file, python_environment, more=["--plan"])
    assert done.returncode == 0, done.stderr
    planned = json.loads(done.stdout.splitlines()[-1])["plan"]
    assert planned["sets"]["forget"]["samples"] == 40
    assert "forget: 40 samples, 1 shards" in done.stderr
    assert not (job_file.parent / "run").exists()


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "status", "message"),
    [
        ("ascent.stop.max_epochs=0", 2, "ConfigError: ascent.stop.max_epochs is 0"),
        ("forget_set.path=/nowhere", 2, "ForgetSetError: the forget set /nowhere does not exist"),
        ("resources.workers=999", 2, "ConfigError: resources.workers is 999"),
        ("model.kwargs.fault=true", 2, "refused kwargs"),
    ],
)
def test_bad_input_exits_with_2_and_a_message(job_file, python_environment, assignment, status, message):
    done = run("unlearn", job_file, python_environment, assignment)
    assert done.returncode == status
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert not (job_file.parent / "run").exists()


@pytest.mark.slow
def test_a_failed_run_exits_with_1(job_file, python_environment):
    done = run("unlearn", job_file, python_environment, "model.factory=faults:failing_model", "model.kwargs.name=fc")
    assert done.returncode == 1, done.stderr
    assert "StageFailedError: features of forget failed: RuntimeError: out of luck" in done.stderr
