"""Scores on Ray: the same bits whatever the workers, the shards, the order of completion and the faults."""

import itertools
import operator
import os

import numpy as np
import pyarrow as pa
import pytest
import ray
from architectures import named
from faults import KillBefore, KillingPairs
from samples import Pairs, pairs, tensors

from imu_ray.config import UnlearnConfig
from imu_ray.data import open_source
from imu_ray.distributed import feature_job, score_job
from imu_ray.distributed.tasks import fetch_stage
from imu_ray.errors import ConfigError, ForgetSetError, StageFailedError
from imu_ray.influence.curvature import CURVATURES
from imu_ray.influence.curvature.hessian import Hessian
from imu_ray.inputs import Inputs
from imu_ray.scopes.head import Head
from imu_ray.tasks.classification import ClassificationTask

pytestmark = pytest.mark.usefixtures("ray_cluster")
ROWS = 201


def config(workers=2, run=1, **more):
    shards = {"influence.block_rows": 8, "influence.blocks_per_shard": run}
    return UnlearnConfig().with_overrides({"resources.workers": workers, **shards, **more})


def features(dataset, settings, model=None):
    model = model or named("fc")
    source = open_source(dataset, settings.forget_set)
    task = ClassificationTask.for_model(model, {"forget": source}, settings.forget_set)
    return feature_job.extract(source, Head.of(model, task), feature_job.share(model), settings, "features"), Head.of(
        model, task
    )


def scores(dataset, settings):
    return table_of(*features(dataset, settings), settings)


def table_of(made, head, settings):
    """The whole table, with intensities of 1, and what stands behind it."""
    found = score_job.score(made, head, settings)
    return pa.concat_tables(score_job.intensity_table(made, found, np.ones(made.rows))), found.figures


def test_the_table_comes_in_row_groups_with_outliers_and_the_intensities_given(monkeypatch):
    monkeypatch.setattr(score_job, "ROW_GROUP", 50)
    monkeypatch.setattr(score_job, "JOINED", 3)
    settings, weights = config(2, 2), np.arange(float(ROWS))
    made, head = features(pairs(ROWS), settings)
    found = score_job.score(made, head, settings)
    groups = list(score_job.intensity_table(made, found, weights))
    assert [len(group) for group in groups] == [64, 64, 64, 9]
    table, inputs = pa.concat_tables(groups), pairs(ROWS)
    assert table.column_names == ["sample_id", "label", "loss", "influence", "gradient_norm", "outlier", "intensity"]
    assert table["sample_id"].to_pylist() == [str(row) for row in range(ROWS)]
    assert table["label"].to_pylist() == inputs.labels.tolist()
    norms = table["gradient_norm"].to_numpy()
    columns = {"loss": found.losses, "influence": found.influence, "intensity": weights}
    for name, column in {**columns, "outlier": norms / np.quantile(norms, 0.95)}.items():
        assert np.array_equal(table[name].to_numpy(), column), name
    labels, counts = np.unique(inputs.labels, return_counts=True)
    assert found.label_counts == dict(zip(labels.tolist(), counts.tolist(), strict=True))


@pytest.fixture(scope="module")
def expected():
    """Scores of one worker with one block a shard."""
    return scores(pairs(ROWS), config(1, 1))


@pytest.mark.parametrize("run", [1, 4, 64])
@pytest.mark.parametrize("workers", [1, 2, 4])
def test_scores_are_bit_identical_for_any_workers_and_shards(workers, run, expected):
    table, figures = scores(pairs(ROWS), config(workers, run))
    assert table.equals(expected[0])
    assert figures == expected[1]


