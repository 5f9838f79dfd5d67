"""What the driver puts into the object store, with the caller's own code where the workers might not find it."""

import contextlib
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import ray
from ray import cloudpickle

from imu_ray.errors import ImuError


def share(value: Any, what: str, kind: type[ImuError]) -> "ray.ObjectRef[Any]":
    """A value in the object store.

    Raises:
        ImuError: of ``kind``; the value cannot be pickled.
    """
    with contextlib.suppress(Exception), own_code_by_value():
        return ray.put(value)
    try:
        return ray.put(value)  # code that cannot travel may still be found by the workers
    except Exception as error:
        raise kind(
            f"{what} cannot be sent to the workers ({type(error).__name__}: {error}); expected what pickles, without "
            "open files, locks and connections; open those where they are used"
        ) from None


@contextlib.contextmanager
def own_code_by_value() -> Iterator[None]:
    """Pickle classes and functions of the caller's own modules with their code (those of ``__main__`` always are)."""
    modules = own_modules()
    for module in modules:
        cloudpickle.register_pickle_by_value(module)
    try:
        yield
    finally:
        for module in modules:
            cloudpickle.unregister_pickle_by_value(module)


def own_modules() -> list[ModuleType]:
    """Imported modules that are neither installed nor built in: of a script's folder, or of the working directory."""
    installed = {Path(sysconfig.get_path(name)).resolve() for name in ("stdlib", "platstdlib", "purelib", "platlib")}
    passed = {"__main__", "imu_ray", *cloudpickle.list_registry_pickle_by_value()}
    found = []
    for name, module in list(sys.modules.items()):
        if "." in name or name in passed or not isinstance(module, ModuleType) or module.__name__ != name:
            continue
        file = getattr(module, "__file__", None) or next(iter(getattr(module, "__path__", ())), None)
        place = Path(file or "").resolve()
        if file and not installed & {*place.parents} and not {"site-packages", "dist-packages"} & {*place.parts}:
            found.append(module)
    return found
