r"""Margins of many models at the same points: what audits of a population of models are made from.

The margin :math:`z_y - \ln \sum_{c \ne y} e^{z_c}` is the log-odds of the true class (``influence.scores.margins``).
M models of a kind, N points.
"""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa
import pyarrow.parquet as pq

from imu_ray.data.location import Location
from imu_ray.errors import CheckpointError, ForgetSetError, NonFiniteError
from imu_ray.run.storage import open_storage

KINDS = ("original", "retrained", "unlearned", "control")
COLUMNS = ("kind", "seed", "point", "set", "margin")

Matrix = npt.NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Margins:
    """Margins ``[kind, seed, point]``.

    Attributes:
        points: ids of the samples, N of them; unique within a set.
        sets: name of the sample set of each point, ``[N]``; ``forget`` is one of them.
        seeds: seeds of the models of each kind, in the order of the rows. ``unlearned`` of a seed was made from
            ``original`` of this seed, ``control`` from ``retrained``.
        of: margins by kind of model, ``[M, N]`` float64. ``original`` models were trained on all samples, ``retrained``
            ones (the oracles) without the forget set; ``unlearned`` ones are originals after unlearning, and
            ``control`` ones are retrained models after the same call: never trained on the forget set, unlearned alike.

    Raises:
        ForgetSetError: a point stands there twice, or there are none.
        CheckpointError: a kind is unknown, a model stands there twice, or shapes do not fit.
        NonFiniteError: a margin is NaN or infinite.
    """

    points: list[str]
    sets: npt.NDArray[np.str_]
    seeds: Mapping[str, list[int]]
    of: Mapping[str, Matrix]

    def __post_init__(self) -> None:
        if not self.points or not self.of:
            raise ForgetSetError("there are no margins; expected at least one model at one point")
        if len(self.sets) != len(self.points):
            raise ForgetSetError(
                f"{len(self.points)} points have {len(self.sets)} names of sets; expected one for each"
            )
        _check_unique(self.points, self.sets, "the margins")
        if set(self.of) != set(self.seeds):
            expected = "expected the same kinds"
            raise CheckpointError(f"margins are of {sorted(self.of)}, seeds of {sorted(self.seeds)}; {expected}")
        for kind, margins_MN in self.of.items():
            self._check(kind, margins_MN)

    def _check(self, kind: str, margins_MN: Matrix) -> None:
        if kind not in KINDS:
            raise CheckpointError(f"kind of model is {kind!r}; expected one of {', '.join(KINDS)}")
        wanted = (len(self.seeds[kind]), len(self.points))
        if margins_MN.shape != wanted or not wanted[0]:
            raise CheckpointError(
                f"margins of {kind} models have shape {margins_MN.shape}; expected {wanted}: a row for each seed, a "
                "column for each point"
            )
        twice = sorted({seed for seed in self.seeds[kind] if self.seeds[kind].count(seed) > 1})
        if twice:
            raise CheckpointError(f"the {kind} model of seed {twice[0]} stands there twice; expected it once")
        bad = np.argwhere(~np.isfinite(margins_MN))
        if len(bad):
            model, point = bad[0]
            raise NonFiniteError(
                f"the {kind} model of seed {self.seeds[kind][model]} has margin {margins_MN[model, point]} at point "
                f"{self.points[point]!r}, {len(bad)} such in all; expected finite numbers; leave the model out"
            )

    @property
    def names(self) -> list[str]:
        """Names of the sets, in the order of their first points."""
        return list(dict.fromkeys(self.sets.tolist()))

    def subset(self, *names: str) -> "Margins":
        """The same models at the points of some sets; ``ForgetSetError`` where there is no such set."""
        for name in names:
            if name not in self.names:
                expected = f"expected one of {', '.join(self.names)}"
                raise ForgetSetError(f"there are no margins of the set {name!r}; {expected}")
        kept = np.isin(self.sets, names)
        points = [point for point, keep in zip(self.points, kept.tolist(), strict=True) if keep]
        return Margins(points, self.sets[kept], self.seeds, {kind: each[:, kept] for kind, each in self.of.items()})

    def join(self, other: "Margins") -> "Margins":
        """The models of both, at the same points; ``CheckpointError`` where points differ or a model is in both."""
        order = _order_of(self, other.points, other.sets, "the other margins")
        kinds = [kind for kind in KINDS if kind in self.of or kind in other.of]
        seeds = {kind: [*self.seeds.get(kind, []), *other.seeds.get(kind, [])] for kind in kinds}
        empty = np.empty((0, len(self.points)))
        of = {
            kind: np.concatenate([self.of.get(kind, empty), other.of[kind][:, order] if kind in other.of else empty])
            for kind in kinds
        }
        return Margins(self.points, self.sets, seeds, of)

    def table(self, kind: str, seed: int) -> pa.Table:
        """The rows of one model, as they are written: columns ``kind, seed, point, set, margin``."""
        if seed not in self.seeds.get(kind, []):
            raise CheckpointError(f"there is no {kind} model of seed {seed}; expected one of {dict(self.seeds)}")
        margins_N = self.of[kind][self.seeds[kind].index(seed)]
        return model_table(kind, seed, self.points, self.sets.tolist(), margins_N)

    def write(self, folder: str | Path) -> list[str]:
        """One Parquet file for each model in a folder or below a URI, as ``read`` takes it; gives their names."""
        storage = open_storage(folder)
        models = {file_name(kind, seed): (kind, seed) for kind, seeds in self.seeds.items() for seed in seeds}
        for name, model in models.items():
            table = self.table(*model)
            storage.write(name, lambda path, table=table: pq.write_table(table, path))  # type: ignore[misc]
        return list(models)

    @classmethod
    def read(cls, where: str | Path | Sequence[str | Path]) -> "Margins":
        """Margins of a folder (or URI) of Parquet files, or of some of them, a model in each.

        Raises:
            CheckpointError: a file cannot be read, lacks a column or holds several models; a model is in two files; a
                model has other points than the first.
            ForgetSetError: there is no such folder or file; a point stands in a file twice.
            NonFiniteError: a margin is missing, NaN or infinite.
        """
        given = [where] if isinstance(where, str | Path) else where
        places = [Location.open(str(each), "margins") for each in given]
        files = [(place, path) for place in places for path in place.ending_in(".parquet")]
        if not files:
            told = ", ".join(place.name for place in places)
            raise ForgetSetError(f"no Parquet file lies in {told or 'an empty list'}; expected one for each model")
        return cls.of_tables((path, _read_file(place, path)) for place, path in files)

    @classmethod
    def of_tables(cls, tables: Iterable[tuple[str, pa.Table]]) -> "Margins":
        """Margins of tables as ``table`` gives them, a model in each, with the name that errors are to give them."""
        first: Margins | None = None
        rows: dict[str, dict[int, Matrix]] = {kind: {} for kind in KINDS}
        origin: dict[tuple[str, int], str] = {}
        for name, table in tables:
            one = _of_table(name, table)
            ((kind, (seed,)),) = one.seeds.items()
            if (kind, seed) in origin:
                raise CheckpointError(
                    f"{name} and {origin[kind, seed]} both hold the {kind} model of seed {seed}; expected a model once"
                )
            origin[kind, seed] = name
            first = first or one
            rows[kind][seed] = one.of[kind][0][_order_of(first, one.points, one.sets, name)]
        if first is None:
            raise ForgetSetError("there are no margins; expected the table of at least one model")
        found = {kind: dict(sorted(models.items())) for kind, models in rows.items() if models}
        of = {kind: np.stack(list(models.values())) for kind, models in found.items()}
        return cls(first.points, first.sets, {kind: list(models) for kind, models in found.items()}, of)


