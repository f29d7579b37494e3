"""The first step of a training: how its loss is made of per-sample losses, and what of that the manifest says."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lightning_acc.contract import HasPerSampleLoss
from lightning_acc.core import stand_in
from lightning_acc.core.objective import AUTOCAST, Objective
from lightning_acc.core.step import Batch, Step
from lightning_acc.errors import RunError
from lightning_acc.record.batches import Structure
from lightning_acc.recorder import description
from lightning_acc.recorder.checks import decomposition, refusals
from lightning_acc.recorder.checks.carried import refuse_carried
from lightning_acc.recorder.checks.penalty import refuse_penalty
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.optimizer import TrainedOptimizer
from lightning_acc.recorder.ranks import SeenBatch


class Assembly:
    """Puts the steps of a training together from the batches that were seen.

    Args:
        trainer: the Lightning trainer.
        processes: number of processes that train together.
        objective: the per-sample losses.
        optimizer: the training's own.
        summed: whether the training loss is the sum of a batch's losses; else their mean.
    """

    def __init__(
        self, trainer: Any, processes: int, objective: Objective, optimizer: TrainedOptimizer, summed: bool = False
    ) -> None:
        self._trainer = trainer
        self._processes = processes
        self._objective = objective
        self._optimizer = optimizer
        self.summed = summed

    def weights(self, seen: list[SeenBatch]) -> list[float]:
        """Loss weights of the batches' samples.

        Gradients are averaged over processes and accumulated batches; the last group of an epoch may be incomplete, but is
        divided all the same.
        """
        parts = self._trainer.accumulate_grad_batches * self._processes
        sizes = [len(batch.ids) for batch in seen]
        return [weight for size in sizes for weight in [1 / parts if self.summed else 1 / (size * parts)] * size]

    def step(self, groups: list[dict[str, Any]], seen: list[SeenBatch]) -> Step:
        """The step these batches, and the hyper-parameters ``groups``, make."""
        return Step(
            self._objective,
            self._optimizer.update,
            [Batch(batch.leaves, batch.rng if batch.random else None) for batch in seen],
            torch.tensor([sample for batch in seen for sample in batch.ids]),
            torch.tensor(self.weights(seen), dtype=torch.float64),
            groups,
        )


def understand(
    trainer: Any,
    module: Any,
    optimizer: TrainedOptimizer,
    structure: Structure,
    theta: Tensor,
    groups: list[dict[str, Any]],
    everyone: list[SeenBatch],
    number: int,
    batch_norm: str,
) -> tuple[Assembly, dict[str, Any]]:
    """Decompose the loss of the first step, number ``number``, and check that against the training's own gradient.

    Args:
        trainer: the Lightning trainer.
        module: the LightningModule.
        optimizer: the training's own.
        structure: how the batches are built.
        theta: parameters (p,) before the step.
        groups: hyper-parameters of the parameter groups.
        everyone: the batches of all processes.
        number: the step.
        batch_norm: the recorder's argument.

    Returns:
        What makes further steps, and the header of the manifest.

    Raises:
        RecordingRefused: the loss is no weighted sum of per-sample losses, or cannot be taken apart.
    """
    refuse_if(refusals.module_refusal(module, batch_norm))
    evaluation_modules = [name for name, part in module.named_modules() if name and not part.training]
    objective = Objective(
        module,
        optimizer.layout,
        structure,
        evaluation_modules=evaluation_modules,
        dtype=theta.dtype,
        autocast=AUTOCAST[str(trainer.precision)],
        trainer=stand_in.facts(trainer),
    )
    mean, total = (Assembly(trainer, trainer.world_size, objective, optimizer, summed) for summed in (False, True))
    tolerance = decomposition.GRADIENT_TOLERANCE[theta.dtype]
    whole_batches = bool(refusals.batch_norms(module))
    try:
        gradient = optimizer.gradient(number)
        first = everyone[0]
        refuse_carried(objective, theta, Batch(first.leaves, first.rng if first.random else None))
        summed = decomposition.fits_better(total.step(groups, everyone), mean.step(groups, everyone), theta, gradient)
        assembly = total if summed else mean
        decomposition.compare_gradients(assembly.step(groups, everyone), theta, gradient, number, tolerance)
        vectorised = decomposition.can_be_vectorised(mean.step(groups, everyone), theta)
        if not isinstance(module, HasPerSampleLoss):
            refuse_penalty(objective, theta, first.leaves, tolerance, decomposition.REMEDY)
        independent = decomposition.rows_are_independent(objective, theta, first.leaves, first.random or whole_batches)
    except RunError as error:
        raise RecordingRefused(str(error)) from error
    header = {
        **description.header(trainer, module, optimizer, theta.dtype),
        "evaluation_modules": evaluation_modules,
        "loss": {
            "source": "per_sample_loss" if isinstance(module, HasPerSampleLoss) else "training_step",
            "reduction": "sum" if summed else "mean",
            "independent_rows": independent,
            "vectorised": vectorised,
            "batch_norm": batch_norm if whole_batches else None,
        },
        "batch_structure": structure,
    }
    return assembly, header
