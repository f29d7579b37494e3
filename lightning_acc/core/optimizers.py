"""U: what happens to the state after the gradient (clipping, weight decay, the optimizer), as pure functions.

A *state* is a tuple of tensors (..., p): the flat parameters, then the optimizer's slots (for SGD with momentum the
momentum buffer, for Adam its two moments). The functions repeat torch.optim's arithmetic operation by operation, so that a
replay is bit-exact.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.objective import ParameterLayout
from lightning_acc.errors import RequestError, RunError

State = tuple[Tensor, ...]
Hyperparameters = dict[str, Any]


@dataclass(frozen=True)
class OptimizerRule:
    """How one optimizer class updates one parameter.

    Attributes:
        update: ``(state, gradient, hyperparameters) -> state`` for one parameter, any leading dimensions. Beside the
            hyper-parameters of its group it finds the number of the step, counted from 1, under ``"step"``.
        slots: for the hyper-parameters of a group, the names of the tensors it keeps for each parameter; all start at 0.
        hyperparameters: what is recorded of a parameter group at every step.
        package: the package the class comes from; one of the same name from elsewhere is another optimizer.
        affine: whether the update is an affine function of state and gradient, number by number, as SGD's is.
    """

    update: Callable[[State, Tensor, Hyperparameters], State]
    slots: Callable[[Hyperparameters], tuple[str, ...]]
    hyperparameters: tuple[str, ...]
    package: str = "torch.optim"
    affine: bool = False


def sgd(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.SGD``: ``b' = m b + (1 - d) (g + c theta)``; ``theta' = theta - lr (b' or g + m b')``."""
    theta, *buffers = state
    if h["maximize"]:
        gradient = -gradient
    if h["weight_decay"] != 0:
        gradient = gradient.add(theta, alpha=h["weight_decay"])
    if buffers:
        damped = 0 if h["step"] == 1 else h["dampening"]  # the first buffer is the gradient itself
        buffers = [buffers[0].mul(h["momentum"]).add(gradient, alpha=1 - damped)]
        gradient = gradient.add(buffers[0], alpha=h["momentum"]) if h["nesterov"] else buffers[0]
    return theta.add(gradient, alpha=-h["lr"]), *buffers


def adam(state: State, gradient: Tensor, h: Hyperparameters) -> State:
    """``torch.optim.Adam`` and ``AdamW``: ``theta' = theta - lr m^ / (sqrt(v^) + eps)``, with or without AMSGrad."""
    theta, mean, square, *largest = state
    beta1, beta2 = h["betas"]
    if h["maximize"]:
        gradient = -gradient
    if h["weight_decay"] != 0:
        if h["decoupled_weight_decay"]:
            theta = theta.mul(1 - h["lr"] * h["weight_decay"])
        else:
            gradient = gradient.add(theta, alpha=h["weight_decay"])
    mean = mean.lerp(gradient, 1 - beta1)
    square = square.mul(beta2).addcmul(gradient, gradient, value=1 - beta2)
    if largest:
        largest = [torch.maximum(largest[0], square)]
    step_size = h["lr"] / (1 - beta1 ** h["step"])
    root = _square_root(largest[0] if largest else square) / (1 - beta2 ** h["step"]) ** 0.5
    return theta.addcdiv(mean, root.add(h["eps"]), value=-step_size), mean, square, *largest


def _square_root(x: Tensor) -> Tensor:
    """sqrt with the derivative 0 at 0 (a dead unit, an unseen embedding), where torch's is infinite and gives NaN."""
    positive = x > 0
    return torch.where(positive, torch.where(positive, x, 1.0).sqrt(), 0.0)


def _adam_slots(h: Hyperparameters) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if h["amsgrad"] else ("exp_avg", "exp_avg_sq")


