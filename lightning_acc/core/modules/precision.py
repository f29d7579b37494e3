"""How Lightning's precisions compute."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

NARROW = (torch.bfloat16, torch.float16)


@dataclass(frozen=True)
class Precision:
    """One of Lightning's precisions.

    Attributes:
        autocast: the narrower dtype the forward passes are cast to (mixed precision), or None.
        default: torch's default dtype in a forward pass: what the module itself creates is of it.
        scored_as: the precision that scores are computed in, where that is another. What is differentiated twice in float16
            leaves its range, and the scale that keeps the gradients of a training within it is made for no other numbers.
    """

    autocast: torch.dtype | None = None
    default: torch.dtype = torch.float32
    scored_as: str | None = None


PRECISIONS = {
    "32-true": Precision(),
    "64-true": Precision(default=torch.float64),
    "bf16-mixed": Precision(autocast=torch.bfloat16),
    "16-mixed": Precision(autocast=torch.float16, scored_as="32-true"),
    "bf16-true": Precision(default=torch.bfloat16),
    "16-true": Precision(default=torch.float16),
}
"""Those that can be replayed, by their names."""


def rounded_to(precision: str, dtype: torch.dtype, compiled: bool) -> torch.dtype:
    """The dtype by whose rounding the gradient of a training may differ from F's; its parameters are of ``dtype``.

    Compiled code does not round between the operations it does at once: under mixed precision it differs by a narrow rounding.
    """
    return (compiled and PRECISIONS[precision].autocast) or dtype


@contextmanager
def default_dtype(dtype: torch.dtype) -> Iterator[None]:
    """In here tensors that are created without a dtype, or from Python's numbers, are of this one."""
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)


def of_other_dtypes(
    module: nn.Module, tensors: Mapping[str, Tensor] | None, trained_in: torch.dtype, trained: set[str]
) -> dict[str, Tensor]:
    """By name what a module holds beside the ``trained`` parameters in other floating-point dtypes than these are trained in,
    as a frozen part in bfloat16.

    ``tensors`` are as the training had them. Others, of a module that was built anew, are as they were built, if a training in
    such a dtype casts nothing.
    """
    held: dict[str, Tensor] = dict(
        itertools.chain(module.named_parameters(remove_duplicate=False), module.named_buffers(remove_duplicate=False))
    )
    if tensors is not None:
        held = {**(held if trained_in == torch.float32 else {}), **tensors}
    return {
        name: value.detach()
        for name, value in held.items()
        if name not in trained and value.is_floating_point() and value.dtype != trained_in
    }


def put(module: nn.Module, name: str, value: Tensor) -> None:
    """Put a value in the place of a parameter or buffer, whatever its dtype."""
    holder, _, leaf = name.rpartition(".")
    part = module.get_submodule(holder)
    if leaf in part._parameters:
        part._parameters[leaf] = nn.Parameter(value, requires_grad=False)
    elif leaf in part._buffers:
        part._buffers[leaf] = value
