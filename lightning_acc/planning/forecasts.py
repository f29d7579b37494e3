"""What each method costs on a run: seconds from a few timed pieces of its work, and bytes; a class for each way to run."""

from __future__ import annotations

from abc import ABC, abstractmethod
from functools import partial

import torch
from torch import Tensor

from lightning_acc.core import tape
from lightning_acc.core.removals import Removals
from lightning_acc.methods import memory
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank import budget, prices, screened, tracked
from lightning_acc.methods.low_rank.choice import DEFECT, RETRAINED, SCREENED, Chosen
from lightning_acc.methods.low_rank.defect import alone
from lightning_acc.methods.low_rank.entry import LowRank
from lightning_acc.methods.method import Method
from lightning_acc.methods.rules import AdjointSgdIe
from lightning_acc.methods.swept import RETRAINING, Swept
from lightning_acc.planning.calibration import Calibration, Cost


class Forecast(ABC):
    """The cost of a method with its usual readout, on the run of a calibration."""

    def __init__(self, calibration: Calibration) -> None:
        self.c, self.replay = calibration, calibration.replay

    @abstractmethod
    def cost(self) -> Cost:
        """Seconds, measured.

        Raises:
            RequestError: the method does not follow this run, or not even one removal fits into memory.
        """

    @abstractmethod
    def bytes(self, removals: int) -> int:
        """Bytes a chunk of so many removals adds to the process at its peak."""

    def taken_once(self) -> float:
        """Seconds of the run itself, taken once more."""
        return self.c.over_the_run(lambda t: self.c.seconds(lambda: self.replay.step(t)(self.replay.initial)))


