import functools
import multiprocessing
import socket

import pytest
import torch
import torch.distributed

from imu_ray.updates import workers
from imu_ray.updates.workers import Workers

WORLD = 3
# By number of entries: of a large tensor each worker adds up a slice, and some slices may be empty.
SHAPES = [(), (1,), (0,), (10, 513), (2, 7, 11_111), (300_001,)]


def parts(shape, dtype=torch.float64):
    """What each worker has; a sum whose last bits depend on its order."""
    return [torch.rand(shape, generator=torch.Generator().manual_seed(rank), dtype=dtype) for rank in range(WORLD)]


def address(rank):
    """The worker in the middle is called by IPv6, where this machine has it."""
    try:
        socket.create_server(("::1", 0), family=socket.AF_INET6).close()
    except OSError:
        return "127.0.0.1"
    return "::1" if rank == 1 else "127.0.0.1"


def sum_in_process(rank, folder, results):
    torch.set_num_threads(1)
    torch.distributed.init_process_group("gloo", init_method=f"file://{folder}/rendezvous", rank=rank, world_size=WORLD)
    own = Workers(rank, WORLD, address=address(rank))
    for case, whole_bytes in enumerate((workers.WHOLE_BYTES, -1)):
        workers.WHOLE_BYTES = whole_bytes
        for shape in SHAPES:
            mine = parts(shape)[rank]
            assert own.sum(mine) is mine
            results.put((case, shape, rank, mine.numpy()))
        strided = parts((4, 6), torch.float32)[rank].T
        results.put((case, "strided", rank, own.sum(strided).numpy().copy()))
    if rank == 1:
        results.put((0, "lost", rank, None))
        results.close()
        results.join_thread()
        return  # and is gone: its process ends
    try:
        while True:
            own.sum(torch.ones(10, 513))
    except ConnectionError as error:
        results.put((0, "lost", rank, str(error)))


@pytest.fixture(scope="module")
def found(tmp_path_factory):
    context = multiprocessing.get_context("spawn")
    results, folder = context.Queue(), tmp_path_factory.mktemp("group")
    group = [context.Process(target=sum_in_process, args=(rank, folder, results), daemon=True) for rank in range(WORLD)]
    for process in group:
        process.start()
    count = WORLD * (2 * (len(SHAPES) + 1) + 1)
    got = {(case, name, rank): value for case, name, rank, value in (results.get(timeout=120) for _ in range(count))}
    for process in group:
        process.join(timeout=60)
    return got


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("case", [0, 1], ids=["by_its_size", "by_slices"])
def test_a_sum_is_that_of_the_parts_in_the_order_of_ranks_to_the_bit(found, case, shape):
    expected = functools.reduce(torch.add, parts(shape)).numpy()
    for rank in range(WORLD):
        assert found[case, shape, rank].shape == shape
        assert found[case, shape, rank].tobytes() == expected.tobytes()


@pytest.mark.parametrize("case", [0, 1])
def test_a_tensor_that_is_not_contiguous_is_summed_in_place(found, case):
    expected = functools.reduce(torch.add, [part.T for part in parts((4, 6), torch.float32)]).numpy()
    assert all((found[case, "strided", rank] == expected).all() for rank in range(WORLD))


def test_a_worker_that_is_gone_is_named_and_nobody_waits_for_it(found):
    # The other survivor may be gone by then as well, because of the first.
    assert any("worker 1 of the ascent" in found[0, "lost", rank] for rank in (0, 2))
    assert all("while sums were brought together" in found[0, "lost", rank] for rank in (0, 2))


@pytest.mark.parametrize("count", [0, 1, 5, 12])
@pytest.mark.parametrize("world", [1, 2, 4, 7])
def test_pieces_are_dealt_in_runs_that_differ_by_one_at_the_most(world, count):
    dealt = [Workers(rank, world).mine(list(range(count))) for rank in range(world)]
    assert [piece for run in dealt for piece in run] == list(range(count))
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1


def test_one_worker_needs_no_group():
    tensor = torch.ones(3)
    assert Workers().sum(tensor) is tensor
    assert Workers().agree("word") == "word"


TOKEN = b"t" * 32


def answered(*callers, ranks=(5,)):
    """Who is taken for a worker of those who call one after the other, say something and, but for the last, hang up."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        calls = []
        for said in callers:
            calls.append(socket.create_connection(server.getsockname()))
            calls[-1].sendall(said)
        for call in calls[:-1]:
            call.close()
        found = workers._answer(server, TOKEN, set(ranks))
    for connection in [*found.values(), calls[-1]]:
        connection.close()
    return sorted(found)


def introduction(rank, token=TOKEN):
    return token + rank.to_bytes(4, "big")


@pytest.mark.parametrize("stranger", [introduction(5, b"f" * 32), b"GET / HTTP/1.1\r\n\r\n", b"", introduction(6)])
def test_only_a_worker_that_is_expected_is_answered(stranger):
    assert answered(stranger, introduction(5)) == [5]


def test_a_stranger_who_says_nothing_does_not_keep_the_workers_waiting(monkeypatch):
    monkeypatch.setattr(workers, "INTRODUCTION_SECONDS", 0.01)
    with socket.create_server(("127.0.0.1", 0)) as server:
        silent, worker = (socket.create_connection(server.getsockname()) for _ in range(2))
        with silent, worker:
            worker.sendall(introduction(5))
            found = workers._answer(server, TOKEN, {5})
    assert sorted(found) == [5]
    found[5].close()


def test_workers_that_never_call_are_named_and_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(workers, "CONNECT_SECONDS", 0.01)
    with pytest.raises(ConnectionError, match=r"workers \[5, 7\] of the ascent have not called"):
        answered(b"", ranks=(7, 5))


def test_a_worker_that_cannot_be_reached_is_named_with_what_to_do():
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
    with pytest.raises(ConnectionError, match=rf"worker 1 .* cannot reach worker 0 at 127.0.0.1, port {port}: .* let the nodes"):
        workers._call(0, ("127.0.0.1", port), TOKEN, 1)


def test_a_worker_that_does_not_do_its_part_is_named_and_not_waited_for_forever(monkeypatch):
    monkeypatch.setattr(workers, "SUM_SECONDS", 0.01)
    own, (here, there) = Workers(0, 2), socket.socketpair()
    here.setblocking(False)
    own._peers = {1: here}
    with here, there, pytest.raises(ConnectionError, match=r"workers \[1\] of the ascent have not done their part"):
        own.sum(torch.ones(3))
