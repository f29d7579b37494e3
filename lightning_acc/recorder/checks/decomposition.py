"""The decomposition of the training loss into per-sample losses is checked, not believed.

Compared are numbers of the training itself (its gradient, its parameters one step later) with what F makes of the record.
"""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_acc.core.objective import Objective
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.recorder.checks.carried import refuse_unknown
from lightning_acc.recorder.checks.refusals import RecordingRefused

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative difference, in norm, that counts as round-off."""

REMEDY = (
    "Define per_sample_loss(self, batch) on the module: one loss a sample, shape (B,), whose mean is what training_step "
    "returns. A penalty on the weights belongs into the optimizer's weight_decay; losses that couple the samples of a batch "
    "(contrastive losses, batch statistics) cannot be attributed to single samples."
)


def _tolerance(objective: Objective) -> float:
    """What counts as round-off between two ways to compute the same number."""
    return GRADIENT_TOLERANCE[objective.dtype] if objective.full_precision else 0.05


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the 2-norm."""
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def fits_better(step: Step, other: Step, theta: Tensor, gradient: Tensor) -> bool:
    """Whether the weights of ``step`` (those of a summed loss) fit the training's own gradient better than those of ``other``.

    Args:
        step: a step.
        other: the same step with other weights.
        theta: parameters (p,) before the step.
        gradient: what the training's backward pass left in ``.grad``, flat (p,).
    """
    return relative_difference(_gradient(step, theta), gradient) < relative_difference(_gradient(other, theta), gradient)


def compare_gradients(step: Step, theta: Tensor, gradient: Tensor, number: int, tolerance: float, least: float = 0.0) -> None:
    """Compare the gradient of the weighted per-sample losses of a step with that of the training.

    Args:
        step: the step with its final weights.
        theta: parameters (p,) before the step.
        gradient: what the training's backward pass left in ``.grad``, flat (p,).
        number: index of the step, for the message.
        tolerance: largest difference that passes, relative to the norm of the gradient.
        least: where that norm is smaller, the difference is taken relative to this; 0 in the first steps.

    Raises:
        RecordingRefused: they differ; gives the difference and the remedy.
    """
    found = _gradient(step, theta)
    scale = max(float(gradient.norm()), least, torch.finfo(theta.dtype).tiny)
    difference = float((found - gradient).norm()) / scale
    if difference <= tolerance:
        return
    refuse_unknown(step, theta, found, number)
    numbers = f"their gradients differ by {100 * difference:.2g} % (allowed {100 * tolerance:.2g} %)"
    if not least:
        raise RecordingRefused(
            f"The training loss is not the weighted sum of per-sample losses: in step {number}, a batch of "
            f"{len(step.sample_ids)} samples, {numbers}. {REMEDY}"
        )
    raise RecordingRefused(
        f"The training loss has become another than the weighted sum of per-sample losses it was at first: in step {number} "
        f"{numbers}. A replay knows neither self.current_epoch and self.global_step nor what a hook or callback changes: "
        "keep the loss, the layers' modes and what is trained the same from the first step to the last."
    )


def _gradient(step: Step, theta: Tensor) -> Tensor:
    try:
        return step.gradient(theta)
    except RunError as error:
        raise RecordingRefused(str(error)) from error
    except Exception as error:
        refuse_unknown(step, theta, None, 0)
        words = " ".join(str(error).split())[:300]
        raise RecordingRefused(
            f"The loss of single samples cannot be computed ({type(error).__name__}: {words}). {REMEDY}"
        ) from error


def can_be_vectorised(step: Step, theta: Tensor) -> bool:
    """Whether many parameter vectors can be evaluated at once with the result of one at a time.

    They cannot where dropout acts on a tensor that is not contiguous: the order its mask is drawn in then depends on the
    layout in memory, which vectorisation changes.
    """
    together = step.gradients(theta[None], step.weights[None])[0]
    return relative_difference(together, step.gradient(theta)) <= _tolerance(step.objective)


def rows_are_independent(objective: Objective, theta: Tensor, leaves: Leaves, in_evaluation_mode: bool) -> bool:
    """Whether a sample alone has the loss it has within its batch.

    Losses that differ by a factor only (a mean over the tokens of a batch) are allowed and answered with False.

    Args:
        objective: the per-sample losses.
        theta: parameters (p,).
        leaves: a batch.
        in_evaluation_mode: look at them in evaluation mode, and answer False: where the forward pass draws random numbers,
            or normalises with the statistics of a batch.

    Raises:
        RecordingRefused: the samples of a batch change each other's gradient.
    """
    leaves = batches.cast(leaves, objective.dtype)
    size = batches.batch_size(leaves)
    leaf = theta.detach().requires_grad_()

    def look() -> bool:
        same = True
        for row in range(min(size, 4)):
            (within,) = torch.autograd.grad(objective.losses(leaf, leaves)[row], leaf, materialize_grads=True)
            single = batches.rows(leaves, torch.tensor([row]))
            (alone,) = torch.autograd.grad(objective.losses(leaf, single)[0], leaf, materialize_grads=True)
            if within.norm() == 0:  # of no weight in this batch, or fitted perfectly
                same = same and bool(alone.norm() == 0)
                continue
            cosine = float(within @ alone / (within.norm() * alone.norm()).clamp_min(torch.finfo(theta.dtype).tiny))
            if not 1 - cosine <= _tolerance(objective):
                raise RecordingRefused(
                    f"The samples of a batch are coupled: alone, sample {row} of the first batch has a gradient that points "
                    f"elsewhere than within the batch (cosine {cosine:.4f}). {REMEDY}"
                )
            same = same and relative_difference(alone, within) <= _tolerance(objective)
        return same

    if not in_evaluation_mode:
        return look()
    with objective.evaluating():
        look()
    return False
