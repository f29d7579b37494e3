"""What pieces of a run's work take: a few of its steps, timed on this thread.

With T steps of sizes b_t a chunk of m removals takes

    seconds(m) = sum_t s(b_t) (a + c m_t)  +  readout (a' + c' m),

``s`` interpolated between the step sizes that were timed, ``m_t`` those of the removals that a step has seen by then.
"""

from __future__ import annotations

import copy
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from lightning_acc.core.devices import CPU, wait_for
from lightning_acc.core.queries import Query
from lightning_acc.core.queries.moments import END, Moments, find
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import chunks
from lightning_acc.methods.sweeps import first_visits
from lightning_acc.record.record import Record

SHARE_SECONDS, SHARE = 0.5, 0.002
"""One of the ten things that are timed may take so much processor time, plus this fraction of what it predicts."""
SLOW = 0.3
"""What takes more seconds than this is timed once, without a turn to warm up."""


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
        moments: when the query is read; None for at the end. What comes later in the run is not taken.
        device: where; what a GPU takes is seconds of a clock, as the thread that asks it does not wait.
    """

    def __init__(
        self,
        run: Record,
        query: Query,
        dtype: str | None,
        memory: int,
        removals: Sequence[Removal],
        moments: Moments | None = None,
        device: torch.device = CPU,
    ) -> None:
        self.query, self.memory = query, memory
        self.moments = find(run, END) if moments is None else moments
        self.readings, until = self.moments.readings, self.moments.last
        self.cpu = self.wall = 0.0
        self._device = device
        Replay(run, dtype, device=device)  # imports what the module needs, once and for all

        def opened() -> Replay:  # by a copy, which has read nothing yet
            return Replay(copy.copy(run), dtype, until, device=device)

        self.load = self.seconds(lambda: opened().activation_bytes)
        self.replay = opened()
        visits, self.scan = self._once(lambda: first_visits(self.replay, removals))
        self.sizes = np.array([len(step.sample_ids) for step in self.replay.records])
        self.visited = [removal for removal, first in zip(removals, visits, strict=True) if first < len(self.replay)]
        new = np.bincount(np.array(visits, dtype=int), minlength=1 + len(self.sizes))[:-1]
        # Of those that any step saw, the share that each step takes along (T,): that has been seen by then.
        self.along = np.cumsum(new) / max(1, len(self.visited))
        self.share_visited = len(self.visited) / max(1, len(removals))
        self._owners = Removals(self.visited)
        self.largest_step = int(self.sizes.argmax())
        self.chosen = self._choose_steps()

    def _choose_steps(self) -> list[int]:
        """Steps to time: for up to five of the sizes there are, one early and one late step, the largest first."""
        sizes = np.unique(np.quantile(self.sizes, [0.0, 0.25, 0.5, 0.75, 1.0], method="nearest"))
        order = [sizes[-1], sizes[0], *sizes[1:-1]] if len(sizes) > 1 else list(sizes)
        alike = [np.flatnonzero(self.sizes == size) for size in order]
        return [int(steps[i * (len(steps) - 1) // 4]) for i in (1, 3) for steps in alike]

    def _once(self, work: Callable[[], Any]) -> tuple[Any, float]:
        wait_for(self._device)
        cpu, wall = time.thread_time(), time.perf_counter()
        result = work()
        wait_for(self._device)
        cpu, wall = time.thread_time() - cpu, time.perf_counter() - wall
        if self._device != CPU:
            cpu = wall
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

    def serial(self, threads: int) -> float:
        """What of a step so many threads do not share, by the clock; more than 1 where they only wait for each other."""
        if threads == 1:
            return 0.0
        share = self.replay.seconds_on(threads) / self.replay.seconds_on(1)
        return max(0.0, (threads * share - 1) / (threads - 1))

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
        """Sum over all steps of ``seconds(t)``."""
        return float(self.each_step(seconds).sum())

    def each_step(self, seconds: Callable[[int], float]) -> np.ndarray:
        """``seconds(t)`` of every step (T,), timed at the chosen steps and interpolated by size."""
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
            return np.asarray(values[0] * self.sizes / sizes[0])
        return np.asarray(np.interp(self.sizes, sizes, values))

    def sample(self, t: int, m: int) -> Removals:
        """m of the removals, of which step t saw as large a share as of all of them."""
        owners, _ = self._owners.occurrences(self.replay.run.steps[t].sample_ids)
        touched = np.unique(owners.numpy())
        others = np.setdiff1d(np.arange(len(self.visited)), touched, assume_unique=True)
        hit = min(round(m * len(touched) / len(self.visited)), len(touched), m)
        picked = [*_spread(touched, hit), *_spread(others, m - hit)]
        return Removals([self.visited[i] for i in sorted(picked)])


def _spread(values: np.ndarray, count: int) -> list[int]:
    """``count`` of the values, evenly spaced."""
    return [int(values[i * len(values) // count]) for i in range(count)]
