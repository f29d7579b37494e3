"""Gradient checkpointing (``torch.utils.checkpoint``) is left out where a module is called as a pure function.

A checkpointed layer is computed again on the way back, when the parameters it was called with are out of the module's sight
already: it would see others, or fail. What it computes is the same without, random numbers included; it takes more memory.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.utils.checkpoint


class _Directly:
    """Stands in for the autograd function of checkpoints with ``use_reentrant=True``."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve_rng_state: bool, *args: Any) -> Any:
        return function(*args)


def _nothing_around(*_: Any, **__: Any) -> Iterator[None]:
    """Stands in for what checkpoints with ``use_reentrant=False`` do before and after the layer is called."""
    yield


_INSTEAD = {"CheckpointFunction": _Directly, "_checkpoint_without_reentrant_generator": _nothing_around}


@contextmanager
def kept_activations() -> Iterator[None]:
    """In here a checkpointed layer keeps its activations, as any other does."""
    place = vars(torch.utils.checkpoint)
    before = {name: place[name] for name in _INSTEAD if name in place}
    place.update({name: _INSTEAD[name] for name in before})
    try:
        yield
    finally:
        place.update(before)
