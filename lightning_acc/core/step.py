"""F: one training step as a pure function, and its derivatives.

    F_t(s, w) = U_t(s, G_t(theta, w)),      G_t(theta, w) = d/dtheta  sum_i w_i l_i(theta)

``s = (theta, slots)`` is the state, ``w`` the loss weights of the recorded batch, ``l_i`` the per-sample losses. It is
defined here and nowhere else: the audit, the retraining and every estimator use it.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field

import torch
from torch import Tensor

from lightning_acc.core.devices import States, drawing
from lightning_acc.core.losses.per_sample import LossFunction
from lightning_acc.core.losses.tracing import quiet, traceable
from lightning_acc.core.objective import Objective, Parameters
from lightning_acc.core.optimizers import Hyperparameters, State, Update
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.core.removals import Removals
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, TakenApart


@dataclass(frozen=True)
class Batch:
    """One batch as the module is given it.

    Attributes:
        leaves: its tensors, first dimension (B,).
        rng: states of the random number generators before the forward pass, those that it draws from.
    """

    leaves: Leaves
    rng: States = field(default_factory=dict)

    def random_numbers(self, device: torch.device) -> AbstractContextManager[None]:
        """In here the forward pass, on ``device``, draws the random numbers it drew in training."""
        return drawing(self.rng, device)


class Step:
    """The recorded step ``t``.

    Args:
        objective: the per-sample losses; batches and weights are moved to where it computes.
        update: the optimizer's U.
        accumulated: the batches whose gradients are accumulated; usually one. Their samples together are B occurrences.
        sample_ids: whose occurrence each row is, (B,).
        weights: recorded loss weights, (B,).
        groups: hyper-parameters of the parameter groups.
        rows_at_once: how many Hessian-vector products to take together.
        own_rows: the leaves are (n, B, ...), a batch for each of n parameter vectors; only ``gradients`` can be asked then.
    """

    def __init__(
        self,
        objective: Objective,
        update: Update,
        accumulated: list[Batch],
        sample_ids: Tensor,
        weights: Tensor,
        groups: list[Hyperparameters],
        rows_at_once: int = 128,
        own_rows: bool = False,
    ) -> None:
        self.objective = objective
        dtype, device = objective.dtype, objective.device
        self.accumulated = [Batch(batches.cast(batch.leaves, dtype, device), batch.rng) for batch in accumulated]
        self.sample_ids = sample_ids
        self.weights = weights.to(device, dtype)
        self.groups = groups
        # Under 16-mixed the loss was scaled on its way back, so that small gradients are numbers of float16.
        self.scale = float(groups[0].get("loss_scale", 1.0))
        self.rows_at_once = rows_at_once
        self._own_rows = own_rows
        self._update = update
        update.check(groups)

    def update(self, state: State, gradient: Tensor) -> State:
        """U_t: the state after the update; all tensors (..., p)."""
        return self._update(state, gradient, self.groups)

    def __call__(self, state: State) -> State:
        """F_t(s, w) with the recorded weights; all tensors (p,)."""
        return self.update(state, self.gradient(state[0]))

    def gradient(self, theta: Tensor) -> Tensor:
        """G_t(theta, w) with the recorded weights; (p,) to (p,)."""
        theta = theta.detach().requires_grad_()
        return torch.autograd.grad((self.scale * self.weights * self.losses(theta)).sum(), theta)[0] * (1 / self.scale)

    def at(self, state: State) -> Point:
        """The step linearised at the state ``s_t`` of the recorded run."""
        return Point(self, state)

    def gradients(self, thetas: Tensor, weights: Tensor) -> Tensor:
        """G_t at n parameter vectors (n, p), each with its own loss weights (n, B); returns (n, p)."""
        thetas = thetas.detach().requires_grad_()
        return torch.autograd.grad((self.scale * weights * self.losses_each(thetas)).sum(), thetas)[0] * (1 / self.scale)

    def response(self) -> tuple[Tensor, Tensor]:
        """What the update makes of a change of one number, where it is affine: see ``Update.response``."""
        return self._update.response(self.groups)

    def losses(self, theta: Parameters) -> Tensor:
        """Per-sample losses (B,) at parameters ``theta``, (p,) or by name."""
        return self._together(lambda batch: self.objective.losses(theta, batch.leaves))

    def evaluate(self, theta: Parameters, function: LossFunction) -> Tensor:
        """``function(module, batch)``, (B, ...), at parameters ``theta``, (p,) or by name; of all accumulated batches."""
        structure = self.objective.structure
        return self._together(lambda batch: self.objective.call(theta, function, TakenApart(batch.leaves, structure)))

    def _together(self, evaluated: Callable[[Batch], Tensor]) -> Tensor:
        """What is computed of each accumulated batch, (B, ...), under the random numbers of its forward pass."""
        parts = []
        for batch in self.accumulated:
            with batch.random_numbers(self.objective.device):
                parts.append(evaluated(batch))
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def losses_each(self, thetas: Tensor) -> Tensor:
        """Per-sample losses (n, B) at each of ``thetas`` (n, p)."""
        parts = []
        for batch in self.accumulated:
            with batch.random_numbers(self.objective.device):
                parts.append(self.objective.losses_each(thetas, batch.leaves, self._own_rows))
        return torch.cat(parts, 1) if len(parts) > 1 else parts[0]

    def single_samples(self, positions: Tensor) -> Leaves | None:
        """The samples at ``positions``, of any shape, taken out of their batches; None where that would change their loss."""
        if not self.objective.independent_rows or any(batch.rng for batch in self.accumulated):
            return None
        if len(self.accumulated) == 1:
            return batches.rows(self.accumulated[0].leaves, positions)
        shapes = {tuple((name, leaf.shape[1:]) for name, leaf in batch.leaves.items()) for batch in self.accumulated}
        if len(shapes) > 1 or not all(map(batches.is_of_samples, self.accumulated[0].leaves)):
            return None
        together = {name: torch.cat([batch.leaves[name] for batch in self.accumulated]) for name in self.accumulated[0].leaves}
        return batches.rows(together, positions)

    def weights_without(self, removals: Removals) -> Tensor:
        """Loss weights (n, B) with each removal's occurrences at 0."""
        removed, position = removals.occurrences(self.sample_ids)
        weights = self.weights.repeat(len(removals), 1)
        weights[removed, position] = 0
        return weights


