"""The methods, one small class each. They differ in the one line of section 2 of the paper they are named after.

A forward method carries the shifts ``D^R_t = s^R_t - s_t`` of n removals through the steps, as a state of tensors
(n, p): ``init``, then ``advance`` for t = 0 ... T-1, then ``finish`` gives the final parameters of the run (p,) and their
shifts (n, p).
A reverse method carries the adjoint of one query backwards and collects, for every sample, the score of removing it.
Neither knows files, Ray or who drives it (``lightning_acc.methods.sweeps``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_acc.core.objective import quiet
from lightning_acc.core.optimizers import State
from lightning_acc.core.removals import Removals
from lightning_acc.core.step import Point, Step


class ForwardMethod(ABC):
    """Carries the shifts of ``removals`` from the first step to the last."""

    follows_run: ClassVar[bool] = True
    """Whether ``advance`` is given the step at the recorded run's state (a Point), or only the step itself."""

    def init(self, state: State, removals: Removals) -> State:
        """What is carried before the first step: no shift at all."""
        return tuple(part.new_zeros(len(removals), part.shape[-1]) for part in state)

    @abstractmethod
    def advance(self, step: Any, carry: State, removals: Removals) -> State:
        """What is carried after the step."""

    def finish(self, carry: State, state: State) -> tuple[Tensor, Tensor]:
        """The final parameters of the run (p,) and their shifts (n, p)."""
        return state[0], carry[0]


class LeaveOneOut(ForwardMethod):
    """The truth, by retraining: ``s^R' = F(s^R, w^R)``, batched over the removals.

    Row 0 is the run with nothing removed: shifts are differences between rows of one computation, so that round-off cancels.
    """

    follows_run = False

    def init(self, state: State, removals: Removals) -> State:
        return tuple(part.repeat(len(removals) + 1, 1) for part in state)

    def advance(self, step: Step, carry: State, removals: Removals) -> State:
        weights = torch.cat([step.weights[None], step.weights_without(removals)])
        return step.update(carry, step.gradients(carry[0], weights))

    def finish(self, carry: State, state: State) -> tuple[Tensor, Tensor]:
        return carry[0][0], carry[0][1:] - carry[0][0]


class AccSgdIe(ForwardMethod):
    """ACC-SGD-IE (arXiv 2510.26185): ``D' = U(s + D, G(theta, w^R) + dG/dtheta(theta, w^R) D) - U(s, G(theta, w))``.

    The gradient is linearised *without the removed samples*, and nothing else is linearised. For SGD the line is the
    paper's ``D' = (I - lr H_{S without j}) D + lr w_j g_j``.
    """

    def init(self, state: State, removals: Removals) -> State:
        # Carried is s + D, the state of the run without the samples, as in the formula.
        return tuple(part.repeat(len(removals), 1) for part in state)

    def advance(self, point: Point, carry: State, removals: Removals) -> State:
        shifts = carry[0] - point.state[0]
        change = point.hessian_product(shifts)
        removed = point.removed(removals, curved=True)
        change[removed.removals] -= removed.gradients + removed.hessian_product(shifts[removed.removals])
        return point.step.update(carry, point.gradient + change)

    def finish(self, carry: State, state: State) -> tuple[Tensor, Tensor]:
        return state[0], carry[0] - state[0]


class SgdIe(ForwardMethod):
    """SGD-IE (Hara et al. 2019, arXiv 1906.08473): ``D' = dF/ds(s, w) D + dF/dw(s, w) (w^R - w)``.

    The whole step is linearised, at the weights *with* the removed samples.
    """

    def advance(self, point: Point, carry: State, removals: Removals) -> State:
        change = point.hessian_product(carry[0])
        removed = point.removed(removals)
        change[removed.removals] -= removed.gradients
        return _update_tangent(point, carry, change)


class TracIn(ForwardMethod):
    """TracIn (Pruthi et al. 2020, arXiv 2002.08484) as SGD-IE with the propagation replaced by the identity.

    ``D' = D + dF/dw(s, w) (w^R - w)``; its linear readout is the sum over visits of ``lr w_j <grad query(theta_T), g_j>``.
    """

    def advance(self, point: Point, carry: State, removals: Removals) -> State:
        removed = point.removed(removals)
        still = tuple(torch.zeros_like(removed.gradients) for _ in carry)
        source = _update_tangent(point, still, -removed.gradients)
        return tuple(shift.index_add(0, removed.removals, part) for shift, part in zip(carry, source, strict=True))


def _update_tangent(point: Point, shifts: State, change: Tensor) -> State:
    """The tangent of U at the run's state and gradient, for n directions; all tensors (n, p)."""
    k = len(shifts)

    def update(*arguments: Tensor) -> State:
        return point.step.update(arguments[:k], arguments[k])

    def tangent(*directions: Tensor) -> State:
        return torch.func.jvp(update, (*point.state, point.gradient), directions)[1]  # type: ignore[no-any-return]

    with quiet():
        tangents: State = torch.vmap(tangent)(*shifts, change)
    return tangents


class AdjointSgdIe:
    """SGD-IE for one query and ALL samples: ``lambda_t = (dF/ds)^T lambda_{t+1}`` from ``lambda_T = grad query``.

    At each step the score of removing sample i grows by ``-w_i (dF/dw_i)^T lambda_{t+1}``.
    """

    propagates = True

    def init(self, query_gradient: Tensor, state: State, n_samples: int) -> tuple[State, Tensor]:
        adjoint = (query_gradient, *(torch.zeros_like(slot) for slot in state[1:]))
        return adjoint, query_gradient.new_zeros(n_samples)

    def advance(self, point: Point, carry: tuple[State, Tensor]) -> tuple[State, Tensor]:
        adjoint, scores = carry
        earlier, slopes = point.pullback(adjoint)
        scores.index_add_(0, point.step.sample_ids, -point.step.weights * slopes)
        return (earlier if self.propagates else adjoint), scores


class AdjointTracIn(AdjointSgdIe):
    """TracIn for one query and all samples: the same with ``lambda_t = grad query`` throughout."""

    propagates = False


FORWARD: dict[str, type[ForwardMethod]] = {
    "loo": LeaveOneOut,
    "acc-sgd-ie": AccSgdIe,
    "sgd-ie": SgdIe,
    "tracin": TracIn,
}
REVERSE: dict[str, type[AdjointSgdIe]] = {"sgd-ie": AdjointSgdIe, "tracin": AdjointTracIn}
LOW_RANK = "acc-low-rank"
"""Corrects the scores of a reverse sweep in one pass forward; see ``lightning_acc.methods.low_rank``."""
METHODS = ("loo", "acc-sgd-ie", LOW_RANK, "sgd-ie", "tracin")
"""All methods: the truth, then the estimates, the most faithful first."""
