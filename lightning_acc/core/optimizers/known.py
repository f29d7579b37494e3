"""The optimizers that are known, by the names of their classes. To add one, write its update and add its rule here."""

from __future__ import annotations

import dataclasses

from lightning_acc.core.optimizers import by_matrix, by_number
from lightning_acc.core.optimizers.rule import Hyperparameters, OptimizerRule

_DECAY = ("weight_decay", "maximize")
_OF_SIGNS = "it moves each number by the sign of a gradient, whose derivative is 0 wherever there is one"


def _adam_slots(h: Hyperparameters) -> tuple[str, ...]:
    return ("exp_avg", "exp_avg_sq", "max_exp_avg_sq") if h["amsgrad"] else ("exp_avg", "exp_avg_sq")


_ADAM = OptimizerRule(
    by_number.adam,
    _adam_slots,
    ("lr", "betas", "eps", "weight_decay", "amsgrad", "maximize", "decoupled_weight_decay"),
    by_number=True,
    one_pass=by_number.adam_in_one_pass,
)
RULES: dict[str, OptimizerRule] = {
    "SGD": OptimizerRule(
        by_number.sgd,
        lambda h: ("momentum_buffer",) if h["momentum"] else (),
        ("lr", "momentum", "weight_decay", "nesterov", "dampening", "maximize"),
        affine=True,
        by_number=True,
    ),
    "Adam": _ADAM,
    "AdamW": _ADAM,
    "NAdam": OptimizerRule(
        by_number.nadam,
        lambda h: ("exp_avg", "exp_avg_sq"),
        ("lr", "betas", "eps", "momentum_decay", "decoupled_weight_decay", *_DECAY),
        numbers=by_number.nadam_numbers,
        by_number=True,
    ),
    "RAdam": OptimizerRule(
        by_number.radam,
        lambda h: ("exp_avg", "exp_avg_sq"),
        ("lr", "betas", "eps", "decoupled_weight_decay", *_DECAY),
        by_number=True,
    ),
    "Adamax": OptimizerRule(
        by_number.adamax, lambda h: ("exp_avg", "exp_inf"), ("lr", "betas", "eps", *_DECAY), by_number=True
    ),
    "RMSprop": OptimizerRule(
        by_number.rmsprop,
        by_number.rmsprop_slots,
        ("lr", "alpha", "eps", "momentum", "centered", *_DECAY),
        by_number=True,
    ),
    "Adagrad": OptimizerRule(
        by_number.adagrad,
        lambda h: ("sum",),
        ("lr", "lr_decay", "initial_accumulator_value", "eps", *_DECAY),
        by_number=True,
    ),
    "Adadelta": OptimizerRule(
        by_number.adadelta, lambda h: ("square_avg", "acc_delta"), ("lr", "rho", "eps", *_DECAY), by_number=True
    ),
    "ASGD": OptimizerRule(
        by_number.asgd,
        lambda h: ("ax",),
        ("lr", "lambd", "alpha", "t0", *_DECAY),
        numbers=by_number.asgd_numbers,
        affine=True,
        by_number=True,
    ),
    "Rprop": OptimizerRule(
        by_number.rprop,
        lambda h: ("prev", "step_size"),
        ("lr", "etas", "step_sizes", "maximize"),
        no_derivative=_OF_SIGNS,
        by_number=True,
    ),
    "Lion": OptimizerRule(  # of whatever package: each has copied the authors' few lines, and the first steps are compared
        by_number.lion,
        lambda h: ("exp_avg",),
        ("lr", "betas", "weight_decay"),
        package="",
        by_number=True,
        no_derivative=_OF_SIGNS,
    ),
    "Adafactor": OptimizerRule(
        by_matrix.adafactor,
        by_matrix.adafactor_slots,
        ("lr", "beta2_decay", "eps", "d", *_DECAY),
        numbers=by_matrix.adafactor_numbers,
    ),
    "Muon": OptimizerRule(
        by_matrix.muon,
        lambda h: ("momentum_buffer",),
        ("lr", "weight_decay", "momentum", "nesterov", "ns_coefficients", "eps", "ns_steps", "adjust_lr_fn"),
    ),
}
NO_FUNCTION = {
    "LBFGS": "takes the gradient at several parameters within a step, as many as its line search asks for, where a recorded "
    "step has one: use SGD or Adam",
    "SparseAdam": "moves the rows that a sparse gradient stores and leaves the others, and a removed sample of loss weight 0 "
    "still stores its rows: use torch.optim.Adam with sparse=False in the embedding",
}
"""Optimizers of torch whose step is no function of state and gradient, each with the reason and the remedy."""


def register_optimizer(optimizer: type, rule: OptimizerRule) -> None:
    """Teach the package an optimizer class: its update as a pure function.

    Example::

        def averaged(state, gradient, h):
            theta, mean = state
            mean = mean.lerp(gradient, 1 - h["beta"])
            return theta - h["lr"] * mean, mean

        la.register_optimizer(Averaged, la.OptimizerRule(averaged, lambda h: ("mean",), ("lr", "beta")))

    The recorder compares the rule with what the optimizer really does in the first steps. Register it where the module is
    defined, so that every process that rebuilds the module knows it.
    """
    RULES[optimizer.__name__] = dataclasses.replace(rule, package=optimizer.__module__)
