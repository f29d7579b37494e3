"""What becomes of the samples' contributions in what is linear in a mean or sum over them, and in what is not."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.losses.reduced import Call, Lost, Reduced, Seen, shares

NO_SAMPLES = Lost("it has a term that no reduction over the samples makes")


def shaped(contributions: Tensor, result: Tensor) -> Tensor:
    """Contributions to ``result``, of its shape and of its dtype if that is wider."""
    reshaped = contributions.reshape(len(contributions), *result.shape)
    return reshaped.to(torch.promote_types(reshaped.dtype, result.dtype))


def same_numbers(seen: Seen, call: Call) -> Any:
    """What keeps all numbers and their order: another shape, another dtype, a copy."""
    result, before = call.result, seen.of(call.args[0])
    if before is None:
        return others(seen, call)
    return seen.keep(result, before.mapped(lambda c: shaped(c, result)))


def picked(seen: Seen, call: Call) -> Any:
    """A part of what was reduced, by an index."""
    result, before = call.result, seen.of(call.args[0])
    if before is None:
        return others(seen, call)
    index = call.args[1] if isinstance(call.args[1], tuple) else (call.args[1],)
    if Ellipsis in index:
        return others(seen, call)
    within = (slice(None), *index)
    return seen.keep(result, before.mapped(lambda c: c[within]))


def negated(seen: Seen, call: Call) -> Any:
    """``-a``."""
    result, before = call.result, seen.of(call.args[0])
    return others(seen, call) if before is None else seen.keep(result, before.mapped(torch.neg))


def added(seen: Seen, call: Call) -> Any:
    """``a + b`` and ``a - b``, or ``b - a``, with a factor ``alpha`` of the second term.

    A term that is made of the module's own tensors alone is a penalty, which no sample is in.
    """
    terms = call.operands
    reduced = [seen.of(term) for term in terms]
    if not any(reduced):
        why = seen.why_lost(*terms)
        return seen.lose(call.result, why) if why else call.result
    for term, known in zip(terms, reduced, strict=True):
        if known is None and not accounted_for(seen, term):
            return seen.lose(call.result, seen.why_lost(term) or NO_SAMPLES)
    # As they are now: ``a += b`` writes the sum to ``a``.
    apart = [term.clone() if isinstance(term, Tensor) and seen.apart(term) else None for term in terms]
    result = call.result
    made = common([known for known in reduced if known is not None])
    if any(known is not None and known.contributions is None for known in reduced):
        return seen.keep(result, made)
    alpha = call.kwargs.get("alpha", 1.0)
    factors = {"sub": (1.0, -alpha), "isub": (1.0, -alpha), "subtract": (1.0, -alpha), "rsub": (-alpha, 1.0)}.get(
        call.name, (1.0, alpha)
    )
    contributions, penalties = [], []
    for known, penalty, factor in zip(reduced, apart, factors, strict=True):
        if known is not None and known.contributions is not None:
            contributions.append(factor * aligned(known.contributions, result))
            penalty = known.penalty
        if penalty is not None:
            penalties.append(factor * penalty)
    summed = sum(contributions[1:], contributions[0]).expand(seen.size, *result.shape)
    together = sum(penalties[1:], penalties[0]).expand(result.shape) if penalties else None
    return seen.keep(result, replace(made, contributions=summed, penalty=together))


def accounted_for(seen: Seen, term: object) -> bool:
    """Whether a term of a sum that was not reduced over the samples is known all the same.

    It is a penalty, is multiplied by 0, or is no function of the parameters.
    """
    return not (isinstance(term, Tensor) and term.requires_grad) or seen.apart(term) or seen.nothing(term)


def common(parts: list[Reduced]) -> Reduced:
    """The weights of a sum of reductions: those that all parts have, else those of a plain mean."""
    if len(parts) == 1 or all(part.total for part in parts):
        return replace(parts[0], contributions=None, penalty=None)
    first = parts[0].weights
    if first is not None and all(part.weights is first for part in parts):
        return replace(parts[0], contributions=None, penalty=None)
    return Reduced(None)


def aligned(contributions: Tensor, result: Tensor) -> Tensor:
    """Contributions (B, *S), where S is broadcast to the shape of ``result``."""
    missing = result.ndim - (contributions.ndim - 1)
    return contributions.reshape(len(contributions), *[1] * missing, *contributions.shape[1:])


def multiplied(seen: Seen, call: Call) -> Any:
    """``a * b``, of one that was reduced over the samples and one that was not."""
    result = call.result
    a, b = call.operands
    first, second = seen.of(a), seen.of(b)
    if first is None and second is None:
        if any(isinstance(operand, (int, float)) and operand == 0 for operand in (a, b)):
            return seen.is_nothing(result)
        why = seen.why_lost(a, b)
        return seen.lose(result, why) if why else result
    if first is not None and second is not None:
        return seen.lose(result, Lost("it has a product of two means or sums over the samples", True))
    known, factor = (first, b) if first is not None else (second, a)
    assert known is not None
    if seen.why_lost(factor):
        return seen.lose(result, Lost("it is multiplied by what is made of means or sums over the samples", True))
    return seen.keep(result, known.mapped(lambda c: (aligned(c, result) * factor).expand(len(c), *result.shape)))


def divided(seen: Seen, call: Call) -> Any:
    """``a / b``: a sum divided by a number, or by the sum of the samples' weights, is their mean."""
    result = call.result
    a, b = call.operands
    above, below = seen.of(a), seen.of(b)
    if above is None or call.kwargs.get("rounding_mode"):
        return others(seen, call)
    if seen.why_lost(b) or (below is not None and b.requires_grad):
        return seen.lose(result, Lost("it is divided by what is made of means or sums over the samples", True))
    made = replace(above.mapped(lambda c: aligned(c, result) / b), total=False)
    if above.total and below is not None and below.contributions is not None:
        made = replace(made, weights=shares(below.contributions), counted=True)
    return seen.keep(result, made)


