"""Progress of long work: a bar on a terminal, otherwise one line every ten seconds."""

import sys
import time
from types import TracebackType

from tqdm import tqdm

LINE_SECONDS = 10.0


class Progress:
    """Counts finished units and samples of one stage; a context manager. A quiet one only counts."""

    def __init__(self, stage: str, total: int, unit: str, *, quiet: bool = False) -> None:
        self.stage, self.total, self.unit = stage, total, unit
        self.done = self.samples = 0
        self.started = self.last_line = time.monotonic()
        self.quiet = quiet
        self.bar = tqdm(total=total, desc=stage, unit=unit, leave=False) if sys.stderr.isatty() and not quiet else None

    def advance(self, units: int = 1, samples: int = 0, note: str = "") -> None:
        """Record finished units; ``note`` stands at the end of the line."""
        self.done += units
        self.samples += samples
        now = time.monotonic()
        elapsed = max(now - self.started, 1e-9)
        rate = f"{self.samples / elapsed:.0f} samples/s" if self.samples else ""
        tail = ", ".join(part for part in (rate, note) if part)
        if self.bar is not None:
            self.bar.set_postfix_str(tail, refresh=False)
            self.bar.update(units)
        elif not self.quiet and now - self.last_line >= LINE_SECONDS:
            self.last_line = now
            left = elapsed / self.done * (self.total - self.done) if self.done else float("inf")
            line = ", ".join(part for part in (f"{self.done} of {self.total} {self.unit}", tail, f"{left:.0f} s left") if part)
            print(f"{self.stage}: {line}", file=sys.stderr, flush=True)

    def __enter__(self) -> "Progress":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if self.bar is not None:
            self.bar.close()
