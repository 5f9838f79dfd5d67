"""Jobs on a head node of their own, started and submitted as docs/running.md says, with token authentication."""

import json
import os
import re
import shlex
import signal
import socket
import subprocess
import sys
import urllib.request
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import load_file

from imu_ray.demo import FORGOTTEN_CLASS, digits, train_and_save, write_digits

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[1]


def documented(section):
    """The commands of the first block below a heading of the page."""
    text = (ROOT / "docs" / "running.md").read_text()
    below = text[text.index(f"\n## {section}") :]
    block = re.search(r"```sh\n(.*?)```", below, re.DOTALL).group(1)
    return [line.partition("#")[0].strip() for line in block.replace("\\\n", " ").splitlines()]


GENERATE, START, SUBMIT = documented("b. A private head node")[-3:]


def free_ports(count):
    sockets = [socket.socket() for _ in range(count)]
    for each in sockets:
        each.bind(("127.0.0.1", 0))
    ports = [each.getsockname()[1] for each in sockets]
    for each in sockets:
        each.close()
    return ports


@dataclass
class Head:
    """A head node: its address, and the environment of a user who has its token."""

    address: str
    environment: dict
    metrics: str = ""

    def command(self, text):
        return self.run(shlex.split(text.replace("http://127.0.0.1:8265", self.address)))

    def run(self, arguments):
        return subprocess.run(arguments, env=self.environment, cwd=ROOT, capture_output=True, text=True, timeout=250)

    def start(self, job_id, config, *assignments):
        """Submit a job and go on."""
        arguments = self.submission(job_id, config, *assignments)
        return subprocess.Popen(arguments, env=self.environment, cwd=ROOT, stdout=subprocess.DEVNULL)

    def submission(self, job_id, config, *assignments):
        """The documented command with another job file."""
        ray_part, job_part = SUBMIT.split(" -- ")
        ray_part = f"{ray_part.replace('http://127.0.0.1:8265', self.address)} --submission-id {job_id}"
        sets = [part for assignment in assignments for part in ("--set", assignment)]
        return [*shlex.split(ray_part), "--", *shlex.split(job_part.replace("job.yaml", str(config))), *sets]

    def submit(self, job_id, config, *assignments):
        return self.run(self.submission(job_id, config, *assignments))

    def logs(self, job_id):
        return self.command(f"ray job logs --address {self.address} {job_id}").stdout

    def status(self, job_id):
        return self.command(f"ray job status --address {self.address} {job_id}").stdout


@pytest.fixture(scope="module")
def head(tmp_path_factory):
    """Started as documented, on free ports, with a home directory of its own for the token."""
    home, gcs, dashboard, agent, client, metrics = tmp_path_factory.mktemp("home"), *free_ports(5)
    kept = os.environ.keys() - {"PYTHONPATH", "RAY_AUTH_TOKEN", "RAY_ADDRESS", "RAY_TMPDIR"}
    environment = {name: os.environ[name] for name in kept}
    environment |= {
        "HOME": str(home), "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}", "RAY_AUTH_MODE": "token",
        "RAY_TMPDIR": f"/tmp/imu-{os.getpid()}",
    }  # fmt: skip
    node = Head(f"http://127.0.0.1:{dashboard}", environment, f"http://127.0.0.1:{metrics}/metrics")
    generated = node.command(GENERATE)
    assert generated.returncode == 0, generated.stderr
    ports = f"--port={gcs} --dashboard-port={dashboard} --dashboard-agent-listen-port={agent}"
    ports += f" --ray-client-server-port={client} --metrics-export-port={metrics}"
    log = (home / "head.log").open("w")
    process = subprocess.Popen(
        shlex.split(f"{START} {ports} --block --num-cpus=2 --temp-dir={environment['RAY_TMPDIR']}"),
        env=environment, cwd=home, stdout=log, stderr=log,
    )  # fmt: skip
    try:
        for _ in range(60):
            if node.command(f"ray job list --address {node.address}").returncode == 0:
                break
        else:
            pytest.fail((home / "head.log").read_text())
        yield node
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(timeout=60)
        log.close()


@pytest.fixture(scope="module")
def job_file(tmp_path_factory):
    """A job that forgets a digit, and the files that it names."""
    folder = tmp_path_factory.mktemp("shared")
    _, labels, train, test = digits()
    train_and_save(folder / "model.safetensors", train)
    parts = {"forget": train[labels[train] == FORGOTTEN_CLASS], "test": test}
    paths = {name: str(write_digits(folder / f"{name}.parquet", rows)) for name, rows in parts.items()}
    values = {
        "model": {"factory": "imu_ray.demo:digits_cnn", "checkpoint": str(folder / "model.safetensors")},
        "forget_set": {"path": paths["forget"], "image_mode": "L"},
        "evaluation": {"test": paths["test"]},
        "run_dir": str(folder / "run"),
        "recipe": "classes",
        "ascent": {"batch_size": 32, "learning_rate": 0.05, "stop": {"max_epochs": 40}},
        "resources": {"workers": 1},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(values))
    return folder / "job.yaml"


