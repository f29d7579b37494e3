"""Modules as they were before ``torch.compile``: F is differentiated twice and vectorised, which compiled code is not."""

from __future__ import annotations

import contextlib
import copy
import inspect
import sys
from contextlib import AbstractContextManager
from typing import Any, TypeVar

import torch
from torch import nn

Module = TypeVar("Module", bound=nn.Module)
ORIGINAL = "_orig_mod"
"""Where what ``torch.compile`` returns holds the module it was given; a part of the names of all that is below."""
COMPILED = "_torchdynamo_orig_callable"
"""What functions that ``torch.compile`` returns have."""
CONTEXT = "_compiler_ctx"
"""Where Lightning keeps how a LightningModule was compiled, and what its methods were before."""


def is_compiled(module: nn.Module) -> bool:
    """Whether the module, one of its parts or a method of theirs is compiled; other functions it calls may be all the same."""
    if getattr(module, CONTEXT, None) is not None:
        return True
    parts = list(module.modules())
    if any(ORIGINAL in part._modules or part._compiled_call_impl is not None for part in parts):
        return True
    held = (value for part in parts for kind in (part, *type(part).__mro__) for value in vars(kind).values())
    return any(inspect.isfunction(value) and hasattr(value, COMPILED) for value in held)


def plain_name(name: str) -> str:
    """The name of a parameter, buffer or submodule in the module as it was before it was compiled."""
    return ".".join(part for part in name.split(".") if part != ORIGINAL)


def plain_copy(module: Module, memo: dict[int, Any] | None = None) -> Module:
    """A copy of a LightningModule, without its trainer, in which nothing is compiled; ``memo`` is that of ``deepcopy``."""
    module = module._modules.get(ORIGINAL, module)  # type: ignore[assignment]
    trainer = module.__dict__.get("_trainer")
    if trainer is not None:
        module.__dict__["_trainer"] = None
    copies: dict[int, Any] = {**(memo or {}), id(module.__dict__.get(CONTEXT)): None}
    try:
        for part in reversed(list(module.modules())):  # what is inside comes first
            if ORIGINAL in part._modules:
                copies[id(part)] = copy.deepcopy(part._modules[ORIGINAL], copies)
        twin: Module = copy.deepcopy(module, copies)
    finally:
        if trainer is not None:
            module.__dict__["_trainer"] = trainer
    for before in module.__dict__.get(CONTEXT) or {}:  # "original_training_step": the compiled one hides that of the class
        twin.__dict__.pop(before.removeprefix("original_"), None)
    return twin


def eagerly() -> AbstractContextManager[Any]:
    """In here functions that are compiled are called as they are written."""
    if "torch._dynamo" not in sys.modules:  # importing it takes seconds, and whoever compiles has
        return contextlib.nullcontext()
    stance: AbstractContextManager[Any] = torch.compiler.set_stance("force_eager")
    return stance
