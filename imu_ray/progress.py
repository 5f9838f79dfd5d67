"""Progress of long work: a bar on a terminal or in a notebook, otherwise a line every ten seconds."""

import logging
import sys
import time
from typing import Any

from tqdm.auto import tqdm

from imu_ray.events import event, logger

LINE_SECONDS = 10.0


class Progress:
    """Counts finished units and samples of one stage; a context manager. A quiet one only counts."""

    def __init__(self, stage: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.samples = 0
        self.rate = 0.0
        self.started = self.last_line = time.monotonic()
        self.quiet = quiet
        self.bar = tqdm(total=total, desc=stage, unit=unit, leave=False) if _interactive() and not quiet else None

    def advance(self, units: int = 1, samples: int = 0, note: str = "") -> None:
        """Record finished units; ``note`` stands at the end of the line. Zero units say that work still goes on."""
        self.done += units
        self.samples += samples
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        self.rate = self.samples / elapsed
        rate = f"{self.rate:.0f} samples/s" if self.samples else ""
        tail = ", ".join(part for part in (rate, note) if part)
        if self.bar is not None:
            self.bar.set_postfix_str(tail, refresh=not units)
            self.bar.update(units)
        elif not self.quiet and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            self._say(tail, elapsed / self.done * (self.total - self.done) if self.done else None)

    def _say(self, tail: str, seconds_left: float | None) -> None:
        if logger.isEnabledFor(logging.INFO):
            left = None if seconds_left is None else round(seconds_left)
            counts: dict[str, Any] = {name: getattr(self, name) for name in ("stage", "done", "total", "unit")}
            event("progress", **counts, now=tail, seconds_left=left)
            return
        left_text = "time left unknown" if seconds_left is None else f"{seconds_left:.0f} s left"
        line = ", ".join(part for part in (f"{self.done} of {self.total} {self.unit}", tail, left_text) if part)
        print(f"{self.stage}: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, *error: object) -> None:
        if self.bar is not None:
            self.bar.close()


def _interactive() -> bool:
    return sys.stderr.isatty() or "ipykernel" in sys.modules
