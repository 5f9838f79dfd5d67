"""The command `imu-ray request`."""

import json
import sys

import pytest
from erasure.paper import UUID, PaperWork, asking

from imu_ray.cli import main
from imu_ray.requests import work as library

pytestmark = pytest.mark.usefixtures("restored_log")


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """Runs ``imu-ray request ACTION`` on one queue; its exit status, last line, and all that it printed."""

    def run_command(action, *arguments):
        monkeypatch.setattr(sys, "argv", ["imu-ray", action, str(tmp_path / "queue"), *map(str, arguments)])
        code = main("request")
        out, log = capfd.readouterr()
        return code, json.loads(out.splitlines()[-1]), out + log

    return run_command


@pytest.fixture
def on_paper(tmp_path, monkeypatch):
    """Carries out what waits without the library; how that goes, and the arguments that name a job file."""
    given, job_file = {}, tmp_path / "job.yaml"
    job_file.write_text("{model: {factory: resnet18}, forget_set: {path: /data}}")

    class Work(PaperWork):
        def __init__(self, job):
            assert job.run_dir == str(tmp_path / "queue")
            super().__init__(tmp_path, ignore_missing=job.forget_set.missing_ids == "ignore", **given)

        def __enter__(self):
            return self

        def __exit__(self, *error):
            pass

    monkeypatch.setattr(library, "JobWork", Work)
    return given, ["--config", job_file]


def write_request(folder, number, *ids):
    path = folder / f"request-{number}.json"
    path.write_text(json.dumps(asking(number, *ids)))
    return path


def test_a_request_is_added_once_and_a_list_too(command, tmp_path):
    path = write_request(tmp_path, 1, "row-1", "row-1")
    code, last, _ = command("add", "--json", path)
    assert (code, last["status"], last["reason"], last["request"]) == (0, "complete", "added", f"{UUID}1")
    assert (last["ids"], last["doubles"], last["not_used"]) == (1, 1, {"email": 1})
    code, last, _ = command("add", "--json", path)
    assert (code, last["added"]) == (0, False)
    assert "already, with the same content; nothing was done" in last["reason"]
    code, last, _ = command("add", "--json", write_request(tmp_path, 1, "row-2"))
    assert (code, last["status"]) == (2, "refused")
    (tmp_path / "ids.txt").write_text("row-3\n\nrow-4\n")
    assert [command("add", "--ids", tmp_path / "ids.txt")[1]["added"] for _ in range(2)] == [True, False]
    code, last, _ = command("add", "--json", path, "--identity-type", "device")
    assert (code, last["reason"].startswith("RequestError: ")) == (2, True)


def test_a_run_tells_the_plan_first_and_status_where_everything_stands(command, on_paper, tmp_path):
    given, job = on_paper
    for number, ids in ((1, ["row-1", "row-2"]), (2, ["row-77"])):
        command("add", "--json", write_request(tmp_path, number, *ids))
    code, last, printed = command("run", *job, "--dry-run")
    assert (code, last["status"], last["batches"], last["totals"]["to_forget"]) == (0, "complete", [], 2)
    assert "failed at once: 1" in printed
    assert command("status")[1]["counts"] == {"pending": 2}
    code, last, printed = command("run", *job)
    assert (code, last["status"], last["reason"]) == (1, "failed", "1 completed, 1 failed")
    assert (last["run_dir"], last["report"]) == (
        str(tmp_path / "queue" / "runs" / "0001"),
        str(tmp_path / "queue" / "runs" / "0001" / "report.html"),
    )
    assert printed.index("to forget: 2") < printed.index("batch begun")
    code, last, shown = command("status")
    assert (code, last["counts"], last["current"]["run"]) == (0, {"completed": 1, "failed": 1}, "runs/0001")
    assert [each["state"] for each in last["requests"]] == ["completed", "failed"]
    assert last["requests"][1]["reason"] == "none of its ids is in the data"
    assert "row-" not in printed + shown, "ids stay in the queue's own files"
    given["status"] = "not_reached"
    command("add", "--json", write_request(tmp_path, 3, "row-3"))
    code, last, _ = command("run", *job)
    assert (code, last["status"], last["reason"]) == (3, "not_reached", "1 not_reached")
    given["status"] = "reached"
    assert command("run", *job, "--retry")[0] == 1, "the one without a row is taken up again too"
    assert command("status")[1]["counts"] == {"completed": 2, "failed": 1}
    assert command("verify")[:2][0] == 0


def test_ids_without_a_row_may_be_passed_over_and_a_request_cancelled(command, on_paper, tmp_path):
    _, job = on_paper
    for number, ids in ((1, ["row-1", "row-77"]), (2, ["row-2"])):
        command("add", "--json", write_request(tmp_path, number, *ids))
    assert command("cancel", f"{UUID}2", "--reason", "withdrawn")[0] == 0
    assert command("run", *job, "--set", "forget_set.missing_ids=ignore")[0] == 0
    last = command("status")[1]
    assert [each["state"] for each in last["requests"]] == ["completed", "cancelled"]
    assert (last["requests"][0]["rows"]["missing"], last["requests"][1]["reason"]) == (1, "withdrawn")
    for wrong in (("abandon",), ("cancel", f"{UUID}1"), ("run", *job, "--replay")):
        code, last, _ = command(*wrong)
        assert (code, last["reason"].partition(":")[0]) == (2, "RequestError")
    assert command("run", *job, "--replay", "--retry")[1]["reason"].startswith("ConfigError: --replay and --retry")


def test_what_was_changed_is_found_by_verify(command, on_paper, tmp_path):
    command("add", "--json", write_request(tmp_path, 1, "row-1"))
    command("run", *on_paper[1])
    metrics = tmp_path / "queue" / "runs" / "0001" / "metrics.json"
    metrics.write_text("{}")
    code, last, _ = command("verify")
    assert (code, last["status"], last["reason"]) == (1, "failed", "changed: metrics")


def test_a_folder_without_requests_is_no_queue(command, on_paper):
    for action in (("status",), ("verify",), ("run", *on_paper[1])):
        code, last, _ = command(*action)
        assert (code, "holds no request; expected a queue" in last["reason"]) == (2, True)
