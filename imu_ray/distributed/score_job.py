"""Scores on Ray tasks: statistics of the forget set's features, a direction, and every sample against it."""

import functools
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, cast

import numpy as np
import pyarrow as pa
import torch

from imu_ray.config import InfluenceConfig, UnlearnConfig
from imu_ray.distributed.feature_job import FeatureSet
from imu_ray.influence.direction import fit_directions
from imu_ray.influence.intensity import Column
from imu_ray.scopes.base import ByLayer, Parameters, Part, Statistics
from imu_ray.scopes.features import SCORE_SCHEMA, FeatureShard, labels_column, of_rows
from imu_ray.scopes.layers import Layers

ROW_GROUP = 65_536  # rows of the table that are written at once
JOINED = 64  # parts of the table that are copied into one, because each holds the whole message that it came in
SHARES = ("plain_gradient_share", "fisher_below_damping")  # of a direction, which are told of batches as their means
TOKENS = ("token_influence", "token_loss")
INTENSITY_SCHEMA = SCORE_SCHEMA.append(pa.field("outlier", pa.float64())).append(pa.field("intensity", pa.float64()))


@dataclass(frozen=True)
class Scores:
    """What is known of the samples of a forget set, ``[N]`` in their order.

    Attributes:
        losses: cross-entropy, nats.
        gradient_norms: norm of each sample's gradient.
        influence: negative where training on the sample lowered the forget-set loss.
        label_counts: samples of each label.
        outlier_norm: gradient norm of which ``outlier`` tells the multiple.
        figures: what stands behind the scores (``fit_direction``).
        tokens: influence and loss of every token, ``[N, T]`` each, NaN where a position has no label; None where
            samples are scored as a whole.
    """

    losses: Column
    gradient_norms: Column
    influence: Column
    label_counts: dict[int, int]
    outlier_norm: float
    figures: dict[str, Any]
    tokens: tuple[Column, Column] | None = None


def shard_statistics(shard: FeatureShard, part: Part, statistics: Mapping[str, Statistics]) -> ByLayer[Any]:
    """Statistics of the layers of a part on one shard, for a task that merges them without a GPU."""
    return part.statistics(shard, statistics).cpu()


def score_shard(shard: FeatureShard, part: Part, directions: Parameters, unit: str = "sample") -> pa.Table:
    """Loss, influence and gradient norm of every sample of a shard; and influence and loss of every token."""
    table = part.scores(shard, directions)
    if unit == "token":
        for name, values in zip(TOKENS, cast(Layers, part).token_scores(shard, directions), strict=True):
            column = pa.FixedSizeListArray.from_arrays(pa.array(values.ravel()), values.shape[1])
            table = table.append_column(name, column)
    return table


def score_batches(shard: FeatureShard, part: Part, settings: InfluenceConfig) -> tuple[pa.Table, list[dict[str, Any]]]:
    """The same with each block as a batch of its own (``influence.reference``), and what stands behind each batch."""
    tables, figures = list[pa.Table](), list[dict[str, Any]]()
    for block in shard.split():

        def reduce(statistics: Statistics, block: FeatureShard = block) -> Mapping[str, Any]:
            return part.statistics(block, dict.fromkeys(part.parameters, statistics)).parts

        def norm_quantile(level: float, block: FeatureShard = block) -> float:
            return float(np.quantile(part.norms(block), level))

        directions, found = fit_directions(settings, list(part.parameters), reduce, None, norm_quantile)
        tables.append(score_shard(block, part, directions, settings.unit))
        figures.append({**{name: found[name] for name in SHARES}, "rows": len(block.ids)})
    return pa.concat_tables(tables) if tables else SCORE_SCHEMA.empty_table(), figures


def norms_of(shard: FeatureShard, part: Part) -> Column:
    """Gradient norm of every sample of a shard."""
    return part.norms(shard)


def with_influence(features: FeatureSet, part: Part, config: UnlearnConfig, influence: Column) -> Scores:
    """What is known of every sample beside an influence ``[N]`` that was computed elsewhere: no curvature is fitted."""
    nowhere = {name: torch.zeros_like(matrix) for name, matrix in part.parameters.items()}
    scored = features.stream("scores", functools.partial(score_shard, part=part, directions=nowhere))
    return replace(_collect(scored, features, part, config), influence=influence)


