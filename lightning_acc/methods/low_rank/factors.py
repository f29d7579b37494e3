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

from lightning_acc.core.objective import Objective, traceable
from lightning_acc.core.step import Step


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

    def named(self, vectors: Tensor) -> dict[str, Tensor]:
        """The same parts by the names of the parameters."""
        weight, bias = self.of(vectors)
        return {f"{self.module}.weight": weight, **({} if bias is None else {f"{self.module}.bias": bias})}

    def outputs(self, inputs: Tensor, vectors: Tensor) -> Tensor:
        """``W a + b`` for inputs (B, in) and the parameters of flat vectors (k, p); (k, B, out)."""
        weight, bias = self.of(vectors)
        products: Tensor = (inputs @ weight.flatten(0, 1).T).unflatten(1, weight.shape[:2]).transpose(0, 1)
        return products if bias is None else products + bias[:, None]


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
        leads, layers = self._leads, self.layers
        batch = len(step.sample_ids)
        named = self.objective.layout.named(theta)
        # What the first layers' own parameters make of their outputs is one product, and added to the outputs. Only the
        # parameters behind them need tangents of their own, as the way back leads through these.
        behind = [layer for layer, lead in zip(layers, leads, strict=True) if lead]
        moving = {name: named[name] for layer in behind for name in layer.named(theta)}
        added = [theta.new_zeros(batch, layer.weight[1][0]) for layer in layers]

        def of(parameters: dict[str, Tensor], extra: list[Tensor]) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
            def loss(outputs: list[Tensor]) -> tuple[Tensor, tuple[list[Tensor], list[Tensor]]]:
                with self.watching([*map(torch.add, outputs, extra)]) as seen:
                    total = step.losses({**named, **parameters}).sum()
                return total, ([a for a, _ in seen], [y for _, y in seen])

            deltas, (inputs, outputs) = torch.func.grad(loss, has_aux=True)(added)
            return deltas, inputs, outputs

        with traceable():
            with torch.no_grad(), self.watching(added) as seen:
                step.losses(theta)
            inputs = [a for a, _ in seen]
            direct = [
                None if lead else layer.outputs(a, directions) for layer, lead, a in zip(layers, leads, inputs, strict=True)
            ]

            def changes(along: dict[str, Tensor], extra: list[Tensor | None]) -> Any:
                pushed = [torch.zeros_like(zero) if e is None else e for zero, e in zip(added, extra, strict=True)]
                (deltas, _, _), tangents = torch.func.jvp(of, (moving, added), (along, pushed))  # type: ignore[misc]
                d_deltas, d_inputs, d_outputs = tangents
                chosen = [(d_inputs[i], d_outputs[i]) for i, lead in enumerate(leads) if lead]
                return deltas, d_deltas, chosen

            tangents = {name: piece for layer in behind for name, piece in layer.named(directions).items()}
            in_dims = (dict.fromkeys(tangents, 0), [None if d is None else 0 for d in direct])
            out_dims: Any = (None, 0, 0)
            deltas, delta_changes, chosen = torch.vmap(changes, in_dims, out_dims, randomness="same")(tangents, direct)
        input_changes: list[Tensor | None] = [None] * len(layers)
        for i, (moved, change) in zip([i for i, lead in enumerate(leads) if lead], chosen, strict=True):
            input_changes[i] = moved
            direct[i] = change - moved @ layers[i].of(theta)[0].T
        return Factors(inputs, deltas, input_changes, delta_changes, [d for d in direct if d is not None])

    @contextmanager
    def watching(self, added: list[Tensor]) -> Iterator[list[tuple[Tensor, Tensor]]]:
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
        with traceable(), self.watching([theta.new_zeros(len(step.sample_ids), x.weight[1][0]) for x in self.layers]) as seen:
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
