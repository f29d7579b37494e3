"""The methods' rules, one small class each. They differ in the one line of the paper they are named after.

A forward rule carries the shifts ``D^R_t = s^R_t - s_t`` of n removals through the steps, as a state of tensors (n, p):
``init``, then ``advance`` for t = 0 ... T-1, then ``finish`` gives the final parameters of the run (p,) and their shifts.
A reverse rule carries the adjoint of one query backwards and collects, for every sample, the score of removing it.
Neither knows files, Ray or who drives it (``methods.sweeps``).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Generic, TypeVar

import torch
from torch import Tensor

from lightning_acc.core.losses.tracing import quiet
from lightning_acc.core.optimizers import State
from lightning_acc.core.products import Point, Pulled
from lightning_acc.core.removals import Removals
from lightning_acc.core.step import Step

Carry = TypeVar("Carry")
"""What a rule takes from step to step."""
RunAndShifts = tuple[State, State]
"""The state of the recorded run (p,), and what is carried of each removal beside it (n, p)."""


class ForwardRule(ABC, Generic[Carry]):
    """Carries the shifts of ``removals`` from the first step to the last, in place.

    A removal goes the run's own way until a step sees it. The driver gives the removals in the order of these steps: those that
    were seen are always the first of what is carried, and the others wait.

    Attributes:
        bend: of a rule that linearises: the most that each shift has changed the gradient by, ``|dG/dtheta D|``, as a share
            of the largest gradient so far, (n,).
    """

    bend: Tensor | None = None

    @abstractmethod
    def init(self, state: State, removals: Removals) -> Carry:
        """What is carried before the first step, in ``state`` (p,): no shift at all."""

    @abstractmethod
    def wake(self, carry: Carry, first: int, last: int) -> None:
        """The next step sees the removals ``first`` to ``last - 1`` for the first time: they set out from where the run is."""

    @abstractmethod
    def advance(self, step: Step, carry: Carry, removals: Removals) -> Carry:
        """What is carried after the step, which is taken for the first of the removals, ``removals``."""

    @abstractmethod
    def finish(self, carry: Carry) -> tuple[Tensor, Tensor]:
        """The parameters of the run (p,) and their shifts (n, p), which mean nothing of removals that wait."""


class LeaveOneOut(ForwardRule[State]):
    """The truth, by retraining: ``s^R' = F(s^R, w^R)``.

    Row 0 is the run with nothing removed: shifts are differences between rows of one computation, so that round-off cancels.
    """

    def init(self, state: State, removals: Removals) -> State:
        return tuple(part.repeat(len(removals) + 1, 1) for part in state)

    def advance(self, step: Step, carry: State, removals: Removals) -> State:
        weights = torch.cat([step.weights[None], step.weights_without(removals)])
        step.advance(tuple(part[: len(weights)] for part in carry), weights)
        return carry

    def wake(self, carry: State, first: int, last: int) -> None:
        for part in carry:
            part[1 + first : 1 + last] = part[0]

    def finish(self, carry: State) -> tuple[Tensor, Tensor]:
        return carry[0][0].clone(), carry[0][1:] - carry[0][0]


class LinearisedRule(ForwardRule[RunAndShifts]):
    """Carries the recorded run itself, and the shifts of the removals as its steps, linearised there, move them."""

    def __init__(self) -> None:
        self.steepest = 0.0
        """Norm of the largest gradient of the run so far."""

    def watch(self, change: Tensor) -> Tensor:
        """How far a linearised ``change`` (n, p) of the gradient reaches, beside the gradient itself: (n,)."""
        bend: Tensor = change.norm(dim=1) / max(self.steepest, torch.finfo(change.dtype).tiny)
        return bend

    def init(self, state: State, removals: Removals) -> RunAndShifts:
        self.bend = state[0].new_zeros(len(removals))
        return state, tuple(part.new_zeros(len(removals), part.shape[-1]) for part in state)

    def wake(self, carry: RunAndShifts, first: int, last: int) -> None:
        """Nothing is shifted yet."""

    def advance(self, step: Step, carry: RunAndShifts, removals: Removals) -> RunAndShifts:
        run, shifts = carry
        point = step.at(run)
        self.steepest = max(self.steepest, float(point.gradient.norm()))
        for first in range(0, len(removals), step.states_at_once):
            last = min(first + step.states_at_once, len(removals))
            bend = self.move(point, tuple(part[first:last] for part in shifts), removals.part(first, last))
            if bend is not None and self.bend is not None:
                self.bend[first:last] = torch.maximum(self.bend[first:last], bend)
        return point.next(), shifts

    @abstractmethod
    def move(self, point: Point, shifts: State, removals: Removals) -> Tensor | None:
        """Write over ``shifts``, what is carried of the removals (n, p), what it is after the step, linearised at ``point``.

        Returns what the shifts changed the gradient by, (n,), see ``bend``; None where the rule linearises no gradient.
        """

    def finish(self, carry: RunAndShifts) -> tuple[Tensor, Tensor]:
        return carry[0][0], carry[1][0]


class AccSgdIe(LinearisedRule):
    """ACC-SGD-IE (arXiv 2510.26185): ``D' = U(s + D, G(theta, w^R) + dG/dtheta(theta, w^R) D) - U(s, G(theta, w))``.

    The gradient is linearised *without the removed samples*, and nothing else is linearised. For SGD the line is the
    paper's ``D' = (I - lr H_{S without j}) D + lr w_j g_j``.
    """

    def init(self, state: State, removals: Removals) -> RunAndShifts:
        # Carried is s + D, the state of the run without the samples, as in the formula.
        carry = super().init(state, removals)
        self.wake(carry, 0, len(removals))
        return carry

    def wake(self, carry: RunAndShifts, first: int, last: int) -> None:
        for part, state in zip(carry[1], carry[0], strict=True):
            part[first:last] = state

    def move(self, point: Point, shifts: State, removals: Removals) -> Tensor:
        shift = shifts[0] - point.state[0]
        removed = point.removed(removals, curved=True)
        own = removed.hessian_product(shift[removed.removals])
        product = point.hessian_product(shift)
        bend = self.watch(product)
        change = without_the_removed(product, removed.removals, removed.gradients, own)
        point.step.write(shifts, change.add_(point.gradient))
        return bend

    def finish(self, carry: RunAndShifts) -> tuple[Tensor, Tensor]:
        return carry[0][0], carry[1][0] - carry[0][0]


def without_the_removed(product: Tensor, removals: Tensor, gradients: Tensor, own: Tensor) -> Tensor:
    """ACC-SGD-IE's change of the gradient, ``G(theta, w^R) + dG/dtheta(theta, w^R) D - G(theta, w)``; in place.

    Args:
        product: ``dG/dtheta(theta, w) D`` with the whole batch's weights, (n, p).
        removals: which of the n removals the batch contains something of, (m,).
        gradients: ``sum_i w_i g_i`` over the samples of each of these, (m, p).
        own: ``sum_i w_i H_i D`` over the same, (m, p).
    """
    product[removals] -= gradients + own
    return product


class SgdIe(LinearisedRule):
    """SGD-IE (Hara et al. 2019, arXiv 1906.08473): ``D' = dF/ds(s, w) D + dF/dw(s, w) (w^R - w)``.

    The whole step is linearised, at the weights *with* the removed samples.
    """

    def move(self, point: Point, shifts: State, removals: Removals) -> Tensor:
        change = point.hessian_product(shifts[0])
        bend = self.watch(change)
        removed = point.removed(removals)
        change[removed.removals] -= removed.gradients
        for shift, part in zip(shifts, _update_tangent(point, shifts, change), strict=True):
            shift.copy_(part)
        return bend


class TracIn(LinearisedRule):
    """TracIn (Pruthi et al. 2020, arXiv 2002.08484) as SGD-IE with the propagation replaced by the identity.

    ``D' = D + dF/dw(s, w) (w^R - w)``; its linear readout is the sum over visits of ``lr w_j <grad query(theta_T), g_j>``.
    """

    def move(self, point: Point, shifts: State, removals: Removals) -> None:
        removed = point.removed(removals)
        still = tuple(torch.zeros_like(removed.gradients) for _ in shifts)
        source = _update_tangent(point, still, -removed.gradients)
        rows = removed.removals.to(removed.gradients.device)
        for shift, part in zip(shifts, source, strict=True):
            shift.index_add_(0, rows, part)


def _update_tangent(point: Point, shifts: State, change: Tensor) -> State:
    """The tangent of U at the run's state and gradient, for n directions; all tensors (n, p)."""
    k = len(shifts)
    if not len(change):
        return shifts

    def update(*arguments: Tensor) -> State:
        return point.step.update(arguments[:k], arguments[k])

    def tangent(*directions: Tensor) -> State:
        return torch.func.jvp(update, (*point.state, point.gradient), directions)[1]  # type: ignore[no-any-return]

    with quiet():
        tangents: State = torch.vmap(tangent)(*shifts, change)
    return tangents


