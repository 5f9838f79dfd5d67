"""What waits becomes one batch: doubles go, what is forgotten already or has no row is answered at once."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from imu_ray.requests.queue import Answer, Rows
from imu_ray.requests.request import Request
from imu_ray.run.record import now


@dataclass
class Merged:
    """What waits, sorted out.

    Attributes:
        ids: of the batch, each once, sorted; the data has a row of each.
        rows: counts of every request of the batch.
        settled: answers of requests for which nothing is to be done, or can be.
        doubles: ids that were asked for more than once.
    """

    ids: list[str] = field(default_factory=list)
    rows: dict[str, Rows] = field(default_factory=dict)
    settled: list[Answer] = field(default_factory=list)
    doubles: int = 0

    @property
    def totals(self) -> dict[str, int]:
        """Counts over all requests that wait."""
        rows = [*self.rows.values(), *(answer.rows for answer in self.settled)]
        counted = {name: sum(getattr(each, name) for each in rows) for name in ("asked", "forgotten_before", "missing")}
        return {"requests": len(rows), **counted, "doubles": self.doubles, "to_forget": len(self.ids)}


def open_ids(waiting: Sequence[Request], forgotten: Collection[str]) -> list[str]:
    """The ids that are to be looked up in the data, each once."""
    return sorted({sample_id for request in waiting for sample_id in request.ids if sample_id not in forgotten})


def merge(
    waiting: Sequence[Request], forgotten: Mapping[str, str], found: Collection[str], ignore_missing: bool
) -> Merged:
    """Sort out what waits.

    A request of which no id has a row is failed: it must not look done. One with some is failed too unless
    ``ignore_missing``; then the others are forgotten and the count is told. One whose ids were all forgotten by earlier
    runs is completed, and refers to them.

    Args:
        waiting: requests, in the order in which they came.
        forgotten: the run that forgot an id, for every id of the lineage.
        found: of ``open_ids`` those that the data has a row of.
        ignore_missing: whether ids without a row may be passed over (``forget_set.missing_ids``).
    """
    merged, ids = Merged(), set[str]()
    for request in waiting:
        before = [sample_id for sample_id in request.ids if sample_id in forgotten]
        here = [sample_id for sample_id in request.ids if sample_id not in forgotten and sample_id in found]
        missing = len(request.ids) - len(before) - len(here)
        rows = Rows(asked=len(request.ids), found=len(here), forgotten_before=len(before), missing=missing)
        merged.doubles += request.doubles + sum(sample_id in ids for sample_id in here)
        if missing and (not (before or here) or not ignore_missing):
            remedy = "" if not (before or here) else "; forget_set.missing_ids=ignore forgets the others"
            what = "none of its ids is in the data" if not (before or here) else rows.in_words
            answer = Answer(
                request_id=request.request_id, state="failed", reason=what + remedy, answered=now(), rows=rows
            )
            merged.settled.append(answer)
        elif not here:
            runs = sorted({forgotten[sample_id] for sample_id in before})
            told = f"forgotten already by {', '.join(runs)}"
            merged.settled.append(
                Answer(
                    request_id=request.request_id,
                    state="completed",
                    reason="; ".join(filter(None, [told, rows.in_words])),
                    answered=now(),
                    rows=rows,
                    runs=runs,
                )
            )
        else:
            merged.rows[request.request_id] = rows
            ids.update(here)
    merged.ids = sorted(ids)
    return merged
