"""Work that goes wrong in the ways workers do, each time once; imported by the workers of a real cluster."""

from __future__ import annotations

import errno
import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from lightning_acc.core.removals import Removal
from lightning_acc.methods.rules import LeaveOneOut
from lightning_acc.record.store import Store
from lightning_acc.scoring.work import Result, compute

PLACE = "LIGHTNING_ACC_TEST_FAULTS"
"""Environment variable: a folder with a file ``<first sample of the chunk>`` holding the fault, taken away when it strikes.

Without it, the folder ``faults`` beside the run.
"""


def place_of(job: Any) -> Path:
    return Path(os.environ.get(PLACE) or Path(job.run.path).parent / "faults")


def faulty(job: Any, removals: list[Removal], progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute``, after the fault that waits for this chunk."""
    place = place_of(job)
    fault = place / str(removals[0][0])
    kind = fault.read_text() if fault.exists() else ""
    if kind and not kind.endswith("always"):
        fault.unlink(missing_ok=True)
    progress(0.1)
    if kind.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        raise MemoryError("no more")
    if kind == "full":
        from ray.exceptions import ObjectStoreFullError

        raise ObjectStoreFullError("no room")
    if kind in ("hangs", "hangs always"):
        time.sleep(600)
    if kind.startswith("hangs on "):
        _hang_on(place, kind.split()[-1], _name(removals), progress)
    if kind == "storage":
        _disturb(place, job.run.store)
    if kind == "slow":
        time.sleep(3)
    _note(place, "computed", _name(removals))
    result = compute(job, removals, progress, replay)
    if kind == "diverges":
        result.scores[0] = np.nan
    return result


def _name(removals: list[Removal]) -> str:
    return f"{removals[0][0]}-{removals[-1][0]}"


def _note(place: Path, what: str, text: str) -> None:
    with open(place / what, "a") as file:
        file.write(f"{text}\n")


def _hang_on(place: Path, node: str, name: str, progress: Callable[[float], None]) -> None:
    """On that node, hang; on another one, wait until that one does."""
    import ray

    if ray.get_runtime_context().get_node_id() == node:
        _note(place, "hanging", name)
        time.sleep(600)
    while not (place / "hanging").exists():
        progress(0.1)
        time.sleep(0.1)


def _disturb(place: Path, store: Store) -> None:
    """Let the next two reads find the storage busy."""
    files = store.filesystem
    reads = files.cat_file

    def busy(path: str, *arguments: Any, **options: Any) -> Any:
        _note(place, "busy", path)
        if len((place / "busy").read_text().splitlines()) == 2:
            files.cat_file = reads
        raise OSError(errno.EBUSY, "Please reduce your request rate")

    files.cat_file = busy


def noted_node(job: Any, removals: list[Removal], progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute``, after two nodes have been noted: a quick one would do all the work before the other has begun."""
    import ray

    place = place_of(job)
    _note(place, "nodes", ray.get_runtime_context().get_node_id())
    started = time.monotonic()
    while len(set((place / "nodes").read_text().split())) < 2 and time.monotonic() - started < 60:
        progress(0.1)
        time.sleep(0.1)
    return compute(job, removals, progress, replay)


def slowly(job: Any, removals: list[Removal], progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute`` of ``loo``, a second a step; that it has begun is noted at the first step."""
    advance = LeaveOneOut.advance

    def slow(self: LeaveOneOut, *arguments: Any) -> Any:
        _note(place_of(job), "begun", _name(removals))
        time.sleep(1)
        return advance(self, *arguments)

    LeaveOneOut.advance = slow  # type: ignore[method-assign]
    return compute(job, removals, progress, replay)
