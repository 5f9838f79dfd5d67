"""A queue is carried out batch by batch, and every request is told what became of it; without Ray."""

import json
import re
from pathlib import Path

import pytest
import torch
from erasure.paper import ROWS, UUID, PaperWork, add, everything, new_queue, states, weights

from imu_ray import CheckpointError, ConfigError, ForgetSetError, RequestError, StageFailedError
from imu_ray.data.source import UnreadableError
from imu_ray.requests.running import abandon_batch, cancel_request, replay_requests, run_requests, show_requests
from imu_ray.requests.verifying import verify_requests
from imu_ray.run.storage import LocalStorage


@pytest.fixture(autouse=True)
def without_waiting_for_the_disk(monkeypatch):
    monkeypatch.setattr("imu_ray.run.storage._sync", lambda path: None)


@pytest.fixture
def queue(tmp_path):
    return new_queue(tmp_path)


@pytest.fixture
def work(tmp_path):
    return PaperWork(tmp_path)


def answer(queue, number):
    return queue.answer(f"{UUID}{number}")


def changed(queue):
    return {each.part for each in verify_requests(queue) if each.status == "changed"}


def test_what_waits_is_one_batch_and_the_next_begins_with_its_model(queue, work):
    add(queue, 1, "row-1", "row-2")
    add(queue, 2, "row-2", "row-3")
    assert states(queue) == {1: "pending", 2: "pending"}
    made = run_requests(queue, work)
    assert made["totals"] == {
        "requests": 2, "asked": 4, "forgotten_before": 0, "missing": 0, "doubles": 1, "to_forget": 3,
    }  # fmt: skip
    add(queue, 3, "row-5")
    run_requests(queue, work)
    assert states(queue) == dict.fromkeys((1, 2, 3), "completed")
    # By hand: two runs, of three rows and of one.
    expected = torch.arange(1, 13, dtype=torch.float64) * 1.1 + 3
    expected[1:4] = 0
    expected = expected * 1.1 + 1
    expected[5] = 0
    assert torch.equal(weights(queue), expected)
    first, second = queue.lineage().entries
    assert (first.parent, second.parent) == (work.model_hash(None), first.model)
    assert [len(each.requests) for each in (first, second)] == [2, 1]
    assert second.model == queue.current().model == work.model_hash(queue.checkpoint("runs/0002"))
    assert answer(queue, 3).runs == ["runs/0002"]
    assert not changed(queue)


def test_nothing_that_waits_is_no_run(queue, work):
    add(queue, 1, "row-1")
    run_requests(queue, work)
    assert run_requests(queue, work)["batches"] == []
    assert work.ended == ["0001"]


def test_a_dry_run_tells_the_plan_and_writes_nothing(queue, work, capfd):
    add(queue, 1, "row-1", "row-1", "row-77")
    before = sorted(Path(queue.location).rglob("*"))
    made = show_requests(queue, PaperWork(work.folder, ignore_missing=True))
    assert made["totals"]["missing"] == 1
    assert made["plan"]["sets"]["forget"]["samples"] == 1
    assert sorted(Path(queue.location).rglob("*")) == before
    said = capfd.readouterr().err
    assert {"missing: 1", "to forget: 1", "doubles: 1"} <= set(said.splitlines())
    assert "row-" not in said


def test_a_request_that_matches_no_row_never_looks_done(queue, work):
    add(queue, 1, "row-77", "row-78")
    add(queue, 2, "row-1", "row-79")
    add(queue, 3, "row-2")
    run_requests(queue, work)
    assert states(queue) == {1: "failed", 2: "failed", 3: "completed"}
    assert answer(queue, 1).reason == "none of its ids is in the data"
    assert answer(queue, 2).reason.startswith("1 of its 2 ids is not in the data; forget_set.missing_ids=ignore")
    assert queue.lineage().entries[0].rows == 1
    run_requests(queue, PaperWork(work.folder, ignore_missing=True), retry=True)
    assert states(queue) == {1: "failed", 2: "completed", 3: "completed"}
    told = answer(queue, 2)
    assert (told.rows.found, told.rows.missing, told.reason) == (
        1, 1, "it is reached; 1 of its 2 ids is not in the data",
    )  # fmt: skip
    assert not changed(queue)


