"""How many removals fit into a memory budget at once, and what pieces of a run's work take: bytes, and seconds.

The figures are measured on the run itself: the tensors autograd keeps for one forward pass over the largest batch, and a
few steps timed on this thread.
"""

from __future__ import annotations

import copy
import itertools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay, saved_bytes
from lightning_acc.errors import RequestError
from lightning_acc.methods.rules import FORWARD
from lightning_acc.record import batches
from lightning_acc.record.record import Run

# Copies of (a parameter-sized vector, the activations of the batch) that one removal needs at the peak of a step.
# Measured with scripts/bench_methods.py; they are upper bounds on the models there, not exact.
COPIES = {"loo": (7, 3), "acc-sgd-ie": (9, 6), "sgd-ie": (9, 6), "tracin": (9, 1)}
LARGEST_CHUNK = 512
"""More removals at a time gain no speed; smaller chunks stay in the processor's caches."""
SHARE_SECONDS, SHARE = 0.5, 0.002
"""One of the ten things that are timed may take so much processor time, plus this fraction of what it predicts."""
SLOW = 0.3
"""What takes more seconds than this is timed once, without a turn to warm up."""


def bytes_per_removal(replay: Replay, method: str) -> int:
    """Bytes that one more removal in a chunk adds to the peak."""
    vectors, activations = COPIES[method]
    vector = replay.initial[0].nbytes
    return int(vectors * vector * len(replay.initial) + activations * replay.activation_bytes)


def chunk_size(replay: Replay, method: str, memory: int) -> int:
    """The number of removals to sweep at once within ``memory`` bytes.

    Raises:
        RequestError: not even one fits.
    """
    each = bytes_per_removal(replay, method)
    # LOO carries one row more, the run with nothing removed.
    fit = memory // each - (method == "loo")
    if fit < 1:
        raise RequestError(
            f"One removal of {method} needs about {2 * each / 2**30:.2f} GB on this run, more than the budget of "
            f"{memory / 2**30:.2f} GB: give memory_gb={2 * each / 2**30:.1f} or more."
        )
    return int(min(fit, LARGEST_CHUNK))


