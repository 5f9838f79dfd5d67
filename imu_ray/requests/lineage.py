"""The lineage of a model: from which one it came, run by run, for which requests, and by which record."""

from collections.abc import Mapping
from typing import Any, Literal

from pydantic import Field

from imu_ray.run.directory import MANIFEST, RunDirectory
from imu_ray.run.metrics import read_metrics
from imu_ray.run.record import Part

LINEAGE = "lineage.json"
DONE = ("reached", "already_met", "epochs_done")  # endings after which the rows count as forgotten


class Outcome(Part):
    """How the run of a batch ended, as its record says.

    Attributes:
        status: of the update, and ``reason``.
        verdict: the status word of the record.
        parent: hash of the model before.
        model: hash of the model after.
        manifest: SHA-256 of the record.
        left_out: ids of rows that could not be used (``forget_set.on_bad_row: skip``).
        metrics: before and after.
    """

    status: str
    reason: str
    verdict: str | None
    parent: str
    model: str
    manifest: str
    left_out: list[str]
    metrics: dict[str, Any]

    @property
    def done(self) -> bool:
        """Whether its rows count as forgotten, so that its model may become the current one."""
        return self.status in DONE


class Entry(Part):
    """One step of the lineage: ``parent`` became ``model``; hashes are of all tensors by name.

    ``kind`` is ``replay`` where ``parent`` is another model than the one before, to which its requests were applied
    again. ``run`` is relative to the queue, ``manifest`` the SHA-256 of its record, ``rows`` how many were forgotten.
    """

    batch: int
    kind: Literal["requests", "replay"]
    parent: str
    model: str
    run: str
    manifest: str
    status: str
    verdict: str | None
    requests: list[str]
    rows: int


class Lineage(Part):
    """All steps up to a model, the first one first. It lies beside the checkpoint, without an id of a sample."""

    format: Literal[1] = 1
    entries: list[Entry] = Field([])

    @property
    def since_root(self) -> list[Entry]:
        """The steps from the last model that came from outside."""
        roots = [place for place, entry in enumerate(self.entries) if entry.kind == "replay"]
        return self.entries[roots[-1] if roots else 0 :]

    @property
    def root(self) -> str | None:
        """Hash of that model."""
        steps = self.since_root
        return steps[0].parent if steps else None

    def with_step(self, entry: Entry) -> "Lineage":
        """One step longer."""
        return Lineage(entries=[*self.entries, entry])

    def breaks(self) -> list[str]:
        """Where a step does not begin with the model that the one before it ended with."""
        pairs = zip(self.entries, self.entries[1:], strict=False)
        return [
            f"{after.run} began with the model {after.parent[:12]}, {before.run} ended with {before.model[:12]}"
            for before, after in pairs
            if after.kind != "replay" and after.parent != before.model
        ]


def read_outcome(run: RunDirectory) -> Outcome | None:
    """How a run ended; None while it has not."""
    if MANIFEST not in run.storage.entries():
        return None
    manifest: Mapping[str, Any] = run.read_manifest()
    if manifest.get("status") != "complete":
        return None
    ascent, verdict = manifest["ascent"], manifest.get("verdict")
    return Outcome(
        status=ascent["status"],
        reason=ascent["reason"],
        verdict=verdict["word"] if verdict else None,
        parent=manifest["model"]["hash_before"],
        model=manifest["model"]["hash_after"],
        manifest=run.digest(MANIFEST),
        left_out=[row["sample_id"] for row in manifest["forget_set"]["bad_rows"]],
        metrics=read_metrics(run),
    )
