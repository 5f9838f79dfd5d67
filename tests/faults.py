"""Deterministic faults: a process kills itself once, marked by a token file, with no timer and no race."""

import functools
import os
import resource
import signal
from dataclasses import dataclass
from pathlib import Path

from architectures import named
from samples import Pairs

from imu_ray.demo import digits_cnn
from imu_ray.updates.stopping import StopTarget


def once(folder, key):
    """Whether ``key`` comes up for the first time, in whatever process."""
    try:
        os.close(os.open(Path(folder) / key, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def kill_once(folder, key, node=False):
    """SIGKILL this process, or its node (the raylet, parent of every worker), the first time that ``key`` comes up."""
    if once(folder, key):
        os.kill(os.getppid() if node else os.getpid(), signal.SIGKILL)


class MarkingPairs(Pairs):
    """Pairs with a folder to leave marks in."""

    def __init__(self, inputs, labels, folder, row=None):
        super().__init__(inputs, labels)
        self.folder, self.row = str(folder), row


class KillingPairs(MarkingPairs):
    """Kills the worker that reads row ``row`` for the first time."""

    def __getitem__(self, row):
        if row == self.row:
            kill_once(self.folder, f"row{row}")
        return super().__getitem__(row)


class KillBefore:
    """A picklable function that kills its worker the first time that it is called, then does its work."""

    def __init__(self, function, folder, key):
        self.function, self.folder, self.key = function, str(folder), key

    def __call__(self, *values, **more):
        kill_once(self.folder, self.key)
        return self.function(*values, **more)


@dataclass(frozen=True)
class KillingTarget(StopTarget):
    """A stop target that kills the worker which first looks at it at a given step."""

    folder: str = ""
    step: int = 0

    def reached(self, record):
        if record["step"] == self.step:
            kill_once(self.folder, f"step{self.step}")
        return super().reached(record)


def announce(folder):
    """Tell whoever reads the named pipe ``announce`` that we are here, then wait on ``never`` until killed."""
    with open(Path(folder) / "announce", "w"):
        pass
    with open(Path(folder) / "never"):
        pass


class HangingPairs(MarkingPairs):
    """Announces itself and hangs at row 20."""

    def __getitem__(self, row):
        if row == 20:
            announce(self.folder)
        return super().__getitem__(row)


@dataclass(frozen=True)
class HangingTarget(StopTarget):
    """Announces itself and hangs at step 6."""

    folder: str = ""

    def reached(self, record):
        if record["step"] == 6:
            announce(self.folder)
        return False


def failing_model(**options):
    """A model that fails on whole blocks, after its head was found with one sample."""
    model = named(**options)
    model.register_forward_pre_hook(fail_on_blocks)
    return model


def fail_on_blocks(module, inputs):
    if len(inputs[0]) > 1:
        raise RuntimeError("out of luck")


@dataclass(frozen=True)
class FullDiskTarget(StopTarget):
    """From step 4 on, no file of this process may grow past 500 bytes."""

    def reached(self, record):
        if record["step"] == 4:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (500, resource.RLIM_INFINITY))
        return False


@dataclass(frozen=True)
class NodeLosingTarget(KillingTarget):
    """Kills the node of whoever first gets to a given step."""

    def reached(self, record):
        if record["step"] == self.step:
            kill_once(self.folder, "node", node=True)
        return False


def _count(log, model, inputs):
    if len(inputs[0]) > 1:
        with open(log, "ab") as file:
            file.write(b".")


def counting_digits(log):
    """The demo's CNN, which appends a byte to a file for every forward call that sees more than one sample."""
    model = digits_cnn()
    model.register_forward_pre_hook(functools.partial(_count, log))
    return model
