"""The decomposition of the training loss into per-sample losses is checked, not believed.

Compared are numbers of the training itself (its gradient, its parameters one step later) with what F makes of the record.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.losses.reduced import NotSeparable
from lightning_acc.core.objective import Objective
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.recorder.checks.carried import refuse_read
from lightning_acc.recorder.checks.refusals import RecordingRefused

GRADIENT_TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9, torch.bfloat16: 0.05, torch.float16: 0.01}
"""Largest relative difference, in norm, that counts as round-off."""

ROWS = 4
"""Samples of the first batch that are looked at by themselves."""
COUPLED = (
    "Losses that couple the samples of a batch (contrastive losses, batch statistics, hard-negative mining) cannot be "
    "attributed to single samples: record groups of samples as one, or train on a loss that is a mean over samples."
)


class GradientsDiffer(RecordingRefused):
    """The gradient of the training is not that of the weighted per-sample losses.

    Args:
        message: says so.
        difference: by how much of its norm.
    """

    def __init__(self, message: str, difference: float) -> None:
        super().__init__(message)
        self.difference = difference


class Coupled(RecordingRefused):
    """The samples of a batch change each other's gradient."""


def remedy(objective: Objective) -> str:
    """What to do where the losses of the samples do not make the loss of the training."""
    rest = "A penalty on the weights belongs into the optimizer's weight_decay"
    if objective.source == "per_sample_loss":
        rest = f"{rest}, or into training_step of a module without per_sample_loss, where it is found. {COUPLED}"
        return (
            "Let per_sample_loss give the losses whose mean (or sum) training_step returns, or a pair (losses, weights) whose "
            f"weighted mean that is, of one forward pass in the same order. {rest}"
        )
    return (
        "Define per_sample_loss(self, batch) on the module: one loss a sample, shape (B,), whose mean is what training_step "
        f"returns, or a pair (losses, weights) whose weighted mean that is. {rest}. {COUPLED}"
    )


def tolerance_of(objective: Objective) -> float:
    """What counts as round-off between two ways to compute the same number."""
    return GRADIENT_TOLERANCE[objective.dtype] if objective.full_precision else 0.05


def relative_difference(found: Tensor, expected: Tensor) -> float:
    """|found - expected| / |expected| in the 2-norm."""
    return float((found - expected).norm() / expected.norm().clamp_min(torch.finfo(expected.dtype).tiny))


def compare_gradients(step: Step, theta: Tensor, gradient: Tensor, number: int, tolerance: float, least: float = 0.0) -> Tensor:
    """Compare the gradient of the weighted per-sample losses of a step with that of the training.

    Args:
        step: the step with its final weights.
        theta: parameters (p,) before the step.
        gradient: what the training's backward pass left in ``.grad``, flat (p,).
        number: index of the step, for the message.
        tolerance: largest difference that passes, relative to the norm of the gradient.
        least: where that norm is smaller, the difference is taken relative to this; 0 in the first steps.

    Returns:
        The former (p,).

    Raises:
        RecordingRefused: they differ; gives the difference and the remedy.
    """
    found = _gradient(step, theta)
    scale = max(float(gradient.norm()), least, torch.finfo(theta.dtype).tiny)
    difference = float((found - gradient).norm()) / scale
    if difference <= tolerance:
        return found
    if not math.isfinite(difference):
        refuse_read(step.objective, number)
    numbers = f"their gradients differ by {100 * difference:.2g} % (allowed {100 * tolerance:.2g} %)"
    if not least:
        raise GradientsDiffer(
            f"The training loss is not the weighted sum of per-sample losses: in step {number}, a batch of "
            f"{len(step.sample_ids)} samples, {numbers}. {remedy(step.objective)}",
            difference,
        )
    raise RecordingRefused(
        f"The training loss has become another than the weighted sum of per-sample losses it was at first: in step {number} "
        f"{numbers}. A replay knows the step, the epoch, and the numbers and texts that hooks and callbacks put into plain "
        "attributes of the module, but no tensors, lists and other objects that they change: keep what the loss is made of in "
        "such attributes and the layers' modes the same from the first step to the last, and let per_sample_loss, where there "
        "is one, change as training_step does."
    )


def _gradient(step: Step, theta: Tensor) -> Tensor:
    with computing(step.objective):
        return step.gradient(theta)


