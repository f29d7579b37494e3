"""The first steps of a training, and a few later ones, are compared with what F makes of their record."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.audit import RoundOff
from lightning_acc.core.modules.compiled import plain_name
from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Step
from lightning_acc.recorder.checks import decomposition
from lightning_acc.recorder.checks.refusals import RecordingRefused, batch_norms

CHECKED_STEPS = 3
CHECKED_SIZES = 3
"""Further batch sizes whose gradient is compared when they are first met, in one process."""
SMALL = 100_000
"""Parameters up to which a later check costs next to nothing."""
APART = 100
"""Larger models are checked later at most once in so many steps."""
DIVERGING = 100.0
"""A step that moves the parameters by so many times their size has left all that training is about."""
LATE_TOLERANCE = 1e-2
"""Largest relative difference that counts as round-off in a later step, whose gradient may be a small rest of large ones."""


class Checks:
    """Follows the training with F: its first steps, then the first and the last one of the epochs 0, 1, 2, 4, 8 ...

    What goes wrong later (a loss that depends on the epoch, a layer switched off, a callback at the end of an epoch) is met
    there, or by the audit, which replays every step.

    Args:
        module: the LightningModule, whose buffers and untrained parameters must stay as they are.
        trained: the names of the others.
        processes: number of processes that train together.
        start: the first step that is followed; not 0 where a training is resumed.
        state: the state before it.
        rounded_to: the dtype by whose rounding a gradient may differ from F's.
    """

    def __init__(
        self, module: Any, trained: Collection[str], processes: int, start: int, state: State, rounded_to: torch.dtype
    ) -> None:
        self._buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
        self._trained = trained
        self._untrained = self._sums(module)
        self._alone = processes == 1
        self._sizes: set[int] = set()
        self._start = start
        self._epoch: int | None = None
        self._strict = True
        self._late = 0
        self._tolerance = 0.0
        self._steepest = 0.0
        self.followed: int | None = None
        """The step whose effect is to be compared, once it is there."""
        self._before = state[0]
        self._pending: tuple[Step, Tensor]
        self._replayed = state
        self._rounded_to = rounded_to
        self._roundoff = RoundOff(state, rounded_to)
        self._since: list[tuple[Step, State, Tensor, Tensor]] = []
        """Steps that ``_roundoff`` has not taken, each with the state before it, its gradient and the parameters after it."""

    def due(self, number: int, size: int, epoch: int, last: bool) -> bool:
        """Whether the gradient of step ``number``, on ``size`` samples of this process, is to be compared.

        The same in all processes, which then exchange what they saw. ``last`` tells the last step of an ``epoch``.
        """
        new_size = self._alone and size not in self._sizes and len(self._sizes) < CHECKED_SIZES
        self._sizes.add(size)
        first, self._epoch = epoch != self._epoch, epoch
        self._strict = self.early(number) or new_size
        if self._strict:
            return True
        late = (first or last) and epoch & (epoch - 1) == 0
        late = late and (len(self._before) <= SMALL or self._late < number // APART)
        self._late += late
        return late

    def parameters(self, number: int, theta: Tensor, module: Any) -> None:
        """Compare the parameters (p,) before step ``number`` with what the step before, if followed, should have made of them.

        Raises:
            RecordingRefused: something else changed them, or a buffer.
        """
        if self.followed is None or number != self.followed + 1:
            return
        self.followed = None
        statistics = {f"{layer}." for layer in batch_norms(module)}  # a known change, which no loss in training depends on
        for name, value in module.named_buffers():
            if name.rpartition(".")[0] + "." in statistics:
                continue
            if not torch.equal(value, self._buffers.get(name, value)):
                raise RecordingRefused(
                    f"The buffer {name!r} changes while training, and it is not known how: keep it fixed, or set the layer "
                    "it belongs to into evaluation mode."
                )
        for name, value in self._sums(module).items():
            if not self._untrained.get(name, value) == value:
                raise RecordingRefused(
                    f"The parameter {name!r} changes while training, and not by the optimizer: it follows others, as a teacher "
                    "that is their average, and would follow them elsewhere without a sample. Keep it as it is."
                )
        step, gradient = self._pending
        before, self._replayed = self._replayed, step.update(self._replayed, gradient)
        self._since.append((step, before, gradient, theta))
        # Most are the same, bit for bit; to tell round-off from more costs as much as several steps.
        if not torch.equal(self._replayed[0], theta) or not theta.norm() < DIVERGING * self._before.norm():
            self._refuse_moved_otherwise(number, theta)
        self._replayed = (theta, *self._replayed[1:])
        self._since = self._since if self.early(number) else []

    def _sums(self, module: Any) -> dict[str, float]:
        """Of the untrained parameters, what changes where they do."""
        named = ((plain_name(name), p.detach()) for name, p in module.named_parameters())
        sums = {name: float(p.sum()) for name, p in named if name not in self._trained and p.is_floating_point()}
        return {name: value for name, value in sums.items() if not math.isnan(value)}

    def _refuse_moved_otherwise(self, number: int, theta: Tensor) -> None:
        """Refuse parameters (p,) before step ``number`` that are not ``_replayed`` up to round-off, or beyond all numbers."""
        for step, state, gradient, after in self._since:
            self._roundoff.advance(step, state, gradient)
            allowed = self._roundoff.allowed
            self._roundoff.restart(after)
        self._since = []
        moved = theta - self._before
        error = (self._replayed[0] - theta).abs() - allowed
        difference = float(error.clamp_min(0).norm() / moved.norm().clamp_min(torch.finfo(theta.dtype).tiny))
        rounding = 8 * torch.finfo(theta.dtype).eps * float(theta.norm() / moved.norm().clamp_min(1e-30))
        if not difference <= self._tolerance + rounding:
            growth = float(moved.norm() / self._before.norm().clamp_min(1e-30))
            if not growth < DIVERGING:
                raise RecordingRefused(
                    f"The training diverges: step {number - 1} moved the parameters "
                    f"{f'by {growth:.1e} times their size' if math.isfinite(growth) else 'beyond all numbers'}, where no "
                    "replay follows it to the last digits: lower the learning rate, or clip the gradients."
                )
            raise RecordingRefused(
                f"Step {number - 1} moved the parameters otherwise than its record says: the recorded step gives a change "
                f"that differs by {100 * difference:.2g} %. Something outside the loss and the optimizer's known rule changes "
                "parameters or gradients (a hook, another callback, an option of a foreign optimizer): leave it out."
            )

    def gradient(self, number: int, state: State, step: Step, gradient: Tensor) -> None:
        """Compare the training's gradient (p,) in step ``number`` with that of the weighted per-sample losses.

        ``state`` is the optimizer's own before the step.

        Raises:
            RecordingRefused: they differ.
        """
        theta = state[0]
        self._steepest = max(self._steepest, float(gradient.norm()))
        strict = decomposition.GRADIENT_TOLERANCE[self._rounded_to]
        self._tolerance = strict if self._strict else max(strict, LATE_TOLERANCE)
        # Where the gradient has all but vanished, what is left of it is round-off.
        least = 0.0 if self._strict else LATE_TOLERANCE * self._steepest
        found = decomposition.compare_gradients(step, theta, gradient, number, self._tolerance, least)
        self.followed = number
        self._before = theta
        # At first F goes all the way by itself; later it starts from the optimizer's slots and the training's gradient.
        if not self.early(number):
            self._replayed, self._roundoff, self._since = state, RoundOff(state, self._rounded_to), []
        # The update is taken when the next step begins: how the training clips its gradients shows after they are looked at.
        if self.early(number):
            gradient = found if torch.equal(self._replayed[0], theta) else step.gradient(self._replayed[0])
        self._pending = step, gradient

    def early(self, number: int) -> bool:
        """Whether step ``number`` is one of the first, which are all compared."""
        return number < self._start + CHECKED_STEPS
