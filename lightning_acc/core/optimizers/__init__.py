"""U: what happens to the state after the gradient (clipping, weight decay, the optimizer), as pure functions.

A *state* is a tuple of tensors (..., p): the flat parameters, then the optimizer's slots (for SGD with momentum the
momentum buffer, for Adam its two moments). The functions repeat torch.optim's arithmetic operation by operation, so that a
replay is bit-exact.
"""

from lightning_acc.core.optimizers.clipping import clipped, through_clipping
from lightning_acc.core.optimizers.known import NO_FUNCTION, RULES, register_optimizer
from lightning_acc.core.optimizers.rule import PARAMETER_STEPS, UNUSED, Hyperparameters, Numbers, OptimizerRule, State, moves
from lightning_acc.core.optimizers.update import Update

__all__ = [
    "NO_FUNCTION",
    "PARAMETER_STEPS",
    "RULES",
    "UNUSED",
    "Hyperparameters",
    "Numbers",
    "OptimizerRule",
    "State",
    "Update",
    "clipped",
    "moves",
    "register_optimizer",
    "through_clipping",
]
