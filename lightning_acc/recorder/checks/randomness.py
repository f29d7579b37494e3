"""What the recorder does draws no random number that the training would have drawn: its generators are put back."""

from __future__ import annotations

import functools
import inspect
import random
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch

from lightning_acc.core.devices import generators_kept, in_use

DEPTH = 3
"""How far below an object its generators are looked for."""
MANY = 64
"""Longer containers hold data, no generators."""


@contextmanager
def random_state_kept(*holders: Any) -> Iterator[None]:
    """In here random numbers may be drawn: whatever happens, torch, NumPy and Python go on as if none had been.

    Args:
        holders: objects whose own generators (``torch.Generator``, NumPy's, ``random.Random``) are put back too: loaders,
            samplers, functions with what they are bound to.
    """
    undo = [_undo(generator) for generator in generators_of(*holders)]
    python, numpy_state = random.getstate(), np.random.get_state()
    try:
        with generators_kept(in_use()):
            yield
    finally:
        random.setstate(python)
        np.random.set_state(numpy_state)
        for put_back in undo:
            put_back()


def generators_of(*holders: Any) -> list[Any]:
    """The random number generators these objects hold, or hold something that holds."""
    found, seen, todo = [], set(), [(holder, 0) for holder in holders]
    while todo:
        thing, depth = todo.pop()
        if id(thing) in seen:
            continue
        seen.add(id(thing))
        if isinstance(thing, (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)):
            found.append(thing)
        elif depth < DEPTH:
            todo += [(part, depth + 1) for part in _parts(thing)]
    return found


def _parts(thing: Any) -> list[Any]:
    if isinstance(thing, functools.partial):
        return [thing.func, *thing.args, *thing.keywords.values()]
    if inspect.ismethod(thing):
        return [thing.__self__]
    if inspect.isfunction(thing):
        return [cell.cell_contents for cell in thing.__closure__ or () if _filled(cell)]
    if isinstance(thing, dict):
        return list(thing.values()) if len(thing) <= MANY else []
    if isinstance(thing, (list, tuple)):
        return list(thing) if len(thing) <= MANY else []
    if isinstance(thing, (torch.Tensor, type)) or inspect.ismodule(thing):
        return []
    held = getattr(thing, "__dict__", None)
    return list(held.values()) if isinstance(held, dict) else []


def _filled(cell: Any) -> bool:
    try:
        return cell.cell_contents is not None
    except ValueError:
        return False


def _undo(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, torch.Generator):
        return functools.partial(generator.set_state, generator.get_state())
    if isinstance(generator, random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    if isinstance(generator, np.random.RandomState):
        return functools.partial(generator.set_state, generator.get_state())
    return functools.partial(setattr, generator.bit_generator, "state", generator.bit_generator.state)


@contextmanager
def seeded(*holders: Any, seed: int = 0) -> Iterator[None]:
    """As ``random_state_kept``; in here all generators begin at ``seed``."""
    with random_state_kept(*holders):
        torch.default_generator.manual_seed(seed)  # that of the CPU alone, which is put back
        np.random.seed(seed)
        random.seed(seed)
        for generator in generators_of(*holders):
            if isinstance(generator, torch.Generator):
                generator.manual_seed(seed)
            elif isinstance(generator, np.random.Generator):
                generator.bit_generator.state = type(generator.bit_generator)(seed).state
            else:
                generator.seed(seed)
        yield
