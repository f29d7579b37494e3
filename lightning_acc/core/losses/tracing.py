"""In what context losses are computed that are vectorised, or differentiated twice; and what autograd keeps of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from lightning_acc.core.devices import generators_kept

_TRACED: ContextVar[bool] = ContextVar("whether operations are vectorised, or differentiated twice", default=False)


def is_traced() -> bool:
    """Whether this is ``traceable``."""
    return _TRACED.get()


@contextmanager
def traceable() -> Iterator[None]:
    """In here operations are chosen that can be vectorised and differentiated twice, without warnings that some are slow.

    Flash attention has no second derivative, and the fused transformer layer cannot be vectorised.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    before = _TRACED.set(True)
    try:
        with sdpa_kernel(SDPBackend.MATH), quiet():
            yield
    finally:
        _TRACED.reset(before)
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def quiet() -> Iterator[None]:
    """In here torch does not warn that an operation is vectorised by a loop, or about its own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=DeprecationWarning)
        yield


class Multiplications(TorchDispatchMode):
    """Counts the multiplications of matrix products and convolutions in here.

    As torch's own counter does; but that hangs on to modules by hooks, which a loss that takes gradients itself runs into.
    """

    def __init__(self) -> None:
        super().__init__()
        self.total = 0.0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        flops = flop_registry.get(func._overloadpacket)
        self.total += 0 if flops is None else flops(*args, **(kwargs or {}), out_val=result) / 2
        return result


def saved_bytes(function: Callable[[Tensor], Tensor], theta: Tensor, shared: Iterable[Tensor] = ()) -> int:
    """Bytes autograd keeps to differentiate ``function`` at ``theta`` (p,), without those of ``theta`` and ``shared``."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    leaf = theta.detach().requires_grad_()
    with generators_kept(theta.device), torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(leaf)
    for tensor in (leaf, *shared):
        kept.pop(tensor.untyped_storage().data_ptr(), None)
    del output
    return sum(kept.values())
