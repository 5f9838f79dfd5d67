"""Re-identification: a network that embeds pictures of persons, trained with a classifier over their identities."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

from torch import Tensor, nn

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Rows, Source
from imu_ray.data.market import EXAMPLE, sighting_of
from imu_ray.errors import ConfigError, ForgetSetError, UnsupportedModelError
from imu_ray.tasks.base import Batch
from imu_ray.tasks.classification import ClassificationTask


@dataclass(frozen=True)
class ReidTask(ClassificationTask):
    """Softmax cross-entropy on identity logits ``[B, C]``; persons are looked up by the classifier's input ``[B, D]``.

    The classifier, the model's last linear layer, serves in training only. To move it alone would leave every embedding
    as it is, so the layers before it move too. The id of a sample tells person and camera (``sighting_of``).
    """

    scope: ClassVar[str] = "usable"
    retrieval_sets: ClassVar[tuple[str, ...]] = ("query", "gallery")

    @classmethod
    def for_model(
        cls, model: nn.Module, sources: Mapping[str, Source], config: ForgetSetConfig, head: str | None = None
    ) -> ClassificationTask:
        """As a classifier's; persons to forget are named, and of query and gallery there are both or none."""
        if isinstance(config.size, tuple) and not all(isinstance(name, str) for name in config.size):
            raise ConfigError(
                f"forget_set.size is {list(config.size)} with task 'reid'; expected ids of persons as texts, such as "
                "['0002', '0010']; quote them, because YAML takes 0010 for the number 8"
            )
        if len(given := [name for name in cls.retrieval_sets if name in sources]) == 1:
            raise ConfigError(f"evaluation has the set {given[0]!r} alone; expected query and gallery, or neither")
        task = super().for_model(model, sources, config, head)
        if not task.head:
            raise UnsupportedModelError(
                f"{type(model).__name__} ends in a convolution with more after it, so that no layer's input is an "
                "embedding; expected a linear classifier over the embeddings"
            )
        return task

    def signals(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """None: the classifier serves in training only."""
        return {}

    def collate(self, rows: Rows) -> Batch:
        """As a classifier's; ``ForgetSetError`` where an id does not tell person and camera."""
        for place, sample_id in enumerate(rows.ids):
            if sighting_of(sample_id) is None:
                raise ForgetSetError(
                    f"the id of {rows.name_of(place)} does not tell person and camera; expected one such as {EXAMPLE}; "
                    "rename the files, or name the column that holds such ids in forget_set.id_column"
                )
        return super().collate(rows)
