"""This process: its threads and its memory."""

from __future__ import annotations

import ctypes
import os
import re
import resource
import sys
import threading
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


_KEPT = threading.RLock()
_inside = 0
"""How many are in ``memory_kept`` just now."""
TRIM_THRESHOLD, MMAP_THRESHOLD, MMAP_MAX = -1, -3, -4
"""Parameters of glibc's ``mallopt``."""


def _told(options: Mapping[int, int], trim: bool = False) -> None:
    """Tell the C library's allocator, where it is glibc's; others have their own ways to keep memory."""
    if sys.platform != "linux":
        return
    library = ctypes.CDLL(None)
    if hasattr(library, "mallopt") and hasattr(library, "malloc_trim"):
        for option, value in options.items():
            library.mallopt(option, value)
        if trim:
            library.malloc_trim(0)


@contextmanager
def memory_kept() -> Iterator[None]:
    """In here memory that tensors gave back stays with the process for the next ones, and goes back to the system at the end.

    A large tensor is otherwise mapped anew every time, page by page: to write 22.7M parameters then takes up to four times as
    long. What comes after finds the allocator as it makes itself once a large tensor was freed.
    """
    global _inside
    with _KEPT:
        _inside += 1
        if _inside == 1:
            _told({MMAP_MAX: 0, TRIM_THRESHOLD: 2**31 - 1})
    try:
        yield
    finally:
        with _KEPT:
            _inside -= 1
            if _inside == 0:
                _told({MMAP_MAX: 65536, MMAP_THRESHOLD: 2**25, TRIM_THRESHOLD: 2**26}, trim=True)


@contextmanager
def as_recorded(manifest: Mapping[str, Any]) -> Iterator[None]:
    """In here torch computes as where the record of this manifest was made: on as many threads, multiplying as precisely."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(manifest.get("matmul_precision", before))
    try:
        with threads(manifest["threads"]), memory_kept():
            yield
    finally:
        torch.set_float32_matmul_precision(before)


@contextmanager
def as_scored(count: int = 1) -> Iterator[None]:
    """In here torch computes as every score is computed: on ``count`` threads, and differentiably.

    One thread, unless steps are worth more (``Replay.threads``), whoever calls: the workers of a machine then share
    its cores, small products do not wait for each other, and the bits of the scores do not depend on where they were computed.
    """
    with threads(count), memory_kept(), torch.enable_grad():
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