_ADAM = OptimizerRule(
    update=adam,
    slots=_adam_slots,
    hyperparameters=("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
)
RULES: dict[str, OptimizerRule] = {
    "SGD": OptimizerRule(
        update=sgd,
        slots=lambda h: ("momentum_buffer",) if h["momentum"] else (),
        hyperparameters=("lr", "momentum", "weight_decay", "nesterov", "dampening", "maximize"),
        affine=True,
    ),
    "Adam": _ADAM,
    "AdamW": _ADAM,
}


def register_optimizer(optimizer: type, rule: OptimizerRule) -> None:
    """Teach the package an optimizer class: its update as a pure function.

    Example::

        def lion(state, gradient, h):
            theta, mean = state
            b1, b2 = h["betas"]
            return theta - h["lr"] * mean.lerp(gradient, 1 - b1).sign(), mean.lerp(gradient, 1 - b2)

        la.register_optimizer(Lion, la.OptimizerRule(lion, lambda h: ("exp_avg",), ("lr", "betas")))

    The recorder compares the rule with what the optimizer really does in the first steps. Register it where the module is
    defined, so that every process that rebuilds the module knows it.
    """
    RULES[optimizer.__name__] = dataclasses.replace(rule, package=optimizer.__module__)


def clip(gradient: list[Tensor], value: float, algorithm: str) -> list[Tensor]:
    """Lightning's gradient clipping, of the parameters' gradients (..., p_k): by their joint norm, or each number by value."""
    if algorithm == "value":
        return [piece.clamp(-value, value) for piece in gradient]
    norms = torch.stack([torch.linalg.vector_norm(piece, dim=-1) for piece in gradient], -1)
    factor = torch.clamp(value / (torch.linalg.vector_norm(norms, dim=-1, keepdim=True) + 1e-6), max=1.0)
    return [piece * factor for piece in gradient]


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
        self._usable: list[Hyperparameters] | None = None

    def initial(self, theta: Tensor) -> State:
        """The state before the first step: parameters ``theta`` and zero slots."""
        return theta, *(torch.zeros_like(theta) for _ in range(self.slots))

    def __call__(self, state: State, gradient: Tensor, groups: list[Hyperparameters]) -> State:
        """The state after the update; all tensors (..., p)."""
        # Parameter by parameter and not in one sweep: vectorised kernels round the last few elements of a tensor
        # differently, so that the bits depend on where a tensor ends.
        sizes = self.layout.sizes
        gradients = list(gradient.split(sizes, -1))
        if groups[0]["gradient_clip_val"]:
            gradients = clip(gradients, groups[0]["gradient_clip_val"], groups[0]["gradient_clip_algorithm"])
        pieces = zip(self.group_of, gradients, *(part.split(sizes, -1) for part in state), strict=True)
        updated = [self._one(tuple(piece), g, groups[group]) for group, g, *piece in pieces]
        return tuple(torch.cat(parts, -1) for parts in zip(*updated, strict=True))

    def check(self, groups: list[Hyperparameters]) -> None:
        """See that the hyper-parameters of the parameter groups are such as this optimizer takes.

        Raises:
            RunError: they are not, as where a record is not what a recorder writes.
        """
        lasting = [{key: value for key, value in h.items() if key != "step"} for h in groups]
        if lasting == self._usable:
            return
        zero = torch.zeros(1, dtype=torch.float64)
        remedy = "restore the run, or record it again"
        for h in groups:
            try:
                used = len(self.rule.slots({key: h[key] for key in self.rule.hyperparameters}))
                self.rule.update(tuple(zero for _ in range(1 + used)), zero, h)
            except (ArithmeticError, LookupError, TypeError, ValueError, RuntimeError) as error:
                raise RunError(
                    f"The hyper-parameters {h} cannot be used ({type(error).__name__}: {error}): {remedy}."
                ) from error
            if used > self.slots:
                raise RunError(f"The hyper-parameters {h} need {used} slots, but the record has {self.slots}: {remedy}.")
        self._usable = lasting

    def _one(self, state: State, gradient: Tensor, h: Hyperparameters) -> State:
        """The state of one parameter after the update; slots that only other groups use stay as they are."""
        used = 1 + len(self.rule.slots(h))
        return *self.rule.update(state[:used], gradient, h), *state[used:]

    def response(self, groups: list[Hyperparameters]) -> tuple[Tensor, Tensor]:
        """What an affine U makes of one number: the changes ``A d + e c`` of the state's parts for changes d and c.

        Args:
            groups: hyper-parameters of the parameter groups.

        Returns:
            A of shape (parts, parts), for changes d of the parts of the state (the parameter, then its slots), and e of shape
            (parts,), for a change c of the gradient; both float64.

        Raises:
            RequestError: U is not affine, or not the same for all parameters.
        """
        obstacle = self.not_uniform(groups)
        if obstacle is not None:
            raise RequestError(obstacle)
        parts = 1 + self.slots
        # Row k: a change of the k-th part; the last but one: of the gradient; the last: none.
        changes = torch.cat([torch.eye(parts + 1, dtype=torch.float64), torch.zeros(1, parts + 1, dtype=torch.float64)])
        *state, gradient = changes.split(1, -1)
        answers = torch.cat(self.rule.update(tuple(state), gradient, groups[0]), -1)
        answers = answers - answers[-1]
        return answers[:parts].T.contiguous(), answers[parts]

    def not_uniform(self, groups: list[Hyperparameters]) -> str | None:
        """Why U is not one affine function for all numbers, in a sentence; None where it is."""
        if not self.rule.affine:
            return "its optimizer is not affine in the gradient, as SGD is"
        if groups[0]["gradient_clip_val"]:
            return "its gradients are clipped"
        if any(group != groups[0] for group in groups[1:]):
            return "its parameter groups have different hyper-parameters"
        return None