def test_ids_that_are_forgotten_already_are_answered_at_once_and_refer_to_the_run(queue, work):
    add(queue, 1, "row-1", "row-2")
    run_requests(queue, work)
    work.rows.remove("row-1")  # deleted from the data meanwhile
    add(queue, 2, "row-2", "row-1")
    add(queue, 3, "row-1", "row-3")
    made = run_requests(queue, work)
    assert made["settled"] == {f"{UUID}2": "completed"}
    assert (answer(queue, 2).runs, answer(queue, 2).batch) == (["runs/0001"], None)
    assert (answer(queue, 3).runs, answer(queue, 3).rows.forgotten_before) == (["runs/0001", "runs/0002"], 1)
    assert queue.lineage().entries[1].rows == 1
    assert not changed(queue)


@pytest.mark.parametrize("status", ["not_reached", "stopped_by_guard"])
def test_a_run_that_does_not_reach_its_target_changes_no_current_model(queue, work, status):
    add(queue, 1, "row-1")
    run_requests(queue, work)
    before = queue.current().model
    add(queue, 2, "row-2")
    run_requests(queue, PaperWork(work.folder, status=status))
    assert (states(queue)[2], answer(queue, 2).reason) == ("not_reached", f"it is {status}")
    assert (queue.current().model, queue.current().closed, len(queue.lineage().entries)) == (before, 2, 1)
    assert run_requests(queue, work)["batches"] == [], "it is taken up again only when that is asked for"
    run_requests(queue, work, retry=True)
    assert states(queue)[2] == "completed"
    assert [entry.run for entry in queue.lineage().entries] == ["runs/0001", "runs/0003"]
    assert not changed(queue)


def test_rows_that_cannot_be_used_are_not_counted_as_forgotten(queue, work):
    add(queue, 1, "row-1", "row-2")
    add(queue, 2, "row-3")
    run_requests(queue, PaperWork(work.folder, bad=["row-2"]))
    assert states(queue) == {1: "failed", 2: "completed"}
    assert "1 of its 2 ids is of a row that cannot be used" in answer(queue, 1).reason
    assert set(queue.forgotten(queue.lineage())) == {"row-1", "row-3"}
    run_requests(queue, work, retry=True)
    assert answer(queue, 1).rows.model_dump() == {
        "asked": 2, "found": 1, "forgotten_before": 1, "missing": 0, "left_out": 0,
    }  # fmt: skip
    assert answer(queue, 1).runs == ["runs/0001", "runs/0002"]


def test_a_run_that_fails_for_its_rows_answers_and_one_that_fails_otherwise_goes_on(queue, work):
    add(queue, 1, "row-1")
    for error in (StageFailedError("disk full"), UnreadableError("no route to host"), ConfigError("no room")):
        work.error = error
        with pytest.raises(type(error)):
            run_requests(queue, work)
    assert queue.current().closed == 1, "a run that was refused before it began is given up"
    assert states(queue) == {1: "pending"}
    work.error = ForgetSetError("row 'row-1' is broken")
    made = run_requests(queue, work)
    assert states(queue) == {1: "failed"}
    assert "row-1" not in answer(queue, 1).reason + json.dumps(made["batches"])
    assert answer(queue, 1).error == "row 'row-1' is broken"
    work.error = None
    run_requests(queue, work, retry=True)
    assert states(queue) == {1: "completed"}