class Point:
    """A step at the state ``s_t``: the gradient there, and products with the derivatives of F."""

    def __init__(self, step: Step, state: State) -> None:
        self.step = step
        self.state = state
        self._leaf = state[0].detach().requires_grad_()
        self._weights = step.weights.detach().requires_grad_()
        with traceable():
            loss = (self._weights * step.losses(self._leaf)).sum()
        (self._graph,) = torch.autograd.grad(loss, self._leaf, create_graph=True)
        self.gradient = self._graph.detach()

    def next(self) -> State:
        """F_t(s_t, w)."""
        return self.step.update(self.state, self.gradient)

    def hessian_product(self, shifts: Tensor) -> Tensor:
        """dG/dtheta (theta, w) D for each row D of ``shifts`` (n, p), with the weights of the whole batch; returns (n, p).

        Reverse over reverse at ONE parameter vector with ONE weight vector, which is what makes it cheap: the forward pass
        is shared by all n.
        """
        if not len(shifts):
            return shifts
        parts = [_products(self._graph, self._leaf, part) for part in shifts.split(self.step.rows_at_once)]
        return torch.cat(parts) if len(parts) > 1 else parts[0]

    def removed(self, removals: Removals, curved: bool = False) -> Removed:
        """What the removed samples contribute to G_t; ``curved``: also to its derivative.

        Args:
            removals: n removals.
            curved: whether Hessian-vector products are going to be asked for.
        """
        removed, position = removals.occurrences(self.step.sample_ids)
        touched, inverse, counts = torch.unique(removed, return_inverse=True, return_counts=True)
        thetas = self._leaf.detach().expand(len(touched), -1).clone().requires_grad_()
        if not len(touched):
            return Removed(touched, thetas, torch.zeros_like(thetas))
        step = self.step
        slot = torch.arange(len(removed)) - (counts.cumsum(0) - counts)[inverse]
        # Each removal gets a batch of its own samples, padded with any sample at weight 0.
        columns = position.new_zeros(len(touched), int(counts.max()))
        columns[inverse, slot] = position
        own = step.single_samples(columns) if columns.shape[1] < len(step.sample_ids) else None
        if own is not None:
            weights = step.weights.new_zeros(columns.shape)
            weights[inverse, slot] = step.weights[position]
            losses = step.objective.losses_each(thetas, own, own_rows=True)
        else:
            weights = step.weights.new_zeros(len(touched), len(step.sample_ids))
            weights[inverse, position] = step.weights[position]
            losses = step.losses_each(thetas)
        (graph,) = torch.autograd.grad((weights * losses).sum(), thetas, create_graph=curved)
        return Removed(touched, thetas, graph)

    def pullback(self, adjoint: State) -> Pulled:
        """``adjoint``, of the state after the step, through F: through the update, and from its gradient through G.

        Can be asked once. Rows of adjoints (n, p) go through one graph, all together where vmap can.
        """
        state = (self._leaf, *(slot.detach().requires_grad_() for slot in self.state[1:]))
        out = self.step.update(state, self._graph)
        inputs = (*state, self._weights, self._graph)

        def pull(cotangents: State, batched: bool, again: bool) -> tuple[Tensor, ...]:
            return torch.autograd.grad(
                out, inputs, cotangents, is_grads_batched=batched, retain_graph=again, materialize_grads=True
            )

        if adjoint[0].ndim == 1:
            *back, slopes, gamma = pull(adjoint, False, False)
        else:
            *back, slopes, gamma = _each_row(pull, adjoint, self.step.rows_at_once)
        return Pulled(tuple(back), gamma, slopes)


