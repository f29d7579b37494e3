"""Observes a ``training_step``: for each function of torch that reduces values over the samples, or is linear in what was
reduced, what each sample contributes to its result.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import TorchFunctionMode

from lightning_acc.core.losses import linear
from lightning_acc.core.losses.linear import others, shaped
from lightning_acc.core.losses.reduced import Call, Lost, Reduced, Rule, Seen, shares, tensors_in


class Reductions(TorchFunctionMode):
    """Observes everything that torch computes in here; what was seen is in ``seen``.

    Args:
        size: B, the number of samples.
        weights_only: see the weights of the samples alone, and leave every number exactly as it is.
        own: the module's own tensors, to see what is made of them alone.
    """

    def __init__(self, size: int, weights_only: bool = False, own: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.seen = Seen(size, weights_only, own)

    def __torch_function__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.seen.empty and RULES.get(function) not in BEGINNINGS:
            return function(*args, **(kwargs or {}))  # a training is observed in every step: its layers are none the slower
        call = Call(function, args, kwargs or {})
        try:
            result = RULES.get(function, others)(self.seen, call)
            self.seen.follow(call, result)
            return result
        except Exception as error:
            # A training goes on, whatever the observer did not foresee; what torch itself refuses, it refuses once more.
            if not (self.seen.weights_only or isinstance(error, NOT_FORESEEN)):
                raise
            return self.seen.lose(call.result, Lost(f"it calls {call.name} in a way that is not understood"))


_signature = functools.cache(inspect.signature)

# --- torch's losses: their values by reduction="none", then the mean or the sum of these


def loss(seen: Seen, call: Call) -> Any:
    """A loss of ``torch.nn.functional``."""
    function = call.function
    bound = _signature(function).bind(*call.args, **call.kwargs)
    bound.apply_defaults()
    given = bound.arguments
    reduction = given["reduction"]
    if all(map(seen.apart, tensors_in(given))):
        return call.result
    if reduction == "none" or given.get("size_average") is not None or given.get("reduce") is not None:
        return call.result
    counts = target_counts(given) if function in (F.cross_entropy, F.nll_loss) else None
    own = None if counts is None else seen.by_sample(counts)
    weights = shares(own) if own is not None and reduction == "mean" else None
    counted = weights is not None and ((own is not None and own[0].numel() > 1) or given["weight"] is not None)
    if seen.weights_only:
        return seen.keep(call.result, Reduced(None, weights, counted, reduction == "sum"))
    given["reduction"] = "none"
    values: Tensor = function(*bound.args, **bound.kwargs)
    mine = seen.by_sample(values)
    if mine is None or (counts is not None and own is None):
        return seen.lose(call.result, no_rows(call.name, values, seen.size))
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


def no_rows(name: str, values: Tensor, size: int) -> Lost:
    """Why the values of a function belong to no samples."""
    return Lost(f"{name} takes values of shape {tuple(values.shape)}, which are not rows of {size} samples")


# --- means and sums


def reduction(seen: Seen, call: Call) -> Any:
    """``sum`` and ``mean``, over all dimensions or some."""
    args, kwargs = call.args, call.kwargs
    values: Tensor = args[0] if args else kwargs["input"]
    dims = kwargs.get("dim", kwargs.get("axis", args[1] if len(args) > 1 and not isinstance(args[1], torch.dtype) else None))
    dims = range(values.ndim) if dims is None or dims == () else [dims] if isinstance(dims, int) else dims
    dims = [d % values.ndim for d in dims] if values.ndim else []
    mean = call.name == "mean"
    before = seen.of(values)
    if before is not None:
        result = call.result
        if before.contributions is None:
            return seen.keep(result, before)
        number = values.numel() / max(1, result.numel()) if mean else 1.0
        over = [d + 1 for d in dims]
        return seen.keep(result, before.mapped(lambda c: shaped((c.sum(over) if over else c) / number, result)))
    if 0 not in dims or seen.apart(values):
        return call.result
    mine = seen.by_sample(values)
    if mine is None:
        return seen.lose(call.result, seen.why_lost(values) or no_rows(call.name, values, seen.size))
    result = call.result
    if seen.weights_only and values.requires_grad:
        return seen.keep(result, Reduced(None, total=not mean))
    kept = wide(mine).sum([d + 1 for d in dims])
    if mean:
        kept = kept / (values.numel() / max(1, result.numel()))
    return seen.keep(result, Reduced(shaped(kept, result), total=not mean))


NOT_FORESEEN = (TypeError, ValueError, LookupError, AttributeError)


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
    **dict.fromkeys(
        _named("reshape", "view", "squeeze", "unsqueeze", "flatten", "ravel", "clone", "contiguous"), linear.same_numbers
    ),
    **dict.fromkeys(_named("to", "float", "double", "half", "bfloat16", "type", "view_as"), linear.same_numbers),
    **dict.fromkeys(_named("detach", "detach_"), linear.detached),
    **dict.fromkeys(_named("__getitem__"), linear.picked),
    **dict.fromkeys(_named("neg", "negative", "__neg__"), linear.negated),
    **dict.fromkeys(_named("add", "add_", "__add__", "__radd__", "__iadd__"), linear.added),
    **dict.fromkeys(_named("sub", "subtract", "sub_", "rsub", "__sub__", "__rsub__", "__isub__"), linear.added),
    **dict.fromkeys(_named("mul", "multiply", "mul_", "__mul__", "__rmul__", "__imul__"), linear.multiplied),
    **dict.fromkeys(_named("div", "divide", "true_divide", "div_", "__truediv__", "__itruediv__"), linear.divided),
    **dict.fromkeys(_named("clamp", "clamp_min", "clamp_", "clamp_min_", "clip", "maximum", "max"), linear.bounded),
    **dict.fromkeys(_named("stack"), linear.stacked),
}
"""The rule of each function; what all others make is no sum over the samples."""
BEGINNINGS = (loss, reduction, linear.multiplied)
"""The rules that say something of what is made of tensors of which nothing is known."""
