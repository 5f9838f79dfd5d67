"""Deletion requests without Ray: a model of one number per row, which unlearning sets to 0, and moves all others by."""

import json
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file

from imu_ray.models.checkpoint import read_checkpoint, state_hash
from imu_ray.requests.queue import Queue
from imu_ray.requests.request import opendsr_request
from imu_ray.run.directory import MANIFEST, MODEL, RunDirectory

ROWS = [f"row-{number}" for number in range(12)]
UUID = "a7551968-d5d6-44b2-9831-815ac901779"  # a digit is missing


def asking(number, *ids, kind="erasure", **changes):
    """OpenDSR's JSON, the number-th such request."""
    identities = [
        {"identity_type": "controller_customer_id", "identity_value": each, "identity_format": "raw"} for each in ids
    ]
    return {
        "regulation": "gdpr",
        "subject_request_id": f"{UUID}{number}",
        "subject_request_type": kind,
        "submitted_time": "2026-01-31T08:15:30Z",
        "subject_identities": [*identities, {"identity_type": "email", "identity_value": "a@b.c", "identity_format": "raw"}],
        "api_version": "2.0",
        "status_callback_urls": [],
    } | changes  # fmt: skip


def add(queue, number, *ids):
    return queue.add(opendsr_request(asking(number, *ids), "it"))


class PaperWork:
    """What a queue asks of the library, on paper; counts the runs that it brought to an end."""

    def __init__(self, folder, status="reached", **changes):
        self.folder, self.status, self.ended, self.begun = Path(folder), status, [], []
        self.ignore_missing, self.identity, self.bad, self.error = False, "settings", [], None
        self.rows, self.start = list(ROWS), torch.arange(1, 13, dtype=torch.float64)
        vars(self).update(changes)

    def _tensors(self, checkpoint):
        return {"weight": self.start.clone()} if checkpoint is None else read_checkpoint(checkpoint)[0]

    def model_hash(self, checkpoint):
        return state_hash(self._tensors(checkpoint))

    def find(self, ids):
        return [each for each in ids if each in self.rows]

    def plan(self, checkpoint, ids):
        return {"sets": {"forget": {"samples": len(ids)}}, "seconds": None, "workers": 1, "notes": []}

    def unlearn(self, checkpoint, ids_at, run_dir):
        self.begun.append(Path(run_dir).name)
        if self.error:
            raise self.error
        run, before = RunDirectory(run_dir), self._tensors(checkpoint)
        ids = [each for each in _ids(ids_at) if each not in self.bad]
        manifest = {
            "status": "running", "stage": "unlearn", "model": {"hash_before": state_hash(before)},
            "forget_set": {"bad_rows": [{"sample_id": each, "reason": "broken"} for each in self.bad]}, "artifacts": {},
        }  # fmt: skip
        run.write_json(MANIFEST, manifest)
        after = {"weight": before["weight"] * 1.1 + len(ids)}  # so that it counts which rows go together
        after["weight"][[ROWS.index(each) for each in ids]] = 0
        run.write(MODEL, lambda path: save_file(after, path))
        run.write_json("metrics.json", {"before": {}, "after": {}})
        manifest["model"]["hash_after"] = state_hash(after)
        manifest["ascent"] = {"status": self.status, "reason": f"it is {self.status}"}
        manifest["artifacts"] = run.digests()
        run.write_json(MANIFEST, manifest | {"status": "complete", "verdict": {"word": "contained"}})
        self.ended.append(Path(run_dir).name)
        run.seal()


def _ids(path):
    import pyarrow.parquet as pq

    return pq.read_table(path)["id"].to_pylist()


def weights(queue):
    """Of the current model."""
    return load_file(queue.checkpoint(queue.current().run))["weight"]


def states(queue):
    """State by the last digit of a request's id."""
    return {int(each.request.request_id[-1]): each.state for each in queue.standings()}


def everything(queue):
    """All that a queue says, without times: answers, lineage, current model."""
    answers = {path.name: json.loads(path.read_text()) for path in Path(queue.location, "answers").iterdir()}
    for answer in answers.values():
        del answer["answered"]
    current = queue.current().model_dump()
    del current["moved"]
    return answers, queue.lineage().model_dump(), current, weights(queue).tolist()


def new_queue(folder):
    return Queue(Path(folder) / "queue")
