"""F: one training step as a pure function, and its derivatives.

    F_t(s, w) = U_t(s, G_t(theta, w)),      G_t(theta, w) = d/dtheta  sum_i w_i l_i(theta)

``s = (theta, slots)`` is the state, ``w`` the loss weights of the recorded batch, ``l_i`` the per-sample losses. It is
defined here and nowhere else: the audit, the retraining and every estimator use it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_acc.objective import Objective, unhurried
from lightning_acc.optimizers import Hyperparameters, State, Update
from lightning_acc.removals import Removals
from lightning_acc.trajectory import batches
from lightning_acc.trajectory.batches import Leaves


class Step:
    """The recorded step ``t``.

    Args:
        objective: the per-sample losses.
        update: the optimizer's U.
        leaves: the batch, first dimension (B,).
        sample_ids: whose occurrence each row is, (B,).
        weights: recorded loss weights, (B,).
        groups: hyper-parameters of the parameter groups.
        rng: state of torch's random number generator before the forward pass, where the step uses it.
        rows_at_once: how many Hessian-vector products to take together.
    """

    def __init__(
        self,
        objective: Objective,
        update: Update,
        leaves: Leaves,
        sample_ids: Tensor,
        weights: Tensor,
        groups: list[Hyperparameters],
        rng: Tensor | None = None,
        rows_at_once: int = 128,
    ) -> None:
        self.objective = objective
        self.leaves = batches.cast(leaves, objective.dtype)
        self.sample_ids = sample_ids
        self.weights = weights.to(objective.dtype)
        self.groups = groups
        self.rows_at_once = rows_at_once
        self._update = update
        self._rng = rng

    def update(self, state: State, gradient: Tensor) -> State:
        """U_t: the state after the update; all tensors (..., p)."""
        return self._update(state, gradient, self.groups)

    def __call__(self, state: State) -> State:
        """F_t(s, w) with the recorded weights; all tensors (p,)."""
        theta = state[0].detach().requires_grad_()
        (gradient,) = torch.autograd.grad(self._loss(theta, self.weights), theta)
        return self.update(state, gradient)

    def at(self, state: State) -> Point:
        """The step linearised at the state ``s_t`` of the recorded run."""
        return Point(self, state)

    def gradients(self, thetas: Tensor, weights: Tensor) -> Tensor:
        """G_t at n parameter vectors (n, p), each with its own loss weights (n, B); returns (n, p)."""
        thetas = thetas.detach().requires_grad_()
        with self.random_numbers():
            losses = self.objective.losses_each(thetas, self.leaves)
        return torch.autograd.grad((weights * losses).sum(), thetas)[0]

    def weights_without(self, removals: Removals) -> Tensor:
        """Loss weights (n, B) with each removal's occurrences at 0."""
        removed, position = removals.occurrences(self.sample_ids)
        weights = self.weights.repeat(len(removals), 1)
        weights[removed, position] = 0
        return weights

    @contextmanager
    def random_numbers(self) -> Iterator[None]:
        """In here the step draws the random numbers it drew in training."""
        with torch.random.fork_rng(devices=[], enabled=self._rng is not None):
            if self._rng is not None:
                torch.set_rng_state(self._rng)
            yield

    def _loss(self, theta: Tensor, weights: Tensor) -> Tensor:
        with self.random_numbers():
            return (weights * self.objective.losses(theta, self.leaves)).sum()


class Point:
    """A step at the state ``s_t``: the gradient there, and products with the derivatives of F."""

    def __init__(self, step: Step, state: State) -> None:
        self.step = step
        self.state = state
        self._leaf = state[0].detach().requires_grad_()
        self._weights = step.weights.detach().requires_grad_()
        (self._graph,) = torch.autograd.grad(step._loss(self._leaf, self._weights), self._leaf, create_graph=True)
        self.gradient = self._graph.detach()

    def next(self) -> State:
        """F_t(s_t, w)."""
        return self.step.update(self.state, self.gradient)

    def hessian_product(self, shifts: Tensor) -> Tensor:
        """dG/dtheta (theta, w) D for each row D of ``shifts`` (n, p), with the weights of the whole batch; returns (n, p).

        Reverse over reverse at ONE parameter vector with ONE weight vector, which is what makes it cheap: the forward pass
        is shared by all n.
        """
        return torch.cat([_products(self._graph, self._leaf, part) for part in shifts.split(self.step.rows_at_once)])

    def removed_parts(self, removals: Removals, shifts: Tensor | None = None) -> tuple[Tensor, Tensor]:
        """What the removed samples contribute to G_t linearised: ``sum_{i in R and batch} w_i (g_i + H_i D)``.

        Args:
            removals: n removals.
            shifts: their shifts D of the parameters, (n, p); None leaves the Hessians out.

        Returns:
            The indices (m,) of the removals the batch contains something of, and their parts (m, p).
        """
        removed, position = removals.occurrences(self.step.sample_ids)
        touched, inverse, counts = torch.unique(removed, return_inverse=True, return_counts=True)
        parts = self.state[0].new_zeros(len(touched), len(self.state[0]))
        if not len(touched):
            return touched, parts
        objective, step = self.step.objective, self.step
        thetas = self._leaf.detach().expand(len(touched), -1).clone().requires_grad_()
        slot = torch.arange(len(removed)) - (counts.cumsum(0) - counts)[inverse]
        widest = int(counts.max())
        own_rows = objective.independent_rows and widest < len(step.sample_ids)
        if own_rows:
            # Each removal gets a batch of its own samples, padded with any sample at weight 0.
            columns = position.new_zeros(len(touched), widest)
            columns[inverse, slot] = position
            weights = step.weights.new_zeros(len(touched), widest)
            weights[inverse, slot] = step.weights[position]
            leaves = batches.rows(step.leaves, columns)
        else:
            weights = step.weights.new_zeros(len(touched), len(step.sample_ids))
            weights[inverse, position] = step.weights[position]
            leaves = step.leaves
        with step.random_numbers():
            losses = objective.losses_each(thetas, leaves, own_rows)
        (parts,) = torch.autograd.grad((weights * losses).sum(), thetas, create_graph=shifts is not None)
        if shifts is None or not parts.requires_grad:
            return touched, parts
        (curved,) = torch.autograd.grad(parts, thetas, shifts[touched], materialize_grads=True)
        return touched, parts.detach() + curved

    def pullback(self, adjoint: State) -> tuple[State, Tensor]:
        """The adjoint of F: ``(dF/ds)^T adjoint``, a state, and ``(dF/dw)^T adjoint``, (B,)."""
        state = (self._leaf, *(slot.detach().requires_grad_() for slot in self.state[1:]))
        out = self.step.update(state, self._graph)
        *back, weights = torch.autograd.grad(out, (*state, self._weights), adjoint, materialize_grads=True)
        return tuple(back), weights


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
        with unhurried():
            return pull(cotangents, True)
    except RuntimeError as error:
        if "memory" in str(error):
            raise
        return torch.stack([pull(row, False) for row in cotangents])
