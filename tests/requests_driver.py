"""Adds requests to a queue and carries them out, group by group, and kills itself on the way; run by erasure/test_queue.py.

Each attempt is a fork of this process, so that what takes time is imported once. A kill point is
``GROUP before|after NAME``, the write of a file of the queue; each kills once, with SIGKILL.
"""

import json
import os
import sys
from pathlib import Path

from faults import kill_once

from imu_ray.cli import main
from imu_ray.requests import command, work  # noqa: F401
from imu_ray.requests.queue import Queue
from imu_ray.requests.request import read_request
from imu_ray.run.storage import LocalStorage


def attempt(queue, config, group, requests, points, marks):
    """Add the requests of a group and carry out what waits; its exit status."""
    write, base = LocalStorage.write, f"{Path(queue).absolute()}/"

    def killing(storage, name, fill):
        told = f"{storage.root}/{name}".removeprefix(base)
        for when in ("before", "after"):
            point = f"{group} {when} {told}"
            if point in points:
                kill_once(marks, point.replace("/", "|"))
            if when == "before":
                write(storage, name, fill)

    LocalStorage.write = killing
    for path in requests:
        Queue(queue).add(read_request(path))
    sys.argv = ["imu-ray", "run", queue, "--config", config]
    return main("request")


def forked(*arguments):
    """How an attempt in a process of its own ended: its exit status, or minus the signal."""
    child = os.fork()
    if child == 0:
        os._exit(attempt(*arguments) or 0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    queue, config, plan, marks = sys.argv[1:]
    plan = json.loads(Path(plan).read_text())
    endings = []
    for group, requests in enumerate(plan["groups"], 1):
        endings.append([forked(queue, config, group, requests, plan["points"], marks)])
        while endings[-1][-1] < 0:
            endings[-1].append(forked(queue, config, group, requests, plan["points"], marks))
    print(json.dumps(endings))
