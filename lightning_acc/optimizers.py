"""U: what happens to the state after the gradient, as pure functions.

A *state* is a tuple of tensors (..., p): the flat parameters, then the optimizer's slots (for SGD with momentum the
momentum buffer). The functions repeat torch.optim's arithmetic operation by operation, so that a replay is bit-exact.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.objective import ParameterLayout

State = tuple[Tensor, ...]
Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class OptimizerRule:
    """How one ``torch.optim`` class updates one parameter.

    Attributes:
        update: ``(state, gradient, hyperparameters) -> state`` for one parameter, any leading dimensions.
        slots: for the hyper-parameters of a group, the names under which ``torch.optim`` keeps the slots.
        hyperparameters: what is recorded of a parameter group at every step.
        refusal: for the hyper-parameters of a group, why they cannot be handled, or None.
    """

    update: Callable[[State, Tensor, Hyperparameters], State]
    slots: Callable[[Hyperparameters], tuple[str, ...]]
    hyperparameters: tuple[str, ...]
    refusal: Callable[[Hyperparameters], str | None]


def sgd(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.SGD`` with dampening 0: ``b' = m b + g + c theta``; ``theta' = theta - lr (b' or g + m b')``."""
    theta, *buffers = state
    if h["maximize"]:
        gradient = -gradient
    if h["weight_decay"] != 0:
        gradient = gradient.add(theta, alpha=h["weight_decay"])
    if buffers:
        buffers = [buffers[0].mul(h["momentum"]).add(gradient)]
        gradient = gradient.add(buffers[0], alpha=h["momentum"]) if h["nesterov"] else buffers[0]
    return theta.add(gradient, alpha=-h["lr"]), *buffers


RULES: dict[str, OptimizerRule] = {
    "SGD": OptimizerRule(
        update=sgd,
        slots=lambda h: ("momentum_buffer",) if h["momentum"] else (),
        hyperparameters=("lr", "momentum", "weight_decay", "nesterov", "dampening", "maximize"),
        refusal=lambda h: f"dampening={h['dampening']}; use dampening=0" if h["dampening"] else None,
    )
}


class Update:
    """U over the whole flat state, parameter by parameter, each with the hyper-parameters of its group.

    Args:
        optimizer: name of the rule.
        layout: the trained parameters.
        group_of: for each of them, the index of its parameter group.
        slots: number of slots of the state.
    """

    def __init__(self, optimizer: str, layout: ParameterLayout, group_of: list[int], slots: int) -> None:
        if optimizer not in RULES:
            raise RunError(f"The optimizer {optimizer} is unknown; known are {', '.join(sorted(RULES))}.")
        self.rule = RULES[optimizer]
        self.layout = layout
        self.group_of = group_of
        self.slots = slots

    def initial(self, theta: Tensor) -> State:
        """The state before the first step: parameters ``theta`` and zero slots."""
        return theta, *(torch.zeros_like(theta) for _ in range(self.slots))

    def __call__(self, state: State, gradient: Tensor, groups: list[Hyperparameters]) -> State:
        """The state after the update; all tensors (..., p)."""
        # Parameter by parameter and not in one sweep: vectorised kernels round the last few elements of a tensor
        # differently, so that the bits depend on where a tensor ends.
        sizes = self.layout.sizes
        pieces = zip(self.group_of, gradient.split(sizes, -1), *(part.split(sizes, -1) for part in state), strict=True)
        updated = [self.rule.update(tuple(piece), g, groups[group]) for group, g, *piece in pieces]
        return tuple(torch.cat(parts, -1) for parts in zip(*updated, strict=True))
