"""The losses of the samples of a batch, and what each weighs in its loss: ``loss = sum_i w_i l_i``, and a penalty, if any.

They are taken in one of three ways: by the module's own ``per_sample_loss``; by observing the reductions of one
``training_step`` over the whole batch; or by ``training_step`` on batches of one sample.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor, nn

from lightning_acc.contract import HasPerSampleLoss
from lightning_acc.core.losses.reduced import Reduced, shares
from lightning_acc.core.losses.reductions import Reductions
from lightning_acc.core.losses.tracing import traceable
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves

LossFunction = Callable[[nn.Module, Any], Tensor]
"""Module and batch to values of shape (B,), or one value for the whole batch."""
Source = Literal["per_sample_loss", "reductions", "training_step"]
Reduction = Literal["mean", "sum", "weighted"]
"""How the losses of a batch make its loss: each with the weight 1 / B; with 1; or with weights of its own, whose sum is 1."""


class Losses(NamedTuple):
    """The losses (B,) of the samples of a batch, their weights (B,), and the scalar that no sample is in, if there is one."""

    losses: Tensor
    weights: Tensor
    penalty: Tensor | None = None


def sources_of(module: nn.Module) -> tuple[Source, ...]:
    """The ways in which the losses of a module may be taken, the best first."""
    return ("per_sample_loss",) if isinstance(module, HasPerSampleLoss) else ("reductions", "training_step")


def losses_of(module: nn.Module, batch: Any, source: Source, reduction: Reduction, penalised: bool = False) -> Losses:
    """The losses of the samples of a batch, and the penalty where there may be one.

    Raises:
        NotSeparable: its reductions do not show them.
        RunError: the module gives something else.
    """
    if source == "per_sample_loss":
        losses, weights = of_per_sample_loss(module, batch)
    elif source == "reductions":
        return separated(observed(module, batch, penalised), size_of(batch), reduction)
    else:
        losses, weights = of_single_samples(module, batch), None
    if weights is not None:
        return Losses(losses, shares(weights).to(losses.dtype))
    return Losses(losses, even(size_of(batch), reduction, losses.dtype).to(losses.device))


def even(size: int, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """Weights (B,) of a mean or a sum over ``size`` samples."""
    return torch.full((size,), 1.0 if reduction == "sum" else 1 / size, dtype=dtype)


def size_of(batch: Any) -> int:
    """How many samples a batch has."""
    return batches.batch_size(batches.flatten(batch)[0])


def of_per_sample_loss(module: nn.Module, batch: Any) -> tuple[Tensor, Tensor | None]:
    """What the module's own ``per_sample_loss`` gives: losses (B,) and, where it gives some, their weights (B,) in the mean.

    Raises:
        RunError: it gives something else.
    """
    given: Any = module.per_sample_loss(batch)  # type: ignore[operator]
    size = size_of(batch)
    losses, weights = given if isinstance(given, tuple) and len(given) == 2 else (given, None)
    if isinstance(losses, Tensor) and losses.shape == (size,) and losses.is_floating_point():
        if weights is None:
            return losses, None
        if isinstance(weights, Tensor) and weights.shape == (size,):
            return losses, weights.detach()
    name = type(module).__name__
    raise RunError(
        f"{name}.per_sample_loss returned {_described(given)} for a batch of {size} samples: it must return one loss a sample, "
        f"a tensor of shape ({size},), or a pair of that and their weights in the mean, of the same shape."
    )


def _described(given: Any) -> str:
    if isinstance(given, Tensor):
        return f"a tensor of shape {tuple(given.shape)}"
    if isinstance(given, (tuple, list)):
        return f"a {type(given).__name__} of {len(given)} ({', '.join(_described(part) for part in given[:4])})"
    return type(given).__name__


def gives_weights(module: nn.Module, batch: Any) -> bool:
    """Whether ``per_sample_loss`` gives weights beside the losses."""
    return of_per_sample_loss(module, batch)[1] is not None


def observed(module: nn.Module, batch: Any, penalised: bool = True) -> Reduced:
    """How ``training_step`` reduces the whole batch to its loss, to which terms may be added that no sample is in.

    Not to look for these, where it is known that there are none, takes less time.

    Raises:
        NotSeparable: that is not seen.
    """
    with Reductions(size_of(batch), own=own_tensors(module) if penalised else ()) as reductions:
        loss = whole_loss_of_training_step(module, batch)
    found: Reduced = reductions.seen.found(loss)
    return found


def own_tensors(module: nn.Module) -> Iterator[Tensor]:
    """The parameters and buffers of a module, as they are while it is called."""
    yield from module.parameters()
    yield from module.buffers()


def reduction_of(reduced: Reduced, size: int) -> Reduction:
    """What a loss is that was reduced so; weights that are only equal by chance, in this batch, are weights."""
    if reduced.total:
        return "sum"
    if reduced.weights is None:
        return "mean"
    uneven = not torch.allclose(reduced.weights.double(), torch.full_like(reduced.weights, 1 / size, dtype=torch.float64))
    return "weighted" if reduced.counted or uneven else "mean"


def weights_of(reduced: Reduced, size: int, reduction: Reduction, dtype: torch.dtype) -> Tensor:
    """The weights (B,) of the samples in the loss."""
    if reduction == "weighted" and reduced.weights is not None:
        return reduced.weights.to(dtype)
    return even(size, reduction, dtype)


def separated(reduced: Reduced, size: int, reduction: Reduction) -> Losses:
    """The losses ``c_i / w_i`` of samples that contribute c_i, 0 where the weight is; and the penalty."""
    assert reduced.contributions is not None
    contributions = reduced.contributions.reshape(size)
    weights = weights_of(reduced, size, reduction, contributions.dtype).to(contributions.device)
    some = weights != 0
    losses = torch.where(some, contributions / torch.where(some, weights, 1), 0)
    return Losses(losses, weights, None if reduced.penalty is None else reduced.penalty.reshape(()))


def of_single_samples(module: nn.Module, batch: Any) -> Tensor:
    """Losses (B,) by ``training_step`` on batches of one sample."""
    leaves, structure = batches.flatten(batch)

    def alone(row: Leaves) -> Tensor:
        single = {name: leaf.unsqueeze(0) for name, leaf in row.items()}
        return whole_loss_of_training_step(module, batches.unflatten(structure, single))

    with traceable():
        if not module.__dict__.get("_rows_resist_vmap"):
            try:
                mapped = torch.vmap(alone, in_dims=(batches.in_dims(leaves),), randomness="different")
                return mapped(batches.unmapped(leaves))
            except RuntimeError:
                module.__dict__["_rows_resist_vmap"] = True
        return torch.stack([alone(batches.rows(leaves, torch.tensor(i))) for i in range(batches.batch_size(leaves))])


def whole_loss_of_training_step(module: nn.Module, batch: Any) -> Tensor:
    """What ``training_step`` returns for the batch, a scalar."""
    step: Any = module.training_step
    extra = (0,) if len(inspect.signature(step).parameters) > 1 else ()  # the batch index, whatever it is called
    return loss_of(step(batch, *extra))


def loss_of(output: Any) -> Tensor:
    """The loss in what ``training_step`` returned.

    Raises:
        RunError: there is none.
    """
    loss = output.get("loss") if isinstance(output, Mapping) else output
    if not isinstance(loss, Tensor) or loss.numel() != 1:
        raise RunError(
            f"training_step returned {type(output).__name__} without a single loss: it must return a scalar tensor, or a "
            'dict with one under "loss".'
        )
    return loss.reshape(())
