"""The first step of a training: how its loss is made of per-sample losses, and what of that the manifest says."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core import stand_in
from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.losses.per_sample import (
    Source,
    even,
    gives_weights,
    observed,
    reduction_of,
    sources_of,
    weights_of,
)
from lightning_acc.core.modules.compiled import is_compiled, plain_name
from lightning_acc.core.objective import Objective
from lightning_acc.core.step import Step
from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Structure
from lightning_acc.recorder import description
from lightning_acc.recorder.checks import causes, decomposition, refusals
from lightning_acc.recorder.checks.carried import refuse_carried
from lightning_acc.recorder.checks.penalty import refuse_dependent_penalty, refuse_penalty
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.optimizer import TrainedOptimizer
from lightning_acc.recorder.ranks import SeenBatch


class Assembly:
    """Puts the steps of a training together from the batches that were seen.

    Args:
        trainer: the Lightning trainer.
        objective: the per-sample losses, and how they make the loss of a batch.
        optimizer: the training's own.

    Attributes:
        observable: whether what each sample weighs can be seen of the training's own forward passes.
    """

    observable = False

    def __init__(self, trainer: Any, objective: Objective, optimizer: TrainedOptimizer) -> None:
        self.objective = objective
        self._trainer = trainer
        self._optimizer = optimizer
        self._even: dict[tuple[int, ...], Tensor] = {}
        """The weights of steps whose samples weigh the same, by the sizes of the batches and how many make a step."""

    @property
    def weighted(self) -> bool:
        """Whether the samples of a batch weigh differently."""
        return self.objective.reduction == "weighted"

    def weights(self, seen: list[SeenBatch]) -> Tensor:
        """Loss weights of the batches' samples, (occurrences,), float64.

        Gradients are averaged over processes and accumulated batches; the last group of an epoch may be incomplete, but is
        divided all the same.
        """
        parts = self._trainer.accumulate_grad_batches * self._trainer.world_size
        sizes = (parts, *(len(batch.ids) for batch in seen))
        if sizes in self._even:
            return self._even[sizes]
        weights: Tensor = torch.cat([self._within(batch) for batch in seen]) / parts
        if not self.weighted:
            self._even[sizes] = weights
        return weights

    def _within(self, batch: SeenBatch) -> Tensor:
        """What the samples of a batch weigh in its loss."""
        if not self.weighted:
            return even(len(batch.ids), self.objective.reduction, torch.float64)
        if batch.weights is None:
            with _batch(batch).random_numbers(self.objective.device):
                leaves = batches.cast(batch.leaves, self.objective.dtype, self.objective.device)
                batch.weights = self.objective.weights(self._optimizer.parameters(), leaves).detach().cpu().double().clone()
        return batch.weights

    def step(self, groups: list[dict[str, Any]], seen: list[SeenBatch]) -> Step:
        """The step these batches, and the hyper-parameters ``groups``, make."""
        of_each = groups[0].get(stand_in.OF_BATCHES) or [None] * len(seen)
        return Step(
            self.objective,
            self._optimizer.update,
            [replace(_batch(batch), settings=one) for batch, one in zip(seen, of_each, strict=True)],
            torch.tensor([sample for batch in seen for sample in batch.ids]),
            self.weights(seen),
            groups,
        )


def _batch(seen: SeenBatch) -> Batch:
    return Batch(seen.leaves, seen.rng if seen.random else {})


def understand(
    trainer: Any,
    module: Any,
    optimizer: TrainedOptimizer,
    structure: Structure,
    theta: Tensor,
    groups: list[dict[str, Any]],
    everyone: list[SeenBatch],
    number: int,
    settings: stand_in.Settings,
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
        settings: of the module, those that have changed by now, as they were in the first step.
        batch_norm: the recorder's argument.

    Returns:
        What makes further steps, and the header of the manifest.

    Raises:
        RecordingRefused: the loss is no weighted sum of per-sample losses, or cannot be taken apart.
    """
    refuse_if(refusals.module_refusal(module, batch_norm))
    evaluation_modules = [plain_name(name) for name, part in module.named_modules() if name and not part.training]
    sources = sources_of(module)
    objective = Objective(
        module,
        optimizer.layout,
        structure,
        source=sources[0],
        reduction="mean",
        evaluation_modules=evaluation_modules,
        dtype=theta.dtype,
        device=theta.device,
        precision=str(trainer.precision),
        trainer=stand_in.facts(trainer),
        settings=settings,
    )
    objective.settle(lambda: stand_in.place_in(groups[0]))
    first_step = _FirstStep(trainer, objective, optimizer, groups, everyone, theta, optimizer.gradient(number), number)
    whole_batches = bool(refusals.batch_norms(module))
    refuse_carried(objective, theta, _batch(everyone[0]))
    if whole_batches:
        sources = tuple(source for source in sources if source != "training_step")  # which has no batches
    failed: list[RunError] = []
    for source in sources:
        try:
            assembly, loss = first_step.taken(source, whole_batches)
            break
        except RunError as error:
            failed.append(error)
    else:
        refuse_if(refusals.compiled_refusal(module, any(batch.random for batch in everyone)))
        reason = causes.explain(failed, lambda: first_step.tried(sources[-1]), theta, first_step.gradient, everyone[0].random)
        raise RecordingRefused(reason) from failed[-1]
    header = {
        **description.header(trainer, module, optimizer, theta.dtype),
        "evaluation_modules": evaluation_modules,
        "loss": {**loss, "batch_norm": batch_norm if whole_batches else None},
        "batch_structure": structure,
    }
    return assembly, header