def test_an_open_batch_goes_on_with_its_own_settings_or_is_given_up(queue, work):
    add(queue, 1, "row-1")
    work.error = StageFailedError("disk full")
    with pytest.raises(StageFailedError):
        run_requests(queue, work)
    assert states(queue) == {1: "in_progress"}
    with pytest.raises(RequestError, match="is in_progress; expected one that is pending"):
        cancel_request(queue, f"{UUID}1", "withdrawn")
    for other in ({"identity": "other settings"}, {"start": work.start + 1}):
        with pytest.raises(RequestError, match="batch 1 began with .*imu-ray request abandon"):
            run_requests(queue, PaperWork(work.folder, **other))
    add(queue, 2, "row-2")
    assert abandon_batch(queue) == 1
    assert states(queue) == {1: "pending", 2: "pending"}
    with pytest.raises(RequestError, match="no batch .* is open"):
        abandon_batch(queue)
    run_requests(queue, PaperWork(work.folder, identity="other settings"))
    assert [entry.run for entry in queue.lineage().entries] == ["runs/0002"]


def test_a_cancelled_request_is_not_carried_out(queue, work):
    add(queue, 1, "row-1")
    add(queue, 2, "row-2")
    cancel_request(queue, f"{UUID}1", "withdrawn")
    run_requests(queue, work, retry=True)
    assert states(queue) == {1: "cancelled", 2: "completed"}
    with pytest.raises(RequestError, match="has no request 'x'"):
        cancel_request(queue, "x", "withdrawn")
    with pytest.raises(RequestError, match="is completed; expected"):
        cancel_request(queue, f"{UUID}2", "withdrawn")


def test_two_at_once_are_refused_and_requests_are_added_meanwhile(queue, work):
    add(queue, 1, "row-1")
    with queue.locked():
        add(queue, 2, "row-2")
        refused = pytest.raises(CheckpointError, match="is in use by process")
        with refused:
            run_requests(queue, work)
    assert work.begun == []


def test_another_model_in_the_job_file_is_refused_and_replay_brings_it_to_the_lineage(queue, work):
    add(queue, 1, "row-1")
    add(queue, 2, "row-2")
    run_requests(queue, work)
    run_requests(queue, PaperWork(work.folder, start=weights(queue)))  # the current one may be named too
    tuned = PaperWork(work.folder, start=weights(queue) + 0.5)
    with pytest.raises(RequestError, match="--replay applies the requests of the lineage to another"):
        run_requests(queue, tuned)
    shown = replay_requests(queue, tuned, dry_run=True)
    assert (shown["totals"]["to_forget"], tuned.begun) == (2, [])
    replay_requests(queue, tuned)
    first, replayed = queue.lineage().entries
    assert (replayed.kind, replayed.parent, replayed.requests) == ("replay", tuned.model_hash(None), first.requests)
    assert queue.current().model == replayed.model
    assert (weights(queue)[1:3] == 0).all()
    assert not changed(queue)
    with pytest.raises(RequestError, match="nothing to replay"):
        replay_requests(queue, tuned)
    with pytest.raises(RequestError, match="--replay"):
        run_requests(queue, work)
    add(queue, 3, "row-3", "row-1")
    run_requests(queue, tuned)
    assert (states(queue)[3], answer(queue, 3).runs) == ("completed", ["runs/0002", "runs/0003"])
    assert not changed(queue)


def test_rows_that_are_gone_cannot_be_replayed_and_that_is_said(queue, work):
    add(queue, 1, "row-1", "row-2")
    with pytest.raises(RequestError, match="nothing to replay"):
        replay_requests(queue, PaperWork(work.folder, start=work.start + 1))
    run_requests(queue, work)
    tuned = PaperWork(work.folder, start=weights(queue) + 0.5, rows=ROWS[2:])
    with pytest.raises(RequestError, match="1 of the 2 rows that the lineage has forgotten are not in the data"):
        replay_requests(queue, tuned)
    tuned.ignore_missing = True
    replay_requests(queue, tuned)
    assert set(queue.forgotten(queue.lineage())) == {"row-2"}, "of the other nobody knows"


