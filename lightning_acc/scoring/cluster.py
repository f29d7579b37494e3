"""Pieces of work, done in this process or farmed out by Ray. Knows no mathematics; the only part that imports Ray.

Ray distributes; what is decided here is what becomes of a piece whose worker dies, runs out of memory or hangs: it is given
out again, a few times, smaller where memory was short, and at last reported as failed while the others go on.
"""

from __future__ import annotations

import logging
import os
import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from lightning_acc import arguments
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.errors import InfluenceError, RequestError
from lightning_acc.extras import extra
from lightning_acc.scoring.worker import Desk, Done, work_for_desk, work_in_steps

if TYPE_CHECKING:
    from lightning_acc.progress import Progress

TRIES = 4
"""How often a piece is given out before it counts as failed."""
MOST_HALVINGS = 6
"""How often a piece that ran out of memory is made smaller: where a 64th of it does not fit, less will not."""
SECONDS_TO_MAKE_ROOM = 2.0
"""Pause before a piece whose result found the object store full is given out again; twice as long every time."""
SECONDS_UNTIL_HUNG = 600.0
"""Without a word from a piece that is being worked on, its worker counts as hung."""
SECONDS_TO_UNPACK = 600.0
"""Without a word from a piece that is being unpacked, which imports what it needs, its worker counts as hung, too."""

Work = Callable[[Any, Any, Callable[[float], None]], Any]
"""A function ``(job, piece, progress) -> result`` that can be imported; ``progress`` is told the fraction done."""
Split = Callable[[Any], list[Any]]
"""Makes smaller pieces of one; the piece alone where it cannot be made smaller."""


@dataclass(frozen=True)
class Failure:
    """In place of the result of a piece that could not be done."""

    reason: str


def each(
    work: Work,
    job: Any,
    pieces: Sequence[Any],
    address: str | None,
    bar: Progress,
    split: Split = lambda piece: [piece],
    gpu: float = 0.0,
    threads: int = 1,
) -> Iterator[tuple[Any, Any]]:
    """``work(job, piece, progress)`` for every piece: yields each with its result, as they are done.

    Args:
        work: what to do.
        job: what all pieces share; Ray ships it once.
        pieces: what to do it with.
        address: of the Ray cluster, see ``connect``; None does it in this process.
        bar: is told how far the pieces are.
        split: makes smaller pieces of one that ran out of memory; these are yielded in its place.
        gpu: what each asks of a card for itself, from 0 for none to 1.
        threads: that a piece can use, at most. Where these are several, the job's field ``threads`` tells each how many it has:
            all of them in this process, which does one piece after the other; CPUs of the cluster, see ``cpus_for``.

    Raises:
        RequestError: the cluster cannot be reached, or has no CPU, or no GPU where one is asked for.
        InfluenceError: what a piece raised; the others are stopped.
    """
    if address is None:
        job = replace(job, threads=threads) if threads > 1 else job
        for i, piece in enumerate(pieces):
            yield from _here(work, job, piece, bar.of(i), split)
    elif pieces:
        bar.note(f"connecting to Ray ({address})")
        with connect(address) as ray:
            if gpu and not ray.cluster_resources().get("GPU", 0):
                raise RequestError(f"The Ray cluster at {address!r} has no GPU: add a node with one, or give device='cpu'.")
            cpus = cpus_for(ray, len(pieces), threads)
            job = replace(job, threads=cpus) if cpus > 1 else job
            yield from _Farm(ray, work, job, bar, split, gpu, cpus).run(pieces)


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


def _here(
    work: Work, job: Any, piece: Any, progress: Callable[[float], None], split: Split, halvings: int = 0
) -> Iterator[tuple[Any, Any]]:
    """One piece, in this process; in smaller ones where memory was short."""
    try:
        result = work(job, piece, progress)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
        smaller = split(piece) if halvings < MOST_HALVINGS else [piece]
        if len(smaller) == 1:
            result = Failure(_out_of_memory(error))
        else:
            for part in smaller:
                yield from _here(work, job, part, progress, split, halvings + 1)
            return
    yield piece, result


@dataclass
class _Task:
    """A piece that is being worked on.

    Attributes:
        part: which of the original pieces it belongs to.
        piece: what it is.
        tries: how often it has been given out.
        messages: Ray's stream of what the worker says; by ``ray://`` only the last, the result.
        number: names it at the desk.
        halvings: how often it has been made smaller.
        heard: when it last said something; None before it begins.
        done: the fraction of it that is done; None until it is unpacked.
    """

    part: int
    piece: Any
    tries: int
    messages: Any
    number: int
    halvings: int = 0
    heard: float | None = None
    done: float | None = None

    @property
    def patience(self) -> float:
        """Seconds after which it counts as hung where it says nothing."""
        return SECONDS_TO_UNPACK if self.done is None else SECONDS_UNTIL_HUNG