@pytest.mark.parametrize(
    "curvature",
    [
        "diagonal_fisher",
        *(pytest.param(each, marks=pytest.mark.slow) for each in ("kfac", "implicit")),
        *(pytest.param(each, marks=[pytest.mark.slow, pytest.mark.long]) for each in ("identity", "hessian")),
    ],
)
def test_every_curvature_gives_the_same_bits_for_any_workers_and_shards_and_when_they_are_killed(
    curvature, tmp_path, monkeypatch
):
    if curvature == "implicit":
        monkeypatch.setitem(CURVATURES, "implicit", Hessian(dense_size=0))
    more = {"influence.curvature": curvature, "influence.robust": "clip"}
    table, figures = scores(pairs(60), config(1, 1, **more))
    assert ("iterations" in figures) == (curvature == "implicit")
    for workers, run in [(4, 4), (2, 64)]:
        again, told = scores(pairs(60), config(workers, run, **more))
        assert again.equals(table)
        assert told == figures
    for name in ("norms_of", "shard_statistics", "score_shard"):
        monkeypatch.setattr(score_job, name, KillBefore(getattr(score_job, name), tmp_path, name))
    again, told = scores(KillingPairs(*tensors(60), tmp_path, row=30), config(2, 2, **more))
    assert again.equals(table)
    assert told == figures
    assert sorted(os.listdir(tmp_path)) == ["norms_of", "row30", "score_shard", "shard_statistics"]


def test_features_that_are_made_anew_in_every_stage_give_the_same_bits(expected, tmp_path):
    settings = config(2, 4, **{"influence.features": "recompute"})
    made, head = features(KillingPairs(*tensors(ROWS), tmp_path, row=100), settings)
    assert sum(report.feature_bytes for report in made.reports) == 0
    assert not any(isinstance(item, ray.ObjectRef) for item in made.refs), "nothing is kept"
    table, figures = table_of(made, head, settings)
    assert table.equals(expected[0])
    assert figures == expected[1]
    odd = made.select(odd_rows).select(first_hundred)
    fetched = [sample_id for shard in feature_job.fetch(odd.refs) for sample_id in shard.ids.to_pylist()]
    assert ids_of(odd) == fetched == [str(row) for row in range(1, 100, 2)]


def test_what_was_made_in_the_callers_process_is_not_taken_for_the_next_calls():
    """A new session may give its objects the same references; what is cached under them must not outlive the fetch."""
    made, _ = features(pairs(20), config(1, 1, **{"influence.features": "recompute"}))
    feature_job.fetch(made.refs)
    assert fetch_stage.cache_info().currsize == feature_job._model.cache_info().currsize == 0


def test_all_sample_sets_share_one_model_in_the_object_store():
    settings = config(**{"influence.features": "recompute"})
    opened = Inputs.open(named("fc"), pairs(20), "classification", {"test": pairs(10, seed=1)}, settings)
    inputs = opened.extract(settings)
    models = {inputs.features[name].refs[0].extraction.work().model for name in ("forget", "test")}
    assert len(models) == 1


def odd_rows(shard):
    return shard.places_n % 2 == 1


def first_hundred(shard):
    return shard.places_n < 100


def test_an_error_of_our_own_comes_back_as_it_was_raised():
    inputs, labels = tensors(20)
    labels[9] = 17
    with pytest.raises(ForgetSetError, match="row '9' of Pairs has label 17; expected 0 to 4"):
        features(Pairs(inputs, labels), config())


def test_any_other_error_names_the_stage_and_the_cause():
    made, _ = features(pairs(20), config())

    def fail(shard):
        raise RuntimeError("the disk is on fire")

    with pytest.raises(StageFailedError, match="figures failed: RuntimeError: the disk is on fire"):
        made.map("figures", fail)


def test_a_worker_that_dies_each_time_is_a_clear_failure(tmp_path):
    class DyingPairs(KillingPairs):
        def __getitem__(self, row):
            if row == self.row:
                os.kill(os.getpid(), 9)
            return super().__getitem__(row)

    with pytest.raises(StageFailedError, match="features failed: WorkerCrashedError"):
        features(DyingPairs(*tensors(20), tmp_path, row=5), config())


def ids_of(features):
    """Sample ids, in order."""
    return [sample_id for ids in features.map("ids", operator.attrgetter("ids")) for sample_id in ids.to_pylist()]


