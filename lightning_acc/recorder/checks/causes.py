"""Why a loss is no weighted sum of per-sample losses, told apart: weights, a penalty, random numbers, coupled samples.

Only a training that is refused is looked into.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_acc.core.losses.reduced import NotSeparable
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.recorder.checks.decomposition import (
    COUPLED,
    GRADIENT_TOLERANCE,
    Coupled,
    GradientsDiffer,
    relative_difference,
)
from lightning_acc.recorder.checks.penalty import HasPenalty

MANY = 512
"""Samples of a batch up to which the weights of their gradients are looked for."""
ROUND_OFF = 1e-3
ALONG = 0.999
"""Cosine from which a rest of the gradient is that of a penalty."""


def explain(failed: Sequence[RunError], tried: Callable[[], Step], theta: Tensor, gradient: Tensor, random: bool) -> str:
    """The cause in the first clause, and what to do about it.

    Args:
        failed: what was found wrong with the losses, for each way to take them.
        tried: gives the step, with losses of the last of these ways.
        theta: parameters (p,) before the step.
        gradient: of the training, (p,).
        random: whether the training's forward pass drew random numbers.
    """
    found = next((error for error in failed if isinstance(error, (HasPenalty, Coupled))), None)
    if found is not None:
        return str(found)
    closest = min((error.difference for error in failed if isinstance(error, GradientsDiffer)), default=math.inf)
    if theta.dtype == torch.float64 and closest <= GRADIENT_TOLERANCE[torch.float32]:
        return (
            "A part of the loss is computed in float32, though the parameters are float64: the gradients agree to "
            f"{closest:.1g} only. Compute the loss in float64 (some libraries call .float() on logits), or train in "
            "precision='32-true'."
        )
    lost = next((error.lost for error in failed if isinstance(error, NotSeparable)), None)
    if lost is not None and lost.couples:
        return f"The samples of a batch are coupled by their loss: {lost.why}. {COUPLED}"
    if not isinstance(failed[-1], GradientsDiffer):
        return str(failed[-1])
    step = tried()
    defined = step.objective.source == "per_sample_loss"
    mine = step.gradient(theta)
    numbers = f"the gradients differ by {100 * relative_difference(mine, gradient):.2g} %"
    penalty = _penalty(gradient - mine, theta)
    if penalty and relative_difference(mine, gradient) > ROUND_OFF:
        seen = ", or leave per_sample_loss out: then the penalty is found in training_step" if defined else ""
        return (
            f"training_step adds {penalty} to the loss, which no sample is in: {numbers}, and the rest points along it. Use "
            f"the optimizer's weight_decay instead{seen}."
        )
    weights = _weights(step, theta, gradient)
    if weights is not None:
        shown = ", ".join(f"{weight:.3g}" for weight in weights[:6].tolist()) + (", ..." if len(weights) > 6 else "")
        how = "Return (losses, weights) from per_sample_loss" if defined else LINES
        mean = (
            "the weighted mean that per_sample_loss gives"
            if step.objective.reduction == "weighted"
            else "the mean of their losses"
        )
        both = "the losses, and what each weighs in their mean, both of shape (B,)"
        return f"training_step weighs the samples of a batch by {shown}: {numbers} from those of {mean}. {how}: {both}."
    if random and defined:
        return (
            f"training_step and per_sample_loss draw different random numbers (dropout, noise): {numbers}. Let both make one "
            "forward pass over the whole batch, with the same layers in the same order."
        )
    if random and lost is not None:
        return (
            "training_step draws random numbers (dropout, noise) for a whole batch, and what each sample contributes to its "
            f"loss is not seen: {lost.why}. {LINES}: the losses, and what each weighs in their mean, both of shape (B,), of "
            "one forward pass over the batch; or reduce the loss by torch's own losses, mean and sum."
        )
    return str(failed[-1])


LINES = "Define on the module: def per_sample_loss(self, batch): ...; return losses, weights"


def _penalty(rest: Tensor, theta: Tensor) -> str | None:
    """In words, the penalty that has ``rest`` (p,) for its gradient; None where it is none of the usual ones."""
    for name, direction in (("a squared penalty on the weights", theta), ("a penalty on the weights' size", theta.sign())):
        size = float(rest.norm() * direction.norm())
        if size > 0 and abs(float(rest @ direction)) >= ALONG * size:
            return name
    return None


def _weights(step: Step, theta: Tensor, gradient: Tensor) -> Tensor | None:
    """The weights (B,) of the samples' gradients that make ``gradient`` (p,); None where none do, or any would."""
    count = len(step.sample_ids)
    if count > min(MANY, len(theta) // 2):
        return None
    leaf = theta.detach().requires_grad_()
    losses = step.losses(leaf)
    rows = [torch.autograd.grad(loss, leaf, retain_graph=True, materialize_grads=True)[0] for loss in losses]
    slopes = torch.stack(rows).double()
    found = torch.linalg.lstsq(slopes.T, gradient.double()[:, None]).solution[:, 0]
    made = found @ slopes
    return found if relative_difference(made, gradient.double()) <= ROUND_OFF else None
