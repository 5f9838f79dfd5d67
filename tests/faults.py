"""Deterministic faults: a process kills itself once, marked by a token file, with no timer and no race."""

import os
import signal
from pathlib import Path

from samples import Pairs


def kill_once(folder, key):
    """SIGKILL this process the first time that ``key`` comes up; later calls do nothing."""
    try:
        os.close(os.open(Path(folder) / key, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return
    os.kill(os.getpid(), signal.SIGKILL)


class KillingPairs(Pairs):
    """Kills the worker that reads row ``row`` for the first time."""

    def __init__(self, inputs, labels, folder, row):
        super().__init__(inputs, labels)
        self.folder, self.row = str(folder), row

    def __getitem__(self, row):
        if row == self.row:
            kill_once(self.folder, f"row{row}")
        return super().__getitem__(row)


class KillBefore:
    """A picklable function that kills its worker the first time it is called for a given size of input, then does its work."""

    def __init__(self, function, folder, key):
        self.function, self.folder, self.key = function, str(folder), key

    def __call__(self, value):
        kill_once(self.folder, self.key)
        return self.function(value)
