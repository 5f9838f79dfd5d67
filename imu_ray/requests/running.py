"""Carry out what waits in a queue, or show what that would be; replay, abandon, cancel."""

import sys
from typing import Any

from imu_ray.errors import CheckpointError, RequestError
from imu_ray.events import event
from imu_ray.requests.batches import begin, carry_out, run_of
from imu_ray.requests.lineage import Lineage, read_outcome
from imu_ray.requests.merging import Merged, merge, open_ids
from imu_ray.requests.queue import AGAIN, Answer, Batch, Queue, Rows, states_of
from imu_ray.requests.work import Work
from imu_ray.run.record import now


def run_requests(queue: Queue, work: Work, *, retry: bool = False) -> dict[str, Any]:
    """Carry out what waits: an open batch first, then one of everything else.

    Of a batch all requests share one run and its end. Its model becomes the current one where the run ended
    ``reached``, ``already_met`` or ``epochs_done``; otherwise the current model stays, and the requests are
    ``not_reached``. A run that failed for its rows makes its requests ``failed``; one that failed for the job file, the
    cluster or the storage leaves them waiting, and raises.

    Args:
        queue: where the requests are.
        work: what is asked of the library.
        retry: take up again what is ``not_reached`` or ``failed``.

    Returns:
        ``batches``, what became of each, and ``totals`` of what waited.

    Raises:
        RequestError: the job file names another model than that which the lineage began with, or other settings than
            those that an open batch began with.
        ImuError: see above; the same call goes on.
    """
    queue.require()
    with queue.locked():
        ended = [carry_out(queue, work, batch)] if (batch := queue.open_batch()) else []
        parent = _parent(queue, work)
        merged = _merge(queue, work, retry)
        plan = _plan(queue, work, merged)
        for answer in merged.settled:
            queue.write_answer(answer)
            event("request answered", request=answer.request_id, state=answer.state)
        if merged.ids:
            current = queue.current()
            batch = begin(queue, work, "requests", parent, current.run, list(merged.rows), merged.rows, merged.ids)
            ended.append(carry_out(queue, work, batch))
        return {"totals": merged.totals, "plan": plan, "batches": ended, "settled": states_of(merged.settled)}


def show_requests(queue: Queue, work: Work, *, retry: bool = False) -> dict[str, Any]:
    """What ``run_requests`` would do; nothing is written."""
    queue.require()
    batch = queue.open_batch()
    if batch is not None:
        print(f"batch {batch.number} is open and is taken up first: {batch.size} rows", file=sys.stderr)
    _parent(queue, work)
    merged = _merge(queue, work, retry, but=batch)
    plan = _plan(queue, work, merged)
    return {"totals": merged.totals, "plan": plan, "batches": [], "settled": states_of(merged.settled)}


def replay_requests(queue: Queue, work: Work, *, dry_run: bool = False) -> dict[str, Any]:
    """Apply all requests of the lineage again, to the model of the job file, as after fine-tuning.

    Where the target is met again, it becomes the current model. What waits is left waiting.

    Raises:
        RequestError: there is nothing to replay, or rows are no longer in the data and may not be passed over.
        ImuError: as in ``run_requests``.
    """
    queue.require()
    with queue.locked():
        batch = queue.open_batch()
        if batch is not None and batch.kind != "replay":
            raise RequestError(f"batch {batch.number} is open; expected it ended; run without --replay first")
        given = work.model_hash(None)
        if batch is None:
            lineage, current = queue.lineage(), queue.current()
            if given in (lineage.root, current.model) or not lineage.entries:
                raise RequestError(
                    f"the model of the job file ({given[:12]}) has nothing to replay: it is the one that the lineage "
                    "begins or ends with, or there is no lineage; expected a model that was trained on since"
                )
            merged = _replayed(queue, work, lineage)
            plan = _show(merged, work.plan(None, merged.ids))
            if dry_run:
                return {"totals": merged.totals, "plan": plan, "batches": [], "settled": {}}
            requests = sorted({name for entry in lineage.since_root for name in entry.requests})
            batch = begin(queue, work, "replay", given, None, requests, {}, merged.ids)
        ended = carry_out(queue, work, batch)
        totals = {"requests": len(batch.requests), "to_forget": batch.size}
        return {"totals": totals, "plan": None, "batches": [ended], "settled": {}}


