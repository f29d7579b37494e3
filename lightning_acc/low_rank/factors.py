"""Per-sample gradients of linear layers as outer products, and how they change along directions of the parameters.

For ``y = W a + b`` the gradient of one sample's loss in W is ``delta a^T`` with ``delta = d loss / d y``, and in b it is delta
(Goodfellow 2015, arXiv 1510.01799). Along a direction d of the parameters it changes by ``delta' a^T + delta a'^T``: the
sample's own Hessian-vector product. So a gradient takes out + in numbers instead of out * in, and inner products of such
gradients are products of inner products.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from lightning_acc.objective import Objective, traceable
from lightning_acc.step import Step


@dataclass(frozen=True)
class Layer:
    """A trained linear layer.

    Attributes:
        module: name of the module.
        weight: where its weight stands in the flat vector: first number, (out, in).
        bias: where its bias stands; None without a trained one.
    """

    module: str
    weight: tuple[int, torch.Size]
    bias: int | None

    def of(self, vectors: Tensor) -> tuple[Tensor, Tensor | None]:
        """The parts of flat vectors (..., p) that belong to it: (..., out, in) and (..., out)."""
        first, shape = self.weight
        weight = vectors[..., first : first + shape.numel()].unflatten(-1, shape)
        return weight, None if self.bias is None else vectors[..., self.bias : self.bias + shape[0]]


@dataclass(frozen=True)
class Factors:
    """The gradients of the B losses of a batch, layer by layer, and their changes along k directions.

    Attributes:
        inputs: a, (B, in) for each layer.
        deltas: delta, (B, out) for each layer.
        input_changes: a', (k, B, in) for each layer; None for one whose inputs do not depend on the parameters.
        delta_changes: delta', (k, B, out) for each layer.
        direct: what the directions d make of the outputs by themselves, ``d_W a + d_b``, (k, B, out) for each layer.
    """

    inputs: list[Tensor]
    deltas: list[Tensor]
    input_changes: list[Tensor | None]
    delta_changes: list[Tensor]
    direct: list[Tensor]


class LinearFactors:
    """Takes the per-sample gradients of a module apart, all of whose trained parameters are in linear layers.

    Args:
        objective: of the module.
        layers: what ``linear_layers`` found.
    """

    def __init__(self, objective: Objective, layers: list[Layer]) -> None:
        self.objective, self.layers = objective, layers
        self._leads: list[bool] | None = None

    def __call__(self, step: Step, theta: Tensor, directions: Tensor) -> Factors:
        """The factors of a step's losses, not weighted, at ``theta`` (p,), with their changes along ``directions`` (k, p)."""
        if self._leads is None:
            self._leads = self._depends(step, theta)
        leads = self._leads

        def of(parameters: Tensor) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
            deltas, (inputs, outputs) = self._gradients(step, parameters)
            moving = [a for a, lead in zip(inputs, leads, strict=True) if lead]
            return moving, deltas, outputs, inputs

        def changes(direction: Tensor) -> tuple[Any, Any, Any]:
            (_, _, _, inputs), (moving, d_deltas, d_outputs, _) = torch.func.jvp(of, (theta,), (direction,))
            return moving, d_deltas, d_outputs

        with traceable():
            _, deltas, _, inputs = of(theta)
            moving, delta_changes, output_changes = torch.vmap(changes, randomness="same", chunk_size=None)(directions)
        queue = iter(moving)
        input_changes = [next(queue) if lead else None for lead in leads]
        direct = []
        for layer, change, moved in zip(self.layers, output_changes, input_changes, strict=True):
            direct.append(change if moved is None else change - moved @ layer.of(theta)[0].T)
        return Factors([a.detach() for a in inputs], [d.detach() for d in deltas], input_changes, delta_changes, direct)

    def _gradients(self, step: Step, theta: Tensor) -> tuple[list[Tensor], tuple[list[Tensor], list[Tensor]]]:
        """delta of each layer, and the layers' inputs and outputs; not weighted."""
        n = len(step.sample_ids)
        zeros = [theta.new_zeros(n, layer.weight[1][0]) for layer in self.layers]

        def loss(added: list[Tensor]) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
            with self._watching(added) as seen:
                total = step.losses(theta).sum()
            return total, ([a for a, _ in seen], [y for _, y in seen])

        deltas, watched = torch.func.grad(loss, has_aux=True)(zeros)
        return deltas, watched

    @contextmanager
    def _watching(self, added: list[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
        """In here each layer's outputs get ``added``, and its inputs and outputs are noted."""
        parts: list[list[tuple[Tensor, Tensor]]] = [[] for _ in self.layers]

        def hook(i: int, inputs: tuple[Tensor, ...], output: Tensor) -> Tensor:
            done = sum(len(a) for a, _ in parts[i])
            parts[i].append((inputs[0], output))
            return output + added[i][done : done + len(output)]

        handles = []
        seen: list[tuple[Tensor, Tensor]] = []
        for i, layer in enumerate(self.layers):
            module = self.objective.submodule(layer.module)
            handles.append(module.register_forward_hook(lambda _, inputs, output, i=i: hook(i, inputs, output)))
        try:
            yield seen
        finally:
            for handle in handles:
                handle.remove()
        for part in parts:
            seen.append((torch.cat([a for a, _ in part]), torch.cat([y for _, y in part])))

    def _depends(self, step: Step, theta: Tensor) -> list[bool]:
        """Whether each layer's inputs depend on the parameters."""
        theta = theta.detach().requires_grad_()
        with traceable(), self._watching([theta.new_zeros(len(step.sample_ids), x.weight[1][0]) for x in self.layers]) as seen:
            step.losses(theta)
        return [a.requires_grad for a, _ in seen]


def linear_layers(objective: Objective) -> list[Layer] | None:
    """The trained linear layers, where all trained parameters are in such; else None."""
    first = 0
    weights: dict[str, tuple[int, torch.Size]] = {}
    biases: dict[str, int] = {}
    for name, shape in objective.layout.shapes:
        module, _, kind = name.rpartition(".")
        if type(objective.submodule(module)) is not nn.Linear:
            return None
        if kind == "weight":
            weights[module] = (first, shape)
        else:
            biases[module] = first
        first += shape.numel()
    if set(biases) - set(weights):
        return None
    return [Layer(module, weight, biases.get(module)) for module, weight in weights.items()]


def factors_for(objective: Objective, step: Step, theta: Tensor) -> LinearFactors | None:
    """Factors for this module, where they really make up its gradients; else None.

    They do not where a layer is called twice or on sequences, a weight is used elsewhere, or losses are coupled.
    """
    layers = linear_layers(objective)
    if not layers or not objective.independent_rows or not objective.full_precision:
        return None
    factors = LinearFactors(objective, layers)
    try:
        found = factors(step, theta, torch.zeros_like(theta)[None])
    except (RuntimeError, IndexError, ValueError):
        return None
    if any(a.ndim != 2 or len(a) != len(step.weights) for a in (*found.inputs, *found.deltas)):
        return None
    whole = torch.zeros_like(theta)
    for layer, a, delta in zip(layers, found.inputs, found.deltas, strict=True):
        weight, bias = layer.of(whole)
        weighted = step.weights[:, None] * delta
        weight += weighted.T @ a
        if bias is not None:
            bias += weighted.sum(0)
    expected = step.gradient(theta)
    scale = float(expected.abs().max())
    return factors if float((whole - expected).abs().max()) <= 1e-3 * scale else None
