"""The forward pass: blocks of samples in, their features out. Reading and decoding run ahead of the model in threads.

Shapes: B samples of a block, C classes, F features (the head's input without the bias input).
"""

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import torch
from torch import Tensor, nn

from imu_ray.config import InfluenceConfig
from imu_ray.data import Rows, Shard, Source
from imu_ray.errors import NonFiniteError, StageFailedError, UnsupportedModelError
from imu_ray.models.layers import evaluation_mode, forward_errors
from imu_ray.scopes.base import Part
from imu_ray.scopes.features import FeatureShard, ShardReport, first_of
from imu_ray.tasks.base import BadRow, Batch, Outputs, Task, reader_of

Decoded = tuple[Batch, npt.NDArray[np.int64], npt.NDArray[np.bool_]]
Digests = tuple[bytes, npt.NDArray[np.uint64]]  # of a block, and the first 64 bits of that of each of its inputs
READER = ThreadPoolExecutor(1, "read")  # one thread in each process: a caller's Dataset need not be safe in several


@dataclass(frozen=True)
class Block:
    """A decoded block: the batch of its usable rows, their places, and its digests, which may be still on their way."""

    batch: Batch
    places_B: npt.NDArray[np.int64]
    usable_B: npt.NDArray[np.bool_]
    digests: Future[Digests]


def extract_features(
    source: Source,
    shard: Shard,
    part: Part,
    model: nn.Module,
    device: torch.device,
    settings: InfluenceConfig | None = None,
) -> tuple[FeatureShard, ShardReport]:
    """Read a shard and run the model over it, one forward call per block, in eval mode.

    Args:
        source: where the samples are.
        shard: which of them.
        part: whose features are kept.
        model: on ``device``.
        device: where the forward pass runs.
        settings: ``influence.*`` as far as it says how the forward pass runs and how features are kept.

    Raises:
        ForgetSetError: a row cannot be used.
        NonFiniteError: a feature is NaN, infinite or out of range; the message names the sample.
        UnsupportedModelError: outputs do not follow from the features, or features change with the call or with the
            rows beside them.
        StageFailedError: the model raised something.
    """
    settings = settings or InfluenceConfig()
    features: list[npt.NDArray[Any]] = []
    labels, ids, digests, places, marks = [], [], b"", [], []
    bad: list[BadRow] = []
    seconds = 0.0
    task = reader_of(part.task, source)

    def forward(batch: Batch) -> Outputs:
        with (
            torch.autocast(device.type, getattr(torch, settings.autocast, None), enabled=settings.autocast != "none"),
            forward_errors(model, batch.inputs, StageFailedError),
        ):
            return part.forward(model, batch)

    with evaluation_mode(model):
        for block in _decode_ahead(source, shard, task, device):
            batch = block.batch
            bad += batch.bad_rows
            labels.append(batch.labels_B.numpy())
            ids.append(batch.ids)
            places.append(block.places_B)
            if batch.ids:
                started = time.perf_counter()
                batch = _to(batch, device, settings.channels_last)
                outputs = forward(batch)
                kept = _finite(outputs.features_BD, outputs.logits_BC, batch.ids)
                features.append(_kept(kept.cpu(), settings.feature_dtype, batch.ids))
                seconds += time.perf_counter() - started
                if shard.index == 0 and len(features) == 1:
                    _check_repeatable(forward, batch, outputs, settings, part.deep)
            digest, marks_B = block.digests.result()
            digests += digest
            marks.append(marks_B[block.usable_B])
    stacked = np.concatenate(features) if features else np.empty((0, part.width), np.float32)
    sizes = tuple(len(part) for part in ids)
    flat = pa.array([sample_id for part in ids for sample_id in part], pa.string())
    report = ShardReport(
        shard.index, len(flat), sizes, digests, tuple(bad), seconds, stacked.nbytes, np.concatenate(marks)
    )
    return FeatureShard(stacked, np.concatenate(labels), flat, sizes, np.concatenate(places)), report


def _decode_ahead(source: Source, shard: Shard, task: Task, device: torch.device) -> Iterator[Block]:
    """The blocks of a shard in order, the next ones decoded while the caller works on one."""

    def decode(read: Future[Rows], start: int, stop: int) -> Decoded:
        rows = read.result()
        batch = task.collate(source.placed(rows, start))
        # Left-out rows are not in the batch; the others keep their order.
        usable = np.isin(rows.ids, batch.ids) if batch.bad_rows else np.ones(len(rows.ids), np.bool_)
        if device.type == "cuda" and batch.ids:
            batch = replace(batch, inputs=batch.inputs.pin_memory())
        return batch, source.positions(start, stop)[usable], usable

    def digest(read: Future[Rows]) -> Digests:
        rows = read.result()
        return rows.digest(), np.frombuffer(b"".join(own[:8] for own in rows.contents), np.uint64)

    # On a GPU the worker's CPUs have nothing else to do; on the CPU one thread hides waiting and takes little from the
    # model.
    threads = torch.get_num_threads() if device.type == "cuda" else 1
    blocks = source.read_blocks(shard)
    with ThreadPoolExecutor(threads) as pool:
        pending: deque[tuple[Future[Decoded], Future[Digests]]] = deque()

        def first() -> Block:
            decoded, digests = pending.popleft()
            return Block(*decoded.result(), digests)

        for start, stop in shard.blocks():
            read = READER.submit(next, blocks)
            pending.append((pool.submit(decode, read, start, stop), pool.submit(digest, read)))
            if len(pending) > threads:
                yield first()
        while pending:
            yield first()


