"""The outputs of a module and the loss of the outputs apart: what ``state="outputs"`` is built on.

A module may say it in two methods: ``outputs(batch)``, (B, c), and ``output_loss(outputs, batch)``, (B,), which together are
its ``per_sample_loss``. Where ``forward`` of one of a batch's tensors and a usual loss against another one give the same
numbers, nothing needs to be said. Either is tried out on a batch of the run: values and gradient, at parameters of no
particular kind.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lightning_acc.core.objective import Parameters
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.errors import RequestError
from lightning_acc.record import batches

TOLERANCE = {torch.float32: 1e-4, torch.float64: 1e-9}
"""Largest relative difference that counts as round-off."""
ROUGH = 0.05
"""The same where training's forward passes are cast to a narrower dtype."""


def _squared(outputs: Tensor, y: Tensor) -> Tensor:
    return (outputs - y.reshape(outputs.shape)).square()


def _binary(outputs: Tensor, y: Tensor) -> Tensor:
    return functional.binary_cross_entropy_with_logits(outputs, y.reshape(outputs.shape).to(outputs), reduction="none")


USUAL: list[Callable[[Tensor, Tensor], Tensor]] = [
    lambda outputs, y: functional.cross_entropy(outputs, y, reduction="none"),
    lambda outputs, y: _binary(outputs, y).mean(1),
    lambda outputs, y: _binary(outputs, y).sum(1),
    lambda outputs, y: _squared(outputs, y).mean(1),
    lambda outputs, y: _squared(outputs, y).sum(1),
    lambda outputs, y: _squared(outputs, y).sum(1) / 2,
]
"""Losses (B,) of outputs (B, c) and targets that need no methods."""


@dataclass(frozen=True)
class Split:
    """Per-sample losses as a loss of outputs; both take the module first.

    Attributes:
        outputs: of a batch, (B, c), or (B,) for c = 1.
        loss: of outputs (B, c) and a batch, (B,).
    """

    outputs: Callable[[nn.Module, Any], Tensor]
    loss: Callable[[nn.Module, Tensor, Any], Tensor]

    def of(self, step: Step, theta: Parameters) -> Tensor:
        """Outputs (B, c) of a step's samples at ``theta``, (p,) or by name."""
        return step.evaluate(theta, self.rows).to(step.objective.dtype)

    def rows(self, module: nn.Module, batch: Any) -> Tensor:
        """Outputs (B, c) of a batch."""
        outputs = self.outputs(module, batch)
        return outputs[:, None] if outputs.ndim == 1 else outputs

    def losses(self, step: Step, theta: Tensor, outputs: Tensor) -> Tensor:
        """Losses (B,) of a step's samples that have these outputs (B, c)."""
        parts = iter(outputs.split([batches.batch_size(batch.leaves) for batch in step.accumulated]))
        return step.evaluate(theta, lambda module, batch: self.loss(module, next(parts), batch))

    def derivatives(self, step: Step, theta: Tensor, outputs: Tensor) -> tuple[Tensor, Tensor]:
        """Gradients (B, c) and Hessians (B, c, c) of the samples' losses in their own outputs (B, c)."""

        def slope(at: Tensor) -> Tensor:
            gradient: Tensor = torch.func.grad(lambda z: self.losses(step, theta, z).sum())(at)
            return gradient

        def column(unit: Tensor) -> Tensor:
            along: Tensor = torch.func.jvp(slope, (outputs,), (unit.expand_as(outputs),))[1]
            return along

        units = torch.eye(outputs.shape[1], dtype=outputs.dtype)
        return slope(outputs), torch.vmap(column, randomness="same")(units).permute(1, 2, 0)


def split_for(replay: Replay) -> Split:
    """The outputs and their loss, of a run of at least one step.

    Raises:
        RequestError: the module does not have them apart, as far as can be told.
    """
    module, step = replay.objective.submodule(""), replay.step(0)
    generator = torch.Generator().manual_seed(0)
    noise = torch.randn(2, len(replay.initial[0]), generator=generator, dtype=torch.float64).to(replay.dtype)
    theta = replay.initial[0] * (1 + 0.1 * noise[0]) + 0.01 * noise[1]  # not where all outputs are 0
    name = type(module).__name__
    if callable(getattr(module, "outputs", None)) and callable(getattr(module, "output_loss", None)):
        own = Split(lambda m, batch: m.outputs(batch), lambda m, z, batch: m.output_loss(z, batch))  # type: ignore[operator]
        if not _reproduces(own, step, theta):
            raise RequestError(
                f"{name}.outputs(batch), of shape (B, c), and {name}.output_loss(outputs, batch), of shape (B,), do not give "
                "the per-sample losses and their gradient: correct them, or use state='parameters'."
            )
        return own
    for split in _usual(step):
        if _reproduces(split, step, theta):
            return split
    raise RequestError(
        f"state='outputs' needs the outputs and their loss apart, and no usual loss of {name}.forward gives its per-sample "
        f"losses: define outputs(batch), of shape (B, c), and output_loss(outputs, batch), of shape (B,), on {name}, or use "
        "state='parameters'."
    )


def _usual(step: Step) -> Iterator[Split]:
    for x, y in itertools.permutations(list(step.accumulated[0].leaves)[:4], 2):
        for loss in USUAL:
            yield Split(
                lambda module, batch, x=x: module(batches.flatten(batch)[0][x]),  # type: ignore[misc]
                lambda _, outputs, batch, y=y, loss=loss: loss(outputs, batches.flatten(batch)[0][y]),  # type: ignore[misc]
            )


def _reproduces(split: Split, step: Step, theta: Tensor) -> bool:
    """Whether a split gives the step's losses, and all of their gradient through the outputs."""
    tolerance = TOLERANCE[theta.dtype] if step.objective.full_precision else ROUGH
    expected, leaf = step.losses(theta), theta.detach().requires_grad_()
    try:
        outputs = split.of(step, leaf)
        if outputs.ndim != 2 or len(outputs) != len(expected):
            return False
        found = split.losses(step, theta, outputs)
        (gradient,) = torch.autograd.grad((step.weights * found).sum(), leaf)
    except Exception:  # whatever a module says to inputs that are none
        return False
    pairs = ((found.detach(), expected), (gradient, step.gradient(theta)))
    return all(
        one.shape == other.shape and float((one - other).norm()) <= tolerance * float(other.norm()) for one, other in pairs
    )
