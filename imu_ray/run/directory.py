"""A run directory: which artifacts it holds, and when a run may go on in it."""

import contextlib
import functools
import hashlib
import itertools
import json
import math
import shutil
import tempfile
import threading
import time
import uuid
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import load_file, save_file
from tensorboardX import SummaryWriter
from torch import Tensor, nn

from imu_ray.errors import CheckpointError, StageFailedError
from imu_ray.run.storage import open_storage

MANIFEST = "manifest.json"
SEAL = "manifest.sha256"  # as ``sha256sum --check`` reads it
INTENSITIES = "intensities.parquet"
MODEL = "model.safetensors"
MODEL_FOLDER = "model"
WITH_SAMPLES = "report_with_samples.html"  # never part of an export
STATE = "state/ascent.safetensors"
RECORD = (MANIFEST, SEAL)
Limits = Mapping[str, int | None]  # ``max_epochs`` and ``max_steps``; None: any number


@dataclass(frozen=True)
class UpdateState:
    """All that the next step of an update depends on, and the trajectory so far."""

    step: int
    tensors: dict[str, Tensor]
    trajectory: list[dict[str, float]]


def default_run_dir() -> Path:
    """A new directory under ``runs`` in the working directory."""
    return Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


class RunDirectory:
    """Where a run leaves its artifacts. Nothing is made before the first artifact is written."""

    def __init__(self, location: str | Path) -> None:
        # A path, made absolute, or the URI as it was given.
        self.location = location if "://" in str(location) else Path(location).absolute()
        self.storage = open_storage(location)
        self._lost: threading.Event | None = None
        self._digests: dict[str, str] = {}  # of what this process has written

    def __reduce__(self) -> tuple[Any, ...]:
        return RunDirectory, (self.location,)  # another process holds no lock

    @contextlib.contextmanager
    def locked(self) -> Iterator[None]:
        """Keep other runs out; ``CheckpointError`` when one is at work here. After a lost lock nothing is written."""
        with self.storage.locked() as lost:
            self._lost = lost
            yield

    def check(self, stage: str, identity: str, limits: Limits | None = None) -> dict[str, Any] | None:
        """The manifest of a run of the same stage and settings, or None when there is none.

        Its ``status`` is ``complete`` when nothing is left to do, and ``extended`` when it ran out of steps and may
        take more now. Any other: it was stopped, and this call continues it.

        Args:
            stage: the stage, as recorded under ``stage``.
            identity: digest of all settings but the limits, as recorded under ``config_identity``.
            limits: how many steps it may take, as recorded under ``limits``; they may have grown since.

        Raises:
            CheckpointError: the directory cannot be made, or holds another run or other files.
        """
        self.storage.check_writable()
        if not self.storage.entries():
            return None
        manifest = self.read_manifest()
        if (manifest.get("stage"), manifest.get("config_identity")) != (stage, identity):
            raise CheckpointError(
                f"run_dir {self.location} holds a run of {manifest.get('stage')} with other settings; expected {stage} "
                "with the same settings, or a new directory"
            )
        begun, limits = manifest.get("limits", {}), dict(limits or {})
        for name, limit in limits.items():
            if (limit or math.inf) < (begun.get(name) or math.inf):
                raise CheckpointError(
                    f"ascent.stop.{name} is {limit}, and the run in run_dir {self.location} began with "
                    f"{begun.get(name) or 'no limit'}; expected as many or more, or a new directory"
                )
        ran_out = (manifest.get("ascent") or {}).get("status") in ("not_reached", "epochs_done")
        return {**manifest, "status": "extended"} if ran_out and limits and limits != begun else manifest

    def check_inputs(self, manifest: dict[str, Any], inputs: dict[str, str]) -> None:
        """Refuse another model, other samples or other weights than those that the run began with."""
        for name, digest in inputs.items():
            begun = manifest.get("inputs", {}).get(name)
            if begun != digest:
                raise CheckpointError(
                    f"run_dir {self.location} holds a run on another {name} (digest {str(begun)[:12]}, now "
                    f"{digest[:12]}); expected the same, or a new directory"
                )

    def withdraw(self) -> None:
        """Remove every file; of a run that was refused, which has made all that is here."""
        for name in self.storage.files():
            self.storage.filesystem.delete_file(f"{self.storage.root}/{name}")

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; ``CheckpointError`` when there is none or it is not one."""
        if not self.storage.entries():
            raise CheckpointError(f"there is no run at {self.location}; expected the directory of a run, or its URI")
        try:
            manifest = self.read_json(MANIFEST)
        except ValueError:
            manifest = None
        if not isinstance(manifest, dict):
            raise CheckpointError(
                f"{self.location} holds files but no {MANIFEST} of a run; expected an empty or new directory, or that "
                "of a run"
            )
        return manifest

    def write(self, name: str, fill: Callable[[Path], object]) -> None:
        """Write one artifact: ``fill`` gets a temporary path, which is renamed to ``name`` when complete."""
        if self._lost is not None and self._lost.is_set():
            raise StageFailedError(
                f"{self.location} may be in use by another run, because this one could not renew its lock for a while; "
                f"expected a store that answers; {name} was not written; the same call continues from the last state"
            )

        def fill_and_digest(path: Path) -> None:
            fill(path)
            if _is_artifact(name):
                self._digests[name] = file_digest(path)

        with self._room_for(name):
            self.storage.write(name, fill_and_digest)

    def write_folder(self, name: str, fill: Callable[[Path], object]) -> None:
        """Write a folder: ``fill`` gets an empty one. The configuration, which is read first, comes last."""
        with self._room_for(name), self.storage.scratch() as made:
            fill(Path(made))
            self.storage.remove(name)
            files = [path for path in Path(made).rglob("*") if path.is_file()]
            for path in sorted(files, key=lambda path: (path.name.endswith("config.json"), path.name)):
                self.write(f"{name}/{path.relative_to(made)}", functools.partial(shutil.move, path))

    @contextlib.contextmanager
    def _room_for(self, name: str) -> Iterator[None]:
        try:
            yield
        except (OSError, SafetensorError) as error:
            raise StageFailedError(
                f"{self.location}/{name} cannot be written: {error}; make room or choose another run_dir; what was "
                "there before is intact"
            ) from error

    def write_text(self, name: str, text: str) -> None:
        """A text artifact."""
        self.write(name, lambda path: path.write_text(text))

    def write_json(self, name: str, values: Any) -> None:
        """A JSON artifact; NaN is refused."""
        self.write_text(name, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_table(self, name: str, table: pa.Table) -> None:
        """A Parquet artifact."""
        self.write_tables(name, iter([table]))

    def write_tables(self, name: str, parts: Iterator[pa.Table]) -> None:
        """A Parquet artifact from parts, of which one is held at a time."""

        def fill(path: Path) -> None:
            first = next(parts)
            with pq.ParquetWriter(path, first.schema, use_dictionary=False) as writer:
                for part in itertools.chain([first], parts):
                    writer.write_table(part)

        self.write(name, fill)
        pa.default_memory_pool().release_unused()

    def read_json(self, name: str) -> Any:
        """A JSON artifact, or None where there is none."""
        with self.storage.fetch(name) as path:
            return json.loads(path.read_text()) if path else None

    def read_table(self, name: str) -> pa.Table:
        """A Parquet artifact as it was written."""
        with self.storage.fetch(name) as path:
            if path is None:
                raise CheckpointError(f"{self.location} holds no {name}; expected the artifact of a run")
            return pq.read_table(path)

    def write_model(self, name: str, model: nn.Module) -> None:
        """All parameters and buffers of a model as safetensors; tensors that share memory are written each."""
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        self.write(name, lambda path: save_file(tensors, path))

    def write_events(self, trajectory: Sequence[Mapping[str, float]]) -> None:
        """The trajectory as a TensorBoard event file, a scalar per column."""

        def fill(path: Path) -> None:
            with tempfile.TemporaryDirectory() as folder:
                with SummaryWriter(folder) as writer:
                    for record in trajectory:
                        for name, value in record.items():
                            writer.add_scalar(name, value, math.ceil(record["step"]))
                (made,) = Path(folder).iterdir()
                shutil.copyfile(made, path)

        self.write("tensorboard/events.out.tfevents.0", fill)

    def save_parameters(self, check: int, parameters: Mapping[str, Tensor]) -> None:
        """The parameters of a row of the trajectory (``ascent.keep=all``), float64, by layer."""
        self.write(_check(check), lambda path: save_file(dict(parameters), path))

    def load_parameters(self, check: int) -> dict[str, Tensor]:
        """The same, read."""
        with self.storage.fetch(_check(check)) as path:
            if path is None:
                raise CheckpointError(f"{self.location} holds no {_check(check)}; expected all that the run wrote")
            tensors: dict[str, Tensor] = load_file(path)
        return tensors

    def save_state(self, state: UpdateState) -> None:
        """The state of an ascent, as one file."""
        metadata = {"step": str(state.step), "trajectory": json.dumps(state.trajectory)}
        self.write(STATE, lambda path: save_file(state.tensors, path, metadata))

    def load_state(self) -> UpdateState | None:
        """The last state saved, or None."""
        with self.storage.fetch(STATE) as path:
            if path is None:
                return None
            try:
                with safe_open(path, framework="pt") as file:
                    metadata: dict[str, str] = file.metadata()
                    tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
            except (SafetensorError, OSError) as error:
                raise CheckpointError(
                    f"{self.location}/{STATE} cannot be read: {error}; delete the state folder to start the ascent anew"
                ) from None
        return UpdateState(int(metadata["step"]), tensors, json.loads(metadata["trajectory"]))

    def digests(self) -> dict[str, str]:
        """SHA-256 of every file that is left when a run ends, but the record and what an update goes on from."""
        left = filter(_is_artifact, self.storage.files())
        return {name: self._digests.get(name) or self.digest(name) for name in left}

    def digest(self, name: str) -> str:
        """SHA-256 of a file; empty where there is none."""
        with self.storage.fetch(name) as path:
            if path is None:
                return ""
            return file_digest(path)

    def seal(self) -> None:
        """Write the digest of the manifest beside it, so that a change of either shows."""
        self.write_text(SEAL, f"{self.digest(MANIFEST)}  {MANIFEST}\n")

    def clear_state(self, *, but_last: bool = False) -> None:
        """Remove the state of a finished run; ``but_last`` keeps what it may take more steps from."""
        self.storage.remove("state/train" if but_last else "state")


def _is_artifact(name: str) -> bool:
    """Whether a file is left when a run ends and is no part of the record."""
    return name not in RECORD and not name.startswith("state/")


def _check(number: int) -> str:
    return f"checks/check-{number:06d}.safetensors"


def file_digest(path: Path) -> str:
    """SHA-256 of a file."""
    seen = hashlib.sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            seen.update(block)
    return seen.hexdigest()