class _Farm:
    def __init__(self, ray: Any, work: Work, job: Any, bar: Progress, split: Split, gpu: float, cpus: int) -> None:
        self._ray, self._bar, self._split = ray, bar, split
        try:
            # In bytes, as whoever unpacks it must have set up its path before.
            self._shared = ray.put(ray.cloudpickle.dumps((work, job)))
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise RequestError(
                f"Ray's object store has no room for what the workers share ({_reason(error)}): free some, or start Ray with a "
                "larger object_store_memory."
            ) from error
        # Tries are counted here: Ray's own would neither split a piece nor notice one that hangs.
        options = {"num_cpus": cpus, "num_gpus": gpu, "max_retries": 0}
        self._remote = ray.remote(work_in_steps).options(num_returns="streaming", **options)
        self._desk: Any = None
        self._by_ray_client = ray.util.client.ray.is_connected()  # ray://, which has no streams
        if self._by_ray_client:
            self._desk = ray.remote(Desk).options(num_cpus=0).remote()
            self._remote = ray.remote(work_for_desk).options(**options)
        self._running: list[_Task] = []
        self._started = 0

    def run(self, pieces: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        shares = [1] * len(pieces)
        finished = [0.0] * len(pieces)
        try:
            self._running = [self._start(part, piece, 1) for part, piece in enumerate(pieces)]
            while self._running:
                ready, _ = self._ray.wait([t.messages for t in self._running], num_returns=1, timeout=1.0, fetch_local=False)
                for task in [task for task in self._running if task.messages in ready]:
                    outcome = self._hear(task)
                    if isinstance(outcome, Done):
                        self._running.remove(task)
                        finished[task.part] += 1
                        yield task.piece, outcome.result
                    elif isinstance(outcome, Exception):
                        self._running.remove(task)
                        short = is_out_of_memory(outcome)
                        smaller = self._split(task.piece) if short and task.halvings < MOST_HALVINGS else [task.piece]
                        if len(smaller) == 1 and task.tries >= TRIES:
                            finished[task.part] += 1
                            yield task.piece, Failure(_out_of_memory(outcome) if short else _reason(outcome))
                        else:
                            shares[task.part] += len(smaller) - 1
                            pause = SECONDS_TO_MAKE_ROOM * 2 ** (task.tries - 1) if self._no_room(outcome) else 0.0
                            halvings = task.halvings + (len(smaller) > 1)
                            tries = 1 if len(smaller) > 1 else task.tries + 1
                            self._running += [self._start(task.part, piece, tries, pause, halvings) for piece in smaller]
                self._read_desk()
                for task in self._running:
                    if task.heard is not None and time.monotonic() - task.heard > task.patience:
                        self._give_up(task)
                for part in range(len(pieces)):
                    done = finished[part] + sum(task.done or 0.0 for task in self._running if task.part == part)
                    self._bar.update(part, min(1.0, done / shares[part]))
        finally:
            for task in self._running:
                self._ray.cancel(task.messages, force=False)

    def _start(self, part: int, piece: Any, tries: int, pause: float = 0.0, halvings: int = 0) -> _Task:
        self._started += 1
        desk = () if self._desk is None else (self._desk, self._started)
        messages = self._remote.remote(self._shared, piece, sys.path, pause, *desk)
        return _Task(part, piece, tries, messages, self._started, halvings)

    def _read_desk(self) -> None:
        if self._desk is not None:
            try:
                said = self._ray.get(self._desk.collect.remote())
            except self._ray.exceptions.RayError:  # gone with its node: pieces are done all the same
                self._desk = None
                return
            for task in self._running:
                if task.number in said:
                    task.heard, task.done = time.monotonic(), said[task.number]

    def _no_room(self, error: BaseException | None) -> bool:
        return isinstance(error, (self._ray.exceptions.ObjectStoreFullError, self._ray.exceptions.OutOfDiskError))

    def _hear(self, task: _Task) -> Done | Exception | None:
        """What the worker says next: the result, what it failed of, or None for progress."""
        exceptions = self._ray.exceptions
        try:
            message = self._ray.get(task.messages if self._by_ray_client else next(task.messages))
        except StopIteration:
            return ChildProcessError("its worker ended without a result")
        except exceptions.RayTaskError as error:
            cause: Exception = error.cause
            if isinstance(cause, InfluenceError):
                raise cause from None
            # What Ray itself failed at, such as bringing over what the workers share, may go better elsewhere.
            if is_out_of_memory(cause) or isinstance(cause, exceptions.RayError):
                return cause
            raise
        except exceptions.TaskCancelledError:
            return TimeoutError(f"its worker said nothing for {task.patience:.0f} s")
        except exceptions.RayError as error:  # the worker, its node or what it made is lost
            return error if isinstance(error, Exception) else None
        task.heard = time.monotonic()
        if isinstance(message, Done):
            return Done(pickle.loads(message.result))
        task.done = message
        return None

    def _give_up(self, task: _Task) -> None:
        task.heard = None
        self._ray.cancel(task.messages, force=True)


def _out_of_memory(error: BaseException) -> str:
    return f"it ran out of memory ({_reason(error)}): give a smaller memory_gb, or a machine with more"


def _reason(error: BaseException) -> str:
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__


@contextmanager
def connect(address: str) -> Iterator[Any]:
    """Ray at ``address``; a local one is started here and stopped at the end, also by Ctrl-C.

    Where Ray is connected already, that connection is used and left open: hold one around several calls to start it once.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # by default 20: a busy machine may take longer
    with extra("compute in this process, with ray_address=None (--ray-address null)"):
        import ray
    arguments.ray_address(address)
    ours = not ray.is_initialized()
    if ours:
        _initialise(ray, address)
    try:
        if ray.cluster_resources().get("CPU", 0) < 1:
            raise RequestError(f"The Ray cluster at {address!r} has no CPU to work on: add a node, or use another cluster.")
        yield ray
    finally:
        if ours:
            ray.shutdown()


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
