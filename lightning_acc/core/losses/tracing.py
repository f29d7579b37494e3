"""In what context losses are computed that are vectorised, or differentiated twice; and what autograd keeps of them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_acc.core.devices import generators_kept


@contextmanager
def traceable() -> Iterator[None]:
    """In here operations are chosen that can be vectorised and differentiated twice, without warnings that some are slow.

    Flash attention has no second derivative, and the fused transformer layer cannot be vectorised.
    """
    fused = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with sdpa_kernel(SDPBackend.MATH), quiet():
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fused)


@contextmanager
def quiet() -> Iterator[None]:
    """In here torch does not warn that an operation is vectorised by a loop, or about its own deprecations."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="There is a performance drop")
        warnings.filterwarnings("ignore", message=".*torch.jit.script. is deprecated", category=DeprecationWarning)
        yield


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
