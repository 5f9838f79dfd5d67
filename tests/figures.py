"""What the shipped schema says of the metrics of a run, and whether it would see a figure of another name or type."""

import copy
import json
import re
from pathlib import Path

from jsonschema import Draft202012Validator

from imu_ray.run.metrics import metrics_schema

CLASS = re.compile(r"[0-9]+")


def refuse(constant):
    raise AssertionError(f"{constant} stands in the metrics")


def check_metrics(run_dir, *sets):
    """The metrics of a run, which fit the schema, and would not with any name or type changed.

    ``sets`` are the names of the evaluation sets, which a caller chooses.
    """
    found = json.loads((Path(run_dir) / "metrics.json").read_text(), parse_constant=refuse)
    validator = Draft202012Validator(metrics_schema())
    assert [f"{each.json_path}: {each.message}" for each in validator.iter_errors(found)] == []
    seen = set()
    for path in paths(found):
        kind = tuple(CLASS.sub("*", str(key)) for key in path)  # one of all classes, or numbers of a list, will do
        if kind not in seen:
            seen.add(kind)
            for what, changed in changes(found, path, sets):
                assert not validator.is_valid(changed), f"{what} {'.'.join(map(str, path))} is not seen"
    return {name: value for name, value in found.items() if name != "$schema"}


def paths(value, path=()):
    """The place of every value inside another."""
    inner = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list) else ()
    for key, each in inner:
        yield (*path, key)
        yield from paths(each, (*path, key))


def changes(found, path, sets):
    """The metrics with one name changed, unless the caller chose it, and with a value of another type."""
    *outer, last = path
    chosen = last in sets or (CLASS.fullmatch(str(last)) and "quantise" not in outer)
    for what in ("another type of",) if chosen else ("another name of", "another type of"):
        changed = copy.deepcopy(found)
        place = at(changed, outer)
        if what == "another name of":
            place[f"{last}s"] = place.pop(last)
        else:
            place[last] = 1.5 if isinstance(place[last], str) else "text"
        yield what, changed


def at(value, path):
    for key in path:
        value = value[key]
    return value
