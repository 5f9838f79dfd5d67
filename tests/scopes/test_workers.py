import functools
import multiprocessing

import pytest
import torch
import torch.distributed

from imu_ray.scopes.workers import Workers

WORLD = 3
SHAPES = [(), (1,), (0,), (10, 513), (2, 7, 11_111)]


def parts(shape):
    """What each worker has."""
    return [
        torch.rand(shape, generator=torch.Generator().manual_seed(rank), dtype=torch.float64) for rank in range(WORLD)
    ]


def sum_in_process(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    own = Workers(rank, WORLD)
    for shape in SHAPES:
        part = parts(shape)[rank]
        assert own.sum(part) is part
        results.put((shape, rank, part.numpy()))
    results.put(("agreed", rank, own.agree(f"the word of {rank}")))
    torch.distributed.destroy_process_group()


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    results, folder = context.Queue(), tmp_path_factory.mktemp("group")
    group = [context.Process(target=sum_in_process, args=(rank, folder, results), daemon=True) for rank in range(WORLD)]
    for process in group:
        process.start()
    got = {
        (name, rank): value
        for name, rank, value in (results.get(timeout=120) for _ in range(WORLD * (len(SHAPES) + 1)))
    }
    for process in group:
        process.join(timeout=60)
    return got


@pytest.mark.parametrize("shape", SHAPES)
def test_a_sum_is_that_of_all_parts_with_the_same_bits_on_every_worker(found, shape):
    expected = functools.reduce(torch.add, parts(shape))
    for rank in range(WORLD):
        torch.testing.assert_close(torch.from_numpy(found[shape, rank]).reshape(shape), expected, rtol=1e-15, atol=0)
        assert found[shape, rank].tobytes() == found[shape, 0].tobytes()


def test_every_worker_gets_the_first_ones_value(found):
    assert {found["agreed", rank] for rank in range(WORLD)} == {"the word of 0"}


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
