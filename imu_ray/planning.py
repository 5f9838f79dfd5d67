"""What a run will cost, before it runs: counted where it can be counted, and estimated from two timed blocks."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import nn

from imu_ray.config import UnlearnConfig
from imu_ray.data import Source
from imu_ray.distributed.factor_job import kinds_of
from imu_ray.distributed.session import object_store_bytes, ray_session, resolve_workers, slots
from imu_ray.errors import ConfigError
from imu_ray.influence.curvature import LAYER_CURVATURES
from imu_ray.inputs import Inputs
from imu_ray.models.spec import ModelSpec
from imu_ray.recipes import resolve_settings, settle_scope
from imu_ray.scopes.extraction import extract_features
from imu_ray.scopes.layers import Layers
from imu_ray.scopes.memory import LayersMemory, memory_of
from imu_ray.tasks.base import rows_at_once

# As measured: of one task; of a shard and of a sample of any set, in the driver; of a sample, what an ascent takes
# beside the features.
TASK_SECONDS = 0.0025
SHARD_BYTES, MARK_BYTES, SAMPLE_BYTES = 5_000, 8, 32
# Of a worker: what its process grows by over many tasks, and matrices of the head at the peak.
WORKER_BYTES, MATRICES = 140_000_000, 38
SCORING_ROUNDS = 7  # tasks per shard after the features: moments, scores, table, change of the outputs, three audits


def plan(
    model: nn.Module | ModelSpec,
    forget_set: Any,
    *,
    task: str = "classification",
    evaluation: Mapping[str, Any] | None = None,
    recipe: str | None = None,
    config: UnlearnConfig | None = None,
    memory: Sequence[float] = (40, 80),
) -> dict[str, Any]:
    """Count and estimate what ``unlearn`` with the same arguments will take. Nothing is written.

    Two blocks are read, run through the model and scored in this process, on the CPU with ``resources.cpus_per_worker``
    threads; the second is timed. Of a Hugging Face model's folder that holds ``config.json`` and no weights everything
    is counted and nothing is run.

    ``memory`` are sizes of a device in GB of 10⁹ bytes, which a language model's layers that move are held against.

    Returns:
        ``sets`` (per sample set: samples, blocks, shards, feature bytes, forward seconds of one worker),
        ``forward_passes`` (per sample), ``tasks``, ``peak_bytes`` (per worker above its imports, in the object store,
        in the driver), ``seconds`` (estimates: features, scoring and audit, in all; the ascent depends on when it stops
        and is not in it; None without weights), ``workers`` and ``workers_that_fit``, ``fits`` and ``notes``. Where
        layers of a sequence or language model move also ``memory``: bytes of one worker by what takes them
        (``LayersMemory``), and for each size whether that ``fits``, and why.

    Raises:
        ImuError: as ``unlearn`` would.
    """
    settings = resolve_settings(recipe, config, task)
    skeleton = model.skeleton() if isinstance(model, ModelSpec) else None
    inputs = Inputs.open(model, forget_set, task, evaluation, settings, skeleton)
    settings = settle_scope(settings, inputs.task)
    with ray_session(settings.with_overrides({"resources.workers": 1}).resources):  # too many are told, not refused
        store, room, workers = object_store_bytes(), slots(settings.resources), resolve_workers(settings.resources)
    reading, scoring = _time_block(inputs, settings) if skeleton is None else (None, None)
    sets = {name: _count(source, inputs, settings, reading) for name, source in inputs.sources.items()}
    samples, shards = (sum(part[key] for part in sets.values()) for key in ("samples", "shards"))
    passes = 1 + SCORING_ROUNDS + 1 if _recompute(settings) else 1  # the ascent makes them once more
    seconds = None
    if reading is not None and scoring is not None:
        features = passes * reading * samples / workers + TASK_SECONDS * shards
        scored = SCORING_ROUNDS * (scoring * samples / workers + TASK_SECONDS * shards)
        seconds = {"features": features, "scoring_and_audit": scored, "without_ascent": features + scored}
    held = _memory(inputs, settings)
    peak = _peak_bytes(sets, inputs, settings, held)
    notes = _notes(_held(sets), peak["object_store"], store, workers, room, settings)
    notes += [] if seconds else ["seconds are not given, because the model's folder holds no weights to run"]
    return {
        "sets": sets,
        "forward_passes": passes,
        "tasks": shards * (1 + SCORING_ROUNDS),
        "peak_bytes": peak,
        "seconds": seconds,
        "workers": workers,
        "workers_that_fit": room,
        "fits": peak["object_store"] <= store and workers <= room,
        "notes": notes + _refusal(inputs, settings),
        **({} if held is None else {"memory": _held_against(held, memory)}),
    }


def _memory(inputs: Inputs, settings: UnlearnConfig) -> LayersMemory | None:
    """Of a worker, where layers of a model with outputs at many positions move."""
    if not (isinstance(inputs.part, Layers) and inputs.task.positions):
        return None
    rows = max(settings.influence.block_rows, settings.ascent.piece_rows)
    return memory_of(inputs.part, settings.ascent, rows_at_once(rows, inputs.task))


def _held_against(held: LayersMemory, sizes: Sequence[float]) -> dict[str, Any]:
    fits = {f"{size:g} GB": held.verdict(size) for size in sizes}
    return {
        **asdict(held),
        "peak": held.peak,
        "peak_checkpointed": held.peak_checkpointed,
        "fits": {name: fit for name, (fit, _) in fits.items()},
        "why": [reason for _, reason in fits.values()],
    }


def _refusal(inputs: Inputs, settings: UnlearnConfig) -> list[str]:
    """Why a run would be refused for its curvature."""
    try:
        if settings.ascent.curvature != "none":
            kinds_of(inputs.part, settings.ascent)
    except ConfigError as error:
        return [f"a run is refused: {error}"]
    return []


def _recompute(settings: UnlearnConfig) -> bool:
    return settings.influence.features == "recompute"


def _block_rows(inputs: Inputs, settings: UnlearnConfig) -> int:
    return rows_at_once(settings.influence.block_rows, inputs.task)


def _count(source: Source, inputs: Inputs, settings: UnlearnConfig, seconds: float | None) -> dict[str, Any]:
    shards = source.shards(_block_rows(inputs, settings), settings.influence.blocks_per_shard)
    return {
        "samples": source.num_rows,
        "blocks": sum(len(list(shard.blocks())) for shard in shards),
        "shards": len(shards),
        "feature_bytes": source.num_rows * _feature_bytes(inputs, settings),
        "forward_seconds": None if seconds is None else source.num_rows * seconds,
    }


def _feature_bytes(inputs: Inputs, settings: UnlearnConfig) -> int:
    """Bytes of one sample's features."""
    wide = next(inputs.model.parameters()).dtype == torch.float64
    item = 2 if settings.influence.feature_dtype != "float32" else 8 if wide else 4
    return item * inputs.part.width