def bounded(seen: Seen, call: Call) -> Any:
    """``clamp`` and ``maximum``, of a divisor: what each sample has of it stays in proportion."""
    result, before = call.result, seen.of(call.args[0])
    if before is None:
        return others(seen, call)
    if not isinstance(result, Tensor) or result.requires_grad:
        return others(seen, call)
    return seen.keep(result, before)


def stacked(seen: Seen, call: Call) -> Any:
    """``stack`` of scalars that were reduced."""
    result = call.result
    tensors = call.args[0] if call.args else call.kwargs["tensors"]
    parts = [seen.of(tensor) for tensor in tensors]
    if not any(parts) or any(tensor.ndim for tensor in tensors):
        return result
    for tensor, part in zip(tensors, parts, strict=True):
        if part is None and not accounted_for(seen, tensor):
            return seen.lose(result, seen.why_lost(tensor) or NO_SAMPLES)
    known = [part for part in parts if part is not None]
    made = common(known)
    if all(part.contributions is not None for part in known):
        none, nothing = result.new_zeros(seen.size), result.new_zeros(())
        columns = [none if part is None or part.contributions is None else part.contributions for part in parts]
        apart = [
            part.penalty if part is not None else tensor if seen.apart(tensor) else None
            for tensor, part in zip(tensors, parts, strict=True)
        ]
        some = any(one is not None for one in apart)
        penalty = torch.stack([nothing if one is None else one for one in apart]) if some else None
        made = replace(made, contributions=torch.stack(columns, 1), penalty=penalty)
    return seen.keep(result, made)


def detached(seen: Seen, call: Call) -> Any:
    """``detach``: a number, but one that a sample would change as its loss does; of what no parameters are in, itself."""
    tensor = call.args[0]
    return others(seen, call) if tensor.requires_grad else same_numbers(seen, call)


def others(seen: Seen, call: Call) -> Any:
    """Any other function: what it makes of means and sums over the samples that depend on the parameters is none itself."""
    for operand in call.args:
        known = seen.of(operand)
        if known is not None and operand.requires_grad:
            return seen.lose(call.result, Lost(f"it is made of {call.name} of a mean or sum over the samples", True))
        if known is None and (why := seen.why_lost(operand)):
            return seen.lose(call.result, why)
    return call.result