class _FirstStep:
    """The first step, whose loss is taken apart in one way or another."""

    def __init__(
        self,
        trainer: Any,
        objective: Objective,
        optimizer: TrainedOptimizer,
        groups: list[dict[str, Any]],
        everyone: list[SeenBatch],
        theta: Tensor,
        gradient: Tensor,
        number: int,
    ) -> None:
        self.objective, self.theta, self.gradient = objective, theta, gradient
        self.batches, self.number = everyone, number
        self._trainer, self._optimizer, self._groups = trainer, optimizer, groups

    def taken(self, source: Source, whole_batches: bool) -> tuple[Assembly, dict[str, Any]]:
        """The losses taken from ``source``, checked; what makes further steps, and what the manifest says of the loss.

        Raises:
            RunError: they are not the samples', or do not make the loss.
        """
        tolerance = decomposition.GRADIENT_TOLERANCE[self._optimizer.rounded_to]
        assembly, found = self._assembled(source, tolerance)
        step, objective, first = assembly.step(self._groups, self.batches), assembly.objective, self.batches[0]
        vectorised = decomposition.can_be_vectorised(step, self.theta, found)
        if objective.penalised:
            refuse_dependent_penalty(objective, self.theta, _batch(first))
        elif source != "per_sample_loss":
            refuse_penalty(objective, self.theta, first.leaves, tolerance)
        independent = decomposition.rows_are_independent(objective, self.theta, _batch(first), whole_batches)
        about = {"source": source, "reduction": objective.reduction, "independent_rows": independent, "vectorised": vectorised}
        return assembly, {**about, **({"penalised": True} if objective.penalised else {})}

    def assembly(self, objective: Objective) -> Assembly:
        """What makes steps of these losses."""
        return Assembly(self._trainer, objective, self._optimizer)

    def tried(self, source: Source) -> Step:
        """This step, of losses from ``source`` in the first way that seemed possible."""
        return self.assembly(self._possible(source)[0]).step(self._groups, self.batches)

    def _assembled(self, source: Source, tolerance: float) -> tuple[Assembly, Tensor]:
        """What makes steps whose gradient is the training's, and the gradient (p,) of this one."""
        possible = self._possible(source)
        for i, objective in enumerate(possible):
            assembly = self.assembly(objective)
            try:
                step = assembly.step(self._groups, self.batches)
                found = decomposition.compare_gradients(step, self.theta, self.gradient, self.number, tolerance)
            except RunError:
                if i == len(possible) - 1:
                    raise
            else:
                break
        assembly.observable = assembly.weighted and self._observable(assembly)
        for batch in self.batches:
            batch.weights = batch.weights if assembly.weighted else None
        return assembly, found

    def _possible(self, source: Source) -> list[Objective]:
        """How losses from ``source`` may make that of a batch."""
        first = self.batches[0]
        size, leaves = len(first.ids), batches.cast(first.leaves, self.objective.dtype, self.objective.device)
        batch, theta = batches.TakenApart(leaves, self.objective.structure), self.theta.detach().requires_grad_()
        with _batch(first).random_numbers(self.objective.device), decomposition.computing(self.objective.taken(source, "mean")):
            if source == "reductions":
                reduced = self.objective.call(theta, observed, batch)
                penalised = reduced.penalty is not None and reduced.penalty.requires_grad
                return [self.objective.taken(source, reduction_of(reduced, size), penalised)]
            if source == "per_sample_loss" and self.objective.call(self.theta, gives_weights, batch):
                return [self.objective.taken(source, "weighted")]
        return [self.objective.taken(source, "mean"), self.objective.taken(source, "sum")]

    def _observable(self, assembly: Assembly) -> bool:
        """Whether the reductions of ``training_step`` show the same weights; compiled, it would be compiled anew for that."""
        if is_compiled(self._trainer.lightning_module):
            return False
        if assembly.objective.source == "reductions":
            return True
        first = self.batches[0]
        batch = batches.TakenApart(
            batches.cast(first.leaves, self.objective.dtype, self.objective.device), self.objective.structure
        )
        with contextlib.suppress(RunError), _batch(first).random_numbers(self.objective.device):
            reduced = self.objective.call(self.theta, observed, batch)
            found = weights_of(reduced, len(first.ids), "weighted", torch.float64)
            return (
                reduced.weights is not None and first.weights is not None and torch.allclose(found.cpu(), first.weights, 1e-6)
            )
        return False
