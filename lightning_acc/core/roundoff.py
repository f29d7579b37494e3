"""What becomes of round-off: the same updates again, on gradients that are moved by as much, up and down.

An update may multiply it. Adam answers a gradient near 0, such as that of a key's bias in attention, which is 0 but for
round-off, with a step of the size of lr; SGD answers with next to nothing.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Step

IN_GRADIENT = 16
"""Round-off in a number of the gradient, in units of the last place of its largest number: what cancels is as large."""
IN_PARAMETER = 4
"""Round-off a step leaves in a parameter by itself, in units of its last place."""


class RoundOff:
    """Follows a replay from ``state``, and tells for every parameter which error round-off explains."""

    def __init__(self, state: State) -> None:
        self._eps = torch.finfo(state[0].dtype).eps
        self._states = (state, state)
        self._response = torch.zeros_like(state[0])
        self._rounded = torch.zeros_like(state[0])

    def advance(self, step: Step, state: State, gradient: Tensor) -> None:
        """Take a step beside the replay, which is at ``state`` and has this gradient (p,)."""
        moved = IN_GRADIENT * self._eps * gradient.abs().max()
        after = step.update(state, gradient)[0]
        up, down = (step.update(s, gradient + m) for s, m in zip(self._states, (moved, -moved), strict=True))
        self._states = up, down
        self._response = torch.maximum((up[0] - after).abs(), (down[0] - after).abs())
        # A parameter that comes near 0 keeps the round-off of what it was.
        self._rounded = self._rounded + IN_PARAMETER * self._eps * torch.maximum(state[0].abs(), after.abs())

    @property
    def allowed(self) -> Tensor:
        """The error of each parameter (p,) that round-off explains since the start, or the last ``restart``."""
        return self._rounded + 2 * self._response

    def restart(self, theta: Tensor) -> None:
        """Go on from parameters (p,) that are known, with the slots as they are."""
        up, down = self._states
        self._states = (theta, *up[1:]), (theta, *down[1:])
        self._rounded = torch.zeros_like(theta)
