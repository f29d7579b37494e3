"""Pieces in the workers of Ray, and what becomes of one whose worker dies, runs out of memory or hangs.

It is given out again, a few times, smaller where memory was short, and at last reported as failed while the others go on.
"""

from __future__ import annotations

import pickle
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from lightning_acc.core.process import is_out_of_memory
from lightning_acc.errors import InfluenceError, OtherRankLost, RequestError
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


class Farm:
    """The pieces that are worked on.

    Args:
        ray: connected.
        work: what is done with each.
        job: what all pieces share.
        bar: is told how far they are.
        split: makes smaller pieces of one that ran out of memory.
        gpu: what a process asks of a card for itself.
        cpus: what it asks for of these.
        beside: processes that work on a piece beside its worker.

    Raises:
        RequestError: Ray has no room for what they share.
    """

    def __init__(
        self, ray: Any, work: Work, job: Any, bar: Progress, split: Split, gpu: float, cpus: int, beside: int = 0
    ) -> None:
        self._ray, self._bar, self._split = ray, bar, split
        try:
            # In bytes, as whoever unpacks it must have set up its path before.
            self._shared = ray.put(ray.cloudpickle.dumps((work, job)))
        except (ray.exceptions.ObjectStoreFullError, ray.exceptions.OutOfDiskError) as error:
            raise RequestError(
                f"Ray's object store has no room for what the workers share ({reason(error)}): free some, or start Ray with a "
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
        self._others = (beside, {"num_cpus": cpus, "num_gpus": gpu, "max_retries": 0})
        self._running: list[_Task] = []
        self._started = 0

    def run(self, pieces: Sequence[Any]) -> Iterator[tuple[Any, Any]]:
        """Each piece with its result, or with a ``Failure``, as they are done."""
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
                            yield task.piece, Failure(out_of_memory(outcome) if short else reason(outcome))
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
        messages = self._remote.remote(self._shared, piece, sys.path, pause, self._others, *desk)
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
            if is_out_of_memory(cause) or isinstance(cause, (exceptions.RayError, OtherRankLost)):
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


def out_of_memory(error: BaseException) -> str:
    """What is said of a piece that cannot be made small enough."""
    return f"it ran out of memory ({reason(error)}): give a smaller memory_gb, or a machine with more"


def reason(error: BaseException) -> str:
    """An error in one line."""
    return str(error).strip().partition("\n")[0].rstrip(".") or type(error).__name__
