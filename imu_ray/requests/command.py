"""The command ``imu-ray request``: add, run, status, cancel, abandon, verify."""

import argparse
import json
import sys
from collections import Counter
from typing import Any

from imu_ray.data import read_ids
from imu_ray.errors import ConfigError
from imu_ray.events import log_events
from imu_ray.job import JobConfig
from imu_ray.requests.queue import Queue
from imu_ray.requests.request import ID_TYPE, list_request, read_request
from imu_ray.requests.running import abandon_batch, cancel_request, replay_requests, run_requests, show_requests
from imu_ray.requests.verifying import verify_requests
from imu_ray.run.storage import below


def request_command(options: argparse.Namespace) -> dict[str, Any]:
    """Carry out ``imu-ray request ACTION``; what its last line says."""
    return {"run_dir": None, **ACTIONS[options.action](Queue(options.queue), options)}


def _add(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    if options.json is not None:
        request = read_request(options.json, options.identity_type or ID_TYPE)
    else:
        request = list_request(read_ids(options.ids))
    added = queue.add(request)
    told = "added" if added else "it is in the queue already, with the same content; nothing was done"
    kept = {"ids": len(request.ids), "doubles": request.doubles, "not_used": request.not_used}
    return {"reason": told, "request": request.request_id, "added": added, **kept}


def _run(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    from imu_ray.requests.work import JobWork  # which imports Ray

    # The queue stands for `run_dir`, so that under `ray job submit` it is checked to be where it lasts.
    job = JobConfig.load(options.config, [*options.set, f"run_dir={json.dumps(options.queue)}"])
    log_events(job.log)
    if options.replay and options.retry:
        raise ConfigError("--replay and --retry were both given; expected one of them; --replay takes up nothing new")
    with JobWork(job) as work:
        if options.replay:
            made = replay_requests(queue, work, dry_run=options.dry_run)
        elif options.dry_run:
            made = show_requests(queue, work, retry=options.retry)
        else:
            made = run_requests(queue, work, retry=options.retry)
    for batch in made["batches"]:
        _tell_costs(batch)
    last = made["batches"][-1] if made["batches"] else None
    report = below(last["run_dir"], "report.html") if last and last["metrics"] and job.audit.report else None
    of_run = {"run_dir": last["run_dir"], "metrics": last["metrics"], "report": report} if last else {}
    if options.dry_run:
        return {"reason": "shown, and nothing done", **made}
    return {**_ending(made), **made, **of_run}


def _ending(made: dict[str, Any]) -> dict[str, str]:
    """Status and reason of what was carried out; a replay counts by how its run ended."""
    states = [*made["settled"].values(), *(state for each in made["batches"] for state in each["requests"].values())]
    replays = [each["status"] for each in made["batches"] if each["kind"] == "replay"]
    failing = [state for state in ("failed", "not_reached", "stopped_by_guard") if state in (*states, *replays)]
    told = [f"{states.count(state)} {state}" for state in sorted(set(states))]
    told += [f"the replay ended {status}" for status in replays]
    return {"status": failing[0] if failing else "complete", "reason": ", ".join(told) or "nothing waits"}


def _tell_costs(batch: dict[str, Any]) -> None:
    """Figures before and after, on standard error."""
    metrics = batch["metrics"] or {}
    for name, before in metrics.get("before", {}).items():
        after = metrics["after"].get(name, {})
        shared = [key for key in ("accuracy", "loss") if isinstance(before, dict) and key in before and key in after]
        figures = ", ".join(f"{key} {before[key]:.4f} -> {after[key]:.4f}" for key in shared)
        if figures:
            print(f"batch {batch['batch']}, {name}: {figures}", file=sys.stderr)


def _status(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    queue.require()
    current, standings, requests = queue.current(), queue.standings(), []
    for each in standings:
        answer = each.answer
        rows = {"asked": len(each.request.ids)} if answer is None else answer.rows.model_dump()
        said = ("reason", "answered", "runs", "run_status", "verdict")
        answered = {name: getattr(answer, name) for name in said if answer}
        named = {"request": each.request.request_id, "state": each.state, "submitted": each.request.submitted_time}
        requests.append({**named, "rows": rows, **answered})
        print(f"{named['request']}  {each.state}  {answered.get('reason', '')}".rstrip(), file=sys.stderr)
    counts = Counter(each.state for each in standings)
    told = ", ".join(f"{count} {name}" for name, count in counts.items())
    model = {"run": current.run, "hash": current.model, "checkpoint": queue.checkpoint(current.run)}
    return {"reason": told, "counts": dict(counts), "current": model, "requests": requests}


def _cancel(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    cancel_request(queue, options.request, options.reason)
    return {"reason": "cancelled", "request": options.request}


def _abandon(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    return {"reason": f"batch {abandon_batch(queue)} is given up; its requests wait again"}


def _verify(queue: Queue, options: argparse.Namespace) -> dict[str, Any]:
    found = verify_requests(queue)
    for each in found:
        print(f"{each.part}: {each.status}: {each.told}", file=sys.stderr)
    changed = sorted({each.part for each in found if each.status == "changed"})
    told = f"changed: {', '.join(changed)}" if changed else "everything that was looked at is as the queue says"
    status = "failed" if changed else "complete"
    return {"status": status, "reason": told, "findings": [vars(each) for each in found]}


ACTIONS = {"add": _add, "run": _run, "status": _status, "cancel": _cancel, "abandon": _abandon, "verify": _verify}