def _each_row(pull: Callable[[State, bool, bool], tuple[Tensor, ...]], adjoints: State, at_once: int) -> list[Tensor]:
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


@dataclass(frozen=True)
class Pulled:
    """What a step makes of an adjoint ``lambda_{t+1}`` on the way back.

    Attributes:
        adjoint: ``lambda_t = (dF/ds)^T lambda_{t+1}``, a state.
        gamma: ``gamma_t = (dU/dG)^T lambda_{t+1}``, (..., p).
        slopes: ``(dG/dw)^T gamma_t``, which is ``<g_i, gamma_t>`` of each occurrence, (..., B).
    """

    adjoint: State
    gamma: Tensor
    slopes: Tensor


class Removed:
    """The removed samples of a step: ``sum_i w_i g_i`` over those of each removal, and products with their Hessians.

    Attributes:
        removals: indices (m,) of the removals the batch contains something of.
        gradients: their sums ``sum_i w_i g_i``, (m, p).
    """

    def __init__(self, removals: Tensor, thetas: Tensor, graph: Tensor) -> None:
        self.removals = removals
        self.gradients = graph.detach()
        self._thetas, self._graph = thetas, graph

    def hessian_product(self, shifts: Tensor) -> Tensor:
        """``sum_i w_i H_i D`` for the shift D of each of the m removals, (m, p)."""
        if not self._graph.requires_grad:
            return torch.zeros_like(shifts)
        (curved,) = torch.autograd.grad(self._graph, self._thetas, shifts, retain_graph=True, materialize_grads=True)
        return curved


def _products(outputs: Tensor, inputs: Tensor, cotangents: Tensor) -> Tensor:
    """``cotangents`` (n, p) through the graph from ``inputs`` to ``outputs``, all rows at once where vmap can."""
    if not outputs.requires_grad:
        return torch.zeros_like(cotangents)

    def pull(rows: Tensor, batched: bool) -> Tensor:
        (product,) = torch.autograd.grad(
            outputs, inputs, rows, is_grads_batched=batched, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        return product

    try:
        with quiet():
            return pull(cotangents, True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return torch.stack([pull(row, False) for row in cotangents])
