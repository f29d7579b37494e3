"""What a step's derivatives make of rows of vectors: pulled back through F, and of the removed samples alone."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.losses.tracing import quiet
from lightning_acc.core.optimizers import State
from lightning_acc.core.process import is_out_of_memory


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
        with quiet():
            return pull(cotangents, True)
    except RuntimeError as error:
        if is_out_of_memory(error):
            raise
        return torch.stack([pull(row, False) for row in cotangents])
