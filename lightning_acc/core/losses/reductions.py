"""Observes a ``training_step``: for each function of torch that reduces values over the samples, or is linear in what was
reduced, what each sample contributes to its result.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_acc.core.losses.reduced import Reduced, Seen, shares

Rule = Callable[[Seen, Any, tuple[Any, ...], dict[str, Any]], Any]
"""Takes what has been seen, a function and its arguments; returns the result, and has it remembered how that was made."""


class Reductions(TorchFunctionMode):
    """Observes everything that torch computes in here; what was seen is in ``seen``.

    Args:
        size: B, the number of samples.
        weights_only: see the weights of the samples alone, and leave every number exactly as it is.
    """

    def __init__(self, size: int, weights_only: bool = False) -> None:
        super().__init__()
        self.seen = Seen(size, weights_only)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        rule = RULES.get(function)
        return rule(self.seen, function, args, kwargs or {}) if rule else function(*args, **(kwargs or {}))


# --- torch's losses: their values by reduction="none", then the mean or the sum of these


def loss(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A loss of ``torch.nn.functional``."""
    bound = inspect.signature(function).bind(*args, **kwargs)
    bound.apply_defaults()
    given = bound.arguments
    reduction = given["reduction"]
    if reduction == "none" or given.get("size_average") is not None or given.get("reduce") is not None:
        return function(*args, **kwargs)
    counts = target_counts(given) if function in (F.cross_entropy, F.nll_loss) else None
    own = None if counts is None else seen.by_sample(counts)
    weights = shares(own) if own is not None and reduction == "mean" else None
    counted = weights is not None and ((own is not None and own[0].numel() > 1) or given["weight"] is not None)
    if seen.weights_only:
        return seen.keep(function(*args, **kwargs), Reduced(None, weights, counted, reduction == "sum"))
    given["reduction"] = "none"
    values: Tensor = function(*bound.args, **bound.kwargs)
    mine = seen.by_sample(values)
    if mine is None or (counts is not None and own is None):
        return seen.lose(function(*args, **kwargs), no_rows(function.__name__, values, seen.size))
    if function is F.ctc_loss and reduction == "mean":
        lengths = torch.as_tensor(given["target_lengths"])
        mine = mine / lengths.clamp_min(1).reshape(mine.shape)
    number: Tensor | float = 1.0 if reduction == "sum" else len(values) if reduction == "batchmean" else values.numel()
    if counts is not None and reduction == "mean":
        number = counts.sum()
    contributions = wide(mine).flatten(1).sum(1) / number
    return seen.keep(contributions.sum(), Reduced(contributions, weights, counted, reduction == "sum"))


def target_counts(given: Any) -> Tensor | None:
    """What each element counts for in the mean of ``cross_entropy``: 0 where it is ignored, else its class weight.

    None where the targets are probabilities of classes, each of which counts for 1.
    """
    target, weight = given["target"], given["weight"]
    if target.is_floating_point():
        return None
    kept = target != given["ignore_index"]
    counts: Tensor = kept.to(given["input"].dtype) if weight is None else weight[torch.where(kept, target, 0)] * kept
    return counts


def wide(values: Tensor) -> Tensor:
    """Values in float32 at least: what a sample contributes would be rounded once more otherwise than in the training."""
    return values.float() if values.dtype in (torch.float16, torch.bfloat16) else values


def shaped(contributions: Tensor, result: Tensor) -> Tensor:
    """Contributions to ``result``, of its shape and of its dtype if that is wider."""
    reshaped = contributions.reshape(len(contributions), *result.shape)
    return reshaped.to(torch.promote_types(reshaped.dtype, result.dtype))


def no_rows(name: str, values: Tensor, size: int) -> str:
    """Why the values of a function belong to no samples."""
    return f"{name} takes values of shape {tuple(values.shape)}, which are not rows of {size} samples"


# --- means and sums


