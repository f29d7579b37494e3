"""Raw shifts as vectors: p numbers for each removal and each part of the optimizer's state. Any module, any removal."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.removals import Removals
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank.method import RawShifts, Seen


class DenseShifts(RawShifts):
    """Keeps u (n, parts, p), brought up to date only when a removal is seen.

    Args:
        removals: n removals.
        basis: Q, (p, r).
        parts: number of tensors of the state.
    """

    def __init__(self, removals: Removals, basis: Tensor, parts: int) -> None:
        self._removals, self._basis = removals, basis
        self._u = basis.new_zeros(len(removals), parts, len(basis))
        self._who = torch.zeros(0, dtype=torch.int64)
        self._gradients = basis.new_zeros(0)

    def removals_in(self, t: int, step: Step) -> Tensor:
        who: Tensor = torch.unique(self._removals.occurrences(step.sample_ids)[0])
        return who

    def see(self, t: int, step: Step, state: State, gamma: Tensor, z: Tensor, mixing: Tensor) -> Seen:
        q, point = self._basis, step.at(state)
        removed = point.removed(self._removals, curved=True)
        who = self._who = removed.removals
        self._gradients = removed.gradients
        self._u[who] = mixing @ self._u[who]
        curved = removed.hessian_product(self._whole(self._u[who, 0], z))
        own = removed.hessian_product(z @ q.T) if q.shape[1] else curved
        contraction = point.hessian_product(q.T.contiguous()) @ q if q.shape[1] else q.new_zeros(0, 0)
        return Seen(self._gradients @ q, own @ q, self._gradients @ gamma, curved @ gamma, contraction)

    def add(self, drift: Tensor, source: Tensor) -> None:
        self._u[self._who] = drift @ self._u[self._who] - source[:, None] * self._gradients[:, None]

    def shifts(self, removals: Tensor, z: Tensor, mixing: Tensor) -> Tensor:
        return self._whole(torch.einsum("nk,nkp->np", mixing[:, 0], self._u[removals]), z)

    def _whole(self, u: Tensor, z: Tensor) -> Tensor:
        """``x = u + Q y`` with ``y = z - Q^T u``."""
        return u + (z - u @ self._basis) @ self._basis.T
