"""Raw shifts as gradients in the outputs: rank + c numbers for each sample, so that all can be followed at once.

The gradient of a sample's loss in the parameters is ``J^T grad_z l``, with J the Jacobian of its c outputs z. What is kept is
``s``, what the removed ``grad_z l`` add up to, and the raw shift is taken to be ``J^T s`` with the Jacobian of today. Inside
the basis ``z_j = Q^T x`` is known as ever, so that

    x = Q z_j + (1 - Q Q^T) J^T s,      H = J^T A J      (Gauss-Newton, A the Hessian of the loss in the outputs),

and a step needs ``J x``, the shift of the sample's outputs, alone. On models that are linear in their parameters nothing of
this is an approximation; on others J as it was is replaced by J as it is, and H by its Gauss-Newton part. Using
``z_j - Q^T u`` with the u of the time in place of ``z_j - Q^T J^T s`` would mix the two Jacobians and is far worse.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank.factors import LinearFactors
from lightning_acc.methods.low_rank.jacobian import Jacobian, LayerJacobian, PlainJacobian
from lightning_acc.methods.low_rank.method import RawShifts, Seen
from lightning_acc.methods.low_rank.protocol import Split


class OutputShifts(RawShifts):
    """Keeps s (n, parts, c), brought up to date only when a sample is seen.

    Args:
        split: the outputs and their loss.
        factors: of modules that linear layers make up; else None.
        owners: for every sample id, which of the n removals it is, or -1; (n_samples,).
        step: gives a step by its number.
        basis: Q, (p, r).
        state: before the first step.
        n: number of removals.
    """

    def __init__(
        self,
        split: Split,
        factors: LinearFactors | None,
        owners: Tensor,
        step: Callable[[int], Step],
        basis: Tensor,
        state: State,
        n: int,
    ) -> None:
        self._split, self._factors, self._owners, self._step, self._basis = split, factors, owners, step, basis
        self._directions = torch.cat([basis.T, basis.new_zeros(1, len(basis))])
        """The columns of Q, and below them the gamma of the step."""
        self._theta = state[0]
        width = split.of(step(0), state[0]).shape[1]
        self._s = basis.new_zeros(n, len(state), width)
        self._last = torch.zeros(n, 2, dtype=torch.int64)
        """The step a removal was last seen at, and the row it had there."""
        self._who, self._slopes = torch.zeros(0, dtype=torch.int64), basis.new_zeros(0)

    def removals_in(self, t: int, step: Step) -> Tensor:
        owners = self._owners[step.sample_ids]
        who: Tensor = torch.unique(owners[owners >= 0])
        return who

    def see(self, t: int, step: Step, state: State, gamma: Tensor, z: Tensor, mixing: Tensor) -> Seen:
        r = self._basis.shape[1]
        theta = self._theta = state[0]
        rows = torch.nonzero(self._owners[step.sample_ids] >= 0)[:, 0]
        owners = self._owners[step.sample_ids[rows]]
        who, inverse = torch.unique(owners, return_inverse=True)
        self._who, self._last[owners] = who, torch.stack([torch.full_like(rows, t), rows], 1)
        self._s[who] = mixing @ self._s[who]

        jacobian = self._jacobian(step, theta)
        self._directions[r] = gamma
        along = jacobian.along(self._directions)
        slopes, curvatures = self._split.derivatives(step, theta, jacobian.outputs)
        bent = torch.einsum("bcd,kbd->kbc", curvatures, along[:r])  # A J Q
        contraction = (step.weights[:, None] * bent).flatten(1) @ along[:r].flatten(1).T

        along, bent, slopes, s = along[:, rows], bent[:, rows], slopes[rows], self._s[owners, 0]
        y = z[inverse] - torch.einsum("kmc,mc->mk", along[:r], s)
        moved = torch.einsum("kmc,mk->mc", along[:r], y) + jacobian.there_and_back(rows, s)
        weights = step.weights[rows, None]

        def together(values: Tensor) -> Tensor:
            return values.new_zeros(len(who), values.shape[1]).index_add(0, inverse, weights * values)

        self._slopes = together(slopes)
        bend = torch.einsum("mcd,md->mc", curvatures[rows], moved)
        return Seen(
            projected=together(torch.einsum("kmc,mc->mk", along[:r], slopes)),
            own=together(torch.einsum("kmc,mc->mk", along[:r], torch.einsum("kmc,mk->mc", bent, z[inverse]))),
            first=together((along[r] * slopes).sum(1, keepdim=True))[:, 0],
            second=together((along[r] * bend).sum(1, keepdim=True))[:, 0],
            contraction=contraction,
        )

    def add(self, drift: Tensor, source: Tensor) -> None:
        self._s[self._who] = drift @ self._s[self._who] - source[:, None] * self._slopes[:, None]

    def shifts(self, removals: Tensor, z: Tensor, mixing: Tensor) -> Tensor:
        s = torch.einsum("mk,mkc->mc", mixing[:, 0], self._s[removals])
        u = z.new_zeros(len(removals), len(self._basis))
        last = self._last[removals]
        for t in torch.unique(last[:, 0]).tolist():
            here = last[:, 0] == t
            u[here] = self._jacobian(self._step(t), self._theta).back(last[here, 1], s[here])
        return u + (z - u @ self._basis) @ self._basis.T

    def _jacobian(self, step: Step, theta: Tensor) -> Jacobian:
        if self._factors is not None:
            return LayerJacobian(self._factors, self._split, step, theta)
        return PlainJacobian(self._split, step, theta)
