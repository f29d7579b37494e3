"""Layers that torch cannot differentiate twice, or does wrongly, made of operations that it can.

Weight normalisation: its backward takes the norms for numbers that nothing has made, so that its second derivative is another
(torch 2.13, ``gradgradcheck`` fails). ``EmbeddingBag``: has none, and cannot be vectorised. Where a replay is ``traceable``
they are made of simple operations; elsewhere they are as in training, to the last bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_acc.core.losses.tracing import is_traced


def make_twice_differentiable(module: nn.Module) -> None:
    """Have the copy ``module`` of a module call its layers so."""
    for part in module.modules():
        if type(part) is _WeightNorm:
            part.__dict__["forward"] = partial(_of_parametrization, -1 if part.dim is None else part.dim)
        if isinstance(part, nn.EmbeddingBag) and type(part).forward is nn.EmbeddingBag.forward:
            part.__dict__["forward"] = partial(embedding_bag, part)
        for hook in part._forward_pre_hooks.values():
            if isinstance(hook, WeightNorm):
                vars(hook)["compute_weight"] = partial(_of_hook, hook)


def weight_norm(v: Tensor, g: Tensor, dim: int) -> Tensor:
    """``g v / |v|``, with a norm for each index of ``dim``, or of all where that is -1."""
    if not is_traced():
        return torch._weight_norm(v, g, dim)
    weight: Tensor = v * (g / torch.norm_except_dim(v, 2, dim))
    return weight


def _of_parametrization(dim: int, g: Tensor, v: Tensor) -> Tensor:
    return weight_norm(v, g, dim)


def _of_hook(hook: Any, module: Any) -> Tensor:
    return weight_norm(getattr(module, hook.name + "_v"), getattr(module, hook.name + "_g"), hook.dim)


def embedding_bag(
    bag: nn.EmbeddingBag, words: Tensor, offsets: Tensor | None = None, per_sample_weights: Tensor | None = None
) -> Tensor:
    """The sum, mean or largest of the embeddings of each row of ``words`` (B, length), (B, dimension)."""
    if not is_traced() or words.ndim != 2 or bag.max_norm is not None:
        return nn.EmbeddingBag.forward(bag, words, offsets, per_sample_weights)
    rows = functional.embedding(words, bag.weight)
    counts = torch.ones_like(words, dtype=torch.bool) if bag.padding_idx is None else words != bag.padding_idx
    if bag.mode == "max":
        largest = rows.masked_fill(~counts[..., None], -torch.inf).max(1).values
        return torch.where(counts.any(1, keepdim=True), largest, 0)
    weights = counts.to(rows.dtype) if per_sample_weights is None else counts * per_sample_weights
    found = (weights[..., None] * rows).sum(1)
    return found / counts.sum(1, keepdim=True).clamp_min(1) if bag.mode == "mean" else found
