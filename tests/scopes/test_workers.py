import pytest
import torch

from imu_ray.scopes.workers import Workers


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_pieces_are_dealt_in_runs_that_differ_by_one_at_most(world, count):
    dealt = [Workers(rank, world).take(list(range(count))) for rank in range(world)]
    assert [piece for run in dealt for piece in run] == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_one_worker_needs_no_group():
    tensor = torch.ones(3)
    assert Workers().sum(tensor) is tensor
    assert Workers().agree("word") == "word"
