"""The curvature of a query, by a few random directions of the parameters.

Along a shift D of the parameters a query changes by more than its gradient says, by ``1/2 D^T H D``. For H the Gauss-Newton
matrix is taken, through the outputs z that torch's losses are given in the query (Schraudolph 2002, *Fast curvature
matrix-vector products*):

    H = sum_i w_i J_i^T A_i J_i,     J_i = dz_i / dtheta,  A_i = d^2 l_i / dz_i^2 of the loss l_i,  w_i = d query / d l_i.

With ``A_i = B_i B_i^T`` and independent standard normal e_ki,

    v_k = sum_i sqrt(w_i) J_i^T B_i e_ki     has     E <v_k, D>^2 = D^T H D,

so that the mean of K squares tells the curvature along any D, with the relative error ``sqrt(2 / K)``.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_acc.core.losses.reductions import target_counts
from lightning_acc.core.objective import Objective
from lightning_acc.core.products import pulled_back
from lightning_acc.core.queries.query import Query

AT_ONCE, AT_ONCE_NUMBERS = 16, 2**23
"""Directions that go back through the query together, and numbers of outputs that these start from."""


class Output(NamedTuple):
    """What a loss was given.

    Attributes:
        outputs: z, with the graph that made them.
        result: the loss as it was handed on, without that graph.
        scale: what each of its values counts for in ``result``.
        factor: makes ``B_i e_i`` of normal numbers like z; where a loss has the value of several, their sum.
        spread: makes numbers like the values such as can be multiplied by z.
    """

    outputs: Tensor
    result: Tensor
    scale: Tensor | float
    factor: Callable[[Tensor], Tensor]
    spread: Callable[[Tensor], Tensor]


class Outputs(TorchFunctionMode):
    """Sees what torch's losses are given in here; these hand on numbers that nothing differentiates further than to them."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[Output] = []

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        if function not in CURVATURES or not result.requires_grad:
            return result
        bound = inspect.signature(function).bind(*args, **(kwargs or {}))
        bound.apply_defaults()
        given = bound.arguments
        if given.get("size_average") is not None or given.get("reduce") is not None or not given["input"].requires_grad:
            return result
        handed = result.detach().requires_grad_()
        output = CURVATURES[function](function, given, handed)
        if output is None:
            return result
        self.seen.append(output)
        return handed


def of_classes(function: Any, given: Any, result: Tensor) -> Output:
    """``cross_entropy`` and ``nll_loss``: ``A = s (diag p - p p^T)``, s the weights of the target's classes."""
    z: Tensor = given["input"]
    dim = 1 if z.ndim > 1 else 0
    p = z.detach().softmax(dim)
    counts, weight, smoothing = target_counts(given), given["weight"], given.get("label_smoothing", 0.0)
    weights = torch.ones(z.shape[dim]).to(p) if weight is None else weight.to(p)
    if counts is None:  # probabilities of classes
        shape = [1] * z.ndim
        shape[dim] = -1
        target = given["target"] * (1 - smoothing) + smoothing / z.shape[dim]
        of_target, number = (target * weights.reshape(shape)).sum(dim), torch.tensor(p.numel() / z.shape[dim]).to(p)
    else:
        of_target = (1 - smoothing) * counts + (given["target"] != given["ignore_index"]) * smoothing * weights.mean()
        number = counts.sum()
    root = p.sqrt()

    def factor(e: Tensor) -> Tensor:
        factored: Tensor = of_target.sqrt().unsqueeze(dim) * (root * e - p * (root * e).sum(dim, keepdim=True))
        return factored

    scale = 1 / number if given["reduction"] == "mean" else 1.0
    return Output(z, result, scale, factor, lambda values: values.unsqueeze(dim) if values.ndim else values)


def of_numbers(function: Any, given: Any, result: Tensor) -> Output | None:
    """Losses that take each output by itself: A is what differentiating them twice gives, where that is positive. None where
    an output is compared with several targets."""
    z: Tensor = given["input"]
    alone = {name: part.detach() if isinstance(part, Tensor) else part for name, part in given.items()}
    with torch.enable_grad():
        leaf = z.detach().requires_grad_()
        values: Tensor = function(**{**alone, "input": leaf, "reduction": "none"})
        if values.shape != z.shape:
            return None
        (slopes,) = torch.autograd.grad(values.sum(), leaf, create_graph=True)
        curved = torch.autograd.grad(slopes.sum(), leaf)[0] if slopes.requires_grad else torch.zeros_like(z)
    root = curved.clamp_min(0).sqrt()
    scale = 1 / values.numel() if given["reduction"] == "mean" else 1.0
    return Output(z, result, scale, lambda e: root * e, lambda values: values)


CURVATURES: dict[Any, Callable[[Any, Any, Tensor], Output | None]] = {
    **dict.fromkeys((F.cross_entropy, F.nll_loss), of_classes),
    **dict.fromkeys((F.mse_loss, F.binary_cross_entropy_with_logits, F.huber_loss, F.smooth_l1_loss), of_numbers),
    **dict.fromkeys((F.poisson_nll_loss, F.soft_margin_loss), of_numbers),
}
"""The losses whose curvature is known."""


def directions(query: Query, objective: Objective, theta: Tensor, number: int, seed: int) -> Tensor | None:
    """``v_k`` of the query at ``theta`` (p,), so many of them, (number, p); None where nothing curved is seen in it.

    Args:
        query: a mean over examples.
        objective: computes its losses.
        theta: (p,).
        number: K.
        seed: of the normal numbers.
    """
    generator = torch.Generator().manual_seed(seed)
    total = theta.new_zeros(number, len(theta))
    leaf = theta.detach().requires_grad_()
    with query.reading(objective), torch.enable_grad():
        for leaves, structure in query.with_same_noise(objective):
            with Outputs() as outputs:
                value = query.batch_sum(objective, leaf, leaves, structure) / query.n_examples
            seen = outputs.seen
            if not seen or not value.requires_grad:
                return None
            weights = torch.autograd.grad(value, [one.result for one in seen], allow_unused=True, materialize_grads=True)
            if any(bool((weight < 0).any()) for weight in weights):
                return None  # a difference of losses may curve either way
            scales = [one.spread((weight * one.scale).sqrt()) for one, weight in zip(seen, weights, strict=True)]
            size = max(1, min(AT_ONCE, AT_ONCE_NUMBERS // sum(one.outputs.numel() for one in seen)))
            for first in range(0, number, size):
                starts = [_drawn(seen, scales, generator) for _ in range(first, min(first + size, number))]
                rows = [torch.stack(parts) for parts in zip(*starts, strict=True)]
                total[first : first + size] += pulled_back([one.outputs for one in seen], [leaf], rows, size)[0]
    return total


def along(products: Tensor) -> Tensor:
    """``1/2 D^T H D`` of n shifts, (n,), by their products with K directions, (K, n); 0 where there are none."""
    return (products**2).sum(0) / max(1, 2 * len(products))


def _drawn(seen: Sequence[Output], scales: Sequence[Tensor], generator: torch.Generator) -> list[Tensor]:
    """``sqrt(w_i) B_i e_i`` of one direction, of each of the outputs."""
    drawn = (torch.randn(one.outputs.shape, generator=generator, dtype=torch.float32).to(one.outputs) for one in seen)
    return [scale * one.factor(e) for one, scale, e in zip(seen, scales, drawn, strict=True)]
