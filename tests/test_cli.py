"""The job file, the command `imu-ray` and the scripts in jobs/."""

import contextlib
import inspect
import json
import os
import runpy
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import yaml
from architectures import named
from jsonschema import Draft202012Validator
from safetensors.torch import save_file
from samples import paper, write_images

import imu_ray
import imu_ray.demo
from imu_ray import ConfigError, JobConfig, StageFailedError, UnlearnConfig
from imu_ray.cli import _warn_of_credentials, main
from imu_ray.distributed import session
from imu_ray.section import settings_of

ROOT = Path(__file__).resolve().parents[1]

pytestmark = pytest.mark.usefixtures("restored_log")


@pytest.fixture
def job_file(tmp_path):
    model = named("fc")
    save_file(model.state_dict(), tmp_path / "model.safetensors")
    write_images(tmp_path / "forget.parquet", 40)
    write_images(tmp_path / "test.parquet", 50, seed=3)
    checkpoint, forget, test = (
        str(tmp_path / name) for name in ("model.safetensors", "forget.parquet", "test.parquet")
    )
    values = {
        "model": {"factory": "architectures:named", "kwargs": {"name": "fc"}, "checkpoint": checkpoint},
        "forget_set": {"path": forget, "image_mode": "L"},
        "evaluation": {"test": test},
        "run_dir": str(tmp_path / "run"),
        "recipe": "paper",
        "ascent": {"stop": {"targets": {"forget.accuracy": None}, "max_epochs": 2}},
    }
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(values))
    return tmp_path / "job.yaml"


def test_a_job_file_is_read_with_its_assignments_last(job_file):
    sets = ["ascent.stop.max_epochs=7", "run_dir=/elsewhere", "evaluation.more=/data/more"]
    sets += ["model.kwargs.name=head", "model.kwargs.deep.er=1"]
    job = JobConfig.load(job_file, sets)
    assert job.config == paper(
        {"ascent.stop": {"targets": {"forget.accuracy": None}, "max_epochs": 7}, "forget_set.image_mode": "L"}
    )
    assert job.evaluation == {"test": str(job_file.with_name("test.parquet")), "more": "/data/more"}
    assert (job.run_dir, job.original) == ("/elsewhere", None)
    assert job.model.spec().kwargs == {"name": "head", "deep": {"er": 1}}


def test_the_recipe_comes_before_the_other_settings_of_a_job(job_file):
    config = JobConfig.load(job_file, ["ascent.l1=0.5", "recipe=classes"]).config
    ascent = {"l1": 0.5, "stop": {"targets": {"forget.accuracy": None}, "max_epochs": 2}}
    expected = UnlearnConfig.from_recipe("classes").with_overrides({"ascent": ascent, "forget_set.image_mode": "L"})
    assert config == expected


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ascent.stop.max_epoch=7", "did you mean ascent.stop.max_epochs"),
        ("modell.factory=x", "unknown setting 'modell.factory'.*did you mean model.factory"),
        ("model.factori=x", "unknown setting 'model.factori'.*did you mean model.factory"),
        ("forget_set.path=3", "forget_set.path is 3; expected text"),
        ("forget_set=/x", "forget_set is '/x'; expected a mapping of settings such as forget_set.path"),
        (
            "original.checkpoint=x",
            "original.factory is missing; expected text: `package.module:callable`.* language model",
        ),
        ("recipe=papper", "did you mean paper"),
        ("recipe=null", "recipe is None; expected one of"),
        ("run_dir=5", "run_dir is 5; expected text"),
        ("evaluation=/x", "evaluation is '/x'; expected a path per name"),
        ("evaluation.other.image_column=/x", "evaluation is .* expected a path per name"),
        ("original=/x", "original is '/x'; expected a mapping of settings such as original.factory"),
        ("sweep.sample=2", "did you mean sweep.samples"),
        ("sweep.samples=0", "sweep.samples is 0; expected a whole number >= 1"),
    ],
)
def test_a_bad_job_file_is_refused_by_name(job_file, assignment, message):
    with pytest.raises(ConfigError, match=message):
        JobConfig.load(job_file, [assignment])


def test_a_job_file_without_samples_is_refused(job_file):
    job_file.write_text("model: {factory: resnet18}")
    with pytest.raises(ConfigError, match="forget_set.path is missing; expected text: path or URI of the samples"):
        JobConfig.load(job_file)