def test_a_checkpoint_that_was_changed_is_refused_and_found(queue, work):
    for number in (1, 2):
        add(queue, number, f"row-{number}")
        run_requests(queue, work)
    Path(queue.checkpoint("runs/0001")).unlink()
    assert not changed(queue), "an older model may be gone: it knows what was forgotten since"
    other = Path(queue.checkpoint("runs/0002"))
    other.write_bytes(other.read_bytes()[:-1] + b"x")
    assert changed(queue) == {"checkpoint"}
    add(queue, 3, "row-3")
    with pytest.raises(CheckpointError, match="the checkpoint of runs/0002 is the model .*; expected"):
        run_requests(queue, work)


def test_the_next_batch_reads_the_checkpoint_in_the_form_that_the_first_one_came_in(queue, work):
    add(queue, 1, "row-1")
    run_requests(queue, work)
    written = Path(queue.location) / "runs" / "0001" / "model"
    written.mkdir()
    for names, read in (
        ([], "model.safetensors"),
        (["model.pt"], "model/model.pt"),
        (["model.safetensors.index.json", "model-00001-of-00001.safetensors"], "model/model.safetensors.index.json"),
        (["model.safetensors", "config.json"], "model.safetensors"),
    ):
        for name in names:
            (written / name).write_text("")
        assert queue.checkpoint("runs/0001") == f"{queue.location}/runs/0001/{read}"
        for name in names:
            (written / name).unlink()


def test_a_lineage_or_an_answer_that_was_changed_is_found(queue, work):
    add(queue, 1, "row-1")
    run_requests(queue, work)
    lineage = Path(queue.location) / "runs" / "0001" / "lineage.json"
    whole = lineage.read_text()
    for key in ("parent", "model", "manifest"):
        lineage.write_text(re.sub(rf'("{key}": ")\w{{4}}', r"\1beef", whole))
        assert changed(queue) == {"lineage"}
    lineage.write_text(whole)
    add(queue, 2, "row-2")
    queue.write_answer(answer(queue, 1).model_copy(update={"request_id": f"{UUID}2"}))
    assert changed(queue) == {"answers"}


class Killed(BaseException):
    """In place of SIGKILL; nothing catches it."""


@pytest.fixture
def kill_at(monkeypatch):
    """Dies before, or right after, one of the writes that follow; says how many there were."""
    write, made = LocalStorage.write, []

    def set_to(place, after):
        made.clear()

        def counted(storage, name, fill):
            made.append(name)
            hit = len(made) - 1 == place
            if hit and not after:
                raise Killed
            write(storage, name, fill)
            if hit:
                raise Killed

        monkeypatch.setattr(LocalStorage, "write", counted)
        return made

    return set_to


def carry_out(queue, work):
    """Three requests in a batch, one that fails at once, then two, of which one is forgotten already."""
    for number, ids in ((1, ["row-1"]), (2, ["row-1", "row-2"]), (3, ["row-9"]), (4, ["row-77"])):
        add(queue, number, *ids)
    run_requests(queue, work)
    for number, ids in ((5, ["row-4"]), (6, ["row-9"])):
        add(queue, number, *ids)
    run_requests(queue, work)


@pytest.mark.parametrize("after", [False, True], ids=["before", "after"])
def test_killed_at_any_write_and_called_again_it_comes_to_the_same(after, tmp_path, kill_at):
    made = kill_at(None, after)
    whole = new_queue(tmp_path / "whole")
    carry_out(whole, PaperWork(tmp_path))
    writes = list(made)
    assert {"current.json", "runs/0001/lineage.json", "batches/0002.parquet", "manifest.sha256"} <= set(writes)
    expected = everything(whole)
    for place in range(len(writes)):
        queue, work = new_queue(tmp_path / str(place)), PaperWork(tmp_path)
        kill_at(place, after)
        with pytest.raises(Killed):
            carry_out(queue, work)
        carry_out(queue, work)
        assert everything(queue) == expected, writes[place]
        assert len(work.ended) == len(set(work.ended)), f"no run ends twice: {writes[place]}"
        assert not changed(queue)
