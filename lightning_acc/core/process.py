"""This process: its threads and its memory."""

from __future__ import annotations

import os
import re
import resource
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch


@contextmanager
def threads(count: int) -> Iterator[None]:
    """In here torch computes on ``count`` threads: the last bits of a product depend on how it is divided."""
    before = torch.get_num_threads()
    torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextmanager
def as_recorded(manifest: Mapping[str, Any]) -> Iterator[None]:
    """In here torch computes as where the record of this manifest was made: on as many threads, multiplying as precisely."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(manifest.get("matmul_precision", before))
    try:
        with threads(manifest["threads"]):
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def as_scored(count: int = 1) -> Iterator[None]:
    """In here torch computes as every score is computed: on ``count`` threads, and differentiably.

    One thread, unless steps are worth more (``Replay.threads``), whoever calls: the workers of a machine then share
    its cores, small products do not wait for each other, and the bits of the scores do not depend on where they were computed.
    """
    with threads(count), torch.enable_grad():
        yield


_NO_MEMORY = re.compile(r"out of memory|not enough memory|can.?t allocate memory|cannot allocate memory", re.I)


def is_out_of_memory(error: BaseException | None) -> bool:
    """Whether an error says that memory was short: Python's, torch's on the CPU or on a GPU, or Ray's."""
    if error is None:
        return False
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return isinstance(error, (RuntimeError, OSError)) and bool(_NO_MEMORY.search(str(error)))


def peak_memory_gb() -> float:
    """Largest resident size of this process so far."""
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20


def available_bytes() -> float:
    """Memory of this machine that processes can still have; all of it where the system does not say."""
    try:
        with open("/proc/meminfo", encoding="ascii") as file:
            return next(int(line.split()[1]) * 2**10 for line in file if line.startswith("MemAvailable"))
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))


def resident_bytes() -> float:
    """Size of this process now; the largest it has been where that is all there is."""
    try:
        with open("/proc/self/statm", encoding="ascii") as file:
            return int(file.read().split()[1]) * resource.getpagesize()
    except OSError:
        return peak_memory_gb() * 2**30
