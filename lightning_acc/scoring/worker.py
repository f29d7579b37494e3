"""What runs in a worker of Ray: a piece of the work in a thread of its own, while the worker says how far it is."""

from __future__ import annotations

import pickle
import queue
import sys
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

SECONDS_BETWEEN_REPORTS = 0.3


@dataclass(frozen=True)
class Done:
    """The result: from a worker in bytes, as Ray would keep arrays in its object store, and fill it, while they are in use."""

    result: Any


def work_in_steps(shared: bytes, piece: Any, path: list[str], pause: float) -> Iterator[Any]:
    """In a worker, after a pause: yields None once it has begun, the fraction done now and then, and the result at last."""
    time.sleep(pause)
    yield None  # it has begun: from here on it counts as hung where it is not heard, also while it unpacks
    sys.path.extend(entry for entry in path if entry not in sys.path)
    work, job = pickle.loads(shared)
    messages: queue.Queue[Any] = queue.Queue()

    def run() -> None:
        try:
            messages.put(Done(pickle.dumps(work(job, piece, lambda done: messages.put(float(done))))))
        except BaseException as error:
            messages.put(error)

    yield 0.0
    threading.Thread(target=run, daemon=True).start()
    reported = time.monotonic()
    while True:
        message = messages.get()
        if isinstance(message, BaseException):
            raise message
        if isinstance(message, Done):
            yield message
            return
        if time.monotonic() - reported > SECONDS_BETWEEN_REPORTS:
            reported = time.monotonic()
            yield message


def work_for_desk(shared: bytes, piece: Any, path: list[str], pause: float, desk: Any, number: int) -> Any:
    """``_work`` where Ray has no streams: returns the result, and leaves at the desk how far it is."""
    for message in work_in_steps(shared, piece, path, pause):
        if isinstance(message, Done):
            return message
        desk.say.remote(number, message)
    raise ChildProcessError("no result")


class Desk:
    """On the cluster: where pieces leave how far they are, until the driver collects it."""

    def __init__(self) -> None:
        self._said: dict[int, float | None] = {}

    def say(self, number: int, done: float | None) -> None:
        """A piece is done to this fraction; None while it is unpacked."""
        self._said[number] = done

    def collect(self) -> dict[int, float | None]:
        """What was said since the last time, by the number of the piece."""
        said, self._said = self._said, {}
        return said
