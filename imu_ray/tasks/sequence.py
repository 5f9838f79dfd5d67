"""Next-token prediction on sequences of token ids, with cross-entropy over the labelled positions.

Shapes: B samples, T positions (tokens of the longest row), C tokens in the vocabulary. Rows are padded on the right.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn
from typing_extensions import Self

from imu_ray.config import ForgetSetConfig
from imu_ray.data import Fields, Rows, Source
from imu_ray.errors import ConfigError, ForgetSetError, UnsupportedModelError
from imu_ray.influence.gradients import IGNORE, output_gradient, shares
from imu_ray.influence.scores import losses_and_classes
from imu_ray.models.layers import evaluation_mode, forward_errors, logits_of
from imu_ray.tasks.base import BadRow, Batch, Metric, Outputs, UnusableError, leave_out, reader_of

PADDING = 0  # a token behind the last label changes nothing, whichever it is
READ = 1024  # rows that are read at once for their lengths
Ids = npt.NDArray[np.int64]


@dataclass(frozen=True)
class SequenceTask:
    """Token cross-entropy of a causal model: ids ``[B, T]`` to logits ``[B, T, C]``, or to an output with ``logits``.

    Attributes:
        config: how rows are read.
        positions: T, tokens of the longest row.
        num_classes: C, outputs of the model.
    """

    config: ForgetSetConfig
    positions: int = 0
    num_classes: int = 0
    scope: ClassVar[str] = "usable"
    augmented: ClassVar[bool] = False
    retrieval_sets: ClassVar[tuple[str, ...]] = ()
    head: ClassVar[str] = ""
    of_classes: ClassVar[bool] = True

    @classmethod
    def fields(cls, config: ForgetSetConfig) -> Fields:
        """Token ids, and labels where there is a column for them."""
        labels = config.token_labels_column
        return {"tokens": config.tokens_column, **({} if labels is None else {"token_labels": labels})}

    @classmethod
    def for_model(
        cls, model: nn.Module, sources: Mapping[str, Source], config: ForgetSetConfig, head: str | None = None
    ) -> Self:
        """Find the longest row, and the vocabulary from a trial with a row of ``forget``."""
        if head:
            raise ConfigError(f"model.head is {head!r}, which sequences do not use; expected none; leave it out")
        reader = cls.reader(model, config)
        length = config.max_length or max(reader_of(reader, source)._longest(source) for source in sources.values())
        inputs = reader._first(sources["forget"], length)
        with evaluation_mode(model), forward_errors(model, inputs, UnsupportedModelError):
            logits = logits_of(model(inputs))
        if logits.ndim != 3 or logits.shape[:2] != inputs.shape:
            raise UnsupportedModelError(
                f"{type(model).__name__} gave {list(logits.shape)} for tokens {list(inputs.shape)}; expected logits "
                "for each token: [samples, tokens, vocabulary]"
            )
        return replace(reader, positions=length, num_classes=logits.shape[2])

    @classmethod
    def reader(cls, model: nn.Module, config: ForgetSetConfig) -> Self:
        """The task as far as it reads rows."""
        return cls(config)

    def reading(self, config: ForgetSetConfig) -> Self:
        """The same task under other settings of the rows."""
        return replace(self, config=config)

    def _longest(self, source: Source) -> int:
        """Tokens of the longest usable row; 2 where there is none."""
        starts = range(0, source.num_rows, READ)
        rows = (source.read(start, min(start + READ, source.num_rows)) for start in starts)
        return max((len(pair[0]) for part in rows for value in part.inputs if (pair := self._usable(value))), default=2)

    def _first(self, source: Source, length: int) -> Tensor:
        """Two copies of the first usable row that is not too long."""
        for row in range(source.num_rows):
            tokens, _ = self._usable(source.read(row, row + 1).inputs[0]) or (np.empty(0, np.int64), None)
            if 0 < len(tokens) <= length:
                return torch.from_numpy(tokens).repeat(2, 1)
        raise ForgetSetError(
            f"no row of {source.name} can be used; expected at least one of 2 to {length} tokens; see "
            f"forget_set.{'_column, forget_set.'.join(self.fields(self.config))}_column"
        )

    def _usable(self, value: Any) -> tuple[Ids, Ids] | None:
        try:
            return self.encode(value)
        except UnusableError:
            return None

    @property
    def metrics(self) -> Mapping[str, Metric]:
        """Loss, the same bounded by that of a uniform guess, share of tokens predicted right, and their probability."""
        guess = math.log(max(self.num_classes, 1))
        return {
            "loss": Metric(rises=True, chance=guess, least=0),
            "bounded_loss": Metric(rises=True, chance=guess, least=0, most=guess),
            "accuracy": Metric(rises=False, least=0, most=1),
            "probability": Metric(rises=False, least=0, most=1),
        }

    def target(self, labels: Tensor) -> Tensor:
        """The labels as they are."""
        return labels

    def sample_metrics(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        r"""Of each sample, ``[B]``, over its T labelled tokens.

        ``loss``: the mean cross-entropy :math:`\ell`, nats a token; ``bounded_loss``: :math:`\min(\ell, \ln C)`;
        ``accuracy``: the share that is predicted right; ``probability``: :math:`e^{-\ell}`, the geometric mean of the
        tokens' probabilities (TOFU's answer probability, arXiv:2401.06121).
        """
        losses_BT, predicted_BT = losses_and_classes(outputs, labels)
        share_BT = shares(labels)
        losses = (losses_BT * share_BT).sum(1)
        return {
            "loss": losses,
            "bounded_loss": losses.clamp_max(math.log(self.num_classes)),
            "accuracy": ((predicted_BT == labels) * share_BT).sum(1),
            "probability": torch.exp(-losses),
        }

    def signals(self, outputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """None: a sample has no single class."""
        return {}

    def output_gradient(self, outputs: Tensor, labels: Tensor) -> Tensor:
        """``(p - onehot(y)) / T`` at the labelled positions, 0 elsewhere."""
        return output_gradient(outputs, labels)

    def encode(self, value: Any) -> tuple[Ids, Ids]:
        """Tokens of a row and the label of each, ``IGNORE`` where it has none; ``UnusableError`` says why not."""
        tokens = value["tokens"] if isinstance(value, Mapping) else value
        ids = _whole_numbers(tokens, "tokens")
        labels = _whole_numbers(value["token_labels"], "labels") if isinstance(value, Mapping) else ids
        if len(labels) != len(ids):
            raise UnusableError(f"it has {len(ids)} tokens and {len(labels)} labels")
        return ids, labels

    def collate(self, rows: Rows) -> Batch:
        """Pad tokens to ``[B, T]``, and shift the labels so that each position has that of the next token.

        Raises:
            ForgetSetError: a row is no sequence of token ids, is too long, or has no label.
        """
        inputs, labels, kept, bad = [], [], [], list[BadRow]()
        for place, (sample_id, value) in enumerate(zip(rows.ids, rows.inputs, strict=True)):
            try:
                ids, wanted = self.encode(value)
                self._check(ids, wanted)
            except UnusableError as error:
                bad.append(leave_out(self.config, rows, place, str(error)))
                continue
            inputs.append(np.pad(ids, (0, self.positions - len(ids)), constant_values=PADDING))
            labels.append(np.pad(wanted[1:], (0, self.positions - len(ids) + 1), constant_values=IGNORE))
            kept.append(sample_id)
        tokens, following = (
            torch.from_numpy(np.array(part, np.int64).reshape(-1, self.positions)) for part in (inputs, labels)
        )
        return Batch(tokens, following, kept, bad)

    def _check(self, ids: Ids, labels: Ids) -> None:
        if len(ids) > self.positions:
            raise UnusableError(f"it has {len(ids)} tokens; forget_set.max_length is {self.positions}")
        known = labels[1:][labels[1:] != IGNORE]
        if not len(known):
            raise UnusableError("no token after the first has a label")
        for what, found in (("token", ids), ("label", known)):
            if found.min() < 0 or found.max() >= self.num_classes:
                raise UnusableError(f"a {what} is outside the vocabulary of {self.num_classes}")

    def forward(self, model: nn.Module, batch: Batch) -> Outputs:
        """Never asked for: no layer moves alone on its kept inputs."""
        raise NotImplementedError


def _whole_numbers(values: Any, what: str) -> Ids:
    """A list of whole numbers as an array."""
    try:
        array = np.asarray(values)
    except (TypeError, ValueError):
        raise UnusableError(f"its {what} are no list of whole numbers") from None
    if array.ndim != 1 or array.dtype.kind not in "iu" or len(array) < 2:
        raise UnusableError(f"its {what} are no list of two or more whole numbers")
    return array.astype(np.int64)
