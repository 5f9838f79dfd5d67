"""Whether the lineage of a queue is still what was written: models, records and answers, one against the other."""

from collections.abc import Iterator

from imu_ray.handover.verify import Finding, verify_run
from imu_ray.requests.lineage import Entry
from imu_ray.requests.queue import Queue
from imu_ray.run.directory import MANIFEST, MODEL, RunDirectory


def verify_requests(queue: Queue) -> list[Finding]:
    """Look at every step of the lineage, at the current model, and at the answers.

    Of each step: that it begins with the model that the one before it ended with (a replay apart), that its record has
    the digest and the hashes that the lineage names, and what ``verify_run`` looks at. A checkpoint before the current
    one may be gone. Of the answers: that every id of a completed request was forgotten by a run of the lineage.

    Raises:
        RequestError: there is no queue.
        CheckpointError: a run of the lineage has no record.
    """
    queue.require()
    lineage, current = queue.lineage(), queue.current()
    findings = [Finding("lineage", "changed", told) for told in lineage.breaks()]
    ends = lineage.entries[-1].model if lineage.entries else None
    if ends != current.model:
        told = f"it ends with the model {str(ends)[:12]}, the current one is {str(current.model)[:12]}"
        findings.append(Finding("lineage", "changed", told))
    if not findings:
        findings.append(Finding("lineage", "same", f"{len(lineage.entries)} steps, each from the model of the last"))
    for entry in lineage.entries:
        findings += _step(queue, entry, is_last=entry.run == current.run)
    return findings + list(_answers(queue, {entry.run for entry in lineage.entries}))


def _step(queue: Queue, entry: Entry, is_last: bool) -> Iterator[Finding]:
    run = RunDirectory(queue.at(entry.run))
    manifest = run.read_manifest()
    hashes = manifest["model"]["hash_before"], manifest["model"]["hash_after"]
    as_named = run.digest(MANIFEST) == entry.manifest and hashes == (entry.parent, entry.model)
    told = f"{entry.run} {'has' if as_named else 'does not have'} the record and the models that the lineage names"
    yield Finding("lineage", "same" if as_named else "changed", told)
    gone = not is_last and MODEL not in run.storage.entries()
    for found in verify_run(queue.at(entry.run)):
        status = "absent" if gone and found.part == "checkpoint" else found.status
        yield Finding(found.part, status, f"{entry.run}: {found.told}")


def _answers(queue: Queue, runs: set[str]) -> Iterator[Finding]:
    """Whether what is said to be completed is."""
    forgotten = {run: set(queue.files.read_table(f"batches/{run[-4:]}.parquet")["id"].to_pylist()) for run in runs}
    completed = [each for each in queue.standings() if each.state == "completed" and each.answer is not None]
    wrong = 0
    for each in completed:
        answer = each.answer
        named = [forgotten.get(run, set()) for run in answer.runs] if answer else []
        lacking = len(each.request.ids) - len(set().union(*named).intersection(each.request.ids))
        if answer is None or lacking != answer.rows.missing or not named:
            wrong += 1
            told = f"request {each.request.request_id} is completed, and {lacking} of its ids are in no run it names"
            yield Finding("answers", "changed", told)
    if not wrong:
        yield Finding("answers", "same", f"{len(completed)} completed requests, each of ids that its runs forgot")
