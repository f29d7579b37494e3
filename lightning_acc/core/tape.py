"""The states of a replay for a sweep back through its steps, within any budget: in memory, on disk, by binomial checkpointing.

What memory does not hold goes to a temporary file, the earliest states first, as they are come back to last. Where the T states
do not fit there either, some are kept and the others computed again, from the nearest one before. With c kept states, and the
one that is on its way, a stretch of l steps is gone back through after

    taken(l, c) = r l - beta(c + 1, r - 1)      steps forward,      beta(c, r) = (c + r choose c),

``r`` the smallest number with ``beta(c, r) >= l``; fewer are not possible (Griewank and Walther, Algorithm 799, ACM TOMS 26,
2000).
"""

from __future__ import annotations

import shutil
import tempfile
import time
import weakref
from collections.abc import Callable, Iterator
from io import FileIO
from math import comb

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.ranks import Ranks
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step


def _repeats(length: int, kept: int) -> int:
    """``r``: the most that a step of so many is taken forward."""
    r = 0
    while comb(kept + r, kept) < length:
        r += 1
    return r


def taken(length: int, kept: int) -> int:
    """The steps forward that it takes to go back through ``length`` steps with ``kept`` states."""
    r = _repeats(length, kept)
    return r * length - comb(kept + r, kept + 1) if r else 0


def _places(first: int, last: int, kept: int) -> list[int]:
    """Where states are kept on the way to the last step before ``last``, so many as ``kept`` with the one at ``first``."""
    places = []
    while last - first > 1 and kept > 1:
        r, length = _repeats(last - first, kept), last - first
        first += max(1, comb(kept + r - 2, kept) if r > 1 else 1, length - comb(kept - 1 + r, kept - 1))
        kept -= 1
        places.append(first)
    return places