def _held(sets: Mapping[str, Any]) -> int:
    return sum(part["feature_bytes"] for part in sets.values())


def _peak_bytes(
    sets: Mapping[str, Any], inputs: Inputs, settings: UnlearnConfig, held: LayersMemory | None
) -> dict[str, int]:
    """Memory of one worker above its imports, of the object stores, and of the driver."""
    rows, shard_blocks = _block_rows(inputs, settings), settings.influence.blocks_per_shard
    head_bytes = sum(tensor.nbytes for tensor in inputs.part.parameters.values())
    model_bytes = sum(tensor.nbytes for tensor in inputs.model.state_dict().values())
    row_bytes = _feature_bytes(inputs, settings) + _row_bytes(inputs.sources["forget"])
    # A shard as read and as features, a block in float64 with its products; or the ascent, which copies nothing.
    shard = rows * shard_blocks * row_bytes + rows * _feature_bytes(inputs, settings) * 4
    ascent = SAMPLE_BYTES * sets["forget"]["samples"]
    kept = 0 if _recompute(settings) else _held(sets)
    # Of layers, the sums of all at once, or one of them while it is solved.
    curvature = [LAYER_CURVATURES["kfac"].memory(*matrix.shape) for matrix in inputs.part.parameters.values()]
    matrices = sum(curvature) if inputs.part.deep else MATRICES * head_bytes
    return {
        "per_worker": WORKER_BYTES + max(shard, ascent) + (matrices + model_bytes if held is None else held.peak),
        "object_store": kept + model_bytes,
        "driver": sum(SHARD_BYTES * part["shards"] + MARK_BYTES * part["samples"] for part in sets.values()) + ascent,
    }


def _notes(held: int, kept: int, store: int, workers: int, room: int, settings: UnlearnConfig) -> list[str]:
    anew = f"features are made again in every stage; each worker of an ascent makes all anew and holds {held:,} bytes"
    spill = f"the features do not fit in the object store ({kept:,} of {store:,} bytes) and will spill to disk"
    notes = {
        anew: _recompute(settings),
        spill: kept > store,
        f"{workers} workers do not fit now ({room} do); an autoscaler has to add nodes": workers > room,
        "seconds are those of this CPU; the workers have GPUs": settings.resources.gpus_per_worker > 0,
    }
    return [note for note, holds in notes.items() if holds]


def _time_block(inputs: Inputs, settings: UnlearnConfig) -> tuple[float, float]:
    """Seconds per sample of reading with the forward pass, and of scoring."""
    source = inputs.sources["forget"]
    (shard, *_) = source.shards(min(_block_rows(inputs, settings), source.num_rows), 1)
    before, cpu = torch.get_num_threads(), torch.device("cpu")
    torch.set_num_threads(settings.resources.cpus_per_worker)
    try:
        for _ in range(2):
            started = time.perf_counter()
            features, report = extract_features(source, shard, inputs.part, inputs.model, cpu, settings.influence)
            extracted = time.perf_counter()
            inputs.part.scores(features, inputs.part.parameters)
            scored = time.perf_counter()
    finally:
        torch.set_num_threads(before)
    rows = max(report.rows, 1)
    return (extracted - started) / rows, (scored - extracted) / rows


def _row_bytes(source: Source) -> int:
    """Bytes of one sample as it is read."""
    value = source.read(0, 1).inputs[0]
    return len(value) if isinstance(value, bytes) else int(getattr(value, "nbytes", 0))
