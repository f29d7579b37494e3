"""Weight normalisation that can be differentiated twice: the second derivative of torch's own operation is a wrong one.

Its backward takes the norms for numbers that nothing has made (torch 2.13, ``gradgradcheck`` fails). Where a replay is
``traceable`` the weight is therefore made of simple operations, and elsewhere as in training, to the last bit.
"""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.parametrizations import _WeightNorm
from torch.nn.utils.weight_norm import WeightNorm

from lightning_acc.core.losses.tracing import is_traced


def normalise_differentiably(module: nn.Module) -> None:
    """Have the copy ``module`` make its normalised weights by ``weight_norm``."""
    for part in module.modules():
        if isinstance(part, _WeightNorm):
            part.__dict__["forward"] = partial(_of_parametrization, -1 if part.dim is None else part.dim)
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
