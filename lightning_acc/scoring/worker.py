"""What runs in a worker of Ray: a piece of the work in a thread of its own, while the worker says how far it is.

Where several processes work on a piece together, the worker that was given it is the first of them, and starts the others.
"""

from __future__ import annotations

import fcntl
import os
import pickle
import queue
import socket
import struct
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import dataclass
from typing import Any

from lightning_acc.errors import OtherRankLost

SECONDS_BETWEEN_REPORTS = 0.3
SECONDS_TO_BE_TOLD = 20.0
"""After one of several processes is lost, until what the others failed of must be known."""
SIOCGIFADDR = 0x8915
"""Asks Linux for the address of a network interface."""


@dataclass(frozen=True)
class Done:
    """The result: from a worker in bytes, as Ray would keep arrays in its object store, and fill it, while they are in use."""

    result: Any


Others = tuple[int, dict[str, Any]]
"""How many processes work on a piece beside its worker, and what Ray is told of each."""


def work_in_steps(shared: bytes, piece: Any, path: list[str], pause: float, others: Others = (0, {})) -> Iterator[Any]:
    """In a worker, after a pause: yields None once it has begun, the fraction done now and then, and the result at last."""
    time.sleep(pause)
    yield None  # it has begun: from here on it counts as hung where it is not heard, also while it unpacks
    sys.path.extend(entry for entry in path if entry not in sys.path)
    with _beside(others, shared, piece, path) as seat:
        work, job = pickle.loads(shared)
        messages: queue.Queue[Any] = queue.Queue()

        def run() -> None:
            try:
                with nullcontext(job) if seat is None else job.joined(seat) as mine:
                    messages.put(Done(pickle.dumps(work(mine, piece, lambda done: messages.put(float(done))))))
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


@contextmanager
def _beside(others: Others, shared: bytes, piece: Any, path: list[str]) -> Iterator[tuple[Any, ...] | None]:
    """In here others work on the piece beside this process: its ``core.ranks.Seat`` among them; None where there are none.

    They are started at once, as all of them must import what they need. Where one is lost, what another failed of is raised.
    """
    count, options = others
    if not count:
        yield None
        return
    import ray

    here = _own_address(ray)
    listener = socket.create_server((here, 0), backlog=count)
    port, remote = listener.getsockname()[1], ray.remote(work_beside).options(scheduling_strategy="SPREAD", **options)
    at_work = [remote.remote(shared, piece, path, (rank, 1 + count, here, port)) for rank in range(1, 1 + count)]
    try:
        yield 0, 1 + count, here, port, listener.detach()
    except BaseException as failure:
        cause = _cause(ray, at_work) if isinstance(failure, OtherRankLost) else None
        for work in at_work:
            ray.cancel(work, force=True)
        if cause is not None:
            raise cause from None
        raise


def _cause(ray: Any, at_work: list[Any]) -> BaseException | None:
    """What one of these failed of by itself; None where that is not known, or it is lost."""
    for ended in ray.wait(at_work, num_returns=len(at_work), timeout=SECONDS_TO_BE_TOLD)[0]:
        try:
            ray.get(ended)
        except ray.exceptions.RayTaskError as error:
            if not isinstance(error.cause, OtherRankLost):
                cause: BaseException = error.cause
                return cause
        except ray.exceptions.RayError:
            pass
    return None


def work_beside(shared: bytes, piece: Any, path: list[str], seat: tuple[Any, ...]) -> None:
    """In another worker: its part of the work on a piece."""
    import ray

    sys.path.extend(entry for entry in path if entry not in sys.path)
    work, job = pickle.loads(shared)
    _own_address(ray)
    with job.joined((*seat, None)) as mine:
        work(mine, piece, lambda done: None)


def _own_address(ray: Any) -> str:
    """Of this node, where gloo, too, is to listen; by itself it asks for the host's name, which may be the loopback's."""
    address = str(ray.util.get_node_ip_address())
    for _, name in socket.if_nameindex() if sys.platform == "linux" else ():
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe, suppress(OSError):
            found = fcntl.ioctl(probe.fileno(), SIOCGIFADDR, struct.pack("256s", name.encode()[:15]))
            if socket.inet_ntoa(found[20:24]) == address:
                os.environ.setdefault("GLOO_SOCKET_IFNAME", name)
    return address


def work_for_desk(shared: bytes, piece: Any, path: list[str], pause: float, others: Others, desk: Any, number: int) -> Any:
    """``work_in_steps`` where Ray has no streams: returns the result, and leaves at the desk how far it is."""
    for message in work_in_steps(shared, piece, path, pause, others):
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
