"""Pieces of work, done in this process or farmed out by Ray. Knows no mathematics; the only part that imports Ray.

Ray distributes; what is decided here is what becomes of a piece that fails (``farm``), and what is asked of a cluster
(``connection``). ``scoring.worker`` is what runs there.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from lightning_acc.core.process import is_out_of_memory
from lightning_acc.errors import RequestError
from lightning_acc.scoring.cluster import farm
from lightning_acc.scoring.cluster.connection import connect, cpus_for, kept, refuse_too_many
from lightning_acc.scoring.cluster.farm import Failure, Farm, Split, Work, out_of_memory

if TYPE_CHECKING:
    from lightning_acc.progress import Progress

__all__ = ["Failure", "connect", "cpus_for", "each", "kept"]


def each(
    work: Work,
    job: Any,
    pieces: Sequence[Any],
    address: str | None,
    bar: Progress,
    split: Split = lambda piece: [piece],
    gpu: float = 0.0,
    threads: int = 1,
    processes: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """``work(job, piece, progress)`` for every piece: yields each with its result, as they are done.

    Args:
        work: what to do.
        job: what all pieces share; Ray ships it once.
        pieces: what to do it with.
        address: of the Ray cluster, see ``connect``; None does it in this process.
        bar: is told how far the pieces are.
        split: makes smaller pieces of one that ran out of memory; these are yielded in its place.
        gpu: what each asks of a card for itself, from 0 for none to 1.
        threads: that a piece can use, at most. Where these are several, the job's field ``threads`` tells each how many it has:
            all of them in this process, which does one piece after the other; CPUs of the cluster, see ``cpus_for``.
        processes: of the cluster, that work on each piece together; the job says how they are ``joined``.

    Raises:
        RequestError: the cluster cannot be reached, or has no CPU, or no GPU where one is asked for.
        InfluenceError: what a piece raised; the others are stopped.
    """
    if address is None:
        job = replace(job, threads=threads) if threads > 1 else job
        for i, piece in enumerate(pieces):
            yield from _here(work, job, piece, bar.of(i), split)
    elif pieces:
        bar.note(f"connecting to Ray ({address})")
        with connect(address) as ray:
            if gpu and not ray.cluster_resources().get("GPU", 0):
                raise RequestError(f"The Ray cluster at {address!r} has no GPU: add a node with one, or give device='cpu'.")
            refuse_too_many(ray, address, processes, gpu)
            cpus = cpus_for(ray, len(pieces) * processes, threads)
            job = replace(job, threads=cpus) if cpus > 1 else job
            yield from Farm(ray, work, job, bar, split, gpu, cpus, processes - 1).run(pieces)


def _here(
    work: Work, job: Any, piece: Any, progress: Callable[[float], None], split: Split, halvings: int = 0
) -> Iterator[tuple[Any, Any]]:
    """One piece, in this process; in smaller ones where memory was short."""
    try:
        result = work(job, piece, progress)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        smaller = split(piece) if halvings < farm.MOST_HALVINGS else [piece]
        if len(smaller) == 1:
            result = Failure(out_of_memory(error))
        else:
            for part in smaller:
                yield from _here(work, job, part, progress, split, halvings + 1)
            return
    yield piece, result
