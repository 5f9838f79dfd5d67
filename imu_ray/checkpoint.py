"""A run directory: safetensors, Parquet and JSON, each written under a temporary name and renamed.

Directories have mode 0700 and files 0600, because sample ids stand in them.
"""

import json
import os
import shutil
import tempfile
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from imu_ray.ascent.loop import AscentState
from imu_ray.errors import CheckpointError, StageFailedError
from imu_ray.models import Head

MANIFEST = "manifest.json"
STATE = "state/ascent.safetensors"
PART = ".part-"


def default_run_dir() -> Path:
    """A new directory under ``runs`` in the working directory."""
    return Path("runs").absolute() / f"{time.strftime('%Y%m%d-%H%M%S')}-{uuid.uuid4().hex[:6]}"


class RunDirectory:
    """Where a run leaves its artifacts. Nothing is made before the first artifact is written."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path).absolute()

    def check(self, stage: str, identity: str) -> dict[str, Any] | None:
        """The manifest of an unfinished run of the same stage and settings to go on from, or None for a new run.

        Raises:
            CheckpointError: the directory cannot be made, or holds another or a finished run, or other files.
        """
        ancestor = next(parent for parent in (self.path, *self.path.parents) if parent.exists())
        if not ancestor.is_dir() or not os.access(ancestor, os.W_OK | os.X_OK):
            raise CheckpointError(
                f"run_dir {self.path} cannot be made: {ancestor} is {'not writable' if ancestor.is_dir() else 'a file'}; expected a "
                "path under a writable directory"
            )
        # Parts of files are all that a process killed before its first artifact leaves.
        if not self.path.exists() or all(entry.name.startswith(PART) for entry in self.path.iterdir()):
            return None
        manifest = self.read_manifest()
        if (manifest.get("stage"), manifest.get("config_identity")) != (stage, identity):
            raise CheckpointError(
                f"run_dir {self.path} holds a run of {manifest.get('stage')} with other settings; expected {stage} with the same "
                "settings to go on from, or a new directory"
            )
        if manifest.get("status") == "complete":
            raise CheckpointError(f"run_dir {self.path} holds a finished run; expected a new directory, so that nothing is overwritten")
        return manifest

    def check_inputs(self, manifest: dict[str, Any], inputs: dict[str, str]) -> None:
        """Refuse to go on with another model, other samples or other weights than those that the run began with."""
        for name, digest in inputs.items():
            begun = manifest.get("inputs", {}).get(name)
            if begun != digest:
                raise CheckpointError(
                    f"run_dir {self.path} holds a run on another {name} (digest {str(begun)[:12]}, now {digest[:12]}); expected the same, "
                    "or a new directory"
                )

    def read_manifest(self) -> dict[str, Any]:
        """The manifest; ``CheckpointError`` when there is none or it is not one."""
        try:
            manifest = json.loads((self.path / MANIFEST).read_text())
        except (OSError, ValueError):
            manifest = None
        if not isinstance(manifest, dict):
            raise CheckpointError(
                f"{self.path} holds files but no {MANIFEST} of a run; expected an empty or new directory, or a run to go on from"
            )
        return manifest

    def write(self, name: str, fill: Callable[[Path], None]) -> Path:
        """Write one artifact: ``fill`` gets a temporary path, which is renamed to ``name`` when complete."""
        target = self.path / name
        try:
            self.path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self.path.chmod(0o700)  # also when it was made beforehand
            target.parent.mkdir(mode=0o700, exist_ok=True)
            handle, temporary = tempfile.mkstemp(dir=target.parent, prefix=PART)
            os.close(handle)  # mkstemp makes the file with mode 0600
            try:
                fill(Path(temporary))
                os.chmod(temporary, 0o600)
                _sync(temporary)
                os.replace(temporary, target)
            except BaseException:
                Path(temporary).unlink(missing_ok=True)
                raise
        except (OSError, SafetensorError) as error:
            raise StageFailedError(
                f"{target} cannot be written: {error}; make room or choose another run_dir; what was there before is intact"
            ) from error
        return target

    def write_text(self, name: str, text: str) -> None:
        """A text artifact."""

        def fill(path: Path) -> None:
            path.write_text(text)

        self.write(name, fill)

    def write_json(self, name: str, values: Any) -> None:
        """A JSON artifact; NaN is refused."""
        self.write_text(name, json.dumps(values, indent=2, allow_nan=False) + "\n")

    def write_table(self, name: str, table: pa.Table) -> None:
        """A Parquet artifact."""
        self.write(name, lambda path: pq.write_table(table, path))

    def write_model(self, name: str, model: nn.Module) -> None:
        """All parameters and buffers of a model as safetensors; tensors that share memory are written each."""
        tensors = {key: value.detach().cpu().contiguous().clone() for key, value in model.state_dict().items()}
        self.write(name, lambda path: save_file(tensors, path))

    def save_head(self, step: int, head: Head) -> None:
        """The head of one check (``ascent.keep=all``), float64, the bias as last column."""
        self.write(f"heads/step-{step:08d}.safetensors", lambda path: save_file({head.name: head.matrix_CD}, path))

    def save_state(self, state: AscentState) -> None:
        """The state of an ascent, as one file."""
        metadata = {"step": str(state.step), "trajectory": json.dumps(state.trajectory)}
        self.write(STATE, lambda path: save_file(state.tensors, path, metadata))

    def load_state(self) -> AscentState | None:
        """The last state saved, or None."""
        path = self.path / STATE
        if not path.exists():
            return None
        try:
            with safe_open(path, framework="pt") as file:
                metadata: dict[str, str] = file.metadata()
                tensors: dict[str, Tensor] = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} cannot be read: {error}; delete the state folder to start the ascent again") from None
        return AscentState(int(metadata["step"]), tensors, json.loads(metadata["trajectory"]))

    def clear_state(self) -> None:
        """Remove the state of a finished run."""
        shutil.rmtree(self.path / "state", ignore_errors=True)


def _sync(path: str) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
