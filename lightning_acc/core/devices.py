"""Where a run is replayed: on the CPU, or on a GPU. ``Replay`` alone moves data there."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_acc.arguments import memory_bytes, shown
from lightning_acc.core.process import available_bytes, peak_memory_gb
from lightning_acc.errors import RequestError, RunError
from lightning_acc.record.record import Record

CPU = torch.device("cpu")
AUTO, CUDA = "auto", "cuda"
KINDS = [CPU.type, CUDA]
CONTEXT_BYTES = 2**29
"""What a process takes of a card beside its tensors."""
ON_CPU = 2 * 2**30
"""Bytes that ``"auto"`` is on the CPU, wherever it is asked: the same pieces, and the same bits."""


def chosen(device: str, run: Record) -> torch.device:
    """Where to replay ``run``, asked for ``"auto"`` (a GPU where there is one), ``"cpu"``, ``"cuda"`` or ``"cuda:1"``.

    A forward pass that drew random numbers draws them again on the kind of device alone that it drew them on.

    Raises:
        RequestError: there is no such device, or not the one that the random numbers were drawn on.
    """
    auto = isinstance(device, str) and device == AUTO
    place = _named((CUDA if count(CUDA) else CPU.type) if auto else device)
    bound = _bound(run, place.type)
    if bound is None:
        return place
    if auto and count(bound):
        return torch.device(bound)
    raise RequestError(
        f"The training of {run.path} drew random numbers (dropout) on {bound}, and {place.type} draws others: give "
        f"device={bound!r}{'' if count(bound) else ', on a machine that has one'}."
    )


def recorded_on(run: Record) -> torch.device:
    """Where the run was trained, if that is here; else the CPU."""
    recorded = str(run.manifest.get("device", CPU.type))
    return torch.device(recorded) if count(recorded) else CPU


def count(kind: str) -> int:
    """How many devices of a kind this machine has."""
    return int(torch.get_device_module(kind).device_count())


def _named(device: object) -> torch.device:
    """The device of this name, where this machine has it.

    Raises:
        RequestError: it has none.
    """
    found = re.fullmatch(r"(\w+)(?::([0-9]{1,4}))?", device) if isinstance(device, str) else None
    kind, number = found.groups() if found else (None, None)
    if kind not in KINDS or (number and kind != CUDA):
        raise RequestError(
            f"There is no device {shown(device)}: give 'auto', 'cpu', 'cuda', or one of several GPUs, such as 'cuda:1'."
        )
    if int(number or 0) >= count(kind):
        has = f"torch finds {count(kind) or 'no'} GPU here"
        raise RequestError(f"device={device!r} cannot be used, as {has}: give device='cpu', or a machine with that GPU.")
    return torch.device(str(device))


def _bound(run: Record, wanted: str) -> str | None:
    """The kind of device that the run can be replayed on alone, where that is not the one ``wanted``."""
    recorded = str(run.manifest.get("device", CPU.type))
    if wanted == recorded:
        return None
    drawn = {kind for step in run.steps for given in step.rng for kind in given}
    return recorded if recorded in drawn else None


States = dict[str, Tensor]
"""States of random number generators, uint8, by the kind of device they are of."""


def states(device: torch.device) -> States:
    """Of the generators that what computes on ``device`` draws from: the CPU's and its own."""
    return {place.type: _generator(place).get_state() for place in _places(device)}


def in_use() -> torch.device:
    """The GPU, where this process has begun to use one; else the CPU."""
    found = torch.accelerator.current_accelerator()
    if found is None or found.type not in KINDS or not torch.get_device_module(found).is_initialized():
        return CPU
    return torch.device(found.type, torch.get_device_module(found).current_device())


@contextmanager
def drawing(given: States, device: torch.device) -> Iterator[None]:
    """In here generators are in these states; afterwards they are as they were before.

    Raises:
        RunError: they are of a GPU, and ``device`` is none.
    """
    missing = [kind for kind in given if kind not in (CPU.type, device.type)]
    if missing:
        raise RunError(
            f"The forward passes of this run drew random numbers on {missing[0]}, which cannot be drawn on {device.type}: give "
            f"device={missing[0]!r}, on a machine that has one."
        )
    with generators_kept(device, enabled=bool(given)):
        for place in {CPU, device}:
            if place.type in given:
                _generator(place).set_state(given[place.type])
        yield


@contextmanager
def generators_kept(device: torch.device, enabled: bool = True) -> Iterator[None]:
    """In here torch may draw random numbers, on the CPU and on ``device``: afterwards it goes on as if it had not."""
    before = states(device) if enabled else {}
    try:
        yield
    finally:
        for place in _places(device) if enabled else ():
            _generator(place).set_state(before[place.type])


def seed(device: torch.device, number: int) -> None:
    """What is drawn next, on the CPU and on ``device``, follows from this number alone."""
    for place in _places(device):
        _generator(place).manual_seed(number)


def _places(device: torch.device) -> tuple[torch.device, ...]:
    return (CPU,) if device == CPU else (CPU, device)


def _generator(device: torch.device) -> torch.Generator:
    """The one that is drawn from on a device, unless one of its own is given."""
    if device == CPU:
        return torch.default_generator
    module = torch.get_device_module(device)
    found: torch.Generator = module.default_generators[module.current_device() if device.index is None else device.index]
    return found


def of_worker(device: torch.device) -> torch.device:
    """The same for a worker of Ray, which sees the card that it was given alone."""
    return torch.device(device.type)


def share(device: torch.device, memory: int) -> float:
    """How much of a card is needed to compute with ``memory`` bytes there, from 0 for none to 1."""
    if device.type != CUDA:
        return 0.0
    whole = torch.cuda.get_device_properties(device).total_memory
    return min(1.0, math.ceil(100 * (memory + CONTEXT_BYTES) / whole) / 100)


def budget(memory_gb: object, device: torch.device, least: int = 0) -> int:
    """``memory_gb`` in bytes: ``"auto"`` is half of what is free of a GPU, where two pieces then fit, and 2 GB on the CPU, or a
    tenth more than ``least`` bytes, which the work cannot do without, where these are more but half of what is free.

    Raises:
        RequestError: it is no positive number.
    """
    if not (isinstance(memory_gb, str) and memory_gb == AUTO):
        return memory_bytes(memory_gb)
    if device.type != CUDA:
        needed = int(1.1 * least)
        return needed if ON_CPU < needed <= available_bytes() // 2 else ON_CPU
    kept = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)  # by torch, for what comes next
    return max(1, (torch.cuda.mem_get_info(device)[0] + kept) // 2 - CONTEXT_BYTES)


def peak_gb(device: torch.device) -> float:
    """The most memory that this process had so far: its own, or that of the card it computes on."""
    return torch.cuda.max_memory_allocated(device) / 2**30 if device.type == CUDA else peak_memory_gb()


def wait_for(device: torch.device) -> None:
    """Until a GPU has done all that it was asked: before a clock is read."""
    if device.type == CUDA:
        torch.cuda.synchronize(device)
