"""Ray, where it runs or started here, and what its machines have."""

from __future__ import annotations

import logging
import math
import os
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from contextvars import ContextVar
from typing import Any

from lightning_acc import arguments
from lightning_acc.errors import RequestError
from lightning_acc.extras import extra

TRIES = 4
"""How often a client is asked for where its server did not start."""
_ends: ContextVar[ExitStack | None] = ContextVar("_ends", default=None)
"""Where Ray is kept: what ends it there."""


def cpus_for(ray: Any, pieces: int, most: int) -> int:
    """How many CPUs each of so many pieces may have, ``most`` at most, while all of them are worked on at once; else 1.

    What others hold is left to them, on whichever node that is: a piece that asked for it would wait for them.
    """
    if most == 1:
        return 1
    for _ in range(20):  # what was given back just now is told a moment later
        held = ray.cluster_resources().get("CPU", 0) - ray.available_resources().get("CPU", 0)
        if not held:
            break
        time.sleep(0.1)
    nodes = [node["Resources"].get("CPU", 0) - held for node in ray.nodes() if node["Alive"]]
    return max((k for k in range(2, most + 1) if sum(max(0, cpus // k) for cpus in nodes) >= pieces), default=1)


def refuse_too_many(ray: Any, address: str, processes: int, gpu: float) -> None:
    """Refuse processes that wait for each other, where the machines of the cluster cannot take all of them at once.

    Raises:
        RequestError: they cannot.
    """
    has = [node["Resources"] for node in ray.nodes() if node["Alive"]]
    room = sum(int(min(some.get("CPU", 0), some.get("GPU", 0) / gpu if gpu else math.inf)) for some in has)
    room = max(1, room)
    if processes > room:
        what = "CPUs and GPUs" if gpu else "CPUs"
        raise RequestError(
            f"processes={processes} work at the same time, and the Ray cluster at {address!r} has {what} for {room}: give "
            f"processes={room}, or add nodes."
        )


@contextmanager
def kept() -> Iterator[None]:
    """In here Ray, once ``connect`` has started it, stays until the end; what needs none starts none.

    Its start and its workers' imports, which take as long as many a piece of work, are then paid once.
    """
    if _ends.get() is not None:
        yield
        return
    with ExitStack() as ends:
        token = _ends.set(ends)
        try:
            yield
        finally:
            _ends.reset(token)


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Ray at ``address``; a local one is started here and stopped at the end, also by Ctrl-C, or at that of ``kept``.

    Where Ray is connected already, that connection is used and left open: hold one around several calls to start it once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    # Workers compute in a thread, whose memory glibc would keep apart, and give back when it could be used again.
    os.environ.setdefault("MALLOC_ARENA_MAX", "1")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # by default 20: a busy machine may take longer
    with extra("compute in this process, with ray_address=None (--ray-address null)"):
        import ray
    arguments.ray_address(address)
    with ExitStack() as ends:
        if not ray.is_initialized():
            _initialise(ray, address)
            (_ends.get() or ends).callback(ray.shutdown)
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise RequestError(f"The Ray cluster at {address!r} has no CPU to work on: add a node, or use another cluster.")
        yield ray


def _initialise(ray: Any, address: str) -> None:
    local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
    for tries in range(1, TRIES + 1):
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
            return
        except ConnectionError as error:
            # Where Ray's proxy for ray:// forks at a bad moment, that one client's server does not start; the next one will.
            if tries == TRIES or "Starting Ray client server failed" not in str(error):
                raise RequestError(
                    f'No Ray cluster answers at {address!r} ({error}): start one with "ray start --head", or use "local".'
                ) from error