def test_the_schema_tells_good_job_files_from_bad_ones(job_file, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["imu-ray"])
    assert main("schema") == 0
    schema = json.loads(capsys.readouterr().out)
    Draft202012Validator.check_schema(schema)
    good = yaml.safe_load(job_file.read_text()) | {
        "axes": {"forget_set.size": [1.0], "ascent.learning_rate": {"loguniform": [1e-4, 0.1]}, "ascent": {"l1": [0]}},
        "sweep": {"samples": 2},
        "ascent.stop.max_epochs": 3,
    }
    assert list(Draft202012Validator(schema).iter_errors(good)) == []
    for change in (
        {"modell": {}}, {"model": {}}, {"forget_set": {"size": 1}}, {"ascent": {"l1": -1}}, {"ascent": {"l2": 1}},
        {"recipe": "papper"}, {"axes": {"log": ["json"]}}, {"axes": {"ascent.l1": {"normal": [0, 1]}}},
        {"sweep": {"samples": 0}},
        {"evaluation": "/data"},
    ):  # fmt: skip
        assert not Draft202012Validator(schema).is_valid(good | change), change
    assert all(item["description"] for item in settings_of(JobConfig).values())


@pytest.fixture
def submitted(monkeypatch):
    """As under ``ray job submit``."""

    def submit(**runtime_env):
        config = {"metadata": {"job_submission_id": "raysubmit_1"}, "runtime_env": runtime_env}
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", json.dumps(config))

    submit()
    return submit


def test_a_submitted_job_needs_an_absolute_path_or_a_uri_for_its_output(job_file, submitted):
    for run_dir in ("/shared/runs/1", "s3://bucket/runs/1"):
        assert JobConfig.load(job_file, [f"run_dir={run_dir}"]).run_dir == run_dir
    for text in ("runs/here", None):
        values = {**yaml.safe_load(job_file.read_text()), "run_dir": text}
        job_file.write_text(yaml.safe_dump({key: value for key, value in values.items() if value}))
        with pytest.raises(ConfigError, match="working directory is temporary.*expected an absolute path"):
            JobConfig.load(job_file)


def test_a_credential_in_the_runtime_environment_is_pointed_out(submitted, caplog):
    submitted(env_vars={"AWS_SECRET_ACCESS_KEY": "hidden", "OMP_NUM_THREADS": "1"})
    _warn_of_credentials()
    assert "AWS_SECRET_ACCESS_KEY" in caplog.text
    assert "hidden" not in caplog.text
    assert "OMP_NUM_THREADS" not in caplog.text


@pytest.fixture
def command(job_file, monkeypatch, capfd):
    """Runs a command with a stage that does nothing else than ``stand_in``; its exit status, last line and log."""

    def run_command(name, stand_in, *more):
        monkeypatch.setitem(vars(imu_ray), name, stand_in)
        monkeypatch.setattr(sys, "argv", ["imu-ray", "--config", str(job_file), *more])
        code = main(name)
        out, log = capfd.readouterr()
        return code, json.loads(out.splitlines()[-1]), log

    return run_command


def ended(status, **metrics):
    return SimpleNamespace(manifest={"ascent": {"status": status, "reason": f"it is {status}"}}, metrics=metrics)


@pytest.mark.parametrize(
    ("status", "code"),
    [("reached", 0), ("already_met", 0), ("epochs_done", 0), ("not_reached", 3), ("stopped_by_guard", 3)],
)
def test_the_exit_status_and_the_last_lines_say_how_a_run_ended(command, job_file, status, code):
    run_dir = str(job_file.with_name("run"))
    exited, last, log = command("unlearn", lambda **_: ended(status, after=1))
    said = {"status": status, "reason": f"it is {status}", "run_dir": run_dir, "report": f"{run_dir}/report.html"}
    assert exited == code
    assert last == {**said, "metrics": {"after": 1}}
    assert "job ended: " + " ".join(f"{key}={value}" for key, value in said.items()) in log.splitlines()[-1]


def terminate(**_):
    os.kill(os.getpid(), signal.SIGTERM)
    signal.pause()


def raising(error):
    def stand_in(**_):
        raise error

    return stand_in


@pytest.mark.parametrize(
    ("stand_in", "code", "status", "reason"),
    [
        (raising(ConfigError("no")), 2, "refused", "ConfigError: no"),
        (raising(StageFailedError("no")), 1, "failed", "StageFailedError: no"),
        (raising(ZeroDivisionError("no")), 1, "failed", "ZeroDivisionError: no"),
        (raising(KeyboardInterrupt), 130, "interrupted", "by SIGINT"),
        (terminate, 143, "terminated", "by SIGTERM"),
    ],
)
def test_a_command_that_does_not_end_well_says_so(command, job_file, stand_in, code, status, reason):
    handler = signal.getsignal(signal.SIGTERM)
    exited, last, log = command("unlearn", stand_in)
    assert exited == code
    run_dir = str(job_file.with_name("run"))
    assert last == {"status": status, "reason": reason, "run_dir": run_dir, "report": None, "metrics": None}
    assert f"ERROR job ended: status={status} reason={reason}" in log.splitlines()[-1]
    assert ("Traceback" in log) == ("ZeroDivision" in reason)
    assert signal.getsignal(signal.SIGTERM) == handler


