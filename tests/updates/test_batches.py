import numpy as np
import pytest

from imu_ray.config import AscentConfig
from imu_ray.scopes.features import FeatureShard, FeatureStore
from imu_ray.updates.batches import epoch_batches

STARTS = np.arange(0, 200, 10)
KEPT = np.flatnonzero(np.arange(200) % 7 != 0)


def flat(batches):
    return np.concatenate(batches)


@pytest.mark.parametrize("window", [1, 3, 64])
def test_every_kept_row_comes_exactly_once_an_epoch(window):
    batches = epoch_batches(KEPT, STARTS, AscentConfig(batch_size=32, window_blocks=window), 0, 0)
    assert sorted(flat(batches)) == KEPT.tolist()
    assert [len(batch) for batch in batches] == [32] * (len(KEPT) // 32) + [len(KEPT) % 32]


def test_the_order_is_a_function_of_seed_and_epoch():
    make = lambda seed, epoch: flat(epoch_batches(KEPT, STARTS, AscentConfig(batch_size=32), seed, epoch)).tolist()
    assert make(1, 2) == make(1, 2)
    assert make(1, 2) != make(1, 3)
    assert make(1, 2) != make(2, 2)


def test_rows_are_shuffled_within_a_window_of_blocks_only():
    every = np.arange(200)
    config = AscentConfig(window_blocks=2, batch_size=10)
    blocks = [set(batch // 10) for batch in epoch_batches(every, STARTS, config, 0, 0)]
    windows = [first | second for first, second in zip(blocks[::2], blocks[1::2], strict=True)]
    assert all(len(window) == 2 for window in windows), "20 rows in a row come from two blocks of 10"
    assert any(len(batch) == 2 for batch in blocks), "and are mixed"
    assert len({tuple(sorted(window)) for window in windows}) == len(windows)


def test_blocks_that_lost_all_their_rows_are_passed_over():
    batches = epoch_batches(np.array([0, 1, 30]), np.array([0, 2, 2, 2, 30]), AscentConfig(), 0, 0)
    assert sorted(flat(batches)) == [0, 1, 30]


def test_gather_returns_rows_of_any_shard():
    features = np.arange(60, dtype=np.float32).reshape(20, 3)
    labels = np.arange(20)
    cuts = [(0, 7), (7, 7), (7, 20)]
    store = FeatureStore([FeatureShard(features[a:b], labels[a:b], [], (b - a,)) for a, b in cuts])
    wanted = np.array([0, 3, 6, 7, 8, 19])
    got, got_labels = store.gather(wanted)
    assert got_labels.tolist() == wanted.tolist()
    assert got.numpy().tolist() == features[wanted].tolist()
    assert len(store) == 20
    short, _ = store.gather(np.array([5]))
    assert short.numpy().tolist() == features[[5]].tolist(), "a shorter microbatch after a longer one"


def test_positions_within_a_batch_ascend_so_that_a_workers_pieces_lie_together():
    batches = epoch_batches(KEPT, STARTS, AscentConfig(batch_size=32), 3, 1)
    assert all((np.diff(batch) > 0).all() for batch in batches)
