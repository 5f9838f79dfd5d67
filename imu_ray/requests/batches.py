"""One batch of a queue, from its begin to the answers of its requests."""

from collections.abc import Mapping
from typing import Any, Literal

from imu_ray.errors import (
    CheckpointError,
    ConfigError,
    EmptySelectionError,
    ForgetSetError,
    ImuError,
    NonFiniteError,
    RequestError,
    UnsupportedModelError,
)
from imu_ray.events import event
from imu_ray.requests.lineage import Entry, Outcome, read_outcome
from imu_ray.requests.queue import Answer, Batch, Queue, Rows, states_of
from imu_ray.requests.work import Work
from imu_ray.run.directory import SEAL, RunDirectory
from imu_ray.run.record import now

OF_THE_ROWS = (ForgetSetError, NonFiniteError, EmptySelectionError)
OF_THE_JOB = (ConfigError, UnsupportedModelError)


def run_of(queue: Queue, batch: Batch) -> RunDirectory:
    """The run directory of a batch."""
    return RunDirectory(queue.at(batch.run))


def begin(
    queue: Queue,
    work: Work,
    kind: Literal["requests", "replay"],
    parent: str,
    parent_run: str | None,
    requests: list[str],
    rows: Mapping[str, Rows],
    ids: list[str],
) -> Batch:
    """Begin a batch on the model ``parent``, whose checkpoint is that of ``parent_run``, or the job file's."""
    batch = Batch(
        number=queue.current().closed + 1,
        kind=kind,
        created=now(),
        identity=work.identity,
        parent=parent,
        parent_run=parent_run,
        requests=requests,
        rows=dict(rows),
        size=len(ids),
    )
    queue.begin(batch, ids)
    event("batch begun", number=batch.number, kind=kind, requests=len(requests), rows=batch.size)
    return batch


def carry_out(queue: Queue, work: Work, batch: Batch) -> dict[str, Any]:
    """Run a batch to its end, or take up its run, and answer its requests."""
    run = run_of(queue, batch)
    outcome, error = read_outcome(run), None
    if outcome is None:
        _require_same(queue, work, batch)
        try:
            work.unlearn(queue.checkpoint(batch.parent_run), queue.at(batch.ids), queue.at(batch.run))
        except OF_THE_JOB:
            if not run.storage.entries():  # it had not begun: another job file may come
                queue.close(batch, None)
            raise
        except OF_THE_ROWS as raised:
            if isinstance(raised, OSError):  # of a storage that may answer again
                raise
            error = raised
        outcome = read_outcome(run)
    if error is None and (outcome is None or outcome.parent != batch.parent):
        raise CheckpointError(f"{queue.at(batch.run)} holds no run of batch {batch.number}, or one of another model")
    if outcome is not None and SEAL not in run.storage.entries():  # killed between record and seal
        run.seal()
    return _close(queue, batch, outcome, error)


def _require_same(queue: Queue, work: Work, batch: Batch) -> None:
    """Refuse another job file, or another model, than those that a batch began with."""
    if work.identity != batch.identity:
        raise RequestError(
            f"batch {batch.number} began with another job file or other settings; expected those that it began with, "
            "with which it goes on; `imu-ray request abandon` gives it up, and its requests wait again"
        )
    found = work.model_hash(queue.checkpoint(batch.parent_run))
    if found != batch.parent:
        raise RequestError(
            f"batch {batch.number} began with the model {batch.parent[:12]}, which is {found[:12]} now; expected the "
            "same; put it back, or give the batch up: `imu-ray request abandon`"
        )


def _close(queue: Queue, batch: Batch, outcome: Outcome | None, error: ImuError | None) -> dict[str, Any]:
    """Write the lineage, the answers and, last, the current model."""
    done = outcome is not None and outcome.done
    if outcome is not None and done:
        entry = Entry(
            batch=batch.number,
            kind=batch.kind,
            parent=outcome.parent,
            model=outcome.model,
            run=batch.run,
            manifest=outcome.manifest,
            status=outcome.status,
            verdict=outcome.verdict,
            requests=batch.requests,
            rows=batch.size - len(outcome.left_out),
        )
        queue.write_lineage(batch, queue.lineage().with_step(entry))
    forgotten = queue.forgotten(queue.lineage()) if batch.rows else {}
    answers = [
        _answer(queue, batch, request_id, rows, outcome, error, forgotten) for request_id, rows in batch.rows.items()
    ]
    for answer in answers:
        queue.write_answer(answer)
        event("request answered", request=answer.request_id, state=answer.state, batch=batch.number)
    queue.close(batch, outcome.model if outcome is not None and done else None)
    failed = f"{type(error).__name__}; the answers of its requests say more"
    status, reason = (outcome.status, outcome.reason) if outcome else ("failed", failed)
    event("batch closed", number=batch.number, status=status, rows=batch.size)
    return {
        "batch": batch.number,
        "kind": batch.kind,
        "status": status,
        "reason": reason,
        "verdict": outcome.verdict if outcome else None,
        "run_dir": queue.at(batch.run),
        "rows": batch.size,
        "requests": states_of(answers),
        "metrics": outcome.metrics if outcome else None,
    }


def _answer(
    queue: Queue,
    batch: Batch,
    request_id: str,
    rows: Rows,
    outcome: Outcome | None,
    error: ImuError | None,
    forgotten: Mapping[str, str],
) -> Answer:
    """What a request is told of the end of its batch."""
    if outcome is None:
        return Answer(
            request_id=request_id,
            state="failed",
            reason=f"the run of its batch failed: {type(error).__name__}",
            error=str(error),
            answered=now(),
            rows=rows,
            batch=batch.number,
        )
    ids = queue.request(request_id).ids
    left_out = len(set(outcome.left_out).intersection(ids))
    rows = rows.model_copy(update={"found": rows.found - left_out, "left_out": left_out})
    state = "not_reached" if not outcome.done else "failed" if left_out else "completed"
    runs = {forgotten[sample_id] for sample_id in ids if sample_id in forgotten}
    return Answer(
        request_id=request_id,
        state=state,
        reason="; ".join(filter(None, [outcome.reason, rows.in_words])),
        answered=now(),
        rows=rows,
        batch=batch.number,
        runs=sorted(runs | ({batch.run} if outcome.done and rows.found else set())),
        run_status=outcome.status,
        verdict=outcome.verdict,
        model=outcome.model if outcome.done else None,
    )
