"""F: one training step as a pure function, and its derivatives.

    F_t(s, w) = U_t(s, G_t(theta, w)),      G_t(theta, w) = d/dtheta  (sum_i w_i l_i(theta) + r(theta))

``s = (theta, slots)`` is the state, ``w`` the loss weights of the recorded batch, ``l_i`` the per-sample losses, ``r`` the
penalty, which no sample is in and most losses do without. F is defined here and nowhere else: the audit, the retraining and
every estimator use it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace

import torch
from torch import Tensor

from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.losses.per_sample import LossFunction
from lightning_acc.core.losses.tracing import traceable
from lightning_acc.core.objective import Objective, Parameters
from lightning_acc.core.optimizers import UNUSED, Hyperparameters, State, Update, moves
from lightning_acc.core.products import Point, Removed
from lightning_acc.core.ranks import ALONE, Ranks
from lightning_acc.core.removals import Removals
from lightning_acc.core.stand_in import place_in
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, TakenApart


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
        states_at_once: how many states to take together; one by one where that is 1.
        own_rows: the leaves are (n, B, ...), a batch for each of n parameter vectors; only ``gradients`` can be asked then.
        apart: whether rows have the same losses and random numbers by themselves, asked of large models with dropout.
        ranks: the processes that have other rows of its batches. Taken from one state, forward or back, it is the whole step.
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
        states_at_once: int = 512,
        own_rows: bool = False,
        apart: Callable[[], bool] = lambda: False,
        ranks: Ranks = ALONE,
    ) -> None:
        self.objective, self.ranks = objective, ranks
        dtype, device = objective.dtype, objective.device
        self.accumulated = [replace(batch, leaves=batches.cast(batch.leaves, dtype, device)) for batch in accumulated]
        self.sample_ids, self.groups = sample_ids, groups
        self.weights, self._recorded = weights.to(device, dtype), weights
        # Under 16-mixed the loss was scaled on its way back, so that small gradients are numbers of float16.
        self.scale = float(groups[0].get("loss_scale", 1.0))
        self.rows_at_once, self.states_at_once = rows_at_once, states_at_once if objective.vectorised else 1
        self._place = place_in(groups[0])
        self._own_rows, self.apart = own_rows, apart
        self.optimizer = update
        update.check(groups)
        self._moves = moves(groups)
        self._unused: list[int] = groups[0].get(UNUSED, [])

    def update(self, state: State, gradient: Tensor) -> State:
        """U_t: the state after the update; all tensors (..., p)."""
        return self.optimizer(state, gradient, self.groups)

    def __call__(self, state: State) -> State:
        """F_t(s, w) with the recorded weights; all tensors (p,)."""
        after = tuple(part.clone() for part in state)
        self._advance_one(after, self.weights)
        return after

    def advance(self, states: State, weights: Tensor) -> None:
        """F_t of n states (n, p), each with its own loss weights (n, B), written over them.

        Their differences are free of round-off: all are computed by the same operations on tensors of the same shapes.
        """
        n = len(weights)
        size = -(-n // -(-n // self.states_at_once))
        for first in range(0, n, size):
            here = min(first, n - size)  # the last block is as large as the others, and begins among those that are done
            if size == 1:
                self._advance_one(tuple(part[first] for part in states), weights[first])
            else:
                gradients = self.gradients(states[0][here : here + size], weights[here : here + size])[first - here :]
                self.write(tuple(part[first : first + size] for part in states), gradients)

    def _advance_one(self, state: State, weights: Tensor) -> None:
        named = {name: piece.detach() for name, piece in self.objective.layout.named(state[0]).items()}
        moved = [piece for i, piece in enumerate(named.values()) if not self._moves or self._moves[i] or i in self._unused]
        for piece in moved:
            piece.requires_grad_()
        gradients = torch.autograd.grad(self._loss(named, weights), moved, materialize_grads=True)
        if self.scale != 1:
            gradients = tuple(gradient * (1 / self.scale) for gradient in gradients)
        found = iter(gradients)
        pieces = [(next(found) if piece.requires_grad else torch.zeros_like(piece)).reshape(-1) for piece in named.values()]
        self._refuse_used(pieces)
        if self.ranks.size > 1:
            whole = torch.cat(pieces)
            self.ranks.add_up(whole)
            pieces = list(whole.split(self.objective.layout.sizes))
        self.optimizer.in_place(state, pieces, self.groups)

    def write(self, states: State, gradients: Tensor) -> None:
        """U_t, written over ``states``; all tensors (..., p)."""
        self.optimizer.in_place(states, gradients.split(self.objective.layout.sizes, -1), self.groups)

    def gradient(self, theta: Tensor) -> Tensor:
        """G_t(theta, w) with the recorded weights; (p,) to (p,)."""
        theta = theta.detach().requires_grad_()
        return self.of_moved(torch.autograd.grad(self._loss(theta, self.weights), theta)[0]) * (1 / self.scale)

    def _loss(self, theta: Parameters, weights: Tensor) -> Tensor:
        """What is differentiated: the loss of the step at ``theta`` with loss weights (B,), scaled."""
        return (self.scale * self.with_shares(weights) * self.terms(theta)).sum()

    def at(self, state: State) -> Point:
        """The step linearised at the state ``s_t`` of the recorded run."""
        return Point(self, state)

    def gradients(self, thetas: Tensor, weights: Tensor) -> Tensor:
        """G_t at n parameter vectors (n, p), each with its own loss weights (n, B); returns (n, p)."""
        thetas = thetas.detach().requires_grad_()
        weights = self.scale * self.with_shares(weights)
        (found,) = torch.autograd.grad((weights * self.terms_each(thetas)).sum(), thetas)
        if self._unused:
            self._refuse_used(found.split(self.objective.layout.sizes, -1))
        return self.of_moved(found) * (1 / self.scale)

    def _refuse_used(self, gradients: Sequence[Tensor]) -> None:
        """Refuse gradients (..., p_k) of parameters that rested in training, as nothing was made of them there.

        Raises:
            RunError: there are some.
        """
        for i in self._unused:
            if gradients[i].any():
                raise RunError(
                    f"Without what is removed, step {self.groups[0]['step'] - 1} uses the parameter "
                    f"{self.objective.layout.shapes[i][0]!r}, which it did not use in training: what is used depends on the "
                    "data (a router, a branch), and how the optimizer would move that parameter is not known. Let every step "
                    "use all of them, as by adding 0 * sum(p.sum() for p in self.parameters()) to the loss, and record again."
                )

    def of_moved(self, gradient: Tensor) -> Tensor:
        """A gradient (..., p), 0 of the parameters that rest."""
        if self._moves is None:
            return gradient
        pieces = zip(gradient.split(self.objective.layout.sizes, -1), self._moves, strict=True)
        return torch.cat([piece if moved else torch.zeros_like(piece) for piece, moved in pieces], -1)

    def losses(self, theta: Parameters) -> Tensor:
        """Per-sample losses (B,) at parameters ``theta``, (p,) or by name."""
        return self._together(lambda batch: self.objective.losses(theta, batch.leaves))

    def terms(self, theta: Parameters) -> Tensor:
        """The losses and, after those of each batch, its penalty, where the objective is penalised: see ``with_shares``."""
        return self._together(lambda batch: self.objective.terms(theta, batch.leaves))

    def terms_each(self, thetas: Tensor) -> Tensor:
        """The same at each of ``thetas`` (n, p); a row for each."""
        return self._together(lambda batch: self.objective.terms_each(thetas, batch.leaves, self._own_rows), 1)

    def with_shares(self, weights: Tensor) -> Tensor:
        """Loss weights (..., B) and, after those of each batch, what its penalty weighs, where the objective is penalised.

        That is the part that the whole batch has in the step, whichever of its samples are removed.
        """
        if not self.objective.penalised:
            return weights
        sizes = [batches.batch_size(batch.leaves) for batch in self.accumulated]
        sizes = sizes if len(sizes) > 1 else [weights.shape[-1]]
        parts = []
        for some, recorded in zip(weights.split(sizes, -1), self._recorded.split(sizes, -1), strict=True):
            share = recorded.amax(-1, True) if self.objective.reduction == "sum" else recorded.sum(-1, True)
            parts += [some, share.to(some).expand(*some.shape[:-1], 1)]
        return torch.cat(parts, -1)

    def evaluate(self, theta: Parameters, function: LossFunction) -> Tensor:
        """``function(module, batch)``, (B, ...), at parameters ``theta``, (p,) or by name; of all accumulated batches."""
        objective = self.objective
        return self._together(lambda batch: objective.call(theta, function, TakenApart(batch.leaves, objective.structure)))

    def _together(self, evaluated: Callable[[Batch], Tensor], dim: int = 0) -> Tensor:
        """What is computed of each accumulated batch, B along ``dim``, under the random numbers of its forward pass."""
        parts = []
        for batch in self.accumulated:
            with batch.random_numbers(self.objective.device), self.objective.within(batch.at(self._place)):
                parts.append(evaluated(batch))
        return torch.cat(parts, dim) if len(parts) > 1 else parts[0]

    def losses_each(self, thetas: Tensor) -> Tensor:
        """Per-sample losses (n, B) at each of ``thetas`` (n, p)."""
        return self._together(lambda batch: self.objective.losses_each(thetas, batch.leaves, self._own_rows), 1)

    def single_samples(self, positions: Tensor) -> Leaves | None:
        """The samples at ``positions``, of any shape, taken out of their batches; None where that would change their loss."""
        if not self.objective.independent_rows or any(batch.rng or batch.settings for batch in self.accumulated):
            return None
        if len(self.accumulated) == 1:
            return batches.rows(self.accumulated[0].leaves, positions)
        shapes = {tuple((name, leaf.shape[1:]) for name, leaf in batch.leaves.items()) for batch in self.accumulated}
        if len(shapes) > 1 or not all(map(batches.is_of_samples, self.accumulated[0].leaves)):
            return None
        together = {name: torch.cat([batch.leaves[name] for batch in self.accumulated]) for name in self.accumulated[0].leaves}
        return batches.rows(together, positions)

    def removed(self, theta: Tensor, removals: Removals, curved: bool = False) -> Removed:
        """What the removed contribute to G_t at the parameters ``theta`` (p,); see ``Point.removed``."""
        removed, position = removals.occurrences(self.sample_ids)
        touched, inverse, counts = torch.unique(removed, return_inverse=True, return_counts=True)
        thetas = theta.expand(len(touched), -1).clone().requires_grad_()
        if not len(touched):
            return Removed(touched, thetas, torch.zeros_like(thetas), self.of_moved)
        few = len(touched) == 1 and 2 * len(position) <= len(self.sample_ids)
        if few and any(batch.rng for batch in self.accumulated) and self.apart():
            loss = self._of_rows(thetas[0], position)
            return Removed(touched, thetas, torch.autograd.grad(loss, thetas, create_graph=curved)[0], self.of_moved)
        slot = torch.arange(len(removed)) - (counts.cumsum(0) - counts)[inverse]
        # Each removal gets a batch of its own samples, padded with any sample at weight 0.
        columns = position.new_zeros(len(touched), int(counts.max()))
        columns[inverse, slot] = position
        own = self.single_samples(columns) if columns.shape[1] < len(self.sample_ids) else None
        if own is not None:
            weights = self.weights.new_zeros(columns.shape)
            weights[inverse, slot] = self.weights[position]
            with self.objective.within(self._place):
                losses = self.objective.losses_each(thetas, own, own_rows=True)
        else:
            weights = self.weights.new_zeros(len(touched), len(self.sample_ids))
            weights[inverse, position] = self.weights[position]
            losses = self.losses_each(thetas)
        (graph,) = torch.autograd.grad((weights * losses).sum(), thetas, create_graph=curved)
        return Removed(touched, thetas, graph, self.of_moved)

    def _of_rows(self, theta: Tensor, positions: Tensor) -> Tensor:
        """The weighted loss at ``theta`` (p,) of the occurrences at ``positions``, taken by twos as drawn in their batches."""
        total, first = theta.new_zeros(()), 0
        for batch in self.accumulated:
            size = batches.batch_size(batch.leaves)
            for part, mine in batch.by_twos(positions[(first <= positions) & (positions < first + size)] - first):
                with part.random_numbers(self.objective.device), self.objective.within(part.at(self._place)), traceable():
                    losses = self.objective.losses(theta, part.leaves)[: len(mine)]
                total = total + (self.weights[(first + mine).to(self.weights.device)] * losses).sum()
            first += size
        return total

    def weights_without(self, removals: Removals) -> Tensor:
        """Loss weights (n, B) with each removal's occurrences at 0."""
        removed, position = removals.occurrences(self.sample_ids)
        weights = self.weights.repeat(len(removals), 1)
        weights[removed, position] = 0
        return weights
