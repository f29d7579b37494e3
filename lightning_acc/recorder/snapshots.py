"""Which steps the parameters are written at. Those between two snapshots are computed again when they are needed."""

from __future__ import annotations

import math
import time

from lightning_acc.record.store import Store
from lightning_acc.recorder.checks.steps import CHECKED_STEPS

POLICIES = ("auto", "every-step", "every-k")
SMALL = 64 * 2**20
"""A whole trajectory of at most so many bytes is written without a second thought."""
SHARE = 0.02
"""Of the training's time that ``auto`` spends on snapshots of larger ones."""


class Snapshots:
    """Decides at which steps a snapshot of the parameters is due.

    ``every-step``: at all. ``every-k``: at every k-th, k such that they fit into the budget. ``auto``: at all where the
    trajectory is small; else as often as the budget allows and 2 % of the training's time pays for. The first steps and the
    final parameters are always there.

    Args:
        policy: one of the three.
        size: bytes of one snapshot.
        steps: expected number of steps, or infinity.
        budget: bytes for all of them.

    Raises:
        RequestError: there is no such policy, or no budget.
    """

    def __init__(self, policy: str, size: int, steps: float, budget: float) -> None:
        self.policy, self.size, self.budget, self._steps = policy, size, budget, steps
        whole = size * (steps + 1)
        self.every = 1
        if policy == "every-k" and math.isfinite(whole):
            self.every = max(1, math.ceil(whole / budget))
        if policy == "auto" and whole <= min(SMALL, budget):
            self.policy = "every-step"
        self._taken = 0
        self._spent = 0.0
        self._started = time.perf_counter()

    def no_room(self, store: Store) -> str | None:
        """Why the snapshots will not fit on the disk; None where they do, or that cannot be known."""
        free = store.free_bytes()
        if free is None or not math.isfinite(self._steps):
            return None
        needed = self.size * (self._steps + 1)
        if self.policy != "every-step":
            needed = min(needed, self.budget)
        if needed <= free:
            return None
        return (
            f"the parameters of {int(self._steps)} steps take {needed / 2**30:.2f} GB, but {store} has only "
            f"{free / 2**30:.2f} GB free: choose another disk, a smaller budget_gb, or parameters='every-k'"
        )

    def due(self, number: int) -> bool:
        """Whether the parameters before step ``number`` are written."""
        if number <= CHECKED_STEPS or self.policy == "every-step":
            return True
        if (self._taken + 2) * self.size > self.budget:  # the final ones need room too
            return False
        if self.policy == "every-k":
            return number % self.every == 0
        return self._spent <= SHARE * (time.perf_counter() - self._started)

    def taken(self, seconds: float) -> None:
        """A snapshot was written, in so many seconds."""
        self._taken += 1
        self._spent += seconds
