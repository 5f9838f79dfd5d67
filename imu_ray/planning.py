"""What a run will cost, before it runs: counted where it can be counted, and estimated from two timed blocks."""

import dataclasses
import time
from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.data import Source
from imu_ray.distributed.session import object_store_bytes, ray_session, slots
from imu_ray.inputs import Inputs
from imu_ray.models.spec import ModelSpec
from imu_ray.pipeline import resolve_settings
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.features import score_shard
from imu_ray.scopes.head import Head

# Of one task, as measured with 100,000 shards; what the driver keeps of a shard, with 10,000; of a sample, what an ascent takes beside the
# features (31 bytes with 2 x 10^6; scoring 10^7 took 6), where it runs: in each worker, or in the driver when one CPU worker is asked for.
TASK_SECONDS = 0.0025
SHARD_BYTES, SAMPLE_BYTES = 5_000, 32
# Of a worker: what its process grows by over many tasks, and matrices of the head at the peak (C = 1,000, D = 2,049: 0.65 GB), as measured.
WORKER_BYTES, MATRICES = 30_000_000, 38
SCORING_ROUNDS = 5  # tasks per shard after the features: moments, scores, change of the outputs, and two audits


def plan(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    *,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
) -> dict[str, Any]:
    """Count and estimate what ``unlearn`` with the same arguments will take. Nothing is written.

    Two blocks are read, run through the model and scored in this process, on the CPU with ``resources.cpus_per_worker`` threads; the
    second is timed.

    Returns:
        ``sets`` (per sample set: samples, blocks, shards, feature bytes, forward seconds of one worker), ``forward_passes`` (per
        sample), ``tasks``, ``peak_bytes`` (per worker above its imports, in the object store, in the driver), ``seconds``
        (estimates: features, scoring and audit, in all; the ascent depends on when it stops and is not in it), ``workers`` and
        ``workers_that_fit``, ``fits`` and ``notes``.

    Raises:
        ImuError: as ``unlearn`` would.
    """
    settings = resolve_settings(recipe, config)
    inputs = Inputs.open(model, forget_set, task, evaluation, settings)
    width = inputs.task.target_layers(inputs.model)[inputs.task.head].in_features
    matrix = inputs.head.matrix_CD
    recompute = settings.influence.features == "recompute"
    item = 2 if settings.influence.feature_dtype != "float32" else 8 if next(inputs.model.parameters()).dtype == torch.float64 else 4
    read_forward, scoring = _time_block(inputs, settings)
    sets = {name: _describe(source, width * item, read_forward, settings) for name, source in inputs.sources.items()}
    samples, shards, stored = (sum(part[key] for part in sets.values()) for key in ("samples", "shards", "feature_bytes"))
    tasks = shards * (1 + SCORING_ROUNDS)
    workers = settings.resources.workers
    passes = 1 + SCORING_ROUNDS + 1 if recompute else 1  # the ascent makes them once more
    rows = settings.influence.block_rows
    shard_rows = rows * settings.influence.blocks_per_shard
    model_bytes = sum(tensor.nbytes for tensor in inputs.model.state_dict().values())
    # A shard as read and as features, one block in float64 with its products; or the ascent, which reads the features where they lie.
    shard_bytes = shard_rows * (width * item + _row_bytes(inputs.sources["forget"])) + rows * width * 8 * 2
    ascent_bytes = SAMPLE_BYTES * sets["forget"]["samples"]
    per_worker = WORKER_BYTES + max(shard_bytes, ascent_bytes) + MATRICES * matrix.nbytes + model_bytes
    features = passes * sum(part["forward_seconds"] for part in sets.values()) / workers + TASK_SECONDS * shards
    scored = scoring * samples * SCORING_ROUNDS / workers + TASK_SECONDS * shards * SCORING_ROUNDS
    with ray_session(dataclasses.replace(settings.resources, workers=1)):  # too many are told, not refused
        store, room = object_store_bytes(), slots(settings.resources)
    kept = (0 if recompute else stored) + model_bytes
    notes = []
    if recompute:
        notes.append(
            f"features are made again in every stage; each worker of an ascent makes all of them once more and holds {stored:,} bytes"
        )
    if kept > store:
        notes.append(f"the features do not fit in the object store ({kept:,} of {store:,} bytes) and will spill to the nodes' disks")
    if workers > room:
        notes.append(f"{workers} workers do not fit now ({room} do); an autoscaler has to add nodes")
    if settings.resources.gpus_per_worker:
        notes.append("seconds are those of this CPU; the workers have GPUs")
    return {
        "sets": sets,
        "forward_passes": passes,
        "tasks": tasks,
        "peak_bytes": {"per_worker": per_worker, "object_store": kept, "driver": SHARD_BYTES * shards + ascent_bytes},
        "seconds": {"features": features, "scoring_and_audit": scored, "without_ascent": features + scored},
        "workers": workers,
        "workers_that_fit": room,
        "fits": kept <= store and workers <= room,
        "notes": notes,
    }


def _describe(source: Source, feature_bytes: int, seconds: float, settings: UnlearnConfig) -> dict[str, Any]:
    shards = source.shards(settings.influence.block_rows, settings.influence.blocks_per_shard)
    return {
        "samples": source.num_rows,
        "blocks": sum(len(list(shard.blocks())) for shard in shards),
        "shards": len(shards),
        "feature_bytes": source.num_rows * feature_bytes,
        "forward_seconds": source.num_rows * seconds,
    }


def _time_block(inputs: Inputs, settings: UnlearnConfig) -> tuple[float, float]:
    """Seconds per sample of reading with the forward pass, and of scoring."""
    source = inputs.sources["forget"]
    (shard, *_) = source.shards(min(settings.influence.block_rows, source.num_rows), 1)
    before = torch.get_num_threads()
    torch.set_num_threads(settings.resources.cpus_per_worker)
    try:
        for _ in range(2):
            started = time.perf_counter()
            features, report = extract_features(source, shard, inputs.task, inputs.model, torch.device("cpu"), settings.influence)
            extracted = time.perf_counter()
            score_shard(features, inputs.head, Head.of(inputs.model, inputs.head.name).matrix_CD)
            scored = time.perf_counter()
    finally:
        torch.set_num_threads(before)
    rows = max(report.rows, 1)
    return (extracted - started) / rows, (scored - extracted) / rows


def _row_bytes(source: Source) -> int:
    """Bytes of one sample as it is read."""
    value = source.read(0, 1).inputs[0]
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))
