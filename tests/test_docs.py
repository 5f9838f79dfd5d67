"""README, docs/ and examples/: what a reader pastes runs, and what a page links to is there."""

import json
import re
import runpy
import shlex
import sqlite3
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from updates.problems import head, store

import imu_ray
from imu_ray.audits import AUDITS
from imu_ray.audits.base import Predictions
from imu_ray.cli import main
from imu_ray.config import AscentConfig, ForgetSetConfig
from imu_ray.demo import digits_cnn
from imu_ray.scopes.workers import Workers
from imu_ray.tasks import TASKS
from imu_ray.updates import UPDATES
from imu_ray.updates.base import UpdateProblem
from imu_ray.updates.objectives import OBJECTIVES
from imu_ray.updates.stopping import StopTarget

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text()
PLACES = ("README.md", "CONTRIBUTING.md", "cluster/README.md")
PAGES = [*(ROOT / place for place in PLACES), *sorted((ROOT / "docs").glob("*.md"))]
REGISTRIES = (AUDITS, OBJECTIVES, TASKS)
COMMAND = [sys.executable, "-c", "import sys; from imu_ray.cli import main; sys.exit(main())"]


def blocks(text, language):
    return re.findall(rf"^```{language}\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


def headings(page):
    """The anchors of a page, as GitHub and the documentation make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    titles = re.findall(r"^#+ (.+)", text, re.MULTILINE)
    return {re.sub(r"[^\w -]", "", title).strip().lower().replace(" ", "-") for title in titles}


def test_the_readme_is_short():
    assert len(README.splitlines()) <= 150


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_a_file_and_a_heading_that_are_there(page):
    for link in re.findall(r"\]\((?!https?:)([^)\s]+)\)", page.read_text()):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        assert target.exists(), link
        assert not anchor or anchor in headings(target), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_every_job_file_of_a_page_is_accepted(page, tmp_path):
    for number, text in enumerate(block for block in blocks(page.read_text(), "yaml") if "factory:" in block):
        path = tmp_path / f"{number}.yaml"
        path.write_text(text)
        imu_ray.JobConfig.load(path)


def run(command, folder, environment):
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


@pytest.fixture(scope="module")
def demo(tmp_path_factory, python_environment):
    """A folder in which `imu-ray demo` ran, and what it printed."""
    folder = tmp_path_factory.mktemp("demo")
    return folder, run([*COMMAND, "demo", "--out", "demo"], folder, python_environment)


@pytest.mark.slow
def test_the_demo_forgets_a_class_and_shows_where_it_is_weak(demo):
    folder, printed = demo
    runs = json.loads(printed.splitlines()[-1])
    assert (runs["status"], runs["run_dir"]) == ("complete", str(folder / "demo"))
    forgotten = runs["class"]["metrics"]
    assert forgotten["after"]["forget"]["accuracy"] <= 0.02
    assert forgotten["after"]["retain"]["accuracy"] >= forgotten["before"]["retain"]["accuracy"] - 0.02
    assert forgotten["after"]["test"]["per_class"]["3"]["accuracy"] <= 0.1
    random = runs["random"]["metrics"]
    assert random["after"]["forget"]["bounded_loss"] >= random["before"]["test"]["bounded_loss"] * 0.8
    assert random["after"]["retain"]["accuracy"] >= random["before"]["retain"]["accuracy"] - 0.01
    for name in ("class", "random"):
        assert json.loads((Path(runs[name]["run_dir"]) / "manifest.json").read_text())["ascent"]["status"] == "reached"
    for column in ("before", "after", "retrained", "membership inference", "forgotten class in test"):
        assert column in printed
    assert "Where this is weak" in printed
    original = load_file(folder / "demo" / "original.safetensors")
    changed = load_file(folder / "demo" / "class" / "run" / "model.safetensors")
    assert {key for key in original if not torch.equal(original[key], changed[key])} == {"head.weight", "head.bias"}
    assert digits_cnn().load_state_dict(changed)
    assert f"{folder}/demo/{{class,random}}/data/{{forget,retain,test}}.parquet" in printed
    assert len(list(folder.glob("demo/*/data/*.parquet"))) == 6


@pytest.fixture
def commanded(demo, ray_cluster, restored_log, monkeypatch, capsys):
    """Runs a command line where the demo ran, on the tests' Ray; gives its last line."""
    monkeypatch.chdir(demo[0])

    def run_command(line):
        monkeypatch.setattr(sys, "argv", shlex.split(line))
        assert main() == 0, line
        return json.loads(capsys.readouterr().out.splitlines()[-1])

    return run_command


@pytest.mark.slow
def test_script_and_job_of_the_readme_run_as_pasted_after_the_demo(commanded, capsys):
    (script,), (job,) = blocks(README, "python"), blocks(README, "yaml")
    Path("driver.py").write_text(script)
    Path("job.yaml").write_text(job)
    runpy.run_path("driver.py", run_name="__main__")
    printed = capsys.readouterr().out
    assert re.search(r"^(reached|already_met) - ", printed, re.MULTILINE)
    (report,) = re.findall(r"^report: (.+)", printed, re.MULTILINE)
    assert Path(report).exists()
    (command,) = re.findall(r"^    (imu-ray unlearn .+)", README, re.MULTILINE)
    ending = commanded(command)
    assert ending["status"] == "reached"
    assert Path(ending["report"]).exists()


@pytest.mark.slow
def test_the_queue_that_is_shown_answers_its_request_after_the_demo(commanded):
    page = (ROOT / "docs" / "requests.md").read_text()
    for name, language in (("request.json", "json"), ("queue.yaml", "yaml")):
        Path(name).write_text(*blocks(page, language))
    (commands,) = blocks(page, "sh")
    added, shown, done, status, verified = (commanded(command) for command in commands.splitlines())
    assert (added["ids"], added["not_used"]) == (2, {"email": 1})
    assert (shown["totals"]["to_forget"], shown["batches"]) == (2, [])
    assert done["reason"] == "1 completed"
    assert status["counts"] == {"completed": 1}
    assert verified["status"] == "complete"


@pytest.mark.slow
@pytest.mark.usefixtures("ray_cluster")
@pytest.mark.parametrize("script", sorted((ROOT / "examples").glob("*.py")), ids=lambda script: script.stem)
def test_an_example_runs_and_reaches_its_target(script, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    runpy.run_path(str(script), run_name="__main__")
    printed = capsys.readouterr().out
    assert "reached" in printed
    assert "not_reached" not in printed
    assert (tmp_path / printed.splitlines()[-1]).exists(), "the last line is the page to look at"


def test_every_example_stands_in_the_documentation():
    page = (ROOT / "docs" / "examples.md").read_text()
    taken = re.findall(r'^--8<-- "(examples/.+)"$', page, re.MULTILINE)
    assert sorted(taken) == sorted(f"examples/{script.name}" for script in (ROOT / "examples").glob("*.py"))


@pytest.fixture
def extending():
    """What the code of docs/extending.md defines; what it registers is taken back."""
    before = [dict(registry) for registry in REGISTRIES]
    defined = {"__name__": "extending"}
    exec("\n".join(blocks((ROOT / "docs" / "extending.md").read_text(), "python")), defined)
    yield defined
    for registry, entries in zip(REGISTRIES, before, strict=True):
        registry.clear()
        registry.update(entries)


def test_the_source_that_is_shown_reads_any_range_of_its_rows(extending, tmp_path):
    with sqlite3.connect(tmp_path / "forget.db") as database:
        database.execute("CREATE TABLE samples (id TEXT, image BLOB, label INTEGER)")
        rows = [(f"row-{i}", bytes([i]), i % 3) for i in range(9)]
        database.executemany("INSERT INTO samples VALUES (?, ?, ?)", rows)
    source = extending["SqliteSource"](str(tmp_path / "forget.db"))
    rows = source.read(3, 6)
    assert source.num_rows == 9
    assert (rows.ids, rows.labels.tolist()) == (["row-3", "row-4", "row-5"], [0, 1, 2])
    assert rows.inputs == [b"\x03", b"\x04", b"\x05"]


def test_the_task_that_is_shown_has_its_metric_as_a_target(extending):
    task = extending["TopTwo"](ForgetSetConfig(), "fc", 4)
    outputs = torch.tensor([[3.0, 2.0, 1.0, 0.0], [3.0, 2.0, 1.0, 0.0]])
    assert task.sample_metrics(outputs, torch.tensor([1, 2]))["top2"].tolist() == [1.0, 0.0]
    assert "top2" in task.metrics


def test_the_scope_that_is_shown_moves_the_biases_alone(extending):
    scope = extending["BiasScope"](head(), {"forget": store()}, Workers())
    start = scope.parameters()["fc"]
    target = StopTarget("forget.loss", scope.measure({"fc": start})["forget.loss"] + 0.1, "test", rising=True)
    problem = UpdateProblem(np.ones(scope.rows), AscentConfig(preconditioner="none"), 0, [target])
    outcome = UPDATES["one_step"](scope, problem)
    moved = outcome.parameters["fc"] - start
    assert outcome.status == "reached"
    assert not moved[:, :-1].any()
    assert moved[:, -1].any()


def test_the_audit_that_is_shown_counts_rows_beyond_unseen_ones(extending):
    sets = {"forget": np.array([0.0, 9.0, 9.0, 9.0]), "test": np.linspace(0, 1, 100)}
    measured = {name: Predictions(np.zeros(len(losses), int), {"loss": losses}, 3) for name, losses in sets.items()}
    assert extending["OverForgotten"]().run(measured, None, 0) == {"over_forgotten": {"share": 0.75}}


def test_the_objective_that_is_shown_pulls_outputs_together(extending):
    outputs = torch.tensor([[1.0, 2.0, 6.0]])
    step = extending["flatten"](outputs, torch.tensor([2]), outputs)
    assert torch.equal(outputs - step, torch.full((1, 3), 3.0))