def reduction(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``sum`` and ``mean``, over all dimensions or some."""
    values = args[0] if args else kwargs["input"]
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None))
    if not isinstance(values, Tensor):
        return function(*args, **kwargs)
    dims = range(values.ndim) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims
    dims = [d % values.ndim for d in dims] if values.ndim else []
    mean = "mean" in function.__name__
    before = seen.of(values)
    if before is not None:
        result = function(*args, **kwargs)
        if before.contributions is None:
            return seen.keep(result, before)
        kept = before.contributions.sum([d + 1 for d in dims]) if dims else before.contributions
        number = values.numel() / max(1, result.numel()) if mean else 1.0
        return seen.keep(result, before.mapped(lambda _: shaped(kept / number, result)))
    if 0 not in dims:
        return function(*args, **kwargs)
    mine = seen.by_sample(values)
    if mine is None:
        return seen.lose(function(*args, **kwargs), seen.why_lost(values) or no_rows(function.__name__, values, seen.size))
    result = function(*args, **kwargs)
    if seen.weights_only and values.requires_grad:
        return seen.keep(result, Reduced(None, total=not mean))
    kept = wide(mine).sum([d + 1 for d in dims])
    if mean:
        kept = kept / (values.numel() / max(1, result.numel()))
    return seen.keep(result, Reduced(shaped(kept, result), total=not mean))


# --- what is linear in what was reduced


def same_numbers(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """What keeps all numbers and their order: another shape, another dtype, a copy."""
    result = function(*args, **kwargs)
    before = seen.of(args[0]) if args else None
    if before is None or not isinstance(result, Tensor):
        why = seen.why_lost(*args)
        return seen.lose(result, why) if why else result
    return seen.keep(result, before.mapped(lambda c: shaped(c, result)))


def picked(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """A part of what was reduced, by an index."""
    result = function(*args, **kwargs)
    before = seen.of(args[0])
    if before is None:
        return result
    index = (slice(None), *(args[1] if isinstance(args[1], tuple) else (args[1],)))
    return seen.keep(result, before.mapped(lambda c: c[index]))


def negated(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``-a``."""
    result = function(*args, **kwargs)
    before = seen.of(args[0])
    return result if before is None else seen.keep(result, before.mapped(torch.neg))


def added(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a + b``, ``a - b``, with a factor ``alpha`` of b."""
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    differentiable = [isinstance(operand, Tensor) and operand.requires_grad for operand in (a, b)]  # before ``a += b``
    result = function(*args, **kwargs)
    first, second = seen.of(a), seen.of(b)
    if first is None and second is None:
        why = seen.why_lost(a, b)
        return seen.lose(result, why) if why else result
    for operand, known, depends in zip((a, b), (first, second), differentiable, strict=True):
        if known is None and depends and not seen.nothing(operand):
            return seen.lose(result, seen.why_lost(operand) or "it has a term that no reduction over the samples makes")
    name = function.__name__.strip("_")
    factors = (1.0, kwargs.get("alpha", 1.0) * (-1.0 if name in ("sub", "isub", "subtract") else 1.0))
    if name in ("rsub",):
        factors = (-1.0, 1.0)
    parts = [(known, factor) for known, factor in zip((first, second), factors, strict=True) if known is not None]
    made = common([known for known, _ in parts])
    if all(known.contributions is not None for known, _ in parts):
        terms = [factor * aligned(known.contributions, result) for known, factor in parts if known.contributions is not None]
        made = replace(made, contributions=sum(terms[1:], terms[0]).expand(seen.size, *result.shape))
    return seen.keep(result, made)


def common(parts: list[Reduced]) -> Reduced:
    """The weights of a sum of reductions: those that all parts have, else those of a plain mean."""
    if len(parts) == 1 or all(part.total for part in parts):
        return replace(parts[0], contributions=None)
    first = parts[0].weights
    if first is not None and all(part.weights is first for part in parts):
        return replace(parts[0], contributions=None)
    return Reduced(None)


def aligned(contributions: Tensor, result: Tensor) -> Tensor:
    """Contributions (B, *S), where S is broadcast to the shape of ``result``."""
    missing = result.ndim - (contributions.ndim - 1)
    return contributions.reshape(len(contributions), *[1] * missing, *contributions.shape[1:])


def multiplied(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a * b``, of one that was reduced over the samples and one that was not."""
    result = function(*args, **kwargs)
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    first, second = seen.of(a), seen.of(b)
    if first is None and second is None:
        if any(isinstance(operand, (int, float)) and operand == 0 for operand in (a, b)):
            return seen.is_nothing(result)
        why = seen.why_lost(a, b)
        return seen.lose(result, why) if why else result
    if first is not None and second is not None:
        return seen.lose(result, "it has a product of two means or sums over the samples, which couples them")
    known, factor = (first, b) if first is not None else (second, a)
    assert known is not None
    return seen.keep(result, known.mapped(lambda c: (aligned(c, result) * factor).expand(seen.size, *result.shape)))


def divided(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``a / b``: a sum divided by a number, or by the sum of the samples' weights, is their mean."""
    result = function(*args, **kwargs)
    a, b = args[0], args[1] if len(args) > 1 else kwargs["other"]
    above, below = seen.of(a), seen.of(b)
    if above is None or kwargs.get("rounding_mode"):
        why = seen.why_lost(a) or (below and "it is divided by a mean or sum over the samples")
        return seen.lose(result, why) if why else result
    if below is not None and isinstance(b, Tensor) and b.requires_grad:
        return seen.lose(result, "it is a quotient of two means or sums over the samples that depend on the parameters")
    made = replace(above.mapped(lambda c: aligned(c, result) / b), total=False)
    if above.total and below is not None and below.contributions is not None:
        made = replace(made, weights=shares(below.contributions), counted=True)
    return seen.keep(result, made)


def bounded(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``clamp`` and ``maximum``, of a divisor: what each sample has of it stays in proportion."""
    result = function(*args, **kwargs)
    before = seen.of(args[0])
    if before is None:
        return result
    if result.requires_grad:
        return seen.lose(result, f"{function.__name__} of a mean or sum over the samples couples them")
    return seen.keep(result, before)


def stacked(seen: Seen, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """``stack`` of scalars that were reduced."""
    result = function(*args, **kwargs)
    tensors = args[0] if args else kwargs["tensors"]
    parts = [seen.of(tensor) for tensor in tensors]
    if not any(parts) or any(tensor.ndim for tensor in tensors):
        return result
    known = [part for part in parts if part is not None]
    if len(known) < len(parts) and any(t.requires_grad for t, part in zip(tensors, parts, strict=True) if part is None):
        return seen.lose(result, seen.why_lost(*tensors) or "it has a term that no reduction over the samples makes")
    made = common(known)
    if all(part.contributions is not None for part in known):
        zero = result.new_zeros(seen.size)
        columns = [zero if part is None or part.contributions is None else part.contributions for part in parts]
        made = replace(made, contributions=torch.stack(columns, 1))
    return seen.keep(result, made)


def _named(*names: str) -> list[Any]:
    """Functions of torch and methods of tensors by these names."""
    return [getattr(owner, name) for owner in (torch, Tensor) for name in names if hasattr(owner, name)]


LOSSES = [
    *(F.cross_entropy, F.nll_loss, F.mse_loss, F.l1_loss, F.smooth_l1_loss, F.huber_loss, F.binary_cross_entropy),
    *(F.binary_cross_entropy_with_logits, F.kl_div, F.poisson_nll_loss, F.gaussian_nll_loss, F.soft_margin_loss),
    *(F.multilabel_margin_loss, F.multilabel_soft_margin_loss, F.multi_margin_loss, F.hinge_embedding_loss),
    *(F.margin_ranking_loss, F.cosine_embedding_loss, F.triplet_margin_loss, F.triplet_margin_with_distance_loss, F.ctc_loss),
]
RULES: dict[Any, Rule] = {
    **dict.fromkeys(LOSSES, loss),
    **dict.fromkeys(_named("sum", "mean"), reduction),
    **dict.fromkeys(_named("reshape", "view", "squeeze", "unsqueeze", "flatten", "ravel", "clone", "contiguous"), same_numbers),
    **dict.fromkeys(_named("detach", "to", "float", "double", "half", "bfloat16", "type", "view_as"), same_numbers),
    **dict.fromkeys(_named("__getitem__"), picked),
    **dict.fromkeys(_named("neg", "negative", "__neg__"), negated),
    **dict.fromkeys(_named("add", "add_", "__add__", "__radd__", "__iadd__"), added),
    **dict.fromkeys(_named("sub", "subtract", "sub_", "rsub", "__sub__", "__rsub__", "__isub__"), added),
    **dict.fromkeys(_named("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"), multiplied),
    **dict.fromkeys(_named("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__"), divided),
    **dict.fromkeys(_named("clamp", "clamp_min", "clamp_", "clamp_min_", "clip", "maximum", "max"), bounded),
    **dict.fromkeys(_named("stack"), stacked),
}
"""The rule of each function; what all others make is no sum over the samples."""