def abandon_batch(queue: Queue) -> int:
    """Give up the open batch: its run is left as it is, and its requests wait again. Returns its number.

    Raises:
        RequestError: none is open, or its run has ended, so that it has an answer.
    """
    queue.require()
    with queue.locked():
        batch = queue.open_batch()
        if batch is None:
            raise RequestError(f"no batch of {queue.location} is open; expected one; see `imu-ray request status`")
        if read_outcome(run_of(queue, batch)) is not None:
            raise RequestError(f"the run of batch {batch.number} has ended; expected `request run`, which answers")
        queue.close(batch, None)
        return batch.number


def cancel_request(queue: Queue, request_id: str, reason: str) -> None:
    """Take a request back that is not answered yet, or was not carried out.

    Raises:
        RequestError: it is completed, or in progress.
    """
    with queue.locked():
        request = queue.request(request_id)
        state = next(each.state for each in queue.standings() if each.request.request_id == request_id)
        if state not in ("pending", *AGAIN):
            raise RequestError(f"request {request_id} is {state}; expected one that is pending, not_reached or failed")
        rows = Rows(asked=len(request.ids))
        queue.write_answer(Answer(request_id=request_id, state="cancelled", reason=reason, answered=now(), rows=rows))


def _parent(queue: Queue, work: Work) -> str:
    """Hash of the current model, found to be what the queue says; the job file must name a model of the lineage."""
    current, lineage = queue.current(), queue.lineage()
    given = work.model_hash(None)
    if current.model is None:
        return given
    if given not in (lineage.root, current.model):
        raise RequestError(
            f"the model of the job file ({given[:12]}) is neither the one that the lineage begins with "
            f"({str(lineage.root)[:12]}) nor the current one ({current.model[:12]}); expected one of them; --replay "
            "applies the requests of the lineage to another"
        )
    found = work.model_hash(queue.checkpoint(current.run))
    if found != current.model:
        raise CheckpointError(
            f"the checkpoint of {current.run} is the model {found[:12]}; expected {current.model[:12]}, as the queue "
            "says; put it back as it was"
        )
    return found


def _merge(queue: Queue, work: Work, retry: bool, but: Batch | None = None) -> Merged:
    states = ("pending", *AGAIN) if retry else ("pending",)
    waiting = [each.request for each in queue.standings() if each.state in states]
    forgotten = queue.forgotten(queue.lineage())
    if but is not None:
        forgotten |= dict.fromkeys(queue.files.read_table(but.ids)["id"].to_pylist(), but.run)
    asked = open_ids(waiting, forgotten)
    found = set(work.find(asked)) if asked else set[str]()
    return merge(waiting, forgotten, found, work.ignore_missing)


def _replayed(queue: Queue, work: Work, lineage: Lineage) -> Merged:
    asked = sorted(queue.forgotten(lineage))
    found = sorted(set(work.find(asked)))
    missing = len(asked) - len(found)
    if not found or (missing and not work.ignore_missing):
        remedy = "" if not found else "; forget_set.missing_ids=ignore replays the others"
        raise RequestError(
            f"{missing} of the {len(asked)} rows that the lineage has forgotten are not in the data; expected all of "
            f"them, because a model that was trained on may know them{remedy}"
        )
    rows = {"replay": Rows(asked=len(asked), found=len(found), missing=missing)}
    return Merged(ids=found, rows=rows)


def _plan(queue: Queue, work: Work, merged: Merged) -> dict[str, Any] | None:
    made = work.plan(queue.checkpoint(queue.current().run), merged.ids) if merged.ids else None
    return _show(merged, made)


def _show(merged: Merged, plan: dict[str, Any] | None) -> dict[str, Any] | None:
    """The dry run in words, on standard error."""
    totals = merged.totals
    told = [f"{name.replace('_', ' ')}: {count:,}" for name, count in totals.items()]
    told += [f"{state} at once: {len(names):,}" for state, names in _by_state(merged).items()]
    if plan and plan.get("seconds"):
        told.append(f"{plan['seconds']['without_ascent']:,.1f} s on {plan['workers']} workers, the ascent not included")
    told += plan["notes"] if plan else []
    print(*told, sep="\n", file=sys.stderr, flush=True)
    return plan


def _by_state(merged: Merged) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for answer in merged.settled:
        found.setdefault(answer.state, []).append(answer.request_id)
    return found
