"""One batch as the module is given it, or some rows of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext, suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.devices import States, drawing
from lightning_acc.core.losses.drawing import AsInTheBatch, NotByRow
from lightning_acc.core.losses.tracing import traceable
from lightning_acc.core.objective import Objective
from lightning_acc.core.stand_in import SETTINGS, Place, Settings
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves


@dataclass(frozen=True)
class Batch:
    """One batch as the module is given it.

    Attributes:
        leaves: its tensors, first dimension (B,).
        rng: states of the random number generators before the forward pass, those that it draws from.
        rows: where it is a part of a batch that draws random numbers, which rows of that, (B,), and how many there are.
        settings: of the module, where they are others than for other batches of its step.
    """

    leaves: Leaves
    rng: States = field(default_factory=dict)
    rows: tuple[Tensor, int] | None = None
    settings: Settings | None = None

    def at(self, place: Place) -> Place:
        """Where it is in the training, in the step at ``place``."""
        return place if self.settings is None else {**place, SETTINGS: self.settings}

    @contextmanager
    def random_numbers(self, device: torch.device) -> Iterator[None]:
        """In here the forward pass, on ``device``, draws the random numbers it drew in training."""
        with drawing(self.rng, device):
            if self.rows is None:
                yield
            else:
                with AsInTheBatch(*self.rows):
                    yield

    def picked(self, rows: Tensor) -> Batch:
        """These rows of it, (m,), with the random numbers that they have in it; two at least, where it draws some."""
        return replace(self, leaves=batches.rows(self.leaves, rows)).as_part(rows, batches.batch_size(self.leaves))

    def by_twos(self, rows: Tensor) -> Iterator[tuple[Batch, Tensor]]:
        """These rows of it, (m,), by twos, each part with the rows it was asked for: a last one alone has another after it."""
        size = batches.batch_size(self.leaves)
        for mine in rows.split(2) if len(rows) else ():
            alone = len(mine) == 1 < size
            yield self.picked(torch.stack([mine[0], (mine[0] + 1) % size]) if alone else mine), mine

    def as_part(self, rows: Sequence[int] | Tensor, size: int) -> Batch:
        """What it is where its leaves are these rows, (B,), of a batch of that size."""
        rows = torch.as_tensor(rows)
        whole = torch.equal(rows, torch.arange(size))
        return replace(self, rows=(rows, size)) if self.rng and not whole else self


class Draws:
    """What is seen of a module's forward passes, and of the random numbers (dropout) in them, of some batches.

    Args:
        objective: computes the losses.
        some: gives the batches, each with where it is in the training, and parameters (p,) to see them at; neither is kept.
        rounded_to: losses that are the same agree to round-off in this dtype.
        parts: that batches are divided into.
    """

    def __init__(
        self,
        objective: Objective,
        some: Callable[[], tuple[list[tuple[Batch, Place]], Tensor]],
        rounded_to: torch.dtype,
        parts: int = 1,
    ) -> None:
        self._objective, self._some, self._parts = objective, some, parts
        self._eps = torch.finfo(rounded_to).eps

    @cached_property
    def alike(self) -> bool:
        """Whether operations that can be vectorised, or differentiated twice, give the losses that the training's give.

        Not where dropout is drawn within a fused kernel, as by attention on a GPU.
        """
        some, theta = self._some()
        allowed = max(1e-3, 4 * self._eps)
        for batch, place in some:
            with self._objective.within(batch.at(place)):
                losses, of_training = self._losses(theta, batch), self._losses(theta, batch, nullcontext())
            if not _near(losses, of_training, allowed):
                return False
        return True

    @cached_property
    def by_row(self) -> bool:
        """Whether rows by themselves have the losses that they have in their batches; not where a loss has a term of no sample.

        It is seen of some pairs of rows, and of all the parts that a batch is divided into: what is true of so many rows may
        not be of others, as where noise that they share has as many numbers.
        """
        some, theta = self._some()
        return not self._objective.penalised and all(self._by_row(theta, *one) for one in some)

    @cached_property
    def once_differentiable(self) -> bool:
        """Whether a function of the user's own is marked so: autograd takes its second derivative for 0, without a word."""
        ((batch, place), *_), theta = self._some()
        some = batch.picked(torch.arange(min(2, batches.batch_size(batch.leaves))))
        leaves = batches.cast(some.leaves, self._objective.dtype, self._objective.device)
        leaf = theta.detach().requires_grad_()
        with self._objective.within(batch.at(place)), suppress(Exception):  # what fails is told by those who need it
            with some.random_numbers(self._objective.device):
                loss = self._objective.losses(leaf, leaves).sum()
            (gradient,) = torch.autograd.grad(loss, leaf, create_graph=True)
            return any(node.name().endswith("::Error") for node in _nodes(gradient))
        return False

    def _by_row(self, theta: Tensor, batch: Batch, place: Place) -> bool:
        with self._objective.within(batch.at(place)):
            return self._are_apart(theta, batch)

    def _are_apart(self, theta: Tensor, batch: Batch) -> bool:
        size, parts = batches.batch_size(batch.leaves), self._parts
        if size == 1:
            return True
        together = self._losses(theta, batch)
        divided = [range(size * i // parts, size * (i + 1) // parts) for i in range(parts)] if parts > 1 else []
        for rows in (torch.tensor(part) for part in ([0, 1], [size - 1, 0], *divided) if len(part) > 1):
            try:
                alone = self._losses(theta, batch.picked(rows))
            except NotByRow:
                return False
            if not _near(alone, together[rows.to(together.device)], min(1e-3, 100 * self._eps)):
                return False
        return True

    def _losses(self, theta: Tensor, batch: Batch, within: AbstractContextManager[None] | None = None) -> Tensor:
        leaf = theta.detach().requires_grad_()  # or other kernels are chosen
        leaves = batches.cast(batch.leaves, self._objective.dtype, self._objective.device)
        with batch.random_numbers(self._objective.device), traceable() if within is None else within:
            return self._objective.losses(leaf, leaves).detach()


def _nodes(tensor: Tensor) -> Iterator[Any]:
    """What autograd has noted of how a tensor was made."""
    todo, seen = [tensor.grad_fn], set()
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            yield node
            todo += [before for before, _ in node.next_functions]


def _near(losses: Tensor, others: Tensor, allowed: float) -> bool:
    """Whether they are the same, (B,), but for so much of the largest."""
    if losses.shape != others.shape:
        return False
    differ = (losses != others) & ~(losses.isnan() & others.isnan())
    return bool((losses - others)[differ].abs().le(allowed * others.abs().max()).all())  # which NaN is not
