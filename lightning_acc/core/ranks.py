"""Processes that take the steps of one replay together, each with some rows of every batch (data-parallel).

The gradient of a step, and what an adjoint becomes on its way back through it, are sums over the rows: each process computes
its part of them, and one sum over all processes makes them whole. States and adjoints are the same everywhere, to the last bit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from functools import partial
from typing import NamedTuple, ParamSpec, TypeVar

import torch
from torch import Tensor, distributed

from lightning_acc.errors import OtherRankLost

P = ParamSpec("P")
R = TypeVar("R")

PATIENCE = timedelta(minutes=30)
"""How long the others are waited for: a step, or the states of a tape, may take one of them longer."""


@dataclass(frozen=True)
class Ranks:
    """This process among them.

    Attributes:
        rank: its number, from 0.
        size: how many there are.
    """

    rank: int = 0
    size: int = 1

    def add_up(self, *parts: Tensor) -> None:
        """Write over each of ``parts``, of any shapes, its sum over all processes."""
        if self.size > 1:
            for part in parts:
                _told(distributed.all_reduce)(part)

    def least(self, count: int) -> int:
        """The least of what the processes count."""
        if self.size == 1:
            return count
        counted = torch.tensor(int(count))
        _told(distributed.all_reduce)(counted, op=distributed.ReduceOp.MIN)
        return int(counted)

    def share(self, sizes: Sequence[int], divisible: bool) -> tuple[list[tuple[int, range]], bool]:
        """Which of the rows of some batches are this process's, and whether they weigh anything: as many for each as can be.

        Args:
            sizes: of the batches.
            divisible: whether rows may be taken out of a batch; else each batch is somebody's as a whole.

        Returns:
            Numbers of batches and rows of each, in their order. Where there are too few for all, a batch that others have, to
            weigh nothing.
        """
        total, first, parts = sum(sizes), 0, []
        begin, end = (total * rank // self.size for rank in (self.rank, self.rank + 1))
        for number, size in enumerate(sizes):
            rows = range(max(begin - first, 0), min(end - first, size))
            if not divisible:  # it is theirs who have its middle
                rows = range(size if begin <= first + size // 2 < end else 0)
            if rows:
                parts.append((number, rows))
            first += size
        smallest = min(range(len(sizes)), key=sizes.__getitem__)
        return (parts, True) if parts else ([(smallest, range(sizes[smallest]))], False)


ALONE = Ranks()
"""One process, which takes all rows."""


class Seat(NamedTuple):
    """Of a process among those that are about to meet.

    Attributes:
        rank: its number.
        size: how many there are.
        host: where rank 0 is.
        port: where it listens.
        socket: of rank 0, the number of the file that listens there.
    """

    rank: int
    size: int
    host: str
    port: int
    socket: int | None = None


@contextmanager
def joined(seat: Seat, backend: str) -> Iterator[Ranks]:
    """In here this process is one of several, which meet where that of rank 0 listens.

    Args:
        seat: its own.
        backend: of torch.distributed.

    Raises:
        OtherRankLost: they do not meet.
    """
    from torch._C._distributed_c10d import TCPStore  # which not every build of torch has

    rank, size, host, port, socket = seat
    meeting = partial(TCPStore, host, port, size, rank == 0, PATIENCE, wait_for_workers=False, master_listen_fd=socket)
    store = _told(meeting)()
    _told(distributed.init_process_group)(backend, store=store, rank=rank, world_size=size, timeout=PATIENCE)
    try:
        yield Ranks(rank, size)
    finally:
        distributed.destroy_process_group()


def _told(communicate: Callable[P, R]) -> Callable[P, R]:
    """``communicate``; where that fails, it is because of the others."""

    def communicating(*arguments: P.args, **options: P.kwargs) -> R:
        try:
            return communicate(*arguments, **options)
        except RuntimeError as error:  # of which DistError is a kind
            words = str(error).strip().partition("\n")[0]
            raise OtherRankLost(f"a process that computes beside it has ended, or is not reached ({words})") from error

    return communicating