def chunks(removals: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Removals in chunks of at most ``size``, as even as can be; an even number of chunks where there is work for two.

    The chunks depend on the run and the budget alone, never on how many workers there are: so do the bits of the scores.
    """
    return even_pieces(removals, size, for_two=len(removals) >= 64)


def even_pieces(removals: Sequence[Removal], size: int, for_two: bool = False) -> list[list[Removal]]:
    """Removals in pieces of at most ``size``, as even as can be; with ``for_two`` an even number of them."""
    n = len(removals)
    count = -(-n // size)
    if for_two:
        count += count % 2
    edges = [n * i // count for i in range(count + 1)] if count else []
    return [list(removals[a:b]) for a, b in itertools.pairwise(edges)]


def query_rows(replay: Replay, query: Query, memory: int) -> int:
    """How many parameter vectors a query may be evaluated at together."""
    return max(1, int(memory // (2 * _query_saved(replay, query) + 4 * replay.initial[0].nbytes)))


def _query_saved(replay: Replay, query: Query, without_data: bool = False) -> int:
    """Bytes autograd would keep for the largest batch of the query, with or without the batch itself."""
    leaves, structure = max(query.batches, key=lambda batch: batches.batch_size(batch[0]))
    leaves = batches.cast(leaves, replay.dtype)
    objective = replay.objective
    shared = [*objective.tensors(), *leaves.values()] if without_data else []
    with objective.evaluating():
        return saved_bytes(lambda theta: query.batch_sum(objective, theta, leaves, structure), replay.initial[0], shared)


def chunk_bytes(replay: Replay, method: str, query: Query, memory: int, removals: int) -> int:
    """Bytes a chunk of ``removals`` adds at its peak: in the sweep, or in the exact readout of ``query`` after it."""
    vector = replay.initial[0].nbytes
    rows = min(removals, query_rows(replay, query, memory)) + 1
    readout = removals * vector + rows * (_query_saved(replay, query, without_data=True) + vector)
    return max(bytes_per_removal(replay, method) * (removals + (method == "loo")), readout)


def reverse_bytes(replay: Replay, method: str, memory: int) -> int:
    """Bytes a reverse sweep adds at its peak: the states it keeps, one step, and a number for every sample."""
    segment, total = _segment(replay, memory), len(replay)
    kept = total if segment == 1 else -(-total // segment) + segment
    state = sum(part.nbytes for part in replay.initial)
    return kept * state + bytes_per_removal(replay, method) + replay.run.n_samples * replay.initial[0].element_size()


def taken_again(replay: Replay, memory: int) -> float:
    """The fraction of its steps that a reverse sweep takes a second time, as it cannot keep all states."""
    segment = _segment(replay, memory)
    return 0.0 if segment == 1 else 1 - 1 / segment


def _segment(replay: Replay, memory: int) -> int:
    """Every how manieth state a ``Tape`` keeps."""
    total = len(replay)
    return 1 if total * sum(part.nbytes for part in replay.initial) <= memory else math.ceil(math.sqrt(total))


@dataclass(frozen=True)
class Cost:
    """Seconds of one thread: ``per_chunk + per_removal * m`` for a chunk of m removals, and ``load`` to open the run.

    Attributes:
        largest: the most removals of a chunk; None where one sweep answers for all.
    """

    load: float
    per_chunk: float
    per_removal: float
    largest: int | None

    def chunks(self, n: int) -> list[int]:
        """Sizes of the chunks of n removals, as ``score`` makes them."""
        if self.largest is None or not n:
            return [n] if n else []
        return [len(part) for part in chunks([()] * n, self.largest)]

    def work_seconds(self, n: int) -> float:
        """Seconds of one thread for n removals."""
        sizes = self.chunks(n)
        return self.load + len(sizes) * self.per_chunk + n * self.per_removal


class Calibration:
    """Times pieces of a run's work on this thread.

    Args:
        run: the run.
        query: what scores are read through.
        dtype: as for ``score``.
        memory: bytes of each process's budget.
        removals: whose cost is asked for.
    """

    def __init__(self, run: Run, query: Query, dtype: str | None, memory: int, removals: Sequence[Removal]) -> None:
        self.query, self.memory = query, memory
        self.cpu = self.wall = 0.0
        Replay(run, dtype)  # imports what the module needs, once and for all
        self.load = self.seconds(lambda: Replay(copy.copy(run), dtype).activation_bytes)  # a copy has read nothing yet
        self.replay = Replay(copy.copy(run), dtype)
        (self.sizes, seen), self.scan = self._once(self._read_steps)
        self.visited = [removal for removal in removals if any(seen[i] for i in removal)]
        self.share_visited = len(self.visited) / max(1, len(removals))
        self._owners = Removals(self.visited)
        self.largest_step = int(self.sizes.argmax())
        self.chosen = self._choose_steps()

    def _read_steps(self) -> tuple[np.ndarray, torch.Tensor]:
        """The size of every step (T,), and which samples any of them saw, (n_samples,)."""
        sizes, seen = [], torch.zeros(self.replay.run.n_samples, dtype=torch.bool)
        for step in self.replay.run.steps:
            sizes.append(len(step.sample_ids))
            seen[step.sample_ids] = True
        return np.array(sizes), seen

    def _choose_steps(self) -> list[int]:
        """Steps to time: for up to five of the sizes there are, one early and one late step, the largest first."""
        sizes = np.unique(np.quantile(self.sizes, [0.0, 0.25, 0.5, 0.75, 1.0], method="nearest"))
        order = [sizes[-1], sizes[0], *sizes[1:-1]] if len(sizes) > 1 else list(sizes)
        alike = [np.flatnonzero(self.sizes == size) for size in order]
        return [int(steps[i * (len(steps) - 1) // 4]) for i in (1, 3) for steps in alike]

    def _once(self, work: Callable[[], Any]) -> tuple[Any, float]:
        cpu, wall = time.thread_time(), time.perf_counter()
        result = work()
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        self.cpu += cpu
        self.wall += wall
        return result, cpu

    def seconds(self, work: Callable[[], Any]) -> float:
        """Seconds ``work`` takes a thread: the least of a few turns, the first of which warms up."""
        first = self._once(work)[1]
        if first > SLOW:
            return first
        return min(self._once(work)[1] for _ in range(1 if first > SLOW / 10 else 3))

    @property
    def busy(self) -> float:
        """Seconds that went by for each second of this thread, as other processes took their share; 2 at most, as a burst of
        work beside the timing says little of the hours after it.
        """
        return min(max(1.0, self.wall / max(self.cpu, 1e-9)), 2.0)

    def line(self, seconds: Callable[[int], float], size: int, times: int) -> tuple[float, float, int]:
        """``seconds(m)`` as ``a + c m``: a, c and the largest m timed, which is ``size`` where that does not take long.

        ``times`` is how often the run does that work, for every one of m = ``size``.
        """
        started, m = self.cpu, min(2, size)
        points = [(m, seconds(m))]
        while m < size:
            each = points[-1][1] / m
            left = SHARE_SECONDS + SHARE * times * each * size - (self.cpu - started)
            # Large tensors take more than their share (they leave the caches, the system maps them anew every time), so
            # that the size itself is timed where that can be, and not many smaller ones.
            wanted = (size, 4 * m) if m >= 8 else (min(8, size),)
            fit = [k for k in wanted if k <= size and 2 * k * each <= left]
            if not fit:
                break
            m = fit[0]
            points.append((m, seconds(m)))
        if len(points) == 1:
            return 0.0, points[0][1] / m, m
        (few, little), (many, much) = points[-2:]
        slope = min(max((much - little) / (many - few), 0.0), much / many)
        return much - slope * many, slope, m

    def over_the_run(self, seconds: Callable[[int], float]) -> float:
        """Sum over all steps of ``seconds(t)``, timed at the chosen steps and interpolated by size."""
        started, total = self.cpu, len(self.sizes)
        found: dict[int, list[float]] = {}
        for t in self.chosen:
            found.setdefault(int(self.sizes[t]), []).append(seconds(t))
            mean = np.mean([np.mean(values) for values in found.values()])
            if self.cpu - started + 2 * mean > SHARE_SECONDS + SHARE * total * mean:
                break
        sizes = sorted(found)
        values = [float(np.mean(found[size])) for size in sizes]
        if len(sizes) == 1:  # no more was affordable than the largest: others in proportion
            return float(values[0] * self.sizes.sum() / sizes[0])
        return float(np.interp(self.sizes, sizes, values).sum())

    def sample(self, t: int, m: int) -> Removals:
        """m of the removals, of which step t saw as large a share as of all of them."""
        owners, _ = self._owners.occurrences(self.replay.run.steps[t].sample_ids)
        touched = np.unique(owners.numpy())
        others = np.setdiff1d(np.arange(len(self.visited)), touched, assume_unique=True)
        hit = min(round(m * len(touched) / len(self.visited)), len(touched), m)
        picked = [*_spread(touched, hit), *_spread(others, m - hit)]
        return Removals([self.visited[i] for i in sorted(picked)])

    def step_seconds(self, method: str, t: int, m: int) -> float:
        """Seconds of a forward method's step t with m removals."""
        replay, rule, chunk = self.replay, FORWARD[method](), self.sample(t, m)
        carry = rule.init(replay.initial, chunk)

        def work() -> None:
            nonlocal carry
            step = replay.step(t)
            if rule.follows_run:
                point = step.at(replay.initial)
                carry = rule.advance(point, carry, chunk)
                point.next()
            else:
                carry = rule.advance(step, carry, chunk)

        return self.seconds(work)


def _spread(values: np.ndarray, count: int) -> list[int]:
    """``count`` of the values, evenly spaced."""
    return [int(values[i * len(values) // count]) for i in range(count)]
