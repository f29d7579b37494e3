"""Pieces of work, each done in this process or by a worker, kept as it is done; and what is said of those that failed."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, NoReturn, TypeVar

from lightning_acc.core import devices
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError, RunError
from lightning_acc.methods.method import Method, Question
from lightning_acc.progress import Progress
from lightning_acc.scoring import cluster
from lightning_acc.scoring.work import Job, Result

Piece = TypeVar("Piece")


def compute_all(
    replay: Replay,
    job: Job,
    work: Callable[..., Result],
    pieces: Sequence[Piece],
    ray_address: str | None,
    progress: bool | None,
    amount: int,
    failed: list[tuple[Piece, str]],
    unit: str = "removals",
    processes: int = 1,
) -> Iterator[tuple[Piece, Result]]:
    """Every piece with its result, as they are done.

    Args:
        replay: of the run, in this process.
        job: what all pieces share.
        work: ``work(job, piece, progress, replay=None)``, a function that can be imported.
        pieces: what it is asked: removals, or what knows how to make itself ``smaller``.
        ray_address: as for ``score``.
        progress: as for ``score``.
        amount: of what the pieces hold together.
        failed: gets the pieces that failed for good, with the reason; the others are done all the same.
        unit: what is counted.
        processes: of Ray, that work on each piece together.
    """
    with Progress(f"{job.method.name} · {amount} {unit}", len(pieces), progress, amount, unit) as bar:
        # A single piece gains nothing from workers that would have to be started first.
        alone = ray_address is None or (ray_address == "local" and len(pieces) < 2 and processes == 1)
        here = partial(_here, work, replay) if alone else work
        gpu = devices.share(job.device, job.question.memory)
        if gpu and processes > 1:  # of which each has a card to itself
            gpu = 1.0
        if not alone:
            job = replace(job, device=devices.of_worker(job.device))
        where = None if alone else ray_address
        threads = replay.threads if pieces else 1
        for piece, result in cluster.each(here, job, pieces, where, bar, partial(_smaller, job), gpu, threads, processes):
            if isinstance(result, cluster.Failure):
                failed.append((piece, result.reason))
            else:
                yield piece, result


def _here(work: Callable[..., Result], replay: Replay, job: Job, piece: Any, progress: Callable[[float], None]) -> Result:
    return work(job, piece, progress, replay)


def _smaller(job: Job, piece: Any) -> list[Any]:
    """A piece that ran out of memory in smaller ones."""
    return piece.smaller(job) if hasattr(piece, "smaller") else list(job.method.smaller(piece, job.question))


def refuse_undivided(replay: Replay, method: Method, question: Question, processes: int, ray_address: str | None) -> None:
    """Refuse ``processes`` where they would have nothing to share.

    Raises:
        RequestError: there is nothing.
    """
    told = f"processes={processes}"
    if not method.is_one_sweep(question):
        raise RequestError(
            f"{told} share one sweep back, of sgd-ie or tracin with the linear readout and no keep_shifts, which this is not: "
            "leave it out, as Ray works on the pieces of other methods at the same time anyway."
        )
    if ray_address is None:
        raise RequestError(f"{told} are started by Ray: give ray_address='local', or that of a cluster.")
    if not any(replay.divisible(step) or len(step.sizes) > 1 for step in replay.records):
        drawn = any(any(step.rng) for step in replay.records)
        why = "its random numbers (dropout) are drawn for a batch as a whole" if drawn else replay.objective.undivided
        raise RequestError(
            f"{told} have nothing to share, as no batch of this run can be divided: {why}. Leave processes out; a "
            "step of several batches (of several GPUs, or accumulated) is shared by its batches."
        )


def refuse_failures(failed: Sequence[tuple[Removal, str]], amount: int, saved: bool, unit: str = "removals") -> NoReturn:
    """Raise what became of pieces that failed.

    Raises:
        RunError: always.
    """
    kept = "stored; score again to compute what is missing" if saved else "lost, as save=False"
    lost = few([removal for removal, _ in failed])
    raise RunError(f"{len(failed)} of {amount} {unit} failed ({lost}): {failed[0][1]}. The others are {kept}.")


def few(removals: Sequence[Removal]) -> str:
    """The first of the removals, in words."""
    shown = ", ".join(" ".join(map(str, removal)) for removal in removals[:5])
    return shown + (", ..." if len(removals) > 5 else "")