def file_name(kind: str, seed: int) -> str:
    """Name of the file of a model."""
    return f"{kind}-{seed:05d}.parquet"


def model_table(kind: str, seed: int, points: Sequence[str], sets: Sequence[str], margins_N: Matrix) -> pa.Table:
    """Margins of one model as a table of the columns ``COLUMNS``.

    Args:
        kind: one of ``KINDS``.
        seed: of the model.
        points: ids of the samples, N of them.
        sets: name of the set of each.
        margins_N: the margin of each.

    Raises:
        CheckpointError: the kind is unknown, or the lengths differ.
        ForgetSetError: a point stands there twice.
        NonFiniteError: a margin is NaN or infinite.
    """
    Margins(list(points), np.asarray(sets, np.str_), {kind: [seed]}, {kind: np.asarray(margins_N)[None]})
    columns = [
        pa.array([kind] * len(points)),
        pa.array(np.full(len(points), seed, np.int64)),
        pa.array(list(points), pa.string()),
        pa.array(list(sets), pa.string()),
        pa.array(np.asarray(margins_N, np.float64)),
    ]
    return pa.table(dict(zip(COLUMNS, columns, strict=True)))


def _read_file(place: Location, path: str) -> pa.Table:
    try:
        return pq.read_table(path, filesystem=place.filesystem)
    except (OSError, pa.ArrowException) as error:
        expected = "expected Parquet; take it out, or make the model's margins again"
        raise CheckpointError(f"{path} cannot be read ({type(error).__name__}); {expected}") from None