class Forward(Forecast):
    """A forward sweep, chunk by chunk, with the exact readout."""

    def __init__(self, calibration: Calibration, method: Swept) -> None:
        super().__init__(calibration)
        self.method, self.copies = method, method.copies_for(calibration.replay, calibration.moments)

    def cost(self) -> Cost:
        """Seconds, measured."""
        c, replay = self.c, self.replay
        largest = memory.chunk_size(replay, self.method.name, self.copies, c.memory)
        n, total = len(c.visited), len(replay)
        if not n:
            return Cost(c.load, self.taken_once() + c.scan, 0.0, largest)
        size = max(map(len, memory.chunks(c.visited, largest)))
        if self.copies.in_turn:  # the run itself and each removal take the same steps
            scale, a, slope = c.each_step(lambda t: c.seconds(lambda: replay.step(t)(replay.initial))), 1.0, 1.0
        else:
            a, slope, m = c.line(partial(self._step, c.largest_step), size, total * -(-n // size))
            scale = c.each_step(lambda t: self._step(t, m)) / max(a + slope * m, 1e-9)

        theta = replay.initial[0]
        rows = memory.query_rows(replay, c.query, c.memory)
        b, read, _ = c.line(lambda m: self._readout(theta.expand(m, -1)), min(size, rows), -(-n // size))
        per_chunk = float(scale.sum()) * a + c.scan + c.readings * b * -(-size // rows)
        per_removal = c.share_visited * float(scale @ c.along) * slope + c.readings * read
        return Cost(c.load, per_chunk, per_removal, largest)

    def _step(self, t: int, m: int) -> float:
        """Seconds of step t with m removals."""
        rule, chunk = self.method.forward(), self.c.sample(t, m)
        carry = rule.init(self.replay.initial, chunk)
        return self.c.seconds(lambda: rule.advance(self.replay.step(t), carry, chunk))

    def _readout(self, thetas: Tensor) -> float:
        return self.c.seconds(lambda: self.c.query.values(self.replay.objective, torch.cat([thetas[:1], thetas])))

    def bytes(self, removals: int) -> int:
        """Bytes a chunk adds."""
        return memory.chunk_bytes(self.replay, self.copies, self.c.query, self.c.memory, removals)


class Back(Forecast):
    """One reverse sweep for all samples, with the linear readout."""

    def __init__(self, calibration: Calibration, method: Swept) -> None:
        super().__init__(calibration)
        assert method.reverse is not None
        self.rule = method.reverse()

    def cost(self) -> Cost:
        """Seconds, measured."""
        c, replay, rule = self.c, self.replay, self.rule
        gradient = c.query.gradient(replay.objective, replay.initial[0])
        carry = rule.init(gradient, replay.initial, replay.run.n_samples)
        back = c.over_the_run(lambda t: c.seconds(lambda: rule.advance(replay.step(t).at(replay.initial), carry)))
        query = c.seconds(lambda: c.query.gradient(replay.objective, replay.initial[0]))
        few = c.visited[:100]
        picked = c.seconds(lambda: [carry[1][list(removal)].sum() for removal in few]) / max(1, len(few))
        ahead = (1 + tape.taken_again(replay, memory.of_the_tape(replay, c.memory))) * self.taken_once()
        return Cost(c.load, ahead + back + c.readings * query, picked, None)

    def bytes(self, removals: int) -> int:
        """Bytes the sweep adds."""
        return memory.reverse_bytes(self.replay, self.c.memory)


class LowRankPass(Forecast):
    """One sweep back, the basis and one pass forward, in a form that ``score`` would choose."""

    def __init__(self, calibration: Calibration, method: Chosen) -> None:
        super().__init__(calibration)
        self.screens, self.price = method.form == SCREENED, method.price
        self.directions = budget.most_directions(self.replay, self.price) or budget.FEWEST_DIRECTIONS

    def cost(self) -> Cost:
        """Seconds, measured."""
        c, replay = self.c, self.replay
        n, ahead, theta = len(c.visited), self.taken_once(), replay.initial[0]
        if not n:
            return Cost(c.load, ahead + c.scan, 0.0, None)
        some = tuple(part.clone() for part in replay.initial)
        back = c.over_the_run(lambda t: c.seconds(lambda: replay.step(t).at(replay.initial).pullback(some)))
        # Beside the sweep back, the run is taken forward twice: for its states, then with the shifts.
        shared = (2 + tape.taken_again(replay, memory.of_the_tape(replay, c.memory))) * ahead + back
        seconds, read, size = self._screened() if self.screens else self._tracked()
        thetas = theta.expand(min(read, 8, memory.query_rows(replay, c.query, c.memory)), -1)
        each = c.seconds(lambda: c.query.values(replay.objective, thetas)) / len(thetas)
        if c.readings > 1:  # the sweep back takes up the query's gradient again at each of the others
            shared += (c.readings - 1) * c.seconds(lambda: c.query.gradient(replay.objective, theta))
        return Cost(c.load, shared + seconds + c.readings * read * each, 0.0, None if size >= n else size)

    def _tracked(self) -> tuple[float, int, int]:
        """Seconds of the basis and the pass, how many are read exactly, and how many are tracked together."""
        c, replay, theta = self.c, self.replay, self.replay.initial[0]
        size, most = budget.removals_at_once(prices.bytes_needed(replay), c.memory), self.directions
        vectors = torch.linalg.qr(self._directions(most).T)[0]

        def step(t: int, m: int) -> float:
            basis = vectors[:, :m].contiguous()
            shifts = tracked.Shifts(Removals(c.visited[:size]), basis, len(replay.initial), len(replay))
            return c.seconds(lambda: shifts.advance(t, replay.step(t), replay.initial, theta))

        a, slope, m = c.line(partial(step, c.largest_step), most, len(replay))
        forward = c.over_the_run(lambda t: step(t, m)) * (a + slope * most) / max(a + slope * m, 1e-9)
        basis = 0.0 if most == len(theta) else self._basis(most, bases.MOST_STEPS)
        return basis + forward, budget.read_exactly(replay, len(c.visited), c.query, c.readings, self.price), size

    def _screened(self) -> tuple[float, int, int]:
        """The same where few removals are followed."""
        c, replay, n = self.c, self.replay, len(self.c.visited)
        followed, modelled = self._counts(n)
        directions, some = self._directions(followed), followed + modelled
        share = 1 + screened.FRESH_SHARE * bool(modelled)

        def step(t: int) -> float:
            point, sample = replay.step(t).at(replay.initial), c.sample(t, some)
            shifts = replay.initial[0].expand(len(point.removed(sample).removals), -1)
            linearised = c.seconds(lambda: replay.step(t).at(replay.initial))
            own = c.seconds(lambda: point.removed(sample, curved=True).hessian_product(shifts))
            return linearised + own + c.seconds(lambda: point.hessian_product(directions)) * share

        basis = self._basis(screened.DIRECTIONS, screened.PLACES) if modelled else 0.0
        return basis + c.over_the_run(step), some, n

    def _counts(self, n: int) -> tuple[int, int]:
        """How many of n removals are followed, and how many modelled."""
        followed = budget.most_followed(self.replay, self.price, self.c.query, self.c.readings)
        followed, modelled = screened.counts(self.replay, n, self.c.memory, followed)
        return followed, modelled if budget.models(self.replay, self.price) else 0

    def _directions(self, count: int) -> Tensor:
        """Directions (count, p) at random."""
        like = self.replay.initial[0]
        return torch.randn(min(count, len(like)), len(like), generator=torch.Generator().manual_seed(0)).to(like)

    def _basis(self, directions: int, places: int) -> float:
        vectors = self._directions(directions + bases.OVERSAMPLING)
        point = self.replay.step(self.c.chosen[0]).at(self.replay.initial)
        times = bases.ITERATIONS * min(places, len(self.replay))
        a, slope, _ = self.c.line(lambda m: self.c.seconds(lambda: point.hessian_product(vectors[:m])), len(vectors), times)
        return times * (a + slope * len(vectors))

    def bytes(self, removals: int) -> int:
        """Bytes the pass adds; what the sweep back kept is given back before the pass forward."""
        replay, allowed = self.replay, self.c.memory
        vector, state = replay.initial[0].nbytes, sum(part.nbytes for part in replay.initial)
        each, at_a_step = prices.bytes_needed(replay)
        if self.screens:
            followed, modelled = self._counts(removals)
            forward = (3 * followed + 2 * modelled) * state + 3 * screened.DIRECTIONS * bool(modelled) * vector
        else:
            forward = 4 * self.directions * vector + at_a_step + each * removals
        return max(tape.held(replay, memory.of_the_tape(replay, allowed)) * state + at_a_step, forward)


class DefectPass(Forecast):
    """One sweep back, and passes forward with the removals that follow the update."""

    def __init__(self, calibration: Calibration, method: Chosen) -> None:
        super().__init__(calibration)
        self.method, self.windows = method, method.windows(self.replay)

    def _inside(self, removals: int) -> int:
        """How many of them are in a window together, in the mean."""
        return max(1, round(removals * self.windows.share(self.replay)))

    def cost(self) -> Cost:
        """Seconds, measured."""
        c, replay, start, n = self.c, self.replay, self.replay.initial, len(self.c.visited)
        ahead = self.taken_once()
        if not n:
            return Cost(c.load, ahead + c.scan, 0.0, None)
        gradient, rule = c.query.gradient(replay.objective, start[0]), AdjointSgdIe()
        carry = rule.init(gradient, start, replay.run.n_samples)
        shared = c.readings * c.seconds(lambda: c.query.gradient(replay.objective, start[0]))
        back = c.over_the_run(lambda t: c.seconds(lambda: rule.advance(replay.step(t).at(start), carry)))
        shared += (1 + tape.taken_again(replay, memory.of_the_tape(replay, c.memory))) * ahead + back
        at_once = budget.removals_at_once(prices.bytes_by_the_update(replay), c.memory)
        piece = self.method.piece_by_the_update(replay, n, c.memory)
        followed = n if self.method.most is None else min(n, self.method.most)
        passes = -(-self._inside(followed) // at_once)
        a, slope, m = c.line(partial(self._step, c.largest_step), -(-followed // passes), passes * len(replay))
        scale = c.over_the_run(lambda t: self._step(t, m)) / max(a + slope * m, 1e-9)
        if self.method.is_relative:
            return Cost(c.load, shared + scale * (passes * a + followed * slope), 0.0, None)
        own = scale * a * -(-self._inside(min(n, piece)) // at_once)
        return Cost(c.load, shared + own, c.share_visited * scale * slope, piece if n > piece else None)

    def _step(self, t: int, m: int) -> float:
        """Seconds of step t with m removals, as many of them in a window as usual."""
        total, start = len(self.replay), self.replay.initial
        adjoints = alone.AdjointDefect(total, [], start[0].expand(2 * total, -1))
        shifts = alone.UpdateAlone(self.replay, self.c.sample(t, m), adjoints, self.windows)
        shifts.begin(t, self._inside(m))
        return self.c.seconds(lambda: shifts.advance(t, self.replay.step(t)))

    def bytes(self, removals: int) -> int:
        """Bytes the passes add; what the sweep back kept is given back before."""
        replay, allowed = self.replay, self.c.memory
        each, at_a_step = needed = prices.bytes_by_the_update(replay)
        followed = removals if self.method.most is None else min(removals, self.method.most)
        together = min(self._inside(followed), budget.removals_at_once(needed, allowed))
        states = tape.held(replay, memory.of_the_tape(replay, allowed)) * sum(part.nbytes for part in replay.initial)
        return at_a_step + max(states, each * together)


def forecast(method: Method, calibration: Calibration) -> Forecast:
    """The forecast for the way in which a method runs."""
    if isinstance(method, LowRank):
        settled = method.settled(calibration.replay, keep_shifts=False)
        if settled.form == RETRAINED:
            return Forward(calibration, RETRAINING)
        return (DefectPass if settled.form == DEFECT else LowRankPass)(calibration, settled)
    assert isinstance(method, Swept)
    return Forward(calibration, method) if method.reverse is None else Back(calibration, method)