def held(replay: Replay, memory: int) -> int:
    """How many states a ``Tape`` of ``memory`` bytes holds in memory while it is gone back through: two at least, and not more
    than T."""
    return max(min(2, len(replay)), min(len(replay), memory // max(1, _bytes(replay.initial))))


def filed(replay: Replay, memory: int, disk: int | None = None) -> int:
    """How many further states it keeps in a temporary file of at most ``disk`` bytes; None: of ``room()``."""
    fit = (room() if disk is None else disk) // max(1, _bytes(replay.initial))
    return max(0, min(len(replay) - held(replay, memory), fit))


def room() -> int:
    """Bytes of a temporary file that leaves others room: a quarter of what is free."""
    return shutil.disk_usage(tempfile.gettempdir()).free // 4


def taken_again(replay: Replay, memory: int, disk: int | None = None) -> float:
    """Of a sweep back: the steps that are taken a second time, or more often, as a share of all steps."""
    total = len(replay)
    return (taken(total, _kept(replay, memory, disk)) - (total - 1)) / total if total else 0.0


def _kept(replay: Replay, memory: int, disk: int | None) -> int:
    """How many states are kept, beside the one that is on its way."""
    return max(1, held(replay, memory) - 1 + filed(replay, memory, disk))


def _bytes(state: State) -> int:
    return sum(part.nbytes for part in state)


SLOW = 5.0
"""Seconds of writing before it is asked whether the disk is worth it."""


class _Stack:
    """States by the steps they are before, the last of them in memory, the others in a file.

    Where the file takes no more, as others fill the disk, or takes longer to write than the steps themselves, what would have
    gone there is kept no longer.

    Args:
        in_memory: how many, one at least.
        most: how many in all.
        first: the state before the first step, which is there without being kept.
        ranks: the processes that keep the same states, so that all of them come by the same steps.
    """

    def __init__(self, in_memory: int, most: int, first: State, ranks: Ranks) -> None:
        self._in_memory = max(1, in_memory)
        self.most, self._first, self._ranks = most, first, ranks
        self._states: list[tuple[int, State]] = []
        self._steps: list[int] = []  # of those in the file
        self._file: FileIO | None = None
        self._full = False
        self._begun, self._writing = time.perf_counter(), 0.0

    def __len__(self) -> int:
        return len(self._steps) + len(self._states)

    @property
    def in_memory(self) -> int:
        """How many."""
        return len(self._states)

    @property
    def last(self) -> int:
        """The step that the last of them is before."""
        return self._states[-1][0] if self._states else self._steps[-1] if self._steps else 0

    def push(self, t: int, state: State) -> None:
        """One more, later than all."""
        if len(self._states) == self._in_memory:
            earliest = self._states.pop(0)
            if not self._full:
                self._write(*earliest)
        self._states.append((t, state))

    def top(self) -> State:
        """The last of them; it is in memory from now on, and in the file no more."""
        if not self._states:
            self._states.append((self._steps.pop(), self._read()) if self._steps else (0, self._first))
        return self._states[-1][1]

    def pop(self) -> State:
        """The last of them, taken off."""
        state = self.top()
        self._states.pop()
        return state

    def _write(self, t: int, state: State) -> None:
        started, kept, worth_it = time.perf_counter(), True, True
        try:
            if self._file is None:
                self._file = tempfile.TemporaryFile(prefix="lightning_acc-", buffering=0)  # noqa: SIM115
                weakref.finalize(self, self._file.close)
            self._file.seek(len(self._steps) * _bytes(state))
            for part in state:
                _whole(self._file.write, part.cpu())
        except OSError:
            kept = False
        else:
            now = time.perf_counter()
            self._writing += now - started
            worth_it = self._writing <= max(SLOW, (now - self._begun) / 2)
        if self._ranks.least(kept):
            self._steps.append(t)
        self._full = not self._ranks.least(kept and worth_it)
        if self._full:
            self.most = len(self._steps) + self._in_memory

    def _read(self) -> State:
        """Of the record behind the last that the file counts."""
        assert self._file is not None
        self._file.seek(len(self._steps) * _bytes(self._first))
        state = tuple(torch.empty_like(part, device="cpu") for part in self._first)
        for part in state:
            _whole(self._file.readinto, part)
        return tuple(part.to(there.device) for part, there in zip(state, self._first, strict=True))


def _whole(move: Callable[[memoryview], int], part: Tensor) -> None:
    """``move``, of a file, over all bytes of ``part`` (p,): the system moves no more than 2 GB at once."""
    left = part.contiguous().numpy().data.cast("B")
    while left:
        moved = move(left)
        if not moved:
            raise OSError("The temporary file of a sweep back has lost what was written.")
        left = left[moved:]


class Tape:
    """A replay taken forward once, whose steps can then be visited from the last to the first.

    ``seen`` is told the parameters (p,) after each number of steps, from 0, on the way forward.

    Args:
        replay: of the run.
        memory: bytes of the states in memory; two of them are there whatever it is.
        disk: bytes of those in a temporary file; None: of ``room()``.

    Attributes:
        final: the parameters (p,) after the last step.
        checked: the parameters (p,) at the step ``replay.checked_at``.
    """

    def __init__(
        self,
        replay: Replay,
        memory: int,
        seen: Callable[[int, Tensor], object] = lambda t, theta: None,
        disk: int | None = None,
    ) -> None:
        self._replay = replay
        in_memory, most = map(replay.ranks.least, (held(replay, memory) - 1, _kept(replay, memory, disk)))
        self._kept = _Stack(in_memory, most, replay.initial, replay.ranks)
        state = self._last = replay.initial
        self.checked = state[0]
        seen(0, state[0])
        places = {0, *_places(0, len(replay), self._kept.most)}
        for t in range(len(replay)):
            self._last = state
            if t in places:
                self._kept.push(t, state)
            state = replay.step(t)(state)
            seen(t + 1, state[0])
            if t + 1 == replay.checked_at:
                self.checked = state[0]
        self.final = state[0]

    def backwards(self) -> Iterator[tuple[Step, State]]:
        """The steps from the last to the first, each with the state before it; can be gone through once."""
        state = self._last
        del self._last
        for t in reversed(range(len(self._replay))):
            if self._kept.last == t:
                state = self._kept.pop()
            elif t < len(self._replay) - 1:
                state = self._taken_to(t)
            yield self._replay.step(t), state

    def _taken_to(self, t: int) -> State:
        """The state before step ``t``, from the last that is kept; others are kept on the way there."""
        first, state = self._kept.last, self._kept.top()
        places = set(_places(first, t + 1, self._kept.most - len(self._kept) + 1))
        for earlier in range(first, t):
            state = self._replay.step(earlier)(state)
            if earlier + 1 in places and earlier + 1 < t:
                self._kept.push(earlier + 1, state)
        return state
