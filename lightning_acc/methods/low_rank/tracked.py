"""Tracked: SGD-IE's reverse sweep, with each sample's gradient taken where the run *without it* would stand.

Unrolling ACC-SGD-IE (arXiv 2510.26185) against the propagator of the whole batch, which all removals share, gives

    score(R) = - sum_t  < gamma_t , sum_{i in R and batch t}  w_i (g_i + H_i D^R_t) >,     gamma_t = (dU/dG)^T lambda_{t+1},

with ``g_i``, ``H_i`` the gradient and the Hessian of a sample's own loss, and ``lambda`` the adjoint of SGD-IE's one sweep
back: SGD-IE is this line with D = 0. The shift D enters through the sample's own Hessian alone, so that it may be rough. Here
it is ``x = u + Q y``, with Q (p, r) an orthonormal basis of the directions in which training contracts most:

* ``u``, the raw shift, is what the removed gradients add up to when nothing contracts them;
* ``a = Q^T u`` and ``z = Q^T x = a + y`` are its r numbers in the basis before and after contraction by the batches, with
  ``M_t = Q^T H_t Q``, and without the sample's own part of it, ``Q^T H_i Q z``, as the sample is not there.

With r = p this is ACC-SGD-IE, exactly; with r = 0 the contraction is left out.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank.back import Back
from lightning_acc.methods.memory import query_rows
from lightning_acc.methods.method import Question
from lightning_acc.methods.reading import Gathered

LEFT_TO_CONTRACT, LEFT_TOO_MUCH = 0.0002, 0.5
"""Directions that the whole training contracts by less than the first exponent are left out of the basis. Where one outside is
contracted by more than the second, the shifts are too rough: their relative error was 0.17 and more."""
TESTED = 256
"""How many removals' shifts are held against the sweep back."""


@dataclass(frozen=True)
class Tracked:
    """What the pass gives for n removals; sums over the steps asked about are means over these.

    Attributes:
        scores: with the linear readout, (n,).
        first: what SGD-IE says of them, (n,).
        read: which of them were read exactly, too, the most influential, (m,).
        linear: what their shifts say of the query to first order, (m,).
        curvature: what the query's curvature adds to that, (m,).
        basis: the basis used.
        shift_error: relative error (root mean square) of what some of the shifts, spread over all, say of the query to first
            order: the sweep back knows that exactly.
        shifts: the estimated shifts at the steps asked about, (steps, n, p), where they are to be kept.
        thetas: the run's parameters there.
    """

    scores: Tensor
    first: Tensor
    read: Tensor
    linear: Tensor
    curvature: Tensor
    basis: bases.Basis
    shift_error: float
    shifts: Tensor | None
    thetas: Tensor | None


def tracked(
    replay: Replay,
    back: Back,
    basis: bases.Basis,
    removals: Sequence[Removal],
    question: Question,
    exactly: int,
    progress: Callable[[float], None] = lambda _: None,
) -> Tracked:
    """One pass forward that tracks n removals.

    Args:
        replay: of the run, whose update is affine and the same for all parameters.
        back: what the sweep back tells.
        basis: of the directions.
        removals: n removals.
        question: what is asked.
        exactly: how many removals are read exactly, those that SGD-IE calls the most influential.
        progress: told the fraction done.
    """
    shifts = Shifts(Removals(removals), basis.vectors, len(replay.initial), len(replay))
    strongest = back.of(removals).abs().argsort(descending=True, stable=True)[:exactly]
    look = _Look(replay, question, shifts, back, strongest)
    current = replay.initial
    if 0 in question.moments.weights:  # of an average
        look(0, current[0])
    for t in range(len(replay)):
        step = replay.step(t)
        shifts.advance(t, step, current, back.gammas[t].to(replay.device))
        current = step(current)
        if t + 1 in question.moments.weights:
            look(t + 1, current[0])
        progress((t + 1) / len(replay))
    scores = shifts.first + shifts.second
    return Tracked(
        scores, shifts.first, look.read, look.linear, look.curvature, basis, look.error(scores), look.shifts, look.thetas
    )


class _Look:
    """What is seen of the shifts at the steps asked about, while the pass goes by them; see ``Tracked``."""

    def __init__(self, replay: Replay, question: Question, shifts: Shifts, back: Back, read: Tensor) -> None:
        self._objective, self._question, self._of, self._gradients = replay.objective, question, shifts.of, back.gradients
        self._n, self.read = len(shifts.first), read
        self._some = torch.linspace(0, self._n - 1, min(self._n, TESTED)).round().long().unique()
        self._said = shifts.first.new_zeros(len(self._some))
        self._rows = query_rows(replay, question.query, question.memory) if len(read) else 1
        self.linear, self.curvature = (shifts.first.new_zeros(len(read)) for _ in range(2))
        self._parts = [(part, Gathered(question.moments)) for part in torch.arange(len(read)).split(self._rows)]
        self._whole = Gathered(question.moments)
        self._kept: list[Tensor] = []
        self._thetas: list[Tensor] = []

    def __call__(self, t: int, theta: Tensor) -> None:
        gradient, question = self._gradients[t], self._question
        if self._n:
            self._said += torch.cat([self._of(part) @ gradient for part in self._some.split(16)])
        for places, gathered in self._parts:
            shifts = self._of(self.read[places])
            linear = shifts @ gradient
            self.linear[places] += linear
            self.curvature[places] -= linear
            if read := gathered(t, theta, shifts):
                changes = question.query.changes(self._objective, read[0], read[1], len(places))
                self.curvature[places] += question.moments.share * changes
        if question.keep_shifts and (read := self._whole(t, theta, self._of(torch.arange(self._n)))):
            self._thetas.append(read[0])
            self._kept.append(read[1])

    def error(self, scores: Tensor) -> float:
        """By how much what some shifts say to first order is off, relative to ``scores`` (n,)."""
        return float((self._said - scores[self._some]).norm() / scores[self._some].norm().clamp_min(1e-300))

    @property
    def shifts(self) -> Tensor | None:
        """(steps, n, p), where they were kept."""
        return torch.stack(self._kept) if self._kept else None

    @property
    def thetas(self) -> Tensor | None:
        """(steps, p), beside the shifts."""
        return torch.stack(self._thetas) if self._thetas else None


