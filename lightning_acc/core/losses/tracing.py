"""In what context losses are computed that are vectorised, or differentiated twice."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel


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
