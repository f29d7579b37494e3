"""Products with the Jacobians ``J_i = d outputs_i / d parameters`` (c, p) of the samples of a step, none of which is ever made.

``J_i d`` by forward mode, all directions d at one evaluation of the outputs; ``J_i J_i^T s_i`` by one way back and one
forward. Where all parameters are in linear layers, ``y = W a + b``, both go through the layers' outputs y alone: the gradient
of ``s . outputs`` in W is ``delta a^T``, and along it y moves by ``delta (a . a + 1)``.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.objective import traceable
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank.factors import LinearFactors
from lightning_acc.methods.low_rank.protocol import Split
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves


class Jacobian(ABC):
    """The Jacobians at a step and parameters (p,)."""

    outputs: Tensor
    """(B, c)."""

    @abstractmethod
    def along(self, directions: Tensor) -> Tensor:
        """``J_i d`` for each of the directions (k, p); (k, B, c)."""

    @abstractmethod
    def back(self, rows: Tensor, s: Tensor) -> Tensor:
        """``J_i^T s_i`` for rows i (m,) of the batch and s (m, c); (m, p)."""

    @abstractmethod
    def there_and_back(self, rows: Tensor, s: Tensor) -> Tensor:
        """``J_i J_i^T s_i``, likewise; (m, c)."""


class LayerJacobian(Jacobian):
    """For modules whose trained parameters are all in linear layers that are called once.

    Args:
        factors: knows the layers.
        split: gives the outputs.
        step: the step.
        theta: parameters, (p,).
    """

    def __init__(self, factors: LinearFactors, split: Split, step: Step, theta: Tensor) -> None:
        self._factors, self._split, self._step, self._theta = factors, split, step, theta
        self._zeros = [theta.new_zeros(len(step.sample_ids), layer.weight[1][0]) for layer in factors.layers]
        with torch.no_grad(), traceable(), factors.watching(self._zeros) as seen:
            self.outputs = split.of(step, theta)
        self._inputs = [a for a, _ in seen]

    def _of(self, added: list[Tensor]) -> Tensor:
        """Outputs where each layer's own outputs get ``added``."""
        with self._factors.watching(added):
            return self._split.of(self._step, self._theta)

    def along(self, directions: Tensor) -> Tensor:
        layers = self._factors.layers
        found = []
        for part in directions.split(self._step.rows_at_once):
            moved = [layer.outputs(a, part) for layer, a in zip(layers, self._inputs, strict=True)]
            with traceable():
                found.append(torch.vmap(self._push, randomness="same")(moved))
        return torch.cat(found)

    def _push(self, moved: list[Tensor]) -> Tensor:
        along: Tensor = torch.func.jvp(self._of, (self._zeros,), (moved,))[1]
        return along

    def _pull(self, rows: Tensor, s: Tensor) -> list[Tensor]:
        """delta of each layer, (B, out)."""
        with traceable():
            pull: Any = torch.func.vjp(self._of, self._zeros)[1]
            deltas: list[Tensor] = pull(s.new_zeros(self.outputs.shape).index_copy(0, rows, s))[0]
        return deltas

    def back(self, rows: Tensor, s: Tensor) -> Tensor:
        found = s.new_zeros(len(rows), len(self._theta))
        for layer, a, delta in zip(self._factors.layers, self._inputs, self._pull(rows, s), strict=True):
            weight, bias = layer.of(found)
            weight += torch.einsum("mo,mi->moi", delta[rows], a[rows])
            if bias is not None:
                bias += delta[rows]
        return found

    def there_and_back(self, rows: Tensor, s: Tensor) -> Tensor:
        moved = [
            delta * (a.square().sum(1, keepdim=True) + (layer.bias is not None))
            for layer, a, delta in zip(self._factors.layers, self._inputs, self._pull(rows, s), strict=True)
        ]
        with traceable():
            return self._push(moved)[rows]


class PlainJacobian(Jacobian):
    """For any module: parameters of its own for each row.

    Args:
        split: gives the outputs.
        step: the step.
        theta: parameters, (p,).
    """

    def __init__(self, split: Split, step: Step, theta: Tensor) -> None:
        self._split, self._step, self._theta = split, step, theta
        with torch.no_grad():
            self.outputs = split.of(step, theta)

    def along(self, directions: Tensor) -> Tensor:
        def push(direction: Tensor) -> Tensor:
            found: Tensor = torch.func.jvp(lambda theta: self._split.of(self._step, theta), (self._theta,), (direction,))[1]
            return found

        with traceable():
            return torch.vmap(push, randomness="same", chunk_size=self._step.rows_at_once)(directions)

    def _each(self, thetas: Tensor, rows: Tensor) -> Tensor:
        """Outputs (m, c) of rows (m,), each at its own parameters (m, p)."""
        step, objective = self._step, self._step.objective
        alone = step.single_samples(rows[:, None])

        def of(theta: Tensor, leaves: Leaves) -> Tensor:
            outputs = objective.call(theta, self._split.rows, batches.unflatten(objective.structure, leaves))
            return outputs.to(objective.dtype)

        if alone is not None:
            return objective.each(of, thetas, alone, own_rows=True)[:, 0]
        parts = []
        for batch in step.accumulated:
            with batch.random_numbers():
                parts.append(objective.each(of, thetas, batch.leaves))
        return torch.cat(parts, 1)[torch.arange(len(rows)), rows]

    def back(self, rows: Tensor, s: Tensor) -> Tensor:
        thetas = self._theta.expand(len(rows), -1)
        pull: Any = torch.func.vjp(lambda at: self._each(at, rows), thetas)[1]
        found: Tensor = pull(s)[0]
        return found

    def there_and_back(self, rows: Tensor, s: Tensor) -> Tensor:
        thetas, moved = self._theta.repeat(len(rows), 1), self.back(rows, s)
        found: Tensor = torch.func.jvp(lambda at: self._each(at, rows), (thetas,), (moved,))[1]
        return found
