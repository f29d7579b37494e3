"""Ray: pieces of work farmed out to workers. Knows no mathematics; the only part that imports Ray."""

from __future__ import annotations

import logging
import os
import queue
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_acc.errors import InfluenceError, RequestError

if TYPE_CHECKING:
    from lightning_acc.progress import Progress

SECONDS_BETWEEN_REPORTS = 0.3


Work = Callable[[Any, Any, Callable[[float], None]], Any]
"""A function ``(job, piece, progress) -> result`` that can be imported; ``progress`` is told the fraction done."""


def map_pieces(work: Work, job: Any, pieces: Sequence[Any], address: str, bar: Progress) -> list[Any]:
    """``work(job, piece, progress)`` for every piece on the Ray cluster at ``address``; results in the order of the pieces.

    Raises:
        RequestError: the cluster cannot be reached or has no CPU.
        InfluenceError: what a piece raised; the others are stopped.
    """
    bar.note(f"connecting to Ray ({address})")
    with connect(address) as ray:
        remote = ray.remote(_work).options(num_cpus=1, num_returns="streaming", max_retries=3)
        # In a list, the reference reaches the worker as it is, and the worker can set up its path before unpacking it.
        shared = [ray.put((work, job))]
        tasks = [remote.remote(shared, piece, sys.path) for piece in pieces]
        results: list[Any] = [None] * len(tasks)
        running = dict(enumerate(tasks))
        try:
            while running:
                ready, _ = ray.wait(list(running.values()), num_returns=1, fetch_local=False)
                for i in [i for i, task in running.items() if any(task is other for other in ready)]:
                    message = _next(ray, running[i])
                    if message is None:
                        del running[i]
                    elif isinstance(message, float):
                        bar.update(i, message)
                    else:
                        results[i] = message.result
                        bar.update(i, 1.0)
        except BaseException:
            for task in running.values():
                ray.cancel(task, force=False)
            raise
        return results


@dataclass(frozen=True)
class _Done:
    result: Any


def _next(ray: Any, task: Any) -> Any:
    try:
        return ray.get(next(task))
    except StopIteration:
        return None
    except ray.exceptions.RayTaskError as error:
        if isinstance(error.cause, InfluenceError):
            raise error.cause from None
        raise


def _work(shared: list[Any], piece: Any, path: list[str]) -> Iterator[Any]:
    """In a worker: yields the fraction done now and then, and the result at last."""
    import ray

    sys.path.extend(entry for entry in path if entry not in sys.path)
    work, job = ray.get(shared[0])
    messages: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            messages.put(_Done(work(job, piece, lambda done: messages.put(float(done)))))
        except BaseException as error:
            messages.put(error)

    threading.Thread(target=run, daemon=True).start()
    reported = time.monotonic()
    while True:
        message = messages.get()
        if isinstance(message, BaseException):
            raise message
        if isinstance(message, _Done):
            yield message
            return
        if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            yield message


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Ray at ``address``; a local one is started here and stopped at the end, also by Ctrl-C.

    Where Ray is connected already, that connection is used and left open: hold one around several calls to start it once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    import ray

    if address not in ("local", "auto") and "://" not in address and ":" not in address:
        raise RequestError(f'{address!r} is no Ray address: use "local", "auto", "ray://host:port", or None for no Ray.')
    ours = not ray.is_initialized()
    if ours:
        local: dict[str, Any] = {"include_dashboard": False} if address == "local" else {}
        try:
            ray.init(address=address, logging_level=logging.ERROR, log_to_driver=False, **local)
        except ConnectionError as error:
            raise RequestError(
                f'No Ray cluster answers at {address!r} ({error}): start one with "ray start --head", or use "local".'
            ) from error
    try:
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise RequestError(f"The Ray cluster at {address!r} has no CPU to work on: add a node, or use another cluster.")
        yield ray
    finally:
        if ours:
            ray.shutdown()
