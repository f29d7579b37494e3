"""What each method costs on a run: seconds from a few timed pieces of its work, and bytes. One small class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch

from lightning_acc import planning
from lightning_acc.low_rank import basis as bases
from lightning_acc.low_rank import sweep as low_rank
from lightning_acc.methods import LOW_RANK, REVERSE
from lightning_acc.planning import Calibration, Cost


class Forecast(ABC):
    """How to tell the cost of a method with a readout; one entry of ``FORECASTS``."""

    def __init__(self, method: str, readout: str) -> None:
        self.method, self.readout = method, readout

    @abstractmethod
    def cost(self, calibration: Calibration) -> Cost:
        """Seconds, measured."""

    @abstractmethod
    def bytes(self, calibration: Calibration, removals: int) -> int:
        """Bytes a chunk of so many removals adds to the process at its peak."""


class Swept(Forecast):
    """A forward method, chunk by chunk, with the exact readout."""

    def cost(self, calibration: Calibration) -> Cost:
        """Seconds, measured.

        Raises:
            RequestError: not even one removal fits into memory.
        """
        c, replay = calibration, calibration.replay
        largest = planning.chunk_size(replay, self.method, c.memory)
        n, total = len(c.visited), len(replay)
        if not n:
            a = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t)(replay.initial)))
            return Cost(c.load, a + c.scan, 0.0, largest)
        size = max(map(len, planning.chunks(c.visited, largest)))
        a, slope, m = c.line(partial(c.step_seconds, self.method, c.largest_step), size, total * -(-n // size))
        scale = c.over_the_run(lambda t: c.step_seconds(self.method, t, m)) / max(a + slope * m, 1e-9)

        theta = replay.initial[0]
        rows, measure = planning.query_rows(replay, c.query, c.memory), self._measure_readout
        b, read, _ = c.line(lambda m: measure(c, theta.expand(m, -1)), min(size, rows), -(-n // size))
        per_chunk = scale * a + c.scan + b * -(-size // rows)
        return Cost(c.load, per_chunk, c.share_visited * scale * slope + read, largest)

    @staticmethod
    def _measure_readout(c: Calibration, thetas: torch.Tensor) -> float:
        return c.seconds(lambda: c.query.values(c.replay.objective, torch.cat([thetas[:1], thetas])))

    def bytes(self, calibration: Calibration, removals: int) -> int:
        """Bytes a chunk of so many removals adds to the process at its peak."""
        return planning.chunk_bytes(calibration.replay, self.method, calibration.query, calibration.memory, removals)


class SweptBack(Forecast):
    """One reverse sweep for all samples, with the linear readout."""

    def cost(self, calibration: Calibration) -> Cost:
        """Seconds, measured."""
        c, replay = calibration, calibration.replay
        gradient = c.query.gradient(replay.objective, replay.initial[0])
        rule = REVERSE[self.method]()
        carry = rule.init(gradient, replay.initial, replay.run.n_samples)
        ahead = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t)(replay.initial)))
        back = c.over_the_run(lambda t: c.seconds(lambda: rule.advance(replay.step(t).at(replay.initial), carry)))
        query = c.seconds(lambda: c.query.gradient(replay.objective, replay.initial[0]))
        again = planning.taken_again(replay, c.memory)
        few = c.visited[:100]
        picked = c.seconds(lambda: [carry[1][list(removal)].sum() for removal in few]) / max(1, len(few))
        return Cost(c.load, (1 + again) * ahead + back + query, picked, None)

    def bytes(self, calibration: Calibration, removals: int) -> int:
        """Bytes the sweep adds to the process at its peak."""
        return planning.reverse_bytes(calibration.replay, self.method, calibration.memory)


class LowRankPass(Forecast):
    """One sweep back, the basis and one pass forward, with the readout ``score`` would choose; at the largest rank."""

    def cost(self, calibration: Calibration) -> Cost:
        """Seconds, measured.

        Raises:
            RequestError: the run is none that acc-low-rank follows, or not even one removal fits into memory.
        """
        c, replay = calibration, calibration.replay
        low_rank.check(replay)
        n, total = len(c.visited), len(replay)
        ahead = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t)(replay.initial)))
        if not n:
            return Cost(c.load, ahead + c.scan, 0.0, None)
        size = low_rank.removals_at_once(replay, c.visited, c.memory)
        theta, rank = replay.initial[0], low_rank.largest_rank(replay)
        back = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t).at(replay.initial).hessian_product(theta[None])))
        width, numbers = min(rank + bases.OVERSAMPLING, len(theta)), torch.Generator().manual_seed(0)
        directions = torch.randn(width, len(theta), generator=numbers).to(theta)
        point = replay.step(c.chosen[0]).at(replay.initial)
        iterations = 0 if rank == len(theta) else bases.ITERATIONS * len(bases.spread(total))
        basis = iterations * c.seconds(lambda: point.hessian_product(directions)) if iterations else 0.0
        vectors = torch.linalg.qr(directions.T)[0][:, :rank]
        tracked = low_rank.tracker(replay, c.visited[:size], bases.Basis(vectors.contiguous(), theta.new_zeros(0), 0.0))
        forward = c.over_the_run(lambda t: c.seconds(lambda: tracked.advance(t, replay.step(t), replay.initial, theta)))
        read = 0.0
        if low_rank.exact_by_default(replay.run, n, c.query):
            thetas = theta.expand(min(n, 8, planning.query_rows(replay, c.query, c.memory)), -1)
            read = c.seconds(lambda: c.query.values(replay.objective, thetas)) / len(thetas)
        per_chunk = (2 + planning.taken_again(replay, c.memory)) * ahead + back + basis + forward
        return Cost(c.load, per_chunk, read, None if size >= n else size)

    def bytes(self, calibration: Calibration, removals: int) -> int:
        """Bytes the pass adds to the process at its peak."""
        c, replay = calibration, calibration.replay
        each, at_a_step = low_rank.bytes_needed(replay, c.visited)
        basis = 4 * low_rank.largest_rank(replay) * replay.initial[0].nbytes
        # What the sweep back kept is given back before the pass forward.
        return basis + max(planning.reverse_bytes(replay, "sgd-ie", c.memory), at_a_step + each * removals)


FORECASTS: list[Forecast] = [
    Swept("loo", "exact"),
    Swept("acc-sgd-ie", "exact"),
    LowRankPass(LOW_RANK, "exact"),
    SweptBack("sgd-ie", "linear"),
    SweptBack("tracin", "linear"),
]
"""The rows of a plan: every method with its default readout."""
