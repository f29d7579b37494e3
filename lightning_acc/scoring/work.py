"""The work of one chunk of removals: what a process, here or elsewhere, is asked and what it answers."""

from __future__ import annotations

import resource
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods import sweeps as sweep
from lightning_acc.methods.low_rank.screened import screened
from lightning_acc.methods.low_rank.sweep import PARAMETERS, SCREENED, TRUSTED, low_rank, most_followed, read_exactly
from lightning_acc.methods.rules import FORWARD, LOW_RANK, REVERSE
from lightning_acc.plan import planning
from lightning_acc.record.record import Run

FACTS = ("basis_rank", "largest_left_out", "shift_error", "fallback", "read_exactly", "followed", "modelled", "model_error")
"""What acc-low-rank tells of how it was done, beside the scores."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know to score a chunk of removals."""

    run: Run
    method: str
    query: Query
    readout: str
    dtype: str | None
    keep_shifts: bool
    memory: int
    rank: int | None = None
    state: str = PARAMETERS

    @property
    def reversed(self) -> bool:
        """Whether one reverse sweep answers for all samples at once."""
        return self.method in REVERSE and self.readout == "linear" and not self.keep_shifts


@dataclass(frozen=True)
class Result:
    """What came out for one chunk: scores (n,), shifts (n, p) or None, what it cost, facts about how it was done, and more
    figures for each removal, (n,).
    """

    scores: np.ndarray
    shifts: torch.Tensor | None
    seconds: float
    peak_memory_gb: float
    facts: dict[str, Any] = field(default_factory=dict)
    more: dict[str, np.ndarray] = field(default_factory=dict)

    @property
    def cost(self) -> dict[str, Any]:
        """What it cost and what else is known of it, as conditions of a table."""
        return {"seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb, **self.facts}


def compute(job: Job, removals: list[Removal], progress: sweep.Progress, replay: Replay | None = None) -> Result:
    """Score one chunk of removals, in this process and on one thread.

    One thread, whoever calls: the workers of a machine then share its cores, small products do not wait for each other,
    and the bits of the scores do not depend on where they were computed.
    """
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        with torch.enable_grad():
            return _compute(job, removals, progress, replay)
    except NotImplementedError as error:
        raise RequestError(
            f"{job.method} differentiates the loss twice, which an operation of this module does not allow ({error}): use "
            "method='loo', or another operation (nn.Embedding and a mean for nn.EmbeddingBag)."
        ) from error
    finally:
        torch.set_num_threads(threads)


def _compute(job: Job, removals: list[Removal], progress: sweep.Progress, replay: Replay | None) -> Result:
    started = time.perf_counter()
    replay = replay or Replay(job.run, job.dtype)
    shifts: torch.Tensor | None = None
    facts: dict[str, Any] = {}
    more: dict[str, np.ndarray] = {}
    if job.method == LOW_RANK and job.state == SCREENED:
        values, facts, uncertainty = _screened(job, removals, progress, replay)
        more["uncertainty"] = uncertainty.double().numpy()
    elif job.method == LOW_RANK:
        values, shifts, facts, uncertainty = _low_rank(job, removals, progress, replay)
        more["uncertainty"] = uncertainty.double().numpy()
    elif job.reversed:
        per_sample = sweep.reverse(replay, REVERSE[job.method](), job.query, job.memory, progress)
        values = torch.stack([per_sample[list(removal)].sum() for removal in removals])
    else:
        theta, shifts = sweep.forward(replay, FORWARD[job.method](), removals, lambda done: progress(0.95 * done))
        if job.readout == "linear":
            values = shifts @ job.query.gradient(replay.objective, theta)
        else:
            rows = planning.query_rows(replay, job.query, job.memory)
            values = job.query.changes(replay.objective, theta, shifts, rows)
    progress(1.0)
    return Result(
        scores=values.double().numpy(),
        shifts=shifts if job.keep_shifts else None,
        seconds=time.perf_counter() - started,
        peak_memory_gb=peak_memory_gb(),
        facts=facts,
        more=more,
    )


def _low_rank(
    job: Job, removals: list[Removal], progress: sweep.Progress, replay: Replay
) -> tuple[torch.Tensor, torch.Tensor | None, dict[str, Any], torch.Tensor]:
    """Scores and shifts by acc-low-rank, what its basis and its shifts are like, and how uncertain each score is.

    What the second order changed bounds, in practice, what the third and all after it would: the correction by the own
    Hessians, the curvature of the query, and how far the shift's own linear readout is off. Their sum is the uncertainty.
    """
    found = low_rank(replay, removals, job.query, job.memory, job.rank, lambda done: progress(0.9 * done), job.state)
    basis, everyone = found.basis, torch.arange(len(removals))
    facts: dict[str, Any] = {"basis_rank": basis.rank, "largest_left_out": basis.left, "shift_error": found.shift_error}
    values, uncertainty = found.scores, (found.scores - found.first).abs()
    if found.shift_error > TRUSTED:
        # Gradients taken at shifts as rough as these would make the scores worse, not better.
        if job.rank is None and job.state == PARAMETERS and not job.keep_shifts:
            values, more, uncertainty = _screened(job, removals, lambda done: progress(0.9 + 0.1 * done), replay)
            return values, None, {**facts, **more, "fallback": SCREENED}, uncertainty
        facts["fallback"] = "sgd-ie"
        values = found.first
    elif job.readout == "exact" and len(removals):
        facts["read_exactly"] = read_exactly(job.run, len(removals), job.query)
        order = values.abs().argsort(descending=True, stable=True)[: facts["read_exactly"]]
        for part in order.split(planning.query_rows(replay, job.query, job.memory)):
            shifts = found.shifts(part)
            linear = shifts @ found.gradient
            curvature = job.query.changes(replay.objective, found.final, shifts, len(part)) - linear
            uncertainty[part] += curvature.abs() + (linear - values[part]).abs()
            values[part] += curvature
    return values, found.shifts(everyone) if job.keep_shifts else None, facts, uncertainty


def _screened(
    job: Job, removals: list[Removal], progress: sweep.Progress, replay: Replay
) -> tuple[torch.Tensor, dict[str, Any], torch.Tensor]:
    """The same, with the most influential removals followed exactly."""
    rows = planning.query_rows(replay, job.query, job.memory) if job.readout == "exact" else None
    followed = most_followed(job.run) if job.rank is None else job.rank
    found = screened(replay, removals, job.query, job.memory, followed, rows, lambda done: progress(0.99 * done))
    facts: dict[str, Any] = {"followed": found.followed, "modelled": found.modelled}
    if found.model_error is not None:
        facts["model_error"] = found.model_error
    return found.scores, facts, found.uncertainty


def peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20
