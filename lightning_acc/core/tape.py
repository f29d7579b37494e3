"""The states of a replay, kept for the way back."""

from __future__ import annotations

import math
from collections.abc import Iterator

from lightning_acc.core.optimizers import State
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step


def segment(replay: Replay, memory: int) -> int:
    """Every how manieth state a ``Tape`` of ``memory`` bytes keeps: each, where all T fit, else every sqrt(T)-th."""
    total = len(replay)
    return 1 if total * sum(part.nbytes for part in replay.initial) <= memory else math.ceil(math.sqrt(total))


def kept(replay: Replay, memory: int) -> int:
    """How many states a ``Tape`` holds at its fullest: those it keeps, and one segment that is computed again."""
    total, every = len(replay), segment(replay, memory)
    return total if every == 1 else -(-total // every) + every


def taken_again(replay: Replay, memory: int) -> float:
    """The fraction of its steps that a sweep back takes a second time, as its tape cannot keep all states."""
    return 1 - 1 / segment(replay, memory)


class Tape:
    """The states of a replay, kept so that its steps can be visited from the last to the first.

    Where the T states do not fit into ``memory`` bytes, about sqrt(T) of them are kept, evenly spaced, and the others are
    computed again, a segment at a time.

    Attributes:
        final: the state after the last step.
    """

    def __init__(self, replay: Replay, memory: int) -> None:
        self._replay = replay
        self._segment = segment(replay, memory)
        self._kept: list[State] = []
        self.final = replay.initial
        for t in range(len(replay)):
            if t % self._segment == 0:
                self._kept.append(self.final)
            self.final = replay.step(t)(self.final)

    def backwards(self) -> Iterator[tuple[Step, State]]:
        """The steps from the last to the first, each with the state before it; can be gone through once."""
        for first in reversed(range(0, len(self._replay), self._segment)):
            states = [self._kept.pop()]
            last = min(first + self._segment, len(self._replay))
            for t in range(first, last - 1):
                states.append(self._replay.step(t)(states[-1]))
            for t in reversed(range(first, last)):
                yield self._replay.step(t), states.pop()
