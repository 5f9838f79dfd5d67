"""The curvature bundle: what is kept of a training set for later requests, in one file without a sample or an id."""

import contextlib
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from pyarrow import fs
from pydantic import ValidationError
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from imu_ray.config import ForgetSetConfig
from imu_ray.errors import CheckpointError, StageFailedError
from imu_ray.run.record import Part
from imu_ray.run.storage import open_folder, open_storage

ABOUT = "imu_ray.bundle"  # key of the file's metadata
Tensors = Mapping[str, Tensor]


class BundleRecord(Part):
    """What a bundle says of itself.

    Attributes:
        model: hash of the model that it was taken of.
        rows: of the training set that it was summed over.
        seed: of the labels drawn from the model; None where another engine drew them.
        source: what made the sums: this library, or kronfluence.
        shapes: ``[C, D]`` by layer.
        sums: kinds of curvature that each layer has sums of.
        figures: mean of every metric over the rows, overall and ``per_class``.
        target: what a label was (``forget_set.target``).
        class_weights: of the loss.
    """

    format: Literal[1] = 1
    created: str
    model: str
    task: str
    rows: int
    seed: int | None
    source: str = "imu_ray"
    shapes: dict[str, list[int]]
    sums: dict[str, list[str]]
    figures: dict[str, Any]
    target: str = "class"
    class_weights: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Bundle:
    """A bundle that was found to be whole; its tensors are read when they are asked for."""

    location: str
    record: BundleRecord
    digest: str

    @classmethod
    def open(cls, location: str | Path) -> "Bundle":
        """Read what a bundle says of itself; ``CheckpointError`` when it is missing, broken or something else."""
        with _fetched(location) as path:
            with safe_open(path, framework="pt") as file:
                text = (file.metadata() or {}).get(ABOUT)
            digest = hashlib.sha256()
            with path.open("rb") as stream:
                while part := stream.read(1 << 20):
                    digest.update(part)
        try:
            record = BundleRecord.model_validate_json(text or "")
        except ValidationError:
            raise CheckpointError(
                f"{location} is no curvature bundle of this release; expected what imu_ray.remember wrote; take it "
                "again"
            ) from None
        return cls(str(location), record, digest.hexdigest())

    def require_model(self, model_hash: str) -> None:
        """``CheckpointError`` when it was taken of another model."""
        if self.record.model != model_hash:
            raise CheckpointError(
                f"bundle {self.location} was taken of another model (hash {self.record.model[:12]}, this one's is "
                f"{model_hash[:12]}); expected the model as it was remembered; forget later requests together with the "
                "earlier ones from that model, or run imu_ray.remember on this one"
            )

    def require_loss(self, settings: ForgetSetConfig) -> None:
        """``CheckpointError`` when it was taken with another loss."""
        held, wanted = (
            (each.target, each.class_weights and tuple(each.class_weights)) for each in (self.record, settings)
        )
        if held != wanted:
            raise CheckpointError(
                f"bundle {self.location} was taken with forget_set.target and class_weights {held}, this run has "
                f"{wanted}; expected the same loss; set them as they were, or take the bundle again"
            )

    def load(self, kinds: Mapping[str, str]) -> dict[str, dict[str, Tensor]]:
        """The sums of some layers, each of one kind, by the name that ``write_bundle`` got."""
        with _fetched(self.location) as path, safe_open(path, framework="pt") as file:
            names = list(file.keys())
            prefixes = {layer: f"{layer}:{kind}:" for layer, kind in kinds.items()}
            return {
                layer: {name[len(start) :]: file.get_tensor(name) for name in names if name.startswith(start)}
                for layer, start in prefixes.items()
            }


def check_place(location: str | Path) -> None:
    """Refuse a place where no bundle can be made, or where a file is: it may be all that is left of a training set."""
    storage, name = open_folder(location)
    storage.check_writable()
    if storage.filesystem.get_file_info(f"{storage.root}/{name}").type != fs.FileType.NotFound:
        raise CheckpointError(f"{location} exists already; expected a new path, because a bundle is never overwritten")


def write_bundle(location: str | Path, record: BundleRecord, sums: Mapping[str, Mapping[str, Tensors]]) -> None:
    """Write the sums by layer, kind and name, as one file of mode 0600."""
    tensors = {
        f"{layer}:{kind}:{name}": tensor.contiguous()
        for layer, kinds in sums.items()
        for kind, named in kinds.items()
        for name, tensor in named.items()
    }
    storage, name = open_folder(location)
    try:
        storage.write(name, lambda path: save_file(tensors, path, {ABOUT: record.model_dump_json()}))
    except (OSError, SafetensorError) as error:
        raise StageFailedError(f"{location} cannot be written: {error}; make room or choose another path") from error


@contextlib.contextmanager
def _fetched(location: str | Path) -> Iterator[Path]:
    """A local copy; ``CheckpointError`` when there is none or it cannot be read."""
    try:
        with open_storage(location).fetch("") as path:
            if path is None:
                raise CheckpointError(
                    f"bundle {location} does not exist; expected the file that imu_ray.remember wrote"
                )
            yield path
    except (OSError, SafetensorError) as error:
        raise CheckpointError(
            f"bundle {location} cannot be read: {error}; expected the whole file that imu_ray.remember wrote"
        ) from None