def score(features: FeatureSet, part: Part, config: UnlearnConfig, fitted_on: FeatureSet | None = None) -> Scores:
    """Influence of every sample and what stands behind it.

    Args:
        features: of the forget set.
        part: the layers that are scored; over several, influence adds up.
        config: ``influence.*``.
        fitted_on: features that the curvature is fitted on; None: those of the forget set.
    """
    if config.influence.reference == "batch":
        batches: list[dict[str, Any]] = []

        def tables() -> Iterator[pa.Table]:
            function = functools.partial(score_batches, part=part, settings=config.influence)
            for table, found in features.stream("scores", function):
                batches.extend(found)
                yield table

        scores = _collect(tables(), features, part, config)
        rows = [each["rows"] for each in batches]
        means = {name: float(np.mean([each[name] for each in batches])) for name in SHARES}
        return replace(scores, figures={**means, "batches": len(batches), "batch_rows": [min(rows), max(rows)]})

    def norm_quantile(level: float) -> float:
        norms = features.map("gradient norms", functools.partial(norms_of, part=part))
        return float(np.quantile(np.concatenate(norms), level))

    def reduce(made: FeatureSet, stage: str, statistics: Statistics) -> dict[str, Any]:
        by_layer = dict.fromkeys(part.parameters, statistics)
        return made.reduce(stage, functools.partial(shard_statistics, part=part, statistics=by_layer)).parts

    directions, figures = fit_directions(
        config.influence,
        list(part.parameters),
        functools.partial(reduce, features, "moments"),
        None if fitted_on is None else functools.partial(reduce, fitted_on, "curvature"),
        norm_quantile,
    )
    function = functools.partial(score_shard, part=part, directions=directions, unit=config.influence.unit)
    return replace(_collect(features.stream("scores", function), features, part, config), figures=figures)


def _collect(tables: Iterable[pa.Table], features: FeatureSet, part: Part, config: UnlearnConfig) -> Scores:
    """The columns of all shards, and what follows from them."""
    columns = {name: np.empty(features.rows) for name in ("loss", "influence", "gradient_norm")}
    shape = features.rows, part.task.positions
    tokens = (np.empty(shape), np.empty(shape)) if config.influence.unit == "token" else None
    counts, start = np.zeros(part.task.num_classes, np.int64), 0
    for scored in tables:
        for name, column in columns.items():
            column[start : start + len(scored)] = scored[name]
        if tokens is not None and len(scored):
            for place, name in zip(tokens, TOKENS, strict=True):
                place[start : start + len(scored)] = (
                    scored[name].combine_chunks().flatten().to_numpy().reshape(len(scored), -1)
                )
        counts += np.bincount(scored["label"].drop_null(), minlength=len(counts))
        start += len(scored)
    norm = float(np.quantile(columns["gradient_norm"], config.influence.clip_quantile))
    label_counts = {label: count for label, count in enumerate(counts.tolist()) if count}
    return Scores(
        columns["loss"],
        columns["gradient_norm"],
        columns["influence"],
        label_counts,
        norm,
        {},
        tokens,
    )


def _identify(shard: FeatureShard) -> tuple[pa.StringArray, pa.Array]:
    """Ids and labels: what of the table the driver does not hold."""
    return shard.ids, labels_column(shard)


def by_token(values_NT: Column) -> pa.ListArray:
    """A list for each row with a value for each of its tokens up to the last that is predicted; null: not predicted."""
    rows = []
    for row in values_NT:
        known = np.flatnonzero(~np.isnan(row))
        used = row[: known[-1] + 1].tolist()
        rows.append([None, *(None if np.isnan(value) else value for value in used)])  # position t predicts token t + 1
    return pa.array(rows, pa.list_(pa.float64()))


def by_position(lists: Sequence[Sequence[float | None]], positions: int) -> Column:
    """The values of such lists, ``[N, T]``, NaN where there is none."""
    values = np.full((len(lists), positions), np.nan)
    for row, tokens in zip(values, lists, strict=True):
        found = np.array(tokens[1:], np.float64)
        row[: len(found)] = found
    return values


def intensity_table(features: FeatureSet, scores: Scores, weights: Column) -> Iterator[pa.Table]:
    """The table of all samples (``INTENSITY_SCHEMA``), a row group at a time."""
    start, waiting = 0, []
    for ids, labels in features.stream("table", _identify):
        rows = slice(start, start + len(ids))
        norms = scores.gradient_norms[rows]
        outlier = norms / scores.outlier_norm if scores.outlier_norm else np.zeros_like(norms)
        own = of_rows(weights[rows])
        columns = [ids, labels, scores.losses[rows], scores.influence[rows], norms, outlier, own]
        table = pa.table(columns, schema=INTENSITY_SCHEMA)
        if scores.tokens is not None:
            table = table.append_column("token_influence", by_token(scores.tokens[0][rows]))
            table = table.append_column("token_intensity", by_token(weights[rows]))
        waiting.append(table)
        if len(waiting) == JOINED:
            waiting = [pa.concat_tables(waiting).combine_chunks()]
        if sum(map(len, waiting)) >= ROW_GROUP:
            yield pa.concat_tables(waiting)
            waiting = []
        start = rows.stop
    if waiting:
        yield pa.concat_tables(waiting)
