"""The first steps of a training are compared with what F makes of their record, before anything later is believed."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_acc.optimizers import State
from lightning_acc.recorder import decomposition
from lightning_acc.recorder.refusals import RecordingRefused, batch_norms
from lightning_acc.step import Step

CHECKED_STEPS = 3
CHECKED_SIZES = 3
"""Further batch sizes whose gradient is compared when they are first met, in one process."""


class FirstSteps:
    """Follows the training for some steps with F.

    Args:
        module: the LightningModule, whose buffers must stay as they are.
        processes: number of processes that train together.
        start: the first step that is followed; not 0 where a training is resumed.
        state: the state before it.
    """

    def __init__(self, module: Any, processes: int, start: int, state: State) -> None:
        self._buffers = {name: value.detach().clone() for name, value in module.named_buffers()}
        self._alone = processes == 1
        self._sizes: set[int] = set()
        self._start = start
        self._before = state[0]
        self._replayed = state

    def due(self, number: int, size: int) -> bool:
        """Whether the gradient of step ``number``, on ``size`` samples of this process, is to be compared.

        The same in all processes, which then exchange what they saw.
        """
        new_size = self._alone and size not in self._sizes and len(self._sizes) < CHECKED_SIZES
        self._sizes.add(size)
        return number < self._start + CHECKED_STEPS or new_size

    def parameters(self, number: int, theta: Tensor, module: Any) -> None:
        """Compare the parameters (p,) before step ``number`` with what the steps so far should have made of them.

        Raises:
            RecordingRefused: something else changed them, or a buffer.
        """
        if not 0 < number - self._start <= CHECKED_STEPS:
            return
        statistics = {f"{layer}." for layer in batch_norms(module)}  # a known change, which no loss in training depends on
        for name, value in module.named_buffers():
            if name.rpartition(".")[0] + "." in statistics:
                continue
            if not torch.equal(value, self._buffers.get(name, value)):
                raise RecordingRefused(
                    f"The buffer {name!r} changes while training, and it is not known how: keep it fixed, or set the layer "
                    "it belongs to into evaluation mode."
                )
        moved = theta - self._before
        difference = decomposition.relative_difference(self._replayed[0] - self._before, moved)
        rounding = 8 * torch.finfo(theta.dtype).eps * float(theta.norm() / moved.norm().clamp_min(1e-30))
        if not difference <= decomposition.GRADIENT_TOLERANCE[theta.dtype] + rounding:
            raise RecordingRefused(
                f"Step {number - 1} moved the parameters otherwise than its record says: the recorded step gives a change "
                f"that differs by {100 * difference:.2g} %. Something outside the loss and the optimizer changes parameters "
                "or gradients (a hook, another callback): leave it out."
            )
        self._replayed = (theta, *self._replayed[1:])

    def gradient(self, number: int, theta: Tensor, step: Step, gradient: Tensor) -> None:
        """Compare the training's gradient (p,) in step ``number`` with that of the weighted per-sample losses.

        Raises:
            RecordingRefused: they differ.
        """
        decomposition.compare_gradients(step, theta, gradient, number)
        if number < self._start + CHECKED_STEPS:
            self._before = theta
            self._replayed = step(self._replayed)