@pytest.fixture(scope="module")
def unlearned(head, job_file):
    """The run directory of a submitted job."""
    done = head.submit("first", job_file)
    assert done.returncode == 0, done.stdout + done.stderr
    return job_file.parent / "run"


def test_a_submitted_job_leaves_its_artifacts(head, unlearned):
    left = {path.name for path in unlearned.iterdir()}
    assert left >= {"model.safetensors", "manifest.json", "metrics.json", "report.html"}
    metrics = json.loads((unlearned / "metrics.json").read_text())
    assert metrics["before"]["forget"]["accuracy"] > 0.9
    assert metrics["after"]["forget"]["accuracy"] <= 0.01
    last = json.loads([line for line in head.logs("first").splitlines() if line.startswith("{")][-1])
    assert last["run_dir"] == str(unlearned)


def test_the_package_travels_with_the_job(head):
    script = "python -c 'import imu_ray; print(imu_ray.__file__)'"
    done = head.command(f"ray job submit --address {head.address} --working-dir . -- {script}")
    assert "/working_dir_files/" in done.stdout, done.stdout + done.stderr


def test_without_the_token_nothing_is_taken(head, job_file, tmp_path):
    stranger = Head(head.address, {**head.environment, "HOME": str(tmp_path), "RAY_AUTH_TOKEN": "0" * 64})
    refused = stranger.submit("stranger", job_file)
    assert refused.returncode != 0
    assert "stranger" not in head.command(f"ray job list --address {head.address}").stdout


@pytest.mark.parametrize(
    ("assignment", "message"),
    [
        ("ascent.stop.max_epoch=3", "ConfigError: unknown setting 'ascent.stop.max_epoch'"),
        ("run_dir=runs/relative", "whose working directory is temporary"),
    ],
)
def test_a_failing_job_says_why_in_its_log(head, job_file, assignment, message):
    name = re.sub(r"\W", "-", assignment)
    assert head.submit(name, job_file, assignment).returncode != 0
    assert message in head.logs(name)
    assert "failed" in head.status(name)


LONG = (
    "recipe=paper", "ascent.learning_rate=1e-7", "ascent.stop.targets={forget.accuracy: null}", "ascent.batch_size=16",
    "log=json",
)  # fmt: skip


@pytest.mark.long
def test_a_stopped_job_goes_on_when_it_is_submitted_again(head, job_file):
    folder = job_file.parent / "stopped"
    settings = (*LONG, "ascent.stop.max_epochs=150", f"run_dir={folder}")
    with head.start("stopped", job_file, *settings) as first:
        while not (folder / "state" / "ascent.safetensors").exists():  # pytest-timeout ends what never begins
            assert "FAILED" not in head.status("stopped"), head.logs("stopped")
        assert head.command(f"ray job stop --address {head.address} stopped").returncode == 0
        first.wait(timeout=100)
    assert json.loads((folder / "manifest.json").read_text())["status"] == "interrupted"
    assert not [path for path in folder.rglob(".part-*") if path.is_file()]

    again = head.submit("again", job_file, *settings)
    assert again.returncode == 0, again.stdout + again.stderr
    events = [json.loads(line) for line in head.logs("again").splitlines() if line.startswith('{"time"')]
    (resumed,) = [event for event in events if event["event"] == "ascent resumed"]
    assert resumed["step"] > 0
    assert json.loads((folder / "manifest.json").read_text())["status"] == "complete"


@pytest.mark.long
def test_two_jobs_at_once_do_not_disturb_each_other(head, job_file, unlearned):
    runs = [job_file.parent / name for name in ("left", "right")]
    submitted = [head.start(run.name, job_file, f"run_dir={run}") for run in runs]
    assert [process.wait(timeout=250) for process in submitted] == [0, 0]
    alone = load_file(unlearned / "model.safetensors")
    for run in runs:
        together = load_file(run / "model.safetensors")
        assert all(torch.equal(together[key], value) for key, value in alone.items())


def figures(head):
    """Every figure that is exported now, with its labels."""
    with urllib.request.urlopen(head.metrics) as page:
        lines = page.read().decode().splitlines()
    return {line.rpartition(" ")[0] for line in lines if line.startswith("ray_imu_ray_")}


@pytest.mark.long
def test_figures_of_a_running_job_are_exported(head, job_file):
    settings = (*LONG, "ascent.stop.max_epochs=1500", f"run_dir={job_file.parent / 'measured'}")
    names = ("forget_accuracy", "forget_loss", "stage_seconds", "feature_bytes")
    wanted = {f"ray_imu_ray_{name}" for name in names}
    others = figures(head)  # of the jobs before it
    with head.start("measured", job_file, *settings) as job:
        seen = set()
        for _ in range(200):  # a slow machine takes long to begin the job
            seen |= {line.partition("{")[0] for line in figures(head) - others} & wanted
            if seen == wanted or job.poll() is not None:
                break
            head.status("measured")
        while job.poll() is None:  # a stop that comes before the job is known is refused
            head.command(f"ray job stop --address {head.address} measured")
    assert seen == wanted
