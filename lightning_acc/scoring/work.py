"""The work of one piece of removals: what a process, here or elsewhere, is asked and what it answers."""

from __future__ import annotations

import importlib.metadata
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from lightning_acc.core import devices
from lightning_acc.core.devices import peak_gb
from lightning_acc.core.process import as_scored
from lightning_acc.core.queries import moments
from lightning_acc.core.ranks import ALONE, Ranks, Seat, joined
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods import registry
from lightning_acc.methods.method import Method, Question
from lightning_acc.record.manifest import CONVENTION
from lightning_acc.record.record import Record
from lightning_acc.record.schema.keys import SCORED
from lightning_acc.record.store import digest

READOUTS = ("exact", "linear")
NO_SECOND = re.compile(r"derivative for '?(aten::)?\w+'? is not implemented")
"""How torch says that it cannot differentiate twice."""


@dataclass(frozen=True)
class Job:
    """Everything a worker needs to know to score a piece of removals; on how many threads it does so, and beside whom."""

    run: Record
    method: Method
    question: Question
    dtype: str | None
    device: torch.device
    threads: int = 1
    ranks: Ranks = ALONE

    @contextmanager
    def joined(self, seat: Seat) -> Iterator[Job]:
        """The job of one of the processes that take it together, see ``core.ranks.joined``."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == devices.CUDA else "gloo"
        with joined(seat, backend) as ranks:
            yield replace(self, ranks=ranks)

    def replay(self) -> Replay:
        """The run, as the question asks for it: up to the last step that it is about."""
        return Replay(self.run, self.dtype, self.question.moments.last, device=self.device, ranks=self.ranks)

    def conditions(self, distinct: Sequence[Removal]) -> dict[str, Any]:
        """What is known of the scores of these removals before they are computed."""
        query = self.question.query
        return {
            "method": self.method.name,
            "query": query.name,
            "query_fingerprint": query.fingerprint,
            "at": self.question.moments.name,
            "readout": self.question.readout,
            **self.method.options,
            "label": self.method.label,
            # Some scores depend on what else was asked: they are never mixed with those of other removals.
            **({"among": digest(json.dumps(distinct).encode())[:16]} if self.method.is_relative else {}),
            "dtype": self.dtype or self.run.scored_in,
            "device": self.device.type,
            # Of a narrow training the scores are those of the same training without rounding: see ``keys.SCORED``.
            **({} if self.run.dtype in SCORED else {"trained_in": self.run.dtype}),
            "convention": CONVENTION,
            "manifest_hash": self.run.hash,
            "version": importlib.metadata.version("lightning-acc"),
            "torch": torch.__version__,
            "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        }


@dataclass(frozen=True)
class Result:
    """What came out for one piece.

    Attributes:
        scores: (n,), or (n, examples).
        shifts: (steps, n, p), where they were asked for.
        thetas: (steps, p), beside them.
        seconds: of this process.
        threads: on which it computed.
        peak_memory_gb: of this process so far, or of the card it computes on.
        details: how it was done, see ``Method.details``.
        more: further figures for each removal, (n,).
    """

    scores: np.ndarray
    shifts: torch.Tensor | None
    thetas: torch.Tensor | None
    seconds: float
    threads: int
    peak_memory_gb: float
    details: dict[str, Any]
    more: dict[str, np.ndarray]

    @property
    def cost(self) -> dict[str, Any]:
        """What it cost and how it was done, as conditions of a table."""
        cost = {"seconds": self.seconds, "peak_memory_gb": self.peak_memory_gb}
        return {**cost, "threads": str(self.threads), **self.details}


def table_name(conditions: dict[str, Any], dtype: str) -> str:
    """File name of a table: ``<method>[-<query>]``, then what is not as usual (at, readout, the dtype of a run in
    ``dtype``, and the number of runs)."""
    usual = registry.find(conditions["method"]).readout
    name = conditions["label"] if conditions["query"] == "val" else f"{conditions['label']}-{conditions['query']}"
    name += "" if conditions["at"] == moments.END else f".{moments.file_part(conditions['at'])}"
    name += "" if conditions["readout"] == usual else f".{conditions['readout']}"
    name += "" if conditions["dtype"] == dtype else f".{conditions['dtype']}"
    return name + (f".mean-of-{conditions['runs']}-runs" if "runs" in conditions else "")


def compute(job: Job, removals: list[Removal], progress: Callable[[float], None], replay: Replay | None = None) -> Result:
    """Score one piece of removals in this process, as ``core.process.as_scored`` computes."""
    started = time.perf_counter()
    with as_scored(job.threads), twice_differentiable(job.method.name):
        replay = replay or job.replay()
        answer = job.method.answer(replay, removals, job.question, progress).on_cpu()
    progress(1.0)
    return Result(
        scores=answer.scores.double().numpy(),
        shifts=answer.shifts,
        thetas=answer.thetas,
        seconds=time.perf_counter() - started,
        threads=job.threads,
        peak_memory_gb=peak_gb(replay.device),
        details=answer.details,
        more={name: _plain(figures) for name, figures in answer.more.items()},
    )


def _plain(figures: torch.Tensor) -> np.ndarray:
    return np.asarray((figures.double() if figures.is_floating_point() else figures).numpy())


@contextmanager
def twice_differentiable(what: str) -> Iterator[None]:
    """In here ``what`` differentiates the loss twice; where an operation does not allow that, says so.

    Raises:
        RequestError: one does not.
    """
    try:
        yield
    except RuntimeError as error:  # or NotImplementedError, which is one
        found = NO_SECOND.search(str(error))
        if found is None and not isinstance(error, NotImplementedError):
            raise
        raise RequestError(
            f"{what} differentiates the loss twice, which an operation of this module does not allow "
            f"({found[0] if found else str(error).rstrip('.')}): use method='loo', or another operation."
        ) from error
