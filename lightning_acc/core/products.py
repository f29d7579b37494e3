"""A step linearised at a state, and products with its derivatives: rows of vectors are taken through one graph."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lightning_acc.core.losses.tracing import quiet, traceable
from lightning_acc.core.optimizers import Hyperparameters, State, Update, through_clipping
from lightning_acc.core.optimizers.update import BLOCK
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.core.removals import Removals

if TYPE_CHECKING:
    from lightning_acc.core.step import Step


@dataclass(frozen=True)
class Pulled:
    """What a step makes of an adjoint ``lambda_{t+1}`` on the way back.

    Attributes:
        adjoint: ``lambda_t = (dF/ds)^T lambda_{t+1}``, a state.
        gamma: ``gamma_t = (dU/dG)^T lambda_{t+1}``, (..., p).
        curvature: ``(dG/dtheta)^T gamma_t``, the part of the adjoint that has come through the gradient, (..., p).
        slopes: ``(dG/dw)^T gamma_t``, which is ``<g_i, gamma_t>`` of each occurrence, (..., B).
    """

    adjoint: State
    gamma: Tensor
    curvature: Tensor
    slopes: Tensor


class Removed:
    """The removed samples of a step: ``sum_i w_i g_i`` over those of each removal, and products with their Hessians.

    Attributes:
        removals: indices (m,) of the removals the batch contains something of.
        gradients: their sums ``sum_i w_i g_i``, (m, p).
    """

    def __init__(self, removals: Tensor, thetas: Tensor, graph: Tensor, of_moved: Callable[[Tensor], Tensor]) -> None:
        self.removals = removals
        self.gradients = of_moved(graph.detach())
        self._thetas, self._graph, self._of_moved = thetas, graph, of_moved

    def hessian_product(self, shifts: Tensor) -> Tensor:
        """``sum_i w_i H_i D`` for the shift D of each of the m removals, (m, p)."""
        if not self._graph.requires_grad:
            return torch.zeros_like(shifts)
        (curved,) = torch.autograd.grad(self._graph, self._thetas, shifts, retain_graph=True, materialize_grads=True)
        return self._of_moved(curved)


class Point:
    """A step at the state ``s_t``: the gradient there, and products with the derivatives of F."""

    def __init__(self, step: Step, state: State) -> None:
        self.step = step
        self.state = state
        self._leaf = state[0].detach().requires_grad_()
        self._weights = step.weights.detach().requires_grad_()
        with traceable():
            loss = (step.with_shares(self._weights) * step.terms(self._leaf)).sum()
        (self._graph,) = torch.autograd.grad(loss, self._leaf, create_graph=True)
        self._gradient = step.of_moved(self._graph.detach()) if step.ranks.size == 1 else None

    @property
    def gradient(self) -> Tensor:
        """G_t(theta, w), (p,)."""
        if self._gradient is None:
            self._gradient = self.step.of_moved(self._graph.detach()).clone()
            self.step.ranks.add_up(self._gradient)
        return self._gradient

    def next(self) -> State:
        """F_t(s_t, w)."""
        after = tuple(part.clone() for part in self.state)
        self.step.write(after, self.gradient)
        return after

    def hessian_product(self, shifts: Tensor) -> Tensor:
        """dG/dtheta (theta, w) D for each row D of ``shifts`` (n, p), with the weights of the whole batch; returns (n, p).

        Reverse over reverse at ONE parameter vector with ONE weight vector, which is what makes it cheap: the forward pass
        is shared by all n.
        """
        if not len(shifts):
            return shifts
        parts = [products(self._graph, self._leaf, part) for part in shifts.split(self.step.rows_at_once)]
        return self.step.of_moved(torch.cat(parts) if len(parts) > 1 else parts[0])

    def removed(self, removals: Removals, curved: bool = False) -> Removed:
        """What the removed samples contribute to G_t; ``curved``: also to its derivative.

        Args:
            removals: n removals.
            curved: whether Hessian-vector products are going to be asked for.
        """
        return self.step.removed(self._leaf.detach(), removals, curved)

    def pullback(self, adjoint: State) -> Pulled:
        """``adjoint``, of the state after the step, through F, written over it: through U, and from its gradient through G.

        Can be asked once. Rows of adjoints (n, p) go through one graph, all together where vmap can. The slopes are of the rows
        that are here.
        """
        gamma = self._through_the_update(adjoint)
        curvature, slopes = pulled_back([self._graph], [self._leaf, self._weights], [gamma], self.step.rows_at_once)
        if self.step.ranks.size > 1:
            curvature = curvature.clone()  # autograd may hand back gamma itself
            self.step.ranks.add_up(curvature)
        adjoint[0].add_(curvature)
        return Pulled(adjoint, gamma, curvature, slopes)

    def slopes(self, adjoint: State) -> Tensor:
        """The slopes of the ``pullback`` alone, which need no product with the Hessian; ``adjoint`` is kept."""
        gamma = self._through_the_update(tuple(part.clone() for part in adjoint))
        return pulled_back([self._graph], [self._weights], [gamma], self.step.rows_at_once)[0]

    def _through_the_update(self, adjoint: State) -> Tensor:
        """``(dU/ds)^T adjoint``, written over it; returns ``gamma``."""
        step = self.step
        # An affine update has the same derivative at any gradient: that of the rows that are here will do.
        gradient = self._graph.detach() if step.optimizer.is_affine(step.groups) else self.gradient
        return through_the_update(step.optimizer, self.state, gradient, step.groups, adjoint, step.rows_at_once)


def pulled_back(outputs: Sequence[Tensor], inputs: Sequence[Tensor], adjoints: Sequence[Tensor], at_once: int) -> list[Tensor]:
    """``adjoints`` of the outputs through a graph to its inputs, once; rows of them (n, ...) through one graph, ``at_once`` of
    them together where vmap can."""
    alike = [(output, adjoint) for output, adjoint in zip(outputs, adjoints, strict=True) if output.requires_grad]
    outputs, adjoints = [output for output, _ in alike], tuple(adjoint for _, adjoint in alike)

    def pull(cotangents: State, batched: bool, again: bool) -> tuple[Tensor, ...]:
        return torch.autograd.grad(
            outputs, inputs, cotangents, is_grads_batched=batched, retain_graph=again, materialize_grads=True
        )

    if adjoints[0].ndim == outputs[0].ndim:
        return list(pull(adjoints, False, False))
    return each_row(pull, adjoints, at_once)


def through_the_update(
    update: Update, state: State, gradient: Tensor, groups: list[Hyperparameters], adjoint: State, at_once: int
) -> Tensor:
    """An adjoint (..., p) of the state after an update of ``state`` by ``gradient``, (p,): written over it ``(dU/ds)^T`` of it;
    returns ``(dU/dG)^T`` of it, (..., p).

    In blocks of numbers, where the rule goes number by number, so that what autograd keeps is never as large as the state.
    """
    gamma = torch.empty_like(adjoint[0])
    places: list[slice] = []
    outputs: list[Tensor] = []
    inputs: list[Tensor] = []

    def pull() -> None:
        # Copies: what autograd hands back may be what it was given, which is written over.
        given = [part[..., place].clone() for place in places for part in adjoint]
        pulled = iter(pulled_back(outputs, inputs, given, at_once))
        for place in places:
            for part in (*adjoint, gamma):
                part[..., place] = next(pulled)
        places.clear()
        outputs.clear()
        inputs.clear()

    pieces = gradient.split(update.layout.sizes)
    for place, block, piece, h in update.blocks(state, update.clipped(pieces, groups), groups):
        leaves = [part.detach().requires_grad_() for part in (*block, piece)]
        outputs += update.one(tuple(leaves[:-1]), leaves[-1], h)
        inputs += leaves
        places.append(place)
        if sum(place.stop - place.start for place in places) >= BLOCK[gradient.device.type]:
            pull()
    if places:
        pull()
    through_clipping(pieces, groups, gamma)
    return gamma


def each_row(pull: Callable[[State, bool, bool], tuple[Tensor, ...]], adjoints: State, at_once: int) -> list[Tensor]:
    """What ``pull`` makes of each row of ``adjoints``, (n, p) each, ``at_once`` of them together."""
    try:
        parts = []
        with quiet():
            for part in zip(*(adjoint.split(at_once) for adjoint in adjoints), strict=True):
                parts.append(pull(part, True, True))
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        rows = zip(*adjoints, strict=True)
        parts = [tuple(found[None] for found in pull(row, False, True)) for row in rows]
    return [torch.cat(found) for found in zip(*parts, strict=True)]


def products(outputs: Tensor, inputs: Tensor, cotangents: Tensor) -> Tensor:
    """``cotangents`` (n, p) through the graph from ``inputs`` to ``outputs``, all rows at once where vmap can."""
    if not outputs.requires_grad:
        return torch.zeros_like(cotangents)

    def pull(rows: Tensor, batched: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            outputs, inputs, rows, is_grads_batched=batched, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    try:
        if len(cotangents) == 1:
            return pull(cotangents[0], False)[None]
        with quiet():
            return pull(cotangents, True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return torch.stack([pull(row, False) for row in cotangents])
