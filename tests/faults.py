"""Work that goes wrong in the ways workers do, each time once; imported by the workers of a real cluster."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from lightning_acc.removals import Removal
from lightning_acc.work import Result, compute

PLACE = "LIGHTNING_ACC_TEST_FAULTS"
"""Environment variable: a folder with a file ``<first sample of the chunk>`` holding the fault, taken away when it strikes."""


def faulty(job: Any, removals: list[Removal], progress: Callable[[float], None], replay: Any = None) -> Result:
    """``compute``, after the fault that waits for this chunk."""
    fault = Path(os.environ[PLACE]) / str(removals[0][0])
    kind = fault.read_text() if fault.exists() else ""
    if kind and kind != "killed always":
        fault.unlink()
    progress(0.1)
    if kind.startswith("killed"):
        os.kill(os.getpid(), signal.SIGKILL)
    if kind == "memory":
        raise MemoryError("no more")
    if kind == "hangs" or (kind.startswith("hangs on ") and kind.endswith(_node())):
        with open(Path(os.environ[PLACE]) / "hanging", "a") as file:
            file.write(f"{removals[0][0]}-{removals[-1][0]}\n")
        time.sleep(600)
    if kind == "slow":
        time.sleep(3)
    with open(Path(os.environ[PLACE]) / "computed", "a") as file:
        file.write(f"{removals[0][0]}-{removals[-1][0]}\n")
    return compute(job, removals, progress, replay)


def _node() -> str:
    import ray

    identity: str = ray.get_runtime_context().get_node_id()
    return identity