def test_a_refused_job_file_exits_with_2_and_no_run_directory(command):
    code, last, _ = command("unlearn", None, "--set", "ascent.stop.max_epochs=0")
    assert (code, last["status"], last["run_dir"]) == (2, "refused", None)
    assert last["reason"] == "ConfigError: ascent.stop.max_epochs is 0; expected a whole number >= 1"


@pytest.mark.parametrize(
    ("statuses", "code", "status"), [(["reached", "not_reached"], 0, "complete"), (["reached", "failed"], 1, "failed")]
)
def test_a_sweep_ends_well_when_all_its_trials_ended(command, job_file, statuses, code, status):
    given = {}
    result = SimpleNamespace(table=pa.table({"status": statuses}), best={"0.1": "a"})
    axis = ["--set", "axes.ascent.l1=[0, 1]", "--set", "sweep.samples=2"]
    exited, last, _ = command("sweep", lambda **arguments: given.update(arguments) or result, *axis, "--resume")
    assert (exited, last["status"], last["report"]) == (code, status, str(job_file.with_name("run") / "sweep.html"))
    assert last["metrics"] == {"trials": len(statuses), "best": {"0.1": "a"}, "failed": statuses.count("failed")}
    assert (given["axes"], given["settings"].samples, given["resume"]) == ({"ascent.l1": [0, 1]}, 2, True)


@pytest.mark.parametrize("command_line", [("unlearn",), ("score",), ("audit",), ("plan",), ("ascend", "--intensities")])
def test_a_command_hands_on_what_the_job_file_says(command, job_file, command_line):
    given = {}
    scores = pa.table({"intensity": [0.0, 1.0]})
    part = {"samples": 40, "shards": 1, "feature_bytes": 1}
    plan = {"sets": {"forget": part}, "peak_bytes": {}, "seconds": {"without_ascent": 1.0}, "workers": 1, "notes": []}
    results = {"unlearn": ended("reached"), "ascend": ended("reached"), "score": scores, "audit": {}, "plan": plan}
    name, *more = command_line
    if more:
        pq.write_table(scores, job_file.with_name("scores.parquet"))
        more.append(str(job_file.with_name("scores.parquet")))
    taken = inspect.signature(getattr(imu_ray, name))
    stand_in = lambda **arguments: given.update(taken.bind(**arguments).arguments) or results[name]
    code, last, log = command(name, stand_in, *more)
    assert ("forget: 40 samples, 1 shards" in log) == (name == "plan")
    job = JobConfig.load(job_file)
    assert code == 0
    assert (given["model"], given["forget_set"], given["config"]) == (job.model.spec(), job.forget_set.path, job.config)
    assert given.get("evaluation") == (None if name == "score" else job.evaluation)
    assert (given.get("run_dir"), last["run_dir"]) == ((None, None) if name == "plan" else (job.run_dir, job.run_dir))
    assert (last["report"] is not None) == (name in ("unlearn", "ascend", "audit"))
    assert given.get("intensities") == (scores if more else None)
    assert given.get("memory") == ((40, 80) if name == "plan" else None)


@pytest.mark.parametrize("name", ["nowhere.parquet", "job.yaml"])
def test_intensities_that_cannot_be_read_are_refused(command, job_file, name):
    code, last, _ = command("ascend", None, "--intensities", str(job_file.with_name(name)))
    assert (code, last["status"]) == (2, "refused")
    assert last["reason"].startswith("CheckpointError: ")


def test_a_model_may_be_defined_where_the_job_starts(command, job_file, monkeypatch):
    monkeypatch.chdir(job_file.parent)
    monkeypatch.setattr(sys, "path", list(sys.path))
    job_file.with_name("defined_here.py").write_text("import torch\n\ndef model():\n    return torch.nn.Linear(2, 2)\n")
    job_file.write_text("{model: {factory: 'defined_here:model'}, forget_set: {path: /data}}")
    assert command("unlearn", lambda model, **_: ended("reached", built=str(model.build())))[0] == 0