def duration(replay: Replay) -> float:
    """What all steps together move a parameter by, in the end, for each unit of its gradient."""
    return sum(gain(replay, t) for t in range(len(replay)))


def gain(replay: Replay, t: int) -> float:
    """By how much step t's update moves a parameter in the end, for each unit of its gradient: lr / (1 - momentum)."""
    drift, source = replay.update.response(replay.run.steps[t].groups)
    moved = []
    for _ in range(10):  # after 1, 2, 4, ... steps
        moved.append(abs(float(source[0])))
        source, drift = drift @ source, drift @ drift
    return max(moved)


class Shifts:
    """The rough shifts of n removals, taken forward through the run, given ``gamma_t``; collects their scores.

    Only ``z`` changes for all removals at every step. What else is kept of a removal is brought up to date when a step sees
    it: between two visits it is mixed by the update alone, in the same way for all that were last seen at one step.

    Args:
        removals: n removals.
        basis: Q, (p, r).
        parts: number of tensors of the state: the parameters and the optimizer's slots.
        n_steps: number of steps of the run.

    Attributes:
        first: the scores of SGD-IE, (n,).
        second: what the own Hessians add to them, (n,).
    """

    def __init__(self, removals: Removals, basis: Tensor, parts: int, n_steps: int) -> None:
        n, (p, r) = len(removals), basis.shape
        self._removals, self._basis = removals, basis
        self._u = basis.new_zeros(n, parts, p)
        self._z = [basis.new_zeros(n, r) for _ in range(parts)]
        self._since = torch.eye(parts).to(basis).repeat(n_steps + 1, 1, 1)
        """By the step a removal was last seen at, plus 1: the product of all updates since."""
        self._seen = torch.zeros(n, dtype=torch.int64)
        self.first = basis.new_zeros(n)
        self.second = basis.new_zeros(n)

    def advance(self, t: int, step: Step, state: State, gamma: Tensor) -> None:
        """Take step t from the recorded run's state; ``gamma`` is (p,)."""
        drift, source = (tensor.to(gamma) for tensor in step.optimizer.response(step.groups))
        q, point = self._basis, step.at(state)
        removed = point.removed(self._removals, curved=True)
        who, gradients = removed.removals, removed.gradients
        z = self._z[0][who]
        u = self._since[self._seen[who]] @ self._u[who]
        curved = removed.hessian_product(self._whole(u[:, 0], z))
        own = removed.hessian_product(z @ q.T) if q.shape[1] else curved
        self.first[who] -= gradients @ gamma
        self.second[who] -= curved @ gamma
        contraction = point.hessian_product(q.T.contiguous()) @ q if q.shape[1] else q.new_zeros(0, 0)
        change = self._z[0] @ contraction
        change[who] -= gradients @ q + own @ q
        self._z = updated(self._z, change, drift, source)
        self._u[who] = drift @ u - source[:, None] * gradients[:, None]
        self._since[: t + 1] = drift @ self._since[: t + 1]
        self._seen[who] = t + 1

    def of(self, removals: Tensor) -> Tensor:
        """The estimates x (m, p) of the final shifts of these removals (m,): rough, unless r = p."""
        mixing = self._since[self._seen[removals]]
        return self._whole(torch.einsum("nk,nkp->np", mixing[:, 0], self._u[removals]), self._z[0][removals])

    def _whole(self, u: Tensor, z: Tensor) -> Tensor:
        """``x = u + Q y`` with ``y = z - Q^T u``."""
        return u + (z - u @ self._basis) @ self._basis.T


def updated(parts: Sequence[Tensor], change: Tensor, drift: Tensor, source: Tensor) -> list[Tensor]:
    """What an affine update makes of changes of the state's parts and of the gradient, all (n, any).

    Args:
        parts: changes of the parts of the state, (n, any) each.
        change: of the gradient, (n, any).
        drift: (parts, parts), of the optimizer's update.
        source: (parts,).
    """
    after = []
    for row, factor in zip(drift.tolist(), source.tolist(), strict=True):
        total = factor * change
        for part, by in zip(parts, row, strict=True):
            if by:
                total.add_(part, alpha=by)
        after.append(total)
    return after


def updated_by_range(
    parts: Sequence[Tensor], change: Tensor, responses: Sequence[tuple[slice, Tensor, Tensor]]
) -> list[Tensor]:
    """The same of parts (n, p), range by range, each with its drift and source."""
    if len(responses) == 1:
        return updated(parts, change, *responses[0][1:])
    ranges = [updated([part[:, at] for part in parts], change[:, at], drift, source) for at, drift, source in responses]
    return [torch.cat(pieces, 1) for pieces in zip(*ranges, strict=True)]
