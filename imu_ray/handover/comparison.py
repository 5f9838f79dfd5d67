"""Runs side by side: what differs in their settings, how they ended, every figure of each, and what they cost."""

import dataclasses
import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from imu_ray.audits.report import render_page
from imu_ray.errors import CheckpointError, ConfigError
from imu_ray.handover.export import opened
from imu_ray.handover.figures import SIDES, RunFigures
from imu_ray.run.metrics import read_metrics
from imu_ray.run.storage import open_folder
from imu_ray.section import flatten

SPOKEN = {"before": "before (do nothing)"}
SHOWN = {"status": "status", "ended": "ended", "recipe": "recipe, as chosen", "rows": "rows to forget"}
MACHINE = ("processor", "cpus", "gpus", "device", "threads_per_worker")


@dataclass(frozen=True)
class Figure:
    """One figure of every run.

    Attributes:
        name: its place in ``metrics.json``, such as ``forget.accuracy``; ``update.*`` and ``seconds.*`` of the record.
        side: ``before`` (which is doing nothing), ``after``, ``retrained``; empty where it is of the run.
        values: of each run the number, or why there is none.
    """

    name: str
    side: str
    values: list[float | str]


@dataclass(frozen=True)
class Comparison:
    """Runs side by side; every list has an entry for each run, in the order given.

    Attributes:
        runs: ``name``, ``location``, ``stage``, ``status`` (the status word; of a run that has not ended, that),
            ``ended`` (how the update ended), ``reason``, ``recipe``, ``rows``, ``model`` and ``forget_set`` (digests).
        warnings: why they are no fair comparison, or which part of it is none.
        settings: by dotted name those that differ.
        figures: all that any of the runs has.
    """

    runs: list[dict[str, Any]]
    warnings: list[str] = field(default_factory=list)
    settings: dict[str, list[Any]] = field(default_factory=dict)
    figures: list[Figure] = field(default_factory=list)

    @property
    def reasons(self) -> dict[str, int]:
        """Why figures are missing, with the number by which a table refers to it."""
        told = (each for figure in self.figures for each in figure.values if isinstance(each, str))
        return {reason: number for number, reason in enumerate(dict.fromkeys(told), 1)}

    def to_json(self) -> dict[str, Any]:
        """Plain values; a figure that a run lacks is ``{"skipped": reason}``."""
        found = dataclasses.asdict(self)
        for figure in found["figures"]:
            figure["values"] = [{"skipped": each} if isinstance(each, str) else each for each in figure["values"]]
        return found

    def text(self) -> str:
        """A table for a terminal; what a run lacks has the number of its reason, which stands below."""
        reasons = self.reasons
        rows = [["", *(run["name"] for run in self.runs)]]
        rows += [[title, *(_word(run[key]) for run in self.runs)] for key, title in SHOWN.items()]
        rows += [[name, *map(_word, values)] for name, values in self.settings.items()]
        for each in self.figures:
            side = f", {SPOKEN.get(each.side, each.side)}" if each.side else ""
            cells = [f"[{reasons[value]}]" if isinstance(value, str) else f"{value:.4g}" for value in each.values]
            rows.append([each.name + side, *cells])
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        lines = ["  ".join([row[0].ljust(widths[0]), *map(str.rjust, row[1:], widths[1:])]).rstrip() for row in rows]
        warnings = [f"warning: {each}" for each in self.warnings]
        return "\n".join([*warnings, *lines, *(f"[{n}] not measured: {reason}" for reason, n in reasons.items())])

    def page(self) -> str:
        """The same as a self-contained page."""
        by_part = itertools.groupby(self.figures, lambda each: each.name.partition(".")[0])
        groups = [(part, list(figures)) for part, figures in by_part]
        return render_page("comparison.html.j2", found=self, groups=groups, word=_word, spoken=SPOKEN, shown=SHOWN)

    def write_page(self, path: str | Path) -> None:
        """Write ``page`` to a new file, or below a URI; ``CheckpointError`` where there is one already."""
        storage, name = open_folder(path)
        with storage.fetch(name) as found:
            if found is not None:
                raise CheckpointError(f"{path} is there; expected a new file")
        storage.write(name, lambda target: target.write_text(self.page()))


def compare(*runs: str | Path) -> Comparison:
    """Put runs side by side.

    Args:
        runs: two or more run directories, their URIs, or what ``export_run`` wrote, a folder or ``.zip``.

    Raises:
        CheckpointError: one of them is no run.
        ConfigError: there are fewer than two.
    """
    if len(runs) < 2:
        raise ConfigError(f"runs to compare are {len(runs)}; expected two or more")
    found = []
    for location in runs:
        with opened(location) as run:
            found.append(RunFigures.of(run.read_manifest(), read_metrics(run)))
    described = [
        _described(name, location, each.record) for name, location, each in zip(_names(runs), runs, found, strict=True)
    ]
    settings = [{key: x for key, x in flatten(each.record["config"]).items() if x != {}} for each in found]
    differ = {key: [each.get(key) for each in settings] for key in dict.fromkeys(itertools.chain(*settings))}
    return Comparison(
        described,
        _warnings([run["name"] for run in described], found),
        {key: values for key, values in differ.items() if any(value != values[0] for value in values)},
        [
            Figure(*key, [each.numbers.get(key, each.reason(*key)) for each in found])
            for key in sorted({key for each in found for key in each.numbers}, key=_Order(found))
        ],
    )


