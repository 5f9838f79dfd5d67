"""The workers of an ascent: which pieces are whose, and how what they found is brought together.

Sums go over TCP connections of their own, one between any two workers. A small step of a head takes one to three milliseconds;
``torch.distributed.all_reduce`` on CPUs hands every sum through threads that sleep, which takes half a millisecond to two.
"""

import contextlib
import functools
import hmac
import os
import secrets
import socket
import time
from collections.abc import Callable, Mapping
from typing import TypeVar

import numpy as np
import torch
import torch.distributed
from torch import Tensor

T = TypeVar("T")
CONNECT_SECONDS, INTRODUCTION_SECONDS = 60.0, 5.0
SUM_SECONDS = 1800.0  # the first worker may be writing its state to slow storage meanwhile
WHOLE_BYTES = 2**18  # received by a worker; up to here a second exchange takes longer than the bytes that it saves


class Workers:
    """One worker and its like. Every worker calls ``sum`` and ``agree`` in the same order, within a process group of torch.

    Args:
        rank: which worker this is, from 0.
        world: number of workers.
        device: where it computes; the CPU when not given.
        address: IP address under which the other workers reach this one.
    """

    def __init__(self, rank: int = 0, world: int = 1, device: torch.device | None = None, address: str = "127.0.0.1") -> None:
        self.rank, self.world, self.address = rank, world, address
        self.device = device or torch.device("cpu")

    def mine(self, pieces: list[T]) -> list[T]:
        """This worker's run of the pieces; runs differ by one piece at the most, and what lies together is read by one worker."""
        return pieces[self.rank * len(pieces) // self.world : (self.rank + 1) * len(pieces) // self.world]

    def sum(self, tensor: Tensor) -> Tensor:
        """Sum over all workers in the order of their ranks, in place: the same bits on each.

        Raises:
            ConnectionError: another worker has ended, cannot be reached, or has not done its part for half an hour. There are no
                sums with these workers after that.
        """
        if self.world == 1:
            return tensor
        own = tensor.detach().cpu().contiguous().view(-1)
        whole = own.nbytes * (self.world - 1) <= WHOLE_BYTES
        # Each worker adds up one slice and hands it on; of a small tensor, each adds up all.
        slices = [own] * self.world if whole else list(torch.tensor_split(own, self.world))
        parts = {peer: torch.empty_like(slices[self.rank]) for peer in self._peers}
        self._exchange(dict(enumerate(slices)), parts)
        parts[self.rank] = slices[self.rank]
        total = functools.reduce(torch.add, [parts[rank] for rank in range(self.world)])
        slices[self.rank].copy_(total)
        if not whole:
            self._exchange(dict.fromkeys(self._peers, total), dict(enumerate(slices)))
        return tensor.copy_(own.view(tensor.shape))

    def agree(self, value: T) -> T:
        """The first worker's value, on every worker."""
        box = [value]
        if self.world > 1:
            torch.distributed.broadcast_object_list(box)
        return box[0]

    def _exchange(self, outgoing: Mapping[int, Tensor], incoming: Mapping[int, Tensor]) -> None:
        """Send and receive at once, to and from every other worker."""
        left: list[tuple[int, Callable[[memoryview], int], memoryview]] = []
        for peer, connection in self._peers.items():
            left.append((peer, connection.send, outgoing[peer].numpy().view(np.uint8).data))
            left.append((peer, connection.recv_into, incoming[peer].numpy().view(np.uint8).data))
        until = time.monotonic() + SUM_SECONDS
        while left := [(peer, move, rest) for peer, move, view in left if (rest := view[_moved(peer, move, view) :])]:
            if time.monotonic() > until:
                late = sorted({peer for peer, *_ in left})
                raise ConnectionError(f"workers {late} of the ascent have not done their part of a sum within {SUM_SECONDS:g} s")
            os.sched_yield()  # whoever sleeps until the sum is there is woken later than most steps take

    @functools.cached_property
    def _peers(self) -> dict[int, socket.socket]:
        """A connection to every other worker, by rank: this worker calls those before it and is called by those after it."""
        token = self.agree(secrets.token_bytes(32))  # so that nobody else's call is taken for a worker's
        family = socket.AF_INET6 if ":" in self.address else socket.AF_INET
        with socket.create_server(("", 0), family=family, backlog=self.world) as server:
            places: list[tuple[str, int]] = [("", 0)] * self.world
            torch.distributed.all_gather_object(places, (self.address, server.getsockname()[1]))
            peers = {rank: _call(rank, place, token, self.rank) for rank, place in enumerate(places[: self.rank])}
            peers |= _answer(server, token, set(range(self.rank + 1, self.world)))
        for connection in peers.values():
            connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
            connection.setblocking(False)
        return peers


def _moved(peer: int, move: Callable[[memoryview], int], view: memoryview) -> int:
    """Bytes that could be sent or received now."""
    try:
        moved = move(view)
    except BlockingIOError:
        return 0
    except OSError as error:
        raise ConnectionError(f"worker {peer} of the ascent was lost while sums were brought together: {error}") from error
    if not moved and view:
        raise ConnectionError(f"worker {peer} of the ascent ended while sums were brought together")
    return moved


def _call(rank: int, place: tuple[str, int], token: bytes, caller: int) -> socket.socket:
    try:
        connection = socket.create_connection(place, timeout=CONNECT_SECONDS)
        connection.sendall(token + caller.to_bytes(4, "big"))
    except OSError as error:
        raise ConnectionError(
            f"worker {caller} of the ascent cannot reach worker {rank} at {place[0]}, port {place[1]}: {error}; the workers of an "
            "ascent talk to each other over TCP, on ports that the system picks: let the nodes of the cluster reach each other on them"
        ) from error
    return connection


def _answer(server: socket.socket, token: bytes, ranks: set[int]) -> dict[int, socket.socket]:
    """Connections of the workers ``ranks``, which call; whoever else calls is hung up on."""
    found: dict[int, socket.socket] = {}
    until = time.monotonic() + CONNECT_SECONDS
    while missing := sorted(ranks - set(found)):
        server.settimeout(max(until - time.monotonic(), 0.001))
        try:
            connection, _ = server.accept()
        except TimeoutError:
            raise ConnectionError(f"workers {missing} of the ascent have not called within {CONNECT_SECONDS:g} s") from None
        caller = _introduction(connection, token)
        if caller in ranks:
            found[caller] = connection
        else:
            connection.close()
    return found


def _introduction(connection: socket.socket, token: bytes) -> int:
    """Rank of a caller who knows the token; -1 of any other."""
    said, length = b"", len(token) + 4
    connection.settimeout(INTRODUCTION_SECONDS)
    with contextlib.suppress(OSError):
        while len(said) < length and (more := connection.recv(length - len(said))):
            said += more
    known = len(said) == length and hmac.compare_digest(said[: len(token)], token)
    return int.from_bytes(said[len(token) :], "big") if known else -1
