"""Figures for Prometheus through ``ray.util.metrics``, with the stage as tag; the dashboard's agents export them.

A process reports every few seconds, so that a run of seconds may end unseen; its manifest has the same figures.
"""

import functools
import time

from ray.util.metrics import Counter, Gauge, Metric

COUNTERS = {
    "samples": "samples done",
    "shards_done": "shards done",
    "shards_retried": "shards begun again after a lost worker or node",
}
GAUGES = {
    "samples_per_second": "samples per second since the stage began",
    "feature_bytes": "bytes of features in the object store",
    "stage_seconds": "seconds that the stage took",
}


@functools.cache
def _metric(name: str) -> Metric:
    kind, doc = (
        (Counter, COUNTERS[name]) if name in COUNTERS else (Gauge, GAUGES.get(name, f"{name} at the last check"))
    )
    return kind(f"imu_ray_{name}", description=doc, tag_keys=("stage",))


# What is to be counted since the last flush, and the last values of the gauges.
_counted: dict[tuple[str, str], float] = {}
_gauges: dict[tuple[str, str], float] = {}
_flushed = [0.0]


def count(name: str, value: float, stage: str) -> None:
    """Add to a counter at the next flush."""
    _counted[name, stage] = _counted.get((name, stage), 0.0) + value


def gauge(name: str, value: float, stage: str) -> None:
    """Set a gauge at the next flush, and again at every one after it."""
    _gauges[name, stage] = value


def flush(every: float = 0.0) -> None:
    """Record the counters and every gauge, unless the last flush is less than ``every`` seconds ago.

    Ray exports a gauge once for each time it is set: one that is set and left alone is gone at the next export.
    """
    now = time.monotonic()
    if now - _flushed[0] < every:
        return
    _flushed[0] = now
    for (name, stage), value in _counted.items():
        if value > 0:
            _metric(name).inc(value, tags={"stage": stage})
    _counted.clear()
    for (name, stage), value in _gauges.items():
        _metric(name).set(value, tags={"stage": stage})