def _to(batch: Batch, device: torch.device, channels_last: bool) -> Batch:
    inputs = batch.inputs.to(device, non_blocking=True)
    if channels_last and inputs.ndim == 4:
        inputs = inputs.contiguous(memory_format=torch.channels_last)
    return replace(batch, inputs=inputs, labels_B=batch.labels_B.to(device))


def _finite(features_BF: Tensor, logits_BC: Tensor, ids: list[str]) -> Tensor:
    """Features in float32 or better; refused when they, or the logits, are not finite.

    Also of a float64 model they must be within the range of float32: sums of their squares and fourth powers must not
    overflow.
    """
    bad = ~(torch.isfinite(features_BF.float()).all(dim=1) & torch.isfinite(logits_BC).flatten(1).all(dim=1))
    if bad.any():
        named = [ids[place] for place in bad.nonzero()[:, 0].tolist()]
        raise NonFiniteError(
            f"the model gives NaN, infinity or features beyond 3.4e38 for {len(named)} samples of a block (ids "
            f"{first_of(named)}); expected finite features and logits; check the weights and the inputs' scale"
        )
    return features_BF if features_BF.dtype == torch.float64 else features_BF.float()


def _check_repeatable(
    forward: Callable[[Batch], Outputs], batch: Batch, outputs: Outputs, settings: InfluenceConfig, deep: bool
) -> None:
    """Refuse a model that draws random numbers in eval mode, or whose features of a row depend on the other rows.

    Of layers the logits are looked at as well, because they are what the features do not tell.

    A part of the block is run twice. The same kernels on the same rows give the same bits, but for atomic additions on
    a GPU: 100 units in the last place are let pass. Kernels for another number of rows add in another order, which
    changes the last bits of every layer, and an untrained net of 150 layers enlarges that a thousandfold: 100,000
    units, or a fifth of the largest feature in half precision. What is taken from the rest of a batch changes more.
    """
    part = min(32, -(-len(batch.ids) // 2))
    # A compiled model gets as many rows as before, for which it is compiled already.
    rows = torch.arange(len(batch.ids) if settings.compile else part, device=batch.inputs.device) % part
    taken = replace(batch, inputs=batch.inputs[rows], labels_B=batch.labels_B[rows])

    def seen(outputs: Outputs) -> Tensor:
        parts = [outputs.features_BD] + ([outputs.logits_BC] if deep else [])
        return torch.cat([part.double() for part in parts if part.is_floating_point()], dim=-1)  # inputs may cross

    first, second, among = seen(forward(taken)), seen(forward(taken)), seen(outputs)[rows]
    largest = seen(outputs).abs().max()
    eps = torch.finfo(outputs.logits_BC.dtype if settings.autocast == "none" else getattr(torch, settings.autocast)).eps
    for where, expected, tolerance, cause in (
        (
            "the same batch is run again",
            second,
            min(1e2 * eps, 0.02),
            "dropout, noise or sampling that eval() does not switch off",
        ),
        (
            "other rows stand beside them",
            among,
            min(1e5 * eps, 0.2),
            "BatchNorm that uses the statistics of its batch",
        ),
    ):
        difference = (first - expected).abs().max()
        if not difference <= tolerance * largest:
            raise UnsupportedModelError(
                f"features of the same rows differ by {float(difference / largest):.2g} of the largest when {where}; "
                f"expected a model that is deterministic in eval mode and takes each row by itself; look for {cause}"
            )


def _kept(features_BF: Tensor, dtype: str, ids: list[str]) -> npt.NDArray[np.floating] | npt.NDArray[np.uint16]:
    """Features as they are kept; refused when float16 cannot hold them."""
    if dtype == "float32":
        return features_BF.numpy()
    rounded = features_BF.to(getattr(torch, dtype))
    bad = ~torch.isfinite(rounded).all(dim=1)
    if bad.any():
        raise NonFiniteError(
            f"features of {int(bad.sum())} samples of a block (the first: {ids[int(bad.nonzero()[0])]}) are beyond the "
            f"range of {dtype}; expected numbers up to 65504 (float16); use influence.feature_dtype=bfloat16 or float32"
        )
    return rounded.numpy() if dtype == "float16" else rounded.view(torch.uint16).numpy()