def selected(size, run=1, dataset=None, seed=0, **more):
    """Features of a part, made from those of all rows, or of a larger part."""
    base = config(run=run, **{"forget_set.size_seed": seed, **more})
    inputs = Inputs.open(named("fc"), dataset or pairs(ROWS), "classification", None, base).extract(base)
    return inputs.select(base.with_overrides({"forget_set.size": size})).features["forget"], inputs.part


@pytest.mark.parametrize("run", [1, 4])
def test_a_larger_part_contains_a_smaller_one_whatever_the_shards(run):
    parts = [set(ids_of(selected(size, run)[0])) for size in (1, 20, 0.5, 1.0)]
    assert [len(part) for part in parts] == [1, 20, 100, ROWS]
    assert all(small < large for small, large in itertools.pairwise(parts))
    assert parts[1] == set(ids_of(selected(20, run=2)[0]))
    assert parts[1] != set(ids_of(selected(20, seed=4)[0]))


def test_a_part_of_a_part_is_the_part_of_all():
    settings = config(**{"forget_set.size": 20})
    opened = Inputs.open(named("fc"), pairs(ROWS), "classification", None, settings)
    alone = opened.extract(settings).select(settings).features["forget"]
    assert alone.rows == sum(report.rows for report in alone.reports) == 20
    assert ids_of(alone) == ids_of(selected(20)[0]) == ids_of(selected(20, **{"forget_set.size": 0.5})[0])


def test_rows_left_out_do_not_move_the_others():
    class Broken(Pairs):
        def __getitem__(self, row):
            return (None if row % 10 == 3 else self.inputs[row]), int(self.labels[row])

    whole = set(ids_of(selected(60)[0]))
    left = set(ids_of(selected(60, dataset=Broken(*tensors(ROWS)), **{"forget_set.on_bad_row": "skip"})[0]))
    assert left == {sample_id for sample_id in whole if int(sample_id) % 10 != 3}


def test_classes_are_a_part_with_all_their_samples():
    labels = pairs(ROWS).labels.numpy()
    assert ids_of(selected((1, 3))[0]) == [str(row) for row in range(ROWS) if labels[row] in (1, 3)]


def test_ids_are_the_samples_in_their_order_and_no_others():
    part = selected(40)[0]
    ids = ids_of(part)
    assert part.holds(pa.chunked_array([ids[:7], ids[7:]]))
    for other in (ids[:-1], [*ids, "x"], ids[::-1], [*ids[:20], "x", *ids[21:]], []):
        assert not part.holds(pa.chunked_array([pa.array(other, pa.string())]))


def test_a_part_is_scored_as_if_it_were_all():
    part, head = selected(40)
    table, _ = table_of(part, head, config())
    rows = [int(sample_id) for sample_id in ids_of(part)]
    alone, _ = scores(Pairs(*(column[rows] for column in tensors(ROWS))), config())
    assert table["label"].to_pylist() == alone["label"].to_pylist()
    largest = abs(alone["influence"].to_numpy()).max()
    # The features of the two differ by the batches they were computed in.
    assert abs(table["influence"].to_numpy() - alone["influence"].to_numpy()).max() <= 1e-5 * largest
    assert part.rows == sum(sum(report.block_sizes) for report in part.reports) == 40


@pytest.mark.parametrize(("size", "message"), [(ROWS + 1, f"at most the {ROWS} rows"), ((1, 77), r"classes \[77\]")])
def test_a_part_that_is_not_there_is_refused(size, message):
    with pytest.raises(ConfigError, match=message):
        selected(size)


@ray.remote(resources={"nowhere": 1})
def never():
    return None


def test_a_process_does_not_wait_for_ever_for_features_that_nothing_can_make(monkeypatch):
    monkeypatch.setattr(feature_job, "ARRIVAL_SECONDS", 0.05)
    with pytest.raises(TimeoutError, match="1 of 2 shards of features did not come"):
        feature_job.fetch([ray.put(None), never.remote()])
