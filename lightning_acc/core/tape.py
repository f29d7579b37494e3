"""The states of a replay for a sweep back through its steps, within any budget: binomial checkpointing.

Where the T states do not fit, some are kept and the others computed again, from the nearest one before. With c kept states, and
the one that is on its way, a stretch of l steps is gone back through after

    taken(l, c) = r l - beta(c + 1, r - 1)      steps forward,      beta(c, r) = (c + r choose c),

``r`` the smallest number with ``beta(c, r) >= l``; fewer are not possible (Griewank and Walther, Algorithm 799, ACM TOMS 26,
2000).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from math import comb

from torch import Tensor

from lightning_acc.core.optimizers import State
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
    """How many states a ``Tape`` of ``memory`` bytes holds while it is gone back through: two at least, and not more than T."""
    return max(min(2, len(replay)), min(len(replay), memory // max(1, sum(part.nbytes for part in replay.initial))))


def taken_again(replay: Replay, memory: int) -> float:
    """Of a sweep back: the steps that are taken a second time, or more often, as a share of all steps."""
    total = len(replay)
    return (taken(total, max(1, held(replay, memory) - 1)) - (total - 1)) / total if total else 0.0


class Tape:
    """A replay taken forward once, whose steps can then be visited from the last to the first.

    ``seen`` is told the parameters (p,) after each number of steps, from 0, on the way forward.

    Attributes:
        final: the parameters (p,) after the last step.
        checked: the parameters (p,) at the step ``replay.checked_at``.
    """

    def __init__(self, replay: Replay, memory: int, seen: Callable[[int, Tensor], object] = lambda t, theta: None) -> None:
        self._replay = replay
        self._most = max(1, held(replay, memory) - 1)
        self._kept: list[tuple[int, State]] = []
        state = self._last = replay.initial
        self.checked = state[0]
        seen(0, state[0])
        places = {0, *_places(0, len(replay), self._most)}
        for t in range(len(replay)):
            self._last = state
            if t in places:
                self._kept.append((t, state))
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
            if self._kept[-1][0] == t:
                state = self._kept.pop()[1]
            elif t < len(self._replay) - 1:
                state = self._taken_to(t)
            yield self._replay.step(t), state

    def _taken_to(self, t: int) -> State:
        """The state before step ``t``, from the last that is kept; others are kept on the way there."""
        first, state = self._kept[-1]
        places = set(_places(first, t + 1, self._most - len(self._kept) + 1))
        for earlier in range(first, t):
            state = self._replay.step(earlier)(state)
            if earlier + 1 in places and earlier + 1 < t:
                self._kept.append((earlier + 1, state))
        return state