def _of_table(name: str, table: pa.Table) -> Margins:
    """The margins of one model."""
    if set(COLUMNS) - set(table.column_names):
        expected = ", ".join(COLUMNS)
        raise CheckpointError(f"{name} has columns {', '.join(table.column_names)}; expected {expected}")
    if not table.num_rows:
        raise CheckpointError(f"{name} has no rows; expected a row for each point")
    holes = [column for column in COLUMNS if table[column].null_count]
    if holes:
        kind = NonFiniteError if holes == ["margin"] else CheckpointError
        raise kind(f"{name} has {table[holes[0]].null_count} rows without a {holes[0]}; expected a value in each")
    try:
        margins_N = table["margin"].cast(pa.float64()).to_numpy()
        points, sets = (table[column].cast(pa.string()).to_pylist() for column in ("point", "set"))
        kinds, seeds = table["kind"].unique().to_pylist(), table["seed"].cast(pa.int64()).unique().to_pylist()
    except pa.ArrowException as error:
        raise CheckpointError(f"{name} has a column of another type ({error}); expected what a run writes") from None
    if len(kinds) > 1 or len(seeds) > 1:
        raise CheckpointError(f"{name} holds models of kinds {kinds} and seeds {seeds}; expected one model in a file")
    _check_unique(points, np.array(sets, np.str_), name)
    return Margins(points, np.array(sets, np.str_), {kinds[0]: seeds}, {kinds[0]: margins_N[None]})


def _check_unique(points: Sequence[str], sets: npt.NDArray[np.str_], name: str) -> None:
    seen: set[tuple[str, str]] = set()
    for key in zip(sets.tolist(), points, strict=True):
        if key in seen:
            raise ForgetSetError(f"point {key[1]!r} of the set {key[0]!r} stands in {name} twice; expected it once")
        seen.add(key)


def _order_of(first: Margins, points: Sequence[str], sets: npt.NDArray[np.str_], name: str) -> npt.NDArray[np.int64]:
    """Where each point of ``first`` stands among others; refused where one side lacks a point of the other."""
    if points == first.points and np.array_equal(sets, first.sets):
        return np.arange(len(points))
    places = {key: place for place, key in enumerate(zip(sets.tolist(), points, strict=True))}
    wanted = list(zip(first.sets.tolist(), first.points, strict=True))
    missing, more = [key for key in wanted if key not in places], places.keys() - wanted
    if missing or more:
        which = f"lacks {len(missing)}" if missing else f"has {len(more)} more"
        example = (missing or sorted(more))[0]
        raise CheckpointError(
            f"{name} {which} of the points of the first model (such as {example[1]!r} of the set {example[0]!r}); "
            "expected the same points for every model; make its margins again"
        )
    return np.array([places[key] for key in wanted], np.int64)
