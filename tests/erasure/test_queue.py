"""Queues over a small trained model: killed on the way, on an object store, and after fine-tuning."""

import json
import os
import subprocess
import sys
import uuid
from pathlib import Path

import numpy as np
import pytest
import torch
import yaml
from erasure.paper import asking
from safetensors.torch import load_file, save_file

from imu_ray import JobConfig, RequestError
from imu_ray.data.ids import IdList
from imu_ray.demo import digits, digits_cnn, train_and_save, write_digits
from imu_ray.models.checkpoint import load_checkpoint, state_hash
from imu_ray.requests.queue import Queue
from imu_ray.requests.request import list_request
from imu_ray.requests.running import replay_requests, run_requests
from imu_ray.requests.verifying import verify_requests
from imu_ray.requests.work import JobWork
from imu_ray.run.storage import open_storage

pytestmark = pytest.mark.slow
ROOT = Path(__file__).resolve().parents[2]
COMMAND = [sys.executable, "-c", "import sys; from imu_ray.cli import main; sys.exit(main('request'))"]
GROUPS = (8, 6, 6)
REQUESTS = [str(uuid.UUID(int=number + 1, version=4)) for number in range(sum(GROUPS))]
# A kill for each: where a request is taken in, a batch begins, its run goes on, answers, and its model becomes current.
POINTS = [
    f"1 after requests/{REQUESTS[3]}.json",
    "1 before batches/0001.json",
    "1 after batches/0001.json",
    "1 after runs/0001/intensities.parquet",
    "1 before runs/0001/model.safetensors",
    "2 before runs/0002/manifest.sha256",
    "2 before runs/0002/lineage.json",
    f"2 after answers/{REQUESTS[9]}.json",
    "3 before current.json",
    "3 after current.json",
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the data, the model and a job file; and the ids of the data."""
    folder = tmp_path_factory.mktemp("trained")
    _, _, train, test = digits()
    write_digits(folder / "train.parquet", train)
    write_digits(folder / "test.parquet", test)
    train_and_save(folder / "original.safetensors", train)
    job = {
        "model": {"factory": "imu_ray.demo:digits_cnn", "checkpoint": f"{folder}/original.safetensors"},
        "forget_set": {"path": f"{folder}/train.parquet", "image_mode": "L"},
        "evaluation": {"test": f"{folder}/test.parquet"},
    }
    (folder / "job.yaml").write_text(yaml.safe_dump(job))
    return folder, [f"digit-{row:04d}" for row in train]


def write_requests(folder, ids):
    """A file for each request: of three rows, one of which the request before asks for too; one of no row at all."""
    folder.mkdir()
    drawn = np.random.default_rng(0).choice(ids, 2 * len(REQUESTS), replace=False).tolist()
    paths = []
    for number, name in enumerate(REQUESTS):
        asked = ["nowhere-1", "nowhere-2"] if number == 4 else drawn[2 * number : 2 * number + 3] + drawn[:1]
        path = folder / f"{number}.json"
        path.write_text(json.dumps(asking(0, *asked, subject_request_id=name)))
        paths.append(str(path))
    ends = np.cumsum(GROUPS)
    return [paths[end - count : end] for count, end in zip(GROUPS, ends, strict=True)]


def carry_out(folder, job, groups, points, environment):
    """Exit statuses of the attempts at each group."""
    (folder / "plan.json").write_text(json.dumps({"groups": groups, "points": points}))
    (folder / "marks").mkdir()
    arguments = [str(folder / "queue"), str(job), str(folder / "plan.json"), str(folder / "marks")]
    command = [sys.executable, str(ROOT / "tests" / "requests_driver.py"), *arguments]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr[-4000:]
    return json.loads(done.stdout.splitlines()[-1]), Queue(folder / "queue")


def outcome(queue):
    """What became of every request, and of which rows; without times, and digests of records that hold times."""
    answers = {each.request.request_id: each.answer.model_dump(exclude={"answered"}) for each in queue.standings()}
    return answers, [entry.model_dump(exclude={"manifest"}) for entry in queue.lineage().entries]


@pytest.mark.long
def test_twenty_requests_killed_ten_times_end_as_if_nothing_had_happened(
    tmp_path, trained, ray_cluster, python_environment
):
    import ray

    folder, ids = trained
    environment = {**python_environment, "RAY_ADDRESS": ray.get_runtime_context().gcs_address}
    groups = write_requests(tmp_path / "requests", ids)
    (tmp_path / "whole").mkdir()
    (tmp_path / "killed").mkdir()
    calm, undisturbed = carry_out(tmp_path / "whole", folder / "job.yaml", groups, [], environment)
    endings, queue = carry_out(tmp_path / "killed", folder / "job.yaml", groups, POINTS, environment)
    assert calm == [[1], [0], [0]], "one request of the first group matches no row"
    # That one was answered by an attempt that was killed later, so that the last one had nothing to tell of it.
    assert endings == [[-9] * 5 + [0], [-9] * 3 + [0], [-9, -9, 0]]
    assert outcome(queue) == outcome(undisturbed)
    states = [each.state for each in queue.standings()]
    assert (states.count("completed"), states.count("failed"), len(states)) == (19, 1, 20)
    assert sorted(open_storage(queue.at("runs")).entries()) == ["0001", "0002", "0003"]
    for run in ("runs/0001", "runs/0002", "runs/0003"):
        models = [load_file(each.checkpoint(run)) for each in (queue, undisturbed)]
        assert state_hash(models[0]) == state_hash(models[1])
    assert [entry.status for entry in queue.lineage().entries] == ["reached"] * 3
    assert not [each for each in verify_requests(queue) if each.status == "changed"]


def request(environment, *arguments, code=0):
    """The last line of ``imu-ray request``, and its log."""
    command = [*COMMAND, *map(str, arguments)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=250)
    assert done.returncode == code, done.stdout + done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


def put(uri, path):
    """Upload a file."""
    storage = open_storage(uri.replace("?", f"/{path.name}?"))
    with path.open("rb") as source, storage.filesystem.open_output_stream(storage.root) as sink:
        sink.write(source.read())
    return uri.replace("?", f"/{path.name}?")


def test_queue_and_data_lie_in_a_bucket_and_so_do_the_artifacts(tmp_path, trained, s3_uri, python_environment):
    folder, ids = trained
    job = yaml.safe_load((folder / "job.yaml").read_text())
    job["forget_set"]["path"] = put(s3_uri, folder / "train.parquet")
    job["evaluation"]["test"] = put(s3_uri, folder / "test.parquet")
    job["model"]["checkpoint"] = put(s3_uri, folder / "original.safetensors")
    (tmp_path / "job.yaml").write_text(yaml.safe_dump(job))
    (tmp_path / "ids.txt").write_text("\n".join(ids[:4]))
    environment = {**python_environment, **{key: os.environ[key] for key in os.environ if key.startswith("AWS_")}}
    queue = s3_uri.replace("?", "/queue?")
    request(environment, "add", queue, "--ids", tmp_path / "ids.txt")
    done, _ = request(environment, "run", queue, "--config", tmp_path / "job.yaml")
    assert (done["reason"], done["totals"]["to_forget"]) == ("1 completed", 4)
    assert done["run_dir"] == s3_uri.replace("?", "/queue/runs/0001?")
    held = Queue(queue)
    assert not [each for each in verify_requests(held) if each.status == "changed"]
    with open_storage(held.checkpoint("runs/0001")).fetch("") as path:
        assert state_hash(load_file(path)) == held.current().model
    assert set(held.forgotten(held.lineage())) == set(ids[:4])
    assert not list(tmp_path.glob("runs*"))


def test_after_fine_tuning_the_requests_are_applied_again_and_the_cost_is_told(tmp_path, trained, ray_cluster):
    folder, ids = trained
    pixels, labels, train, _ = digits()
    queue = Queue(tmp_path / "queue")
    queue.add(list_request(IdList.of(ids[:30])))
    sets = ["ascent.stop.targets.forget.bounded_loss=0.3"]
    with JobWork(JobConfig.load(folder / "job.yaml", sets)) as work:
        run_requests(queue, work)
    model = digits_cnn()
    load_checkpoint(model, queue.checkpoint("runs/0001"))
    for parameters in (model.body.parameters(), model.head.parameters()):
        optimiser = torch.optim.SGD(parameters, lr=0.05)
        for _ in range(20):  # on all rows, those that were forgotten among them
            optimiser.zero_grad()
            inputs = torch.from_numpy(pixels[train]).unsqueeze(1) / 255
            torch.nn.functional.cross_entropy(model(inputs), torch.from_numpy(labels[train])).backward()
            optimiser.step()
    save_file(model.eval().state_dict(), tmp_path / "tuned.safetensors")
    tuned = JobConfig.load(folder / "job.yaml", [*sets, f"model.checkpoint={tmp_path}/tuned.safetensors"])
    with JobWork(tuned) as work:
        with pytest.raises(RequestError, match="--replay"):
            run_requests(queue, work)
        (replayed,) = replay_requests(queue, work)["batches"]
    before, after = (replayed["metrics"][side] for side in ("before", "after"))
    assert before["forget"]["samples"] == 30
    assert before["forget"]["bounded_loss"] < 0.3 <= after["forget"]["bounded_loss"]
    assert {"forget", "test"} <= after.keys()
    assert [entry.kind for entry in queue.lineage().entries] == ["requests", "replay"]
    assert not [each for each in verify_requests(queue) if each.status == "changed"]