@pytest.mark.parametrize("environment", [{}, {"RAY_ADDRESS": "10.0.0.1:6379"}, "submitted"])
def test_the_demo_runs_on_the_cluster_that_there_is(request, monkeypatch, capfd, tmp_path, environment):
    options = {}
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    if environment == "submitted":
        request.getfixturevalue("submitted")
    elif environment:
        monkeypatch.setenv("RAY_ADDRESS", environment["RAY_ADDRESS"])
    monkeypatch.setattr(session.ray, "init", lambda **given: options.update(given) or contextlib.nullcontext())
    monkeypatch.setattr(session.ray, "shutdown", lambda: None)
    monkeypatch.setattr(imu_ray.demo, "run_demo", lambda out: {"class": {"run_dir": str(out), "metrics": {}}})
    monkeypatch.setattr(sys, "argv", ["imu-ray", "--out", str(tmp_path)])
    assert main("demo") == 0
    assert (options.get("address"), options.get("num_cpus")) == ((None, None) if environment else ("local", 2))
    assert json.loads(capfd.readouterr().out.splitlines()[-1])["run_dir"] == str(tmp_path)


@pytest.mark.parametrize("script", sorted((ROOT / "jobs").glob("*.py")), ids=lambda path: path.stem)
def test_a_script_in_jobs_is_the_command_of_its_name(script, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", [str(script), "--help"])
    with pytest.raises(SystemExit, match="^0$"):
        runpy.run_path(str(script))
    assert capsys.readouterr().out.startswith(f"usage: imu-ray {script.stem} ")


def job_command(name, job_file, assignments):
    sets = [part for assignment in assignments for part in ("--set", assignment)]
    return [sys.executable, ROOT / "jobs" / f"{name}.py", "--config", job_file, *sets]


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
def test_the_jobs_run_one_after_the_other_and_end_in_a_json_line(job_file, monkeypatch, capsys):
    monkeypatch.chdir(job_file.parent)

    def run(name, *assignments):
        _, script, *arguments = map(str, job_command(name, job_file, assignments))
        monkeypatch.setattr(sys, "argv", [script, *arguments])
        with pytest.raises(SystemExit, match="^0$"):
            runpy.run_path(script, run_name="__main__")
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    last = run("unlearn")
    unlearned = Path(last["run_dir"])
    assert unlearned == job_file.parent / "run"
    assert last["metrics"]["after"]["forget"]["samples"] == 40
    assert (last["status"], last["report"]) == ("epochs_done", f"{unlearned}/report.html")

    scored = run("score", "run_dir=scores")
    assert scored["metrics"]["samples"] == 40
    assert (job_file.parent / "scores" / "intensities.parquet").exists()

    model = yaml.safe_load(job_file.read_text())["model"]
    original = [f"original.{key}={model[key]}" for key in ("factory", "checkpoint")] + ["original.kwargs.name=fc"]
    settings = ["run_dir=audit", f"model.checkpoint={unlearned}/model.safetensors", *original]
    assert run("audit", *settings)["metrics"] == last["metrics"]


def stopped(name, job_file, environment, number, when, *assignments):
    """Exit status, last line and log of a job that gets a signal once its log has ``when``."""
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    job = subprocess.Popen(job_command(name, job_file, assignments), env=environment, **pipes)
    next(line for line in job.stderr if when in line)
    job.send_signal(number)
    out, log = job.communicate(timeout=90)
    return job.returncode, json.loads(out.splitlines()[-1]), log


@pytest.mark.slow
@pytest.mark.parametrize(
    ("number", "code", "status"),
    [pytest.param(signal.SIGINT, 130, "interrupted", marks=pytest.mark.long), (signal.SIGTERM, 143, "terminated")],
)
def test_a_run_that_is_told_to_stop_records_it(job_file, python_environment, number, code, status):
    endless = "ascent.stop.max_epochs=100000000"
    exited, last, log = stopped("unlearn", job_file, python_environment, number, "preconditioner done", endless)
    assert (exited, last["status"]) == (code, status)
    assert f"job ended: status={status}" in log.splitlines()[-1]
    assert json.loads((job_file.parent / "run" / "manifest.json").read_text())["status"] == "interrupted"
    assert "Traceback" not in log
    assert "*** SIG" not in log, "a handler of Ray's that aborts three seconds later"


@pytest.mark.slow
@pytest.mark.long
def test_an_interrupted_sweep_says_what_was_not_run_and_keeps_what_was_finished(job_file, python_environment):
    axis = "axes.ascent.stop.max_epochs=[1, 100000000]"
    exited, last, log = stopped("sweep", job_file, python_environment, signal.SIGINT, "trial ended", axis)
    assert (exited, last["status"]) == (130, "interrupted"), log
    assert "sweep interrupted: trials_left=1" in log
    assert "Tuner.restore" not in log, "advice of Tune's that is not ours"
    assert len(list(job_file.parent.glob("run/rows/*.json"))) == 1
    assert not (job_file.parent / "run" / "results.parquet").exists()
