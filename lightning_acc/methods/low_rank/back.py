"""One sweep back through the run for a query: SGD-IE's scores, and what the passes forward need of it."""

from __future__ import annotations

import mmap
import shutil
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import IO

import torch
from torch import Tensor

from lightning_acc.core.audit import confirm
from lightning_acc.core.optimizers import State
from lightning_acc.core.products import Point, Pulled
from lightning_acc.core.queries import curvature
from lightning_acc.core.removals import Removal, summed
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.core.tape import Tape
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.memory import of_the_tape
from lightning_acc.methods.method import Question
from lightning_acc.methods.reading import Slopes
from lightning_acc.methods.rules import AdjointSgdIe

HELD = 2**28
"""Bytes of a temporary file that are the process's memory at once."""


@dataclass(frozen=True)
class Back:
    """What the sweep back tells.

    Attributes:
        gammas: ``gamma_t = (dU/dG)^T lambda_{t+1}`` of every step, (T, p); in a temporary file.
        first: SGD-IE's score of each sample of the run, (n_samples,).
        curves: the same read in directions of the query's curvature, (K, n_samples); see ``reading.Slopes``.
        final: parameters of the run after its last step, (p,).
        gradients: what the adjoint got at the steps asked about, see ``Slopes``, (p,).
        places: some steps, evenly spread over the run, and the states before them.
    """

    gammas: Scratch
    first: Tensor
    curves: Tensor
    final: Tensor
    gradients: dict[int, Tensor]
    places: list[tuple[Step, State]]

    def of(self, removals: Sequence[Removal]) -> Tensor:
        """SGD-IE's scores of n removals, (n,), on the CPU."""
        return summed(self.first.cpu(), removals)

    def curved(self, removals: Sequence[Removal]) -> Tensor:
        """What the query's curvature adds to these, (n,), on the CPU; with no ``curves``, 0."""
        return curvature.along(summed(self.curves.cpu(), removals))


def of_the_query(rows: Tensor) -> Tensor:
    """Of what goes back with directions of the query's curvature, (1 + K, p), what belongs to the query, (p,)."""
    return rows if rows.ndim == 1 else rows[0]


class Scratch:
    """Vectors (p,) in a file that is mapped into memory.

    What of it has been looked at counts as the process's memory until it is let go, which is done whenever that is ``HELD``.

    Args:
        file: where.
        count: how many.
        like: a vector (p,) of the size and dtype of each.
    """

    def __init__(self, file: IO[bytes], count: int, like: Tensor) -> None:
        self._length, self._seen = count, 0
        file.truncate(max(1, count * like.nbytes))
        self._mapped = mmap.mmap(file.fileno(), 0)
        numbers = torch.frombuffer(self._mapped, dtype=like.dtype, count=count * len(like)) if count * len(like) else like[:0]
        self._vectors = numbers.reshape(count, len(like))

    def __len__(self) -> int:
        return self._length

    def __getitem__(self, i: int) -> Tensor:
        self._seen += self._vectors.element_size() * self._vectors.shape[1]
        if self._seen > HELD and hasattr(self._mapped, "madvise"):
            self._mapped.madvise(mmap.MADV_DONTNEED)  # what has been written is the file's
            self._seen = 0
        return self._vectors[i]

    def __setitem__(self, i: int, vector: Tensor) -> None:
        self[i].copy_(vector)


class AdjointGammas(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps ``gamma_t`` of every step.

    Args:
        gammas: where to keep them: T rows (p,).
    """

    def __init__(self, gammas: Scratch) -> None:
        self.gammas = gammas
        self._t = len(gammas)

    def see(self, point: Point, pulled: Pulled) -> None:
        """One step back."""
        self._t -= 1
        self.gammas[self._t] = of_the_query(pulled.gamma)


def scratch_bytes(replay: Replay, vectors: int | None = None) -> int:
    """Of the temporary file that a sweep back keeps ``vectors`` (p,) in: unless more, one of every step."""
    return (len(replay) if vectors is None else vectors) * int(replay.initial[0].nbytes)


@contextmanager
def scratch(replay: Replay, vectors: int | None = None) -> Iterator[Scratch]:
    """Room for so many ``vectors`` (p,) in a temporary file until the context is left.

    Raises:
        RequestError: there is none.
    """
    like, total = replay.initial[0], len(replay) if vectors is None else vectors
    needed, free = scratch_bytes(replay, vectors), shutil.disk_usage(tempfile.gettempdir()).free
    if needed > free:
        raise RequestError(
            f"acc-low-rank keeps a gradient for each of the {len(replay)} steps, {needed / 2**30:.2f} GB, in a temporary file, "
            f"but {tempfile.gettempdir()} has {free / 2**30:.2f} GB free: name a folder with more in TMPDIR, or another method."
        )
    with tempfile.TemporaryFile(prefix="lightning_acc-") as file:
        yield Scratch(file, total, like)


@contextmanager
def sweep_back(replay: Replay, question: Question, progress: Callable[[float], None], curves: int = 0) -> Iterator[Back]:
    """Sweep back once; the gradients along the run are there until the context is left.

    Args:
        replay: of the run.
        question: what is asked; its memory is for the states of the run.
        progress: told the fraction done.
        curves: the directions of the query's curvature that go back, too.

    Raises:
        RequestError: there is no room for its temporary file.
    """
    total = len(replay)
    with scratch(replay) as gammas:
        slopes = Slopes(replay, question, curves)
        tape = Tape(replay, of_the_tape(replay, question.memory, each=curves > 0), slopes.see)
        progress(0.25)
        final = tape.final
        confirm(replay, tape.checked)
        slope = slopes(total, final)
        gradients = {total: of_the_query(slope)}
        rule = AdjointGammas(gammas)
        carry = rule.init(slope, replay.initial, replay.run.n_samples)
        wanted, places = set(bases.spread(total)), []
        for back, (step, before) in enumerate(tape.backwards(), start=1):
            if total - back in wanted:
                places.append((step, before))
            carry = rule.advance(step.at(before), carry)
            if total - back in question.moments.weights:
                slope = slopes(total - back, before[0])
                gradients[total - back] = of_the_query(slope)
                carry = rule.read_again(carry, slope)
            progress(0.25 + 0.75 * back / total)
        del tape
        first = carry[1].reshape(1 + curves, -1)
        yield Back(gammas, first[0], first[1:], final, gradients, places)
