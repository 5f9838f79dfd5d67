"""A queue of deletion requests: files in a directory or a bucket. No server, and no state but these files.

``requests/ID.json`` is written once, when a request is added. ``batches/N.json`` begins a batch, ``batches/N.parquet``
has its ids, ``runs/N`` is its run directory, ``answers/ID.json`` says how a request ended. ``current.json`` names the
current model and the last batch that is closed. A batch that has begun is open until ``current.json`` says that it is
closed; that one write, the last, ends it. Whoever finds an open batch takes it up, and writes the same again.
"""

import contextlib
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, TypeVar

import pyarrow as pa
from pydantic import Field, ValidationError

from imu_ray.errors import RequestError
from imu_ray.models.checkpoint import INDEX, PICKLED, SINGLE
from imu_ray.requests.lineage import LINEAGE, Lineage
from imu_ray.requests.request import Request
from imu_ray.run.directory import MODEL, MODEL_FOLDER, RunDirectory
from imu_ray.run.record import Part, now
from imu_ray.run.storage import below, open_storage

CURRENT = "current.json"
AGAIN = ("not_reached", "failed")  # states of which a request can be tried again
P = TypeVar("P", bound=Part)


class Rows(Part):
    """What became of the ids of a request: each is one of the last four."""

    asked: int
    found: int = 0
    forgotten_before: int = 0
    missing: int = 0
    left_out: int = 0

    @property
    def in_words(self) -> str:
        """What there is to say of ids that were not forgotten; empty where there are none."""
        told = [
            f"{count} of its {self.asked} ids {'is' if count == 1 else 'are'} {what}"
            for count, what in ((self.missing, "not in the data"), (self.left_out, "of a row that cannot be used"))
            if count
        ]
        return ", ".join(told)


class Answer(Part):
    """How a request ended. ``reason`` holds no id; ``error`` may name a row.

    ``runs`` are those that forgot its rows, ``model`` is the hash of the model after the last of them.
    """

    format: Literal[1] = 1
    request_id: str
    state: Literal["completed", "not_reached", "failed", "cancelled"]
    reason: str
    error: str | None = None
    answered: str
    rows: Rows
    batch: int | None = None
    runs: list[str] = Field([])
    run_status: str | None = None
    verdict: str | None = None
    model: str | None = None


def states_of(answers: Iterable[Answer]) -> dict[str, str]:
    """State by id of a request."""
    return {answer.request_id: answer.state for answer in answers}


class Batch(Part):
    """Requests that are carried out together, on one model, with the settings that ``identity`` stands for.

    ``parent_run`` is the run whose checkpoint ``parent`` is the hash of; None: the model of the job file. ``rows`` has
    the counts of each request that waits for it, and is empty in a replay. Of ``size`` ids the data has a row.
    """

    format: Literal[1] = 1
    number: int
    kind: Literal["requests", "replay"]
    created: str
    identity: str
    parent: str
    parent_run: str | None
    requests: list[str]
    rows: dict[str, Rows]
    size: int

    @property
    def run(self) -> str:
        """Its run directory, relative to the queue."""
        return f"runs/{self.number:04d}"

    @property
    def ids(self) -> str:
        """Its ids: a Parquet file with one column, ``id``."""
        return f"batches/{self.number:04d}.parquet"


class Current(Part):
    """The last batch that is closed, and the current model: that of ``run``, or of the job file where there is none."""

    format: Literal[1] = 1
    closed: int = 0
    run: str | None = None
    model: str | None = None
    moved: str | None = None


@dataclass(frozen=True)
class Standing:
    """A request, where it stands, and its answer."""

    request: Request
    state: str
    answer: Answer | None


