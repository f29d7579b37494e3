"""What each method costs on a run: seconds from a few timed pieces of its work, and bytes. One small class for each kind."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch

from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank import screened
from lightning_acc.methods.low_rank import sweep as low_rank
from lightning_acc.methods.rules import LOW_RANK, REVERSE
from lightning_acc.plan import planning
from lightning_acc.plan.planning import Calibration, Cost


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
    """One sweep back, the basis and one pass forward, with the state and the readout that ``score`` would choose."""

    def cost(self, calibration: Calibration) -> Cost:
        """Seconds, measured.

        Raises:
            RequestError: the run is none that acc-low-rank follows, or not even one removal fits into memory.
        """
        c, replay = calibration, calibration.replay
        low_rank.check(replay)
        n = len(c.visited)
        ahead = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t)(replay.initial)))
        if not n:
            return Cost(c.load, ahead + c.scan, 0.0, None)
        theta = replay.initial[0]
        back = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t).at(replay.initial).transposed(theta)))
        # Beside the sweep back, the run is taken forward twice: for its states, then with the shifts.
        shared = (2 + planning.taken_again(replay, c.memory)) * ahead + back
        screened = low_rank.chosen_state(replay.run) == low_rank.SCREENED
        seconds, read, size = self._screened(c) if screened else self._tracked(c)
        thetas = theta.expand(min(read, 8, planning.query_rows(replay, c.query, c.memory)), -1)
        each = c.seconds(lambda: c.query.values(replay.objective, thetas)) / len(thetas)
        return Cost(c.load, shared + seconds + read * each, 0.0, None if size >= n else size)

    def _tracked(self, c: Calibration) -> tuple[float, int, int]:
        """Seconds of the basis and the pass, how many are read exactly, and how many are tracked together."""
        replay, theta, n = c.replay, c.replay.initial[0], len(c.visited)
        size, rank = low_rank.removals_at_once(replay, c.visited, c.memory), low_rank.largest_rank(replay)
        places = len(bases.spread(len(replay)))
        vectors = torch.linalg.qr(_directions(theta, rank).T)[0]
        tracked = low_rank.tracker(replay, c.visited[:size], bases.Basis(vectors.contiguous(), theta.new_zeros(0), 0.0))
        forward = c.over_the_run(lambda t: c.seconds(lambda: tracked.advance(t, replay.step(t), replay.initial, theta)))
        basis = 0.0 if rank == len(theta) else _basis_seconds(c, rank, places)
        return basis + forward, low_rank.read_exactly(replay.run, n, c.query), size

    def _screened(self, c: Calibration) -> tuple[float, int, int]:
        """The same where few removals are followed."""
        replay, theta, n = c.replay, c.replay.initial[0], len(c.visited)
        followed, modelled = screened.counts(replay, n, c.memory, low_rank.most_followed(replay.run))
        directions, some = _directions(theta, followed), followed + modelled
        share = 1 + screened.FRESH_SHARE * bool(modelled)

        def step(t: int) -> float:
            point, sample = replay.step(t).at(replay.initial), c.sample(t, some)
            shifts = theta.expand(len(point.removed(sample).removals), -1)
            linearised = c.seconds(lambda: replay.step(t).at(replay.initial))
            own = c.seconds(lambda: point.removed(sample, curved=True).hessian_product(shifts))
            return linearised + own + c.seconds(lambda: point.hessian_product(directions)) * share

        basis = _basis_seconds(c, screened.DIRECTIONS, screened.PLACES) if modelled else 0.0
        return basis + c.over_the_run(step), some, n

    def bytes(self, calibration: Calibration, removals: int) -> int:
        """Bytes the pass adds to the process at its peak."""
        c, replay = calibration, calibration.replay
        vector, parts = replay.initial[0].nbytes, len(replay.initial)
        if low_rank.chosen_state(replay.run) == low_rank.SCREENED:
            followed, modelled = screened.counts(replay, removals, c.memory, low_rank.most_followed(replay.run))
            forward = (3 * followed + 2 * modelled) * parts * vector + 3 * screened.DIRECTIONS * bool(modelled) * vector
        else:
            each, at_a_step = low_rank.bytes_needed(replay, c.visited)
            forward = 4 * low_rank.largest_rank(replay) * vector + at_a_step + each * removals
        # What the sweep back kept is given back before the pass forward.
        return max(planning.reverse_bytes(replay, "sgd-ie", c.memory), forward)


def _directions(like: torch.Tensor, count: int) -> torch.Tensor:
    """Directions (count, p) at random."""
    return torch.randn(min(count, len(like)), len(like), generator=torch.Generator().manual_seed(0)).to(like)


def _basis_seconds(c: Calibration, rank: int, places: int) -> float:
    directions = _directions(c.replay.initial[0], rank + bases.OVERSAMPLING)
    point = c.replay.step(c.chosen[0]).at(c.replay.initial)
    return bases.ITERATIONS * min(places, len(c.replay)) * c.seconds(lambda: point.hessian_product(directions))


FORECASTS: list[Forecast] = [
    Swept("loo", "exact"),
    Swept("acc-sgd-ie", "exact"),
    LowRankPass(LOW_RANK, "exact"),
    SweptBack("sgd-ie", "linear"),
    SweptBack("tracin", "linear"),
]
"""The rows of a plan: every method with its default readout."""
