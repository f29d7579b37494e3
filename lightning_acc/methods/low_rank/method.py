"""acc-low-rank: SGD-IE's reverse sweep, with each sample's gradient taken where the run *without it* would stand.

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

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Point, Step
from lightning_acc.methods.rules import AdjointSgdIe


@dataclass(frozen=True)
class Seen:
    """What a step tells of the m removals whose samples it saw; sums over each one's samples i in the batch.

    Attributes:
        projected: ``sum_i w_i Q^T g_i``, (m, r).
        own: ``sum_i w_i Q^T H_i Q z``, (m, r).
        first: ``<gamma, sum_i w_i g_i>``, (m,).
        second: ``<gamma, sum_i w_i H_i x>``, (m,).
        contraction: ``M_t = Q^T H_t Q`` of the whole batch, (r, r).
    """

    projected: Tensor
    own: Tensor
    first: Tensor
    second: Tensor
    contraction: Tensor


class RawShifts(ABC):
    """The raw shifts u of n removals, in some form, and how the own gradients and Hessians of their samples are taken."""

    @abstractmethod
    def removals_in(self, t: int, step: Step) -> Tensor:
        """The removals (m,) whose samples step t saw, sorted."""

    @abstractmethod
    def see(self, t: int, step: Step, state: State, gamma: Tensor, z: Tensor, mixing: Tensor) -> Seen:
        """Look at step t.

        Args:
            t: number of the step.
            step: the step.
            state: the recorded run's state before it.
            gamma: ``gamma_t``, (p,).
            z: of the removals in the step, (m, r).
            mixing: what has become of each one's raw state since it was last seen, ``mixing @ then``; (m, parts, parts).
        """

    @abstractmethod
    def add(self, drift: Tensor, source: Tensor) -> None:
        """Take the step last seen for the removals in it: ``u' = drift u + source (-sum_i w_i g_i)``.

        Args:
            drift: (parts, parts), of the optimizer's update.
            source: (parts,).
        """

    @abstractmethod
    def shifts(self, removals: Tensor, z: Tensor, mixing: Tensor) -> Tensor:
        """x of these removals (m,), (m, p), after the step last seen, as ``z`` and ``mixing`` are now."""


class AccLowRank:
    """Tracks n removals forward through the run, given ``gamma_t``; collects their scores, with linear readout.

    Only ``z`` changes for all removals at every step. What else is kept of a removal is brought up to date when a step sees
    it: between two visits it is mixed by the update alone, in the same way for all that were last seen at one step.

    Args:
        basis: Q, (p, r).
        raw: the raw shifts of the removals.
        parts: number of tensors of the state: the parameters and the optimizer's slots.
        n: number of removals.
        n_steps: number of steps of the run.
    """

    def __init__(self, basis: Tensor, raw: RawShifts, parts: int, n: int, n_steps: int) -> None:
        self.basis, self.raw = basis, raw
        r = basis.shape[1]
        self._z = [basis.new_zeros(n, r) for _ in range(parts)]
        self._since = torch.eye(parts, dtype=basis.dtype).repeat(n_steps + 1, 1, 1)
        """By the step a removal was last seen at, plus 1: the product of all updates since."""
        self._seen = torch.zeros(n, dtype=torch.int64)
        self.first = basis.new_zeros(n)
        """The scores of SGD-IE."""
        self.second = basis.new_zeros(n)
        """What the own Hessians add to them."""

    def advance(self, t: int, step: Step, state: State, gamma: Tensor) -> None:
        """Take step t from the recorded run's state; ``gamma`` is (p,)."""
        drift, source = (tensor.to(gamma) for tensor in step.response())
        who = self.raw.removals_in(t, step)
        mixing = self._since[self._seen[who]]
        seen = self.raw.see(t, step, state, gamma, self._z[0][who], mixing)
        self.raw.add(drift, source)
        self.first[who] -= seen.first
        self.second[who] -= seen.second
        change = self._z[0] @ seen.contraction
        change[who] -= seen.projected + seen.own
        self._z = updated(self._z, change, drift, source)
        self._since[: t + 1] = drift @ self._since[: t + 1]
        self._seen[who] = t + 1

    @property
    def scores(self) -> Tensor:
        """Scores (n,) with the linear readout: positive where the samples help."""
        return self.first + self.second

    def shifts(self, removals: Tensor) -> Tensor:
        """The estimates x (m, p) of the final shifts of these removals (m,): rough, unless r = p."""
        return self.raw.shifts(removals, self._z[0][removals], self._since[self._seen[removals]])


def updated(parts: Sequence[Tensor], change: Tensor, drift: Tensor, source: Tensor) -> list[Tensor]:
    """What an affine update makes of changes of the state's parts and of the gradient, all (n, any).

    Args:
        parts: changes of the parts of the state.
        change: of the gradient.
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


class AdjointGradients(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps ``gamma_t = (dU/dG)^T lambda_{t+1}`` of every step.

    Args:
        gammas: where to keep them: T rows (p,).
    """

    def __init__(self, gammas: Sequence[Tensor] | Tensor) -> None:
        self.gammas = gammas
        self._t = len(gammas)

    def advance(self, point: Point, carry: tuple[State, Tensor]) -> tuple[State, Tensor]:
        """One step back."""
        self._t -= 1
        adjoint, scores = carry
        drift, source = (tensor.to(scores) for tensor in point.step.response())
        together = torch.stack(adjoint)
        gamma = source @ together
        self.gammas[self._t][:] = gamma
        # The same as the pullback of F, without differentiating the update, which is affine.
        back = drift.T @ together
        curved, slopes = point.transposed(gamma)
        back[0] += curved
        scores.index_add_(0, point.step.sample_ids, -point.step.weights * slopes)
        return tuple(back), scores
