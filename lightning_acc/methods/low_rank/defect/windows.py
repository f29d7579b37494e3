"""The steps that a removal follows the update in: from a visit until some steps after the last one."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import evenly

EPOCHS = 2
"""Of a window that is as long as anybody needs: each reaches to the next visit."""


@dataclass(frozen=True)
class Windows:
    """Windows that end L steps after a visit, or with the next of the steps that one may end before. Those that touch are one.

    Attributes:
        length: L.
        stride: one may end before every so many steps, since what the sweep back knows there is kept.
    """

    length: int
    stride: int = 1

    def end(self, visit: Tensor) -> Tensor:
        """The steps before which windows end, by the last visit of each."""
        return -(-(visit + self.length + 1) // self.stride) * self.stride

    def ends(self, replay: Replay, removals: Sequence[Removal]) -> list[int]:
        """The numbers of steps, less than all, after which a window of any of the removals ends."""
        owners = Removals(removals)
        last = torch.full((len(removals),), len(replay))
        ends: set[int] = set()
        for t, step in enumerate(replay.records):
            visited = owners.occurrences(step.sample_ids)[0].unique()
            before = self.end(last[visited])
            ends.update(before[before < t].tolist())
            last[visited] = t
        return sorted(end for end in ends.union(self.end(last).tolist()) if end < len(replay))

    def most_inside(self, replay: Replay, removals: Removals) -> int:
        """How many of the removals are in a window together, at most."""
        ends, most = torch.full((len(removals),), -1), 0
        for t, step in enumerate(replay.records):
            visited = removals.occurrences(step.sample_ids)[0].unique()
            ends[visited] = self.end(torch.tensor(t))
            most = max(most, int((ends > t).sum()), len(visited))
        return most

    def passes(self, replay: Replay, removals: Sequence[Removal], at_once: int) -> list[range]:
        """The removals in as few passes as have no more of them in a window together than can be followed ``at_once``."""
        n, parts = len(removals), list[range]()
        inside = self.most_inside(replay, Removals(removals))
        for number in range(max(1, -(-inside // at_once)), n + 1):
            parts = evenly(n, number)
            if all(self._fit(replay, removals[part.start : part.stop], at_once) for part in parts):
                break
        return parts

    def _fit(self, replay: Replay, removals: Sequence[Removal], at_once: int) -> bool:
        return len(removals) <= at_once or self.most_inside(replay, Removals(removals)) <= at_once

    def share(self, replay: Replay) -> float:
        """Of the steps of a run, in which a sample is in a window, in the mean."""
        seen = sum(len(step.sample_ids) for step in replay.records)
        apart = len(replay) * replay.run.n_samples / max(1, seen)
        return min(1.0, (self.length + 1 + (self.stride - 1) / 2) / max(1e-9, apart))

    def ends_at_most(self, replay: Replay) -> int:
        """After how many steps a window ends; of those that reach to the next visit, few do."""
        return 0 if self.share(replay) >= 1 else len(replay) // self.stride


def usual(replay: Replay) -> Windows:
    """Of the steps of two epochs."""
    seen = sum(len(step.sample_ids) for step in replay.records)
    return Windows(-(-EPOCHS * replay.run.n_samples * len(replay) // max(1, seen)))
