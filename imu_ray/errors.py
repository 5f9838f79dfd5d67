"""Every error that imu_ray raises on purpose.

A message says what is wrong (with the value), what was expected and what to do. All survive pickling, because they are
raised in Ray workers and read in the driver.
"""

import difflib
import traceback
from collections.abc import Iterable


class ImuError(Exception):
    """Base class: catch it to catch everything that imu_ray raises on purpose."""


class ConfigError(ImuError):
    """A setting is unknown or out of range, or two settings contradict each other."""


class ForgetSetError(ImuError):
    """The forget set (or an evaluation set) is missing, malformed or holds a row that cannot be used."""


class UnsupportedModelError(ImuError):
    """The model has no classifier head that the method can work on."""


class EmptySelectionError(ImuError):
    """No sample was kept for the ascent, so there is nothing to ascend on."""


class NonFiniteError(ImuError):
    """A NaN or an infinity where a finite number is needed."""


class CheckpointError(ImuError):
    """A checkpoint or a run directory cannot be read, does not fit or must not be overwritten."""


class RequestError(ImuError):
    """A deletion request, or the queue that it is in, cannot be used."""


class StageFailedError(ImuError):
    """A stage of the job failed for a reason outside the settings and the data; the cause is in the message."""


def is_refusal(error: BaseException) -> bool:
    """Whether settings or inputs were refused (status ``refused``), rather than that the work failed."""
    return isinstance(error, ImuError) and not isinstance(error, StageFailedError | EmptySelectionError)


def raised_in(error: BaseException) -> str:
    """``KeyError in a.py, line 3``: kind and place of an error without its text, which may hold what a sample holds."""
    line = traceback.extract_tb(error.__traceback__)[-1]
    return f"{type(error).__name__} in {line.filename}, line {line.lineno}"


def nearest(name: str, valid: Iterable[str]) -> str:
    """Remedy for a name that is not registered: the near ones, or all of them."""
    names = sorted(valid)
    close = difflib.get_close_matches(name, names, n=3, cutoff=0.6)
    close = close or [other for other in names if other.rsplit(".", 1)[-1] == name.rsplit(".", 1)[-1]]
    return f"did you mean {', '.join(close)}?" if close else f"expected one of {', '.join(names)}"