class AdjointSgdIe:
    """SGD-IE for one query and ALL samples: ``lambda_t = (dF/ds)^T lambda_{t+1}`` from ``lambda_T = grad query``.

    At each step the score of removing sample i grows by ``-w_i (dF/dw_i)^T lambda_{t+1}``, which is ``-w_i <g_i, gamma_t>``
    with ``gamma_t = (dU/dG)^T lambda_{t+1}``. Where the query is read at several steps, ``lambda_t`` gets its gradient at each.

    The adjoints of many queries go back together, as rows (Q, p).
    """

    def init(self, query_gradient: Tensor, state: State, n_samples: int) -> tuple[State, Tensor]:
        """The adjoint after the last step, (..., p), and the scores collected so far, (..., n_samples)."""
        adjoint = (query_gradient.clone(), *(torch.zeros_like(query_gradient) for _ in state[1:]))
        return adjoint, query_gradient.new_zeros(*query_gradient.shape[:-1], n_samples)

    def advance(self, point: Point, carry: tuple[State, Tensor]) -> tuple[State, Tensor]:
        """One step back, of the adjoint (..., p) and the scores (..., n_samples), in place."""
        adjoint, scores = carry
        slopes = self.slopes(point, adjoint)
        scores.index_add_(-1, point.step.sample_ids.to(scores.device), -point.step.weights * slopes)
        return carry

    def slopes(self, point: Point, adjoint: State) -> Tensor:
        """``<g_i, gamma_t>`` of the occurrences of a step, (..., B); takes the adjoint (..., p) one step back."""
        pulled = point.pullback(adjoint)
        self.see(point, pulled)
        return pulled.slopes

    def read_again(self, carry: tuple[State, Tensor], query_gradient: Tensor) -> tuple[State, Tensor]:
        """The query is read here, too: its gradient (..., p) joins the adjoint (..., p)."""
        carry[0][0].add_(query_gradient)
        return carry

    def see(self, point: Point, pulled: Pulled) -> None:
        """Told what the step made of the adjoint, for those who keep some of it."""


class AdjointTracIn(AdjointSgdIe):
    """TracIn for one query and all samples: the same with ``lambda_t = grad query`` throughout."""

    def slopes(self, point: Point, adjoint: State) -> Tensor:
        """``g_(t,i)^T grad query``, the slopes (B,) of one step for the ``adjoint`` (p,), which stays where it is."""
        return point.slopes(adjoint)
