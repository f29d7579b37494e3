"""``OptimizerRule``: how one optimizer class updates one parameter."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

State = tuple[Tensor, ...]
Hyperparameters = dict[str, Any]
Numbers = Callable[[Tensor, Mapping[str, Any], Hyperparameters], Hyperparameters]
PARAMETER_STEPS = "parameter_steps"
"""The hyper-parameter that tells of each parameter how many steps have moved it by then, with this one, and 0 where it rests:
as it is frozen, or was not used, and so has no gradient. It is given where not all parameters are moved by every step."""

UNUSED = "unused"
"""The hyper-parameter that names, by their places, those that rest as the loss of the step was not made of them."""


def moves(groups: list[Hyperparameters]) -> list[bool] | None:
    """Which of the parameters a step moves, by the hyper-parameters of its parameter groups; None: all."""
    steps = groups[0].get(PARAMETER_STEPS)
    return None if steps is None or all(steps) else [step > 0 for step in steps]


@dataclass(frozen=True)
class OptimizerRule:
    """How one optimizer class updates one parameter.

    Attributes:
        update: ``(state, gradient, hyperparameters) -> state`` for one parameter, all tensors flat, (..., p_k) with any leading
            dimensions. Beside the hyper-parameters of its group it finds the number of the step, counted from 1, under
            ``"step"``, and the shape of the parameter under ``"shape"``.
        slots: for the hyper-parameters of a group, and the ``"shape"`` of a parameter, the names of the tensors the optimizer
            keeps for it, as large as the parameter or expanded to that. All start at 0: what the optimizer starts elsewhere,
            the update sets in step 1.
        hyperparameters: what is recorded of a parameter group at every step.
        numbers: further numbers the update needs, recorded beside the hyper-parameters: those in which no gradient has a part,
            such as NAdam's product of momenta. Called before each step with a parameter of the group, what the optimizer keeps
            of it (nothing before the first step), and the hyper-parameters with ``"step"``.
        package: the package the class comes from; one of the same name from elsewhere is another optimizer. Empty: any.
        affine: whether the update is an affine function of state and gradient, number by number, as SGD's is.
        by_number: whether it moves each number of a parameter by itself, so that it may be taken in blocks of numbers.
        no_derivative: why a derivative of the update says nothing of it, in words that go on after "because"; None where it
            does say something. Methods that need the derivative then refuse the run.
        one_pass: the update of states on the CPU, of any parameters together, written over them in one pass, to round-off.
    """

    update: Callable[[State, Tensor, Hyperparameters], State]
    slots: Callable[[Hyperparameters], tuple[str, ...]]
    hyperparameters: tuple[str, ...]
    numbers: Numbers | None = None
    package: str = "torch.optim"
    affine: bool = False
    by_number: bool = False
    no_derivative: str | None = None
    one_pass: Callable[[State, Tensor, Hyperparameters], None] | None = None
