"""One batch as the module is given it, or some rows of it."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from lightning_acc.core.devices import States, drawing
from lightning_acc.core.losses.drawing import AsInTheBatch, NotByRow
from lightning_acc.core.losses.tracing import traceable
from lightning_acc.core.objective import Objective
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves


@dataclass(frozen=True)
class Batch:
    """One batch as the module is given it.

    Attributes:
        leaves: its tensors, first dimension (B,).
        rng: states of the random number generators before the forward pass, those that it draws from.
        rows: where it is a part of a batch that draws random numbers, which rows of that, (B,), and how many there are.
    """

    leaves: Leaves
    rng: States = field(default_factory=dict)
    rows: tuple[Tensor, int] | None = None

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

    def as_part(self, rows: Sequence[int] | Tensor, size: int) -> Batch:
        """What it is where its leaves are these rows, (B,), of a batch of that size."""
        rows = torch.as_tensor(rows)
        whole = torch.equal(rows, torch.arange(size))
        return replace(self, rows=(rows, size)) if self.rng and not whole else self


def rows_apart(objective: Objective, some: Iterable[Batch], theta: Tensor, rounded_to: torch.dtype, parts: int = 1) -> bool:
    """Whether rows by themselves have the losses that they have in their batches, at parameters ``theta`` (p,).

    That is to round-off in ``rounded_to``; and not where the loss has a term that no sample is in. It is seen of some pairs of
    rows, and of all ``parts`` that a batch is divided into: what is true of so many rows may not be of others, as where noise
    that they share has as many numbers.
    """
    return not objective.penalised and all(_apart(objective, batch, theta, rounded_to, parts) for batch in some)


def _apart(objective: Objective, batch: Batch, theta: Tensor, rounded_to: torch.dtype, parts: int) -> bool:
    batch = replace(batch, leaves=batches.cast(batch.leaves, objective.dtype, objective.device))
    size, roundoff = batches.batch_size(batch.leaves), min(1e-3, 100 * torch.finfo(rounded_to).eps)

    def losses(of: Batch) -> Tensor:
        with of.random_numbers(objective.device), torch.no_grad(), traceable():
            return objective.losses(theta, of.leaves)

    if size == 1:
        return True
    together = losses(batch)
    divided = [range(size * i // parts, size * (i + 1) // parts) for i in range(parts)] if parts > 1 else []
    for rows in (torch.tensor(part) for part in ([0, 1], [size - 1, 0], *divided) if len(part) > 1):
        try:
            alone = losses(batch.picked(rows))
        except NotByRow:
            return False
        error = (alone - together[rows.to(together.device)]).abs().max() if alone.shape == rows.shape else torch.inf
        if not error <= roundoff * together.abs().max():  # which NaN is not
            return False
    return True