class Queue:
    """The files of a queue. What changes answers or the current model is called by who holds ``locked``."""

    def __init__(self, location: str | Path) -> None:
        self.files = RunDirectory(location)

    @property
    def location(self) -> Path | str:
        """The absolute path, or the URI as it was given."""
        return self.files.location

    def at(self, name: str) -> str:
        """Path or URI of a file or folder of the queue."""
        return below(self.location, *name.split("/"))

    def require(self) -> None:
        """``RequestError`` where there is no queue."""
        if not self._names("requests"):
            raise RequestError(f"{self.location} holds no request; expected a queue that `imu-ray request add` made")

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep others from running or cancelling; ``CheckpointError`` when somebody does."""
        with self.files.locked():
            yield

    def add(self, request: Request) -> bool:
        """Take a request in; False where it is there already.

        Raises:
            RequestError: another request with its id is there.
            CheckpointError: the queue cannot be written, or another request is just being added.
        """
        name = f"requests/{request.request_id}.json"
        with RunDirectory(self.at("requests")).locked():
            known = self._read(Request, name)
            if known is None:
                self._write(name, request)
                return True
        if known.content != request.content:
            raise RequestError(
                f"request {request.request_id} is in the queue already, added {known.added}, and asks for something "
                "else; expected a new subject_request_id for another request"
            )
        return False

    def request(self, request_id: str) -> Request:
        """A request; ``RequestError`` where there is none of that id."""
        found = self._read(Request, f"requests/{request_id}.json")
        if found is None:
            raise RequestError(f"the queue {self.location} has no request {request_id!r}; see `imu-ray request status`")
        return found

    def standings(self) -> list[Standing]:
        """Every request in the order in which they came, with its state."""
        open_batch = self.open_batch()
        found = []
        for name in self._names("requests"):
            request = self.request(name.removesuffix(".json"))
            answer = self.answer(request.request_id)
            if open_batch is not None and request.request_id in open_batch.rows:
                found.append(Standing(request, "in_progress", None))  # one that is written counts when all are
            else:
                found.append(Standing(request, answer.state if answer else "pending", answer))
        return sorted(found, key=lambda each: (each.request.added, each.request.request_id))

    def answer(self, request_id: str) -> Answer | None:
        """The answer of a request; None while there is none."""
        return self._read(Answer, f"answers/{request_id}.json")

    def write_answer(self, answer: Answer) -> None:
        """Answer a request."""
        self._write(f"answers/{answer.request_id}.json", answer)

    def current(self) -> Current:
        """The last batch that is closed, and the current model."""
        return self._read(Current, CURRENT) or Current()

    def lineage(self) -> Lineage:
        """That of the current model."""
        run = self.current().run
        found = None if run is None else self._read(Lineage, f"{run}/{LINEAGE}")
        if run is not None and found is None:
            raise RequestError(f"{self.location}/{run} holds no {LINEAGE}; expected that of the current model")
        return found or Lineage()

    def write_lineage(self, batch: Batch, lineage: Lineage) -> None:
        """Put the lineage beside the checkpoint of a batch."""
        self._write(f"{batch.run}/{LINEAGE}", lineage)

    def open_batch(self) -> Batch | None:
        """The batch that has begun and is not closed."""
        return self._read(Batch, f"batches/{self.current().closed + 1:04d}.json")

    def begin(self, batch: Batch, ids: Iterable[str]) -> None:
        """Begin a batch: its ids first, so that it has them when it is there."""
        self.files.write_table(batch.ids, pa.table({"id": pa.array(sorted(ids), pa.string())}))
        self._write(f"batches/{batch.number:04d}.json", batch)

    def close(self, batch: Batch, model: str | None) -> None:
        """End a batch, with the hash of the new current model, or None where the current one stays."""
        current = self.current()
        moved = {} if model is None else {"run": batch.run, "model": model, "moved": now()}
        self._write(CURRENT, current.model_copy(update={"closed": batch.number, **moved}))

    def checkpoint(self, run: str | None) -> str | None:
        """The checkpoint of a run of the queue, in the form that the first one came in; None for none."""
        if run is None:
            return None
        written = self._names(f"{run}/{MODEL_FOLDER}")
        pretrained = any(name.endswith("config.json") for name in written)  # it keeps shared tensors once
        kept = [] if pretrained else [name for name in (PICKLED, INDEX, SINGLE) if name in written]
        return self.at(f"{run}/{MODEL_FOLDER}/{kept[0]}" if kept else f"{run}/{MODEL}")

    def forgotten(self, lineage: Lineage) -> dict[str, str]:
        """The run that forgot each id that the current model has forgotten since it came from outside."""
        found: dict[str, str] = {}
        for entry in lineage.since_root:
            bad = RunDirectory(self.at(entry.run)).read_manifest()["forget_set"]["bad_rows"]
            left_out = {row["sample_id"] for row in bad}
            ids = self.files.read_table(f"batches/{entry.batch:04d}.parquet")["id"].to_pylist()
            found |= dict.fromkeys((sample_id for sample_id in ids if sample_id not in left_out), entry.run)
        return found

    def _names(self, folder: str) -> list[str]:
        return sorted(open_storage(self.at(folder)).entries())

    def _write(self, name: str, part: Part) -> None:
        self.files.write_text(name, part.model_dump_json(indent=2) + "\n")

    def _read(self, kind: type[P], name: str) -> P | None:
        with self.files.storage.fetch(name) as path:
            if path is None:
                return None
            try:
                return kind.model_validate_json(path.read_bytes())
            except ValidationError:
                raise RequestError(
                    f"{self.location}/{name} is no {kind.__name__.lower()} of this release; expected a file that "
                    "imu-ray request wrote; put it back as it was"
                ) from None