@contextmanager
def computing(objective: Objective) -> Iterator[None]:
    """In here losses are computed; what the module fails of becomes one sentence.

    Raises:
        RecordingRefused: they cannot be.
    """
    try:
        yield
    except NotSeparable:
        raise
    except RunError as error:
        raise RecordingRefused(str(error)) from error
    except Exception as error:
        refuse_read(objective)
        words = " ".join(str(error).split())[:300]
        raise RecordingRefused(
            f"The loss of single samples cannot be computed ({type(error).__name__}: {words}). {remedy(objective)}"
        ) from error


def can_be_vectorised(step: Step, theta: Tensor, gradient: Tensor) -> bool:
    """Whether many parameter vectors can be evaluated at once with the result of one at a time, which is ``gradient`` (p,).

    They cannot where dropout acts on a tensor that is not contiguous: the order its mask is drawn in then depends on the
    layout in memory, which vectorisation changes.
    """
    together = step.gradients(theta[None], step.weights[None])[0]
    return relative_difference(together, gradient) <= tolerance_of(step.objective)


def rows_are_independent(objective: Objective, theta: Tensor, batch: Batch, whole_batches: bool) -> bool:
    """Whether a sample alone has the loss it has within its batch, and so may be taken out of it.

    That the samples do not change each other's gradient is seen by single samples; or, where a sample alone would draw other
    random numbers, or be normalised otherwise, by batches that are full of one of them.

    Args:
        objective: the per-sample losses.
        theta: parameters (p,).
        batch: the first one.
        whole_batches: losses need the statistics of whole batches: look at them in evaluation mode.

    Raises:
        RecordingRefused: the samples of a batch change each other's gradient.
    """
    batch = Batch(batches.cast(batch.leaves, objective.dtype, objective.device), batch.rng)
    random = bool(batch.rng)
    if not (random or whole_batches):
        try:
            # The lengths of ragged tensors are read: single samples of these are not computed with many at once.
            return _alike(objective, theta, batch, copies=False) and not any(map(batches.is_joined, batch.leaves))
        except Coupled:
            if objective.source != "reductions":
                raise
    if not whole_batches:
        try:
            _alike(objective, theta, batch, copies=True)
            return False
        except Coupled:
            if not random:
                raise
    with objective.evaluating():
        _alike(objective, theta, batch, copies=objective.source == "reductions")
    return False


def _alike(objective: Objective, theta: Tensor, batch: Batch, copies: bool) -> bool:
    """Whether the first samples of a batch have the same loss in one of their own, or of copies of themselves.

    Losses that differ by a factor only (a mean over the tokens of a batch) are allowed and answered with False.

    Raises:
        RecordingRefused: their gradients point elsewhere.
    """
    size = batches.batch_size(batch.leaves)
    leaf = theta.detach().requires_grad_()
    slopes = []
    for row in range(min(size, ROWS)):
        with batch.random_numbers(objective.device):
            number, place = (size, row) if copies else (1, 0)
            slopes.append(_slope(objective.losses(leaf, batches.rows(batch.leaves, torch.full((number,), row)))[place], leaf))
    with batch.random_numbers(objective.device):
        together = objective.losses(leaf, batch.leaves)
    # Most are the same, which is seen of one sum, at the price of one of them: its parts have the sizes 1, 2, 3 and 4, so that
    # what a coupling adds to one sample and takes from another does not cancel.
    norms = [float(slope.norm()) for slope in slopes]
    if all(norm > 0 for norm in norms):
        parts = [number / norm for number, norm in enumerate(norms, 1)]
        within = _slope(sum(part * loss for part, loss in zip(parts, together, strict=False)), leaf)
        for part, slope in zip(parts, slopes, strict=True):
            within.sub_(slope, alpha=part)
        if float(within.norm()) <= tolerance_of(objective):
            return True
    same = True
    for row, alone in enumerate(slopes):
        within = _slope(together[row], leaf)
        if within.norm() == 0:  # of no weight in this batch, or fitted perfectly
            same = same and bool(alone.norm() == 0)
            continue
        cosine = float(within @ alone / (within.norm() * alone.norm()).clamp_min(torch.finfo(theta.dtype).tiny))
        if not 1 - cosine <= tolerance_of(objective):
            raise Coupled(
                f"The samples of a batch are coupled: {'among copies of itself' if copies else 'alone'}, sample {row} of the "
                f"first batch has a gradient that points elsewhere than within the batch (cosine {cosine:.4f}). {COUPLED}"
            )
        same = same and relative_difference(alone, within) <= tolerance_of(objective)
    return same


def _slope(loss: Tensor, leaf: Tensor) -> Tensor:
    if not loss.requires_grad:
        return torch.zeros_like(leaf)
    (gradient,) = torch.autograd.grad(loss, leaf, materialize_grads=True, retain_graph=True)
    return gradient
