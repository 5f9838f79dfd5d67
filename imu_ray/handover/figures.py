"""The figures of a finished run by name and side, and why it lacks others: what a comparison is made from."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

SIDES = ("before", "after", "retrained")
NO_SIDE = {
    "before": "no original was given to the audit",
    "retrained": "no retrained model was given (audit.reference)",
}
# Parts that stand beside the sides, and what the sides are called in them.
PARTS = {
    "recovery": {"before": "before", "after": "after", "retrained": "reference"},
    "reference": {"before": "before", "after": "after"},
    "gaps": {"before": "do_nothing", "after": "unlearned"},
}
# Counts, settings, and what is no figure of the whole.
NO_FIGURES = (
    "samples", "rows", "labelled", "classes", "queries", "gallery", "left_out", "tokens", "models", "steps", "members",
    "membership.non_members", "trained_on", "per_class", "destinations", "roc", "band", "metrics",
)  # fmt: skip
Key = tuple[str, str]  # name, such as forget.accuracy, and side; the side is empty where a figure is of the run


@dataclass(frozen=True)
class RunFigures:
    """What a run measured.

    Attributes:
        record: its manifest.
        metrics: its metrics.
        numbers: figures by name and side. Of an interval the mean; of steps that were measured on the way, the last.
        told: by name and side why something was skipped.
    """

    record: Mapping[str, Any]
    metrics: Mapping[str, Any]
    numbers: Mapping[Key, float]
    told: Mapping[Key, str]

    @classmethod
    def of(cls, record: Mapping[str, Any], metrics: Mapping[str, Any]) -> "RunFigures":
        """From what ``manifest.json`` and ``metrics.json`` hold."""
        numbers, told = dict[Key, float](), dict[Key, str]()
        parts = [(side, "", metrics.get(side, {})) for side in SIDES]
        for group, sides in PARTS.items():
            given = metrics.get(group, {})
            given = given.get("sides", given)
            parts += [(side, group, given.get(name, {})) for side, name in sides.items()]
        for side, prefix, part in parts:
            for name, value in _leaves(part, prefix):
                if isinstance(value, str):
                    told[name, side] = value
                else:
                    numbers[name, side] = value
        return cls(record, metrics, numbers | _costs(record), told)

    def reason(self, name: str, side: str) -> str:
        """Why there is no such figure."""
        stage, status = self.record["stage"], self.record["status"]
        group, *inner = name.split(".")
        for end in range(len(inner) + 1, 0, -1):
            if (why := self.told.get((".".join([group, *inner][:end]), side))) is not None:
                return why
        if status != "complete":
            return f"the run is {status}"
        if group == "seconds":
            return f"the run had no stage {inner[0]}"
        if group == "update":
            return f"{stage} makes no update"
        if not self.metrics:
            return f"{stage} measures nothing"
        if group in ("reference", "gaps") and group not in self.metrics:
            return NO_SIDE["retrained"]
        if side not in self.metrics:
            return NO_SIDE.get(side, f"the run has nothing {side}")
        if group == "recovery":
            found = self.metrics.get(group, {}).get(PARTS[group][side], {})
            return "the test broke off" if inner[0] in found else f"audit.recovery does not name {inner[0]}"
        known = self.metrics[side] if group not in PARTS else self.metrics
        return "it was not measured" if group in known else f"the run has no {group}"


def _leaves(part: Mapping[str, Any], prefix: str) -> Iterator[tuple[str, float | str]]:
    """Numbers by dotted name; as text the reasons of what was skipped."""
    for key, value in part.items():
        name = f"{prefix}.{key}" if prefix else key
        if key == "skipped":
            named = {prefix: value} if isinstance(value, str) else {f"{prefix}.{k}": v for k, v in value.items()}
            yield from named.items()
        elif key in NO_FIGURES or name in NO_FIGURES:
            continue
        elif isinstance(value, Mapping) and "mean" not in value:
            yield from _leaves(value, name)
        else:
            value = value["mean"] if isinstance(value, Mapping) else value
            last = value[-1] if isinstance(value, list) and value else value
            if isinstance(last, int | float) and not isinstance(last, bool):
                yield name, float(last)


def _costs(record: Mapping[str, Any]) -> dict[Key, float]:
    """What the update did, and seconds of each stage and of all."""
    seconds, ascent = record.get("seconds", {}), record.get("ascent") or {}
    found = {f"update.{key}": ascent.get(key) for key in ("steps", "kept_samples", "output_change", "parameter_drift")}
    found |= {f"seconds.{stage}": value for stage, value in seconds.items()} | {"seconds.total": sum(seconds.values())}
    return {(name, ""): float(value) for name, value in found.items() if value is not None}