class _Order:
    """Sorts figures: by the place of their part, then of their name, then by side."""

    def __init__(self, runs: Sequence[RunFigures]) -> None:
        names = dict.fromkeys(name for run in runs for name, _ in run.numbers)
        self.names = {name: place for place, name in enumerate(names)}
        self.parts = {part: place for place, part in enumerate(dict.fromkeys(name.partition(".")[0] for name in names))}

    def __call__(self, key: tuple[str, str]) -> tuple[int, int, int]:
        name, side = key
        return self.parts[name.partition(".")[0]], self.names[name], SIDES.index(side) if side else 0


def _names(runs: Sequence[str | Path]) -> list[str]:
    """The last part of each path, or the whole where some share it."""
    last = [str(each).partition("?")[0].rstrip("/").rpartition("/")[2] for each in runs]
    return [str(given) if last.count(name) > 1 else name for name, given in zip(last, runs, strict=True)]


def _described(name: str, location: str | Path, record: Mapping[str, Any]) -> dict[str, Any]:
    ascent, verdict, forget = (record.get(key) or {} for key in ("ascent", "verdict", "forget_set"))
    return {
        "name": name,
        "location": str(location),
        "stage": record["stage"],
        "status": verdict.get("word") if record["status"] == "complete" else record["status"],
        "ended": ascent.get("status"),
        "reason": verdict.get("reason", ascent.get("reason")),
        "recipe": ascent.get("recipe"),
        "rows": forget.get("rows_used"),
        "model": record["model"]["hash_before"],
        "forget_set": forget.get("fingerprint"),
    }


def _warnings(names: Sequence[str], runs: Sequence[RunFigures]) -> list[str]:
    """Why figures of these runs, or some of them, are no fair comparison."""
    records = [run.record for run in runs]
    models = [None if record["stage"] == "audit" else record["model"]["hash_before"][:12] for record in records]
    same: dict[str, list[str | None]] = {"begin with different models": models}
    sets = [{"forget": record.get("forget_set"), **record.get("evaluation", {})} for record in records]
    for name in dict.fromkeys(itertools.chain(*sets)):
        told = "forget different rows" if name == "forget" else f"have different rows in the set {name}"
        same[told] = [_rows_of(each.get(name), name, record) for each, record in zip(sets, records, strict=True)]
    same["stand beside different retrained models"] = [run.metrics.get("reference", {}).get("model") for run in runs]
    found = []
    for told, values in same.items():
        given = {name: value[:60] for name, value in zip(names, values, strict=True) if value}
        if len(set(given.values())) > 1:
            each = "; ".join(f"{name}: {value}" for name, value in given.items())
            found.append(f"the runs {told} ({each}): no fair comparison")
    for name, run in zip(names, runs, strict=True):
        if run.record["status"] != "complete":
            found.append(f"{name} has not ended: it is {run.record['status']}")
        if "fingerprint" not in (run.record.get("forget_set") or {"fingerprint": None}):
            found.append(
                f"{name} is an export, which does not tell rows to forget: whether they are the others' is open"
            )
        if run.record["stage"] == "audit":
            found.append(f"{name} is an audit: its record does not say which original the model was made from")
        doubts = {side: run.metrics.get(side, {}).get("membership", {}).get("warning") for side in SIDES}
        found += [f"{name}, {side}: {doubt}" for side, doubt in doubts.items() if doubt]
    if len({record["versions"].get("imu-ray") for record in records}) > 1:
        found.append("the runs are of different versions of imu-ray")
    if len({str([record["hardware"].get(key) for key in MACHINE]) for record in records}) > 1:
        found.append("the runs are of different machines: their seconds are no fair comparison")
    return found


def _rows_of(samples: Mapping[str, Any] | None, name: str, record: Mapping[str, Any]) -> str | None:
    """Which rows a set holds; None where it was not given, or is not told."""
    if samples is None or "fingerprint" not in samples:
        return None
    chosen = {key: record["config"]["forget_set"].get(key) for key in ("size", "size_seed")} if name == "forget" else {}
    part = f", {chosen}" if chosen.get("size") is not None else ""
    return f"{samples['rows_used']} rows {samples['fingerprint'][:12]}{part}"


def _word(value: Any) -> str:
    return "-" if value is None else str(value)
