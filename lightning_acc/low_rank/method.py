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

from lightning_acc.methods import AdjointSgdIe
from lightning_acc.optimizers import State
from lightning_acc.step import Point


@dataclass(frozen=True)
class Seen:
    """What a step tells of the m removals whose samples it saw; sums over each one's samples i in the batch.

    Attributes:
        removals: their indices, (m,).
        projected: ``sum_i w_i Q^T g_i``, (m, r).
        own: ``sum_i w_i Q^T H_i Q z``, (m, r).
        first: ``<gamma, sum_i w_i g_i>``, (m,).
        second: ``<gamma, sum_i w_i H_i x>``, (m,).
        contraction: ``M_t = Q^T H_t Q`` of the whole batch, (r, r).
    """

    removals: Tensor
    projected: Tensor
    own: Tensor
    first: Tensor
    second: Tensor
    contraction: Tensor


class RawShifts(ABC):
    """The raw shifts u of n removals, and how the own gradients and Hessians of their samples are taken."""

    @abstractmethod
    def see(self, t: int, point: Point, gamma: Tensor, y: Tensor, z: Tensor, mixing: Tensor) -> Seen:
        """Look at step t.

        Args:
            t: number of the step.
            point: the step at the recorded run's state.
            gamma: ``gamma_t``, (p,).
            y: (n, r).
            z: (n, r).
            mixing: (n, parts, parts); what has become of each removal's raw state since it was last seen: ``mixing @ then``.
        """

    @abstractmethod
    def add(self, seen: Seen, drift: Tensor, source: Tensor) -> None:
        """Take the step for the removals seen: ``u' = drift u + source (-sum_i w_i g_i)``.

        Args:
            seen: what ``see`` gave.
            drift: (parts, parts), of the optimizer's update.
            source: (parts,).
        """

    @abstractmethod
    def shifts(self, removals: Tensor, mixing: Tensor) -> Tensor:
        """u of these removals (m,), (m, p)."""


class AccLowRank:
    """Tracks n removals forward through the run, given ``gamma_t``; collects their scores, with linear readout.

    Args:
        basis: Q, (p, r).
        raw: the raw shifts of the removals.
        parts: number of tensors of the state: the parameters and the optimizer's slots.
        n: number of removals.
    """

    def __init__(self, basis: Tensor, raw: RawShifts, parts: int, n: int) -> None:
        self.basis, self.raw = basis, raw
        r = basis.shape[1]
        self._a = basis.new_zeros(n, parts, r)
        self._z = basis.new_zeros(n, parts, r)
        self._mixing = torch.eye(parts, dtype=basis.dtype).repeat(n, 1, 1)
        self.first = basis.new_zeros(n)
        """The scores of SGD-IE."""
        self.second = basis.new_zeros(n)
        """What the own Hessians add to them."""

    def advance(self, t: int, point: Point, gamma: Tensor) -> None:
        """Take step t; ``gamma`` is (p,)."""
        drift, source = (tensor.to(gamma) for tensor in point.step.response())
        z = self._z[:, 0]
        seen = self.raw.see(t, point, gamma, z - self._a[:, 0], z, self._mixing)
        who = seen.removals
        self.first[who] -= seen.first
        self.second[who] -= seen.second
        contraction = z @ seen.contraction
        self._a = _step(self._a, drift, source, who, -seen.projected)
        self._z = _step(self._z, drift, source, who, -seen.projected - seen.own, contraction)
        self.raw.add(seen, drift, source)
        self._mixing = drift @ self._mixing
        self._mixing[who] = torch.eye(len(source), dtype=gamma.dtype)

    @property
    def scores(self) -> Tensor:
        """Scores (n,) with the linear readout: positive where the samples help."""
        return self.first + self.second

    def shifts(self, removals: Tensor) -> Tensor:
        """The estimates x (m, p) of the final shifts of these removals (m,): rough, unless r = p."""
        y = self._z[removals, 0] - self._a[removals, 0]
        return self.raw.shifts(removals, self._mixing) + y @ self.basis.T


def _step(
    state: Tensor, drift: Tensor, source: Tensor, who: Tensor, change: Tensor, shared: Tensor | None = None
) -> Tensor:
    """``drift state + source change`` for states (n, parts, r) and changes of the gradient (m, r) of some, (n, r) of all."""
    moved = drift @ state
    if shared is not None:
        moved += source[:, None] * shared[:, None]
    return moved.index_add(0, who, source[:, None] * change[:, None])


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
        gamma = torch.einsum("k,kp->p", source, torch.stack(adjoint))
        self.gammas[self._t][:] = gamma
        # The same as the pullback of F, without differentiating the update, which is affine.
        back = torch.einsum("kl,kp->lp", drift, torch.stack(adjoint))
        back[0] += point.hessian_product(gamma[None])[0]
        return tuple(back), scores
