"""Order statistics of a column that nobody holds: counted by their leading bits in one pass, picked out in the next."""

import math
from collections.abc import Callable, Iterable

import numpy as np
import numpy.typing as npt

Column = npt.NDArray[np.float64]
Parts = Callable[[], Iterable[Column]]  # a column, a part at a time and in order, as often as it is asked for

# Of a float64, what is left is the exponent and four bits of the fraction: 16 bins for each doubling. The order of non-negative numbers is
# that of their bits.
SHIFT = 48
BINS = 1 << (63 - SHIFT)


class OrderStatistics:
    """What stands where in the ascending order of a column of non-negative numbers; exact.

    In place of the column it holds the counts of the bins (256 kB) and, during ``at``, the values that share a bin with one that is asked
    for: some percent of a column that spreads over a few orders of magnitude, all of one that hardly spreads.

    Attributes:
        count: numbers in the column.
    """

    def __init__(self, parts: Parts) -> None:
        self._parts = parts
        bins = np.zeros(BINS, np.int64)
        for part in parts():
            bins += np.bincount(_bin(part), minlength=BINS)
        self._up_to = np.cumsum(bins)
        self.count = int(self._up_to[-1])

    def at(self, *ranks: int) -> list[tuple[float, int]]:
        """For each rank, counted from 0, the value there and how many of the column do not exceed it; one more pass for all."""
        wanted = np.searchsorted(self._up_to, ranks, side="right")
        held: dict[int, list[Column]] = {bin_: [] for bin_ in wanted.tolist()}
        for part in self._parts():
            bins = _bin(part)
            for bin_, values in held.items():
                values.append(part[bins == bin_])
        ordered, found = {}, []
        for bin_ in list(held):
            ordered[bin_] = np.concatenate(held.pop(bin_))
            ordered[bin_].sort()
        for rank, bin_ in zip(ranks, wanted.tolist(), strict=True):
            below = int(self._up_to[bin_ - 1]) if bin_ else 0
            value = ordered[bin_][rank - below]
            found.append((float(value), below + int(np.searchsorted(ordered[bin_], value, side="right"))))
        return found


def neighbours(level: float, count: int) -> tuple[int, int, float]:
    """The ranks between which a quantile of ``count`` numbers lies, and its place from the first to the second, in [0, 1)."""
    place = level * (count - 1)
    low = math.floor(place)
    return low, min(low + 1, count - 1), place - low


def quantile(parts: Parts, level: float) -> float:
    """A quantile of a column of non-negative numbers, in two passes; the bits of ``numpy.quantile``, which holds the column twice."""
    ordered = OrderStatistics(parts)
    low, high, share = neighbours(level, ordered.count)
    (lower, _), (upper, _) = ordered.at(low, high)
    return between(lower, upper, share)


def between(lower: float, upper: float, share: float) -> float:
    """Linear interpolation, rounded as that of ``numpy.quantile``."""
    return float(np.quantile([lower, upper], share))


def _bin(part: Column) -> npt.NDArray[np.int64]:
    return part.view(np.int64) >> SHIFT
