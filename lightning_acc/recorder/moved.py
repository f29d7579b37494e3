"""Which of the parameters a step moves: the optimizer leaves those that have no gradient as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.optimizers import PARAMETER_STEPS, Hyperparameters, Numbers, Update
from lightning_acc.errors import RunError
from lightning_acc.recorder.checks.refusals import TRAINED_LATER, RecordingRefused


def groups_of(optimizer: torch.optim.Optimizer) -> dict[int, int]:
    """Of each parameter of an optimizer the index of its group, by the parameter's id."""
    return {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}


class Moved:
    """Sees which parameters each step moves: those in a parameter group that have a gradient.

    Args:
        trainer: the Lightning trainer.
        recorded: the parameters that are recorded, by name.
        left_out: the others.
        update: U, which is told what joins a group later.

    Attributes:
        parameter_steps: how many steps have moved each by now.
        begins: whether the newest step is the first one that moves some parameter.
    """

    def __init__(
        self,
        trainer: Any,
        recorded: Sequence[tuple[str, Tensor]],
        left_out: Sequence[tuple[str, Tensor]],
        update: Update,
    ) -> None:
        self._trainer, self._optimizer = trainer, trainer.optimizers[0]
        self._recorded, self._left_out, self._update = recorded, left_out, update
        self._frozen_at_first = {name for name, p in recorded if not p.requires_grad}
        self._sizes = self._group_sizes()
        self.parameter_steps = [0] * len(recorded)
        self.begins = False

    def _group_sizes(self) -> list[int]:
        return [len(group["params"]) for group in self._optimizer.param_groups]

    def _slots(self, i: int, group: int) -> int:
        """How many slots the optimizer has for a parameter in a group."""
        return len(self._update.rule.slots({**self._optimizer.param_groups[group], "shape": tuple(self._recorded[i][1].shape)}))

    def in_groups(self, step: int) -> None:
        """See which group each parameter is in by step number ``step``, where the optimizer has been given more.

        Raises:
            RunError: a parameter has come to another group, or to one that has more slots than the record.
        """
        if self._group_sizes() == self._sizes:
            return
        self._sizes, known = self._group_sizes(), groups_of(self._optimizer)
        for i, (name, parameter) in enumerate(self._recorded):
            before, now = self._update.group_of[i], known.get(id(parameter))
            if now is None or now == before:
                continue
            if before is not None:
                raise RunError(
                    f"The optimizer has the parameter {name!r} in group {now} in step {step} and had it in group {before}: let "
                    "parameters stay in their groups, and change the hyper-parameters of these."
                )
            if self._slots(i, now) > self._update.slots:
                raise RunError(
                    f"The optimizer keeps {self._slots(i, now)} tensors of the parameter {name!r}, which joins in step {step}, "
                    f"and {self._update.slots} of those before: give all parameter groups the same kind of momentum."
                )
            self._update.group_of[i] = now

    def steps_of_each(self, groups: list[Hyperparameters], step: int) -> list[int] | None:
        """The hyper-parameter ``PARAMETER_STEPS`` of step number ``step``; None where all go as if every step moved them.

        F gives a parameter without a gradient a zero gradient, which comes to the same unless it would still move, by weight
        decay or by what its slots have gathered.

        Raises:
            RecordingRefused: a parameter moves otherwise than F moves it.
            RunError: one moves that is not recorded.
        """
        of_each = self._update.group_of
        now = [group is not None and p.grad is not None for (_, p), group in zip(self._recorded, of_each, strict=True)]
        self._refuse(now, step)
        if all(now) and self.parameter_steps.count(step) == len(now):  # as most often
            self.parameter_steps, self.begins = [step + 1] * len(now), not step
            return None
        self.begins = any(moved and not before for moved, before in zip(now, self.parameter_steps, strict=True))
        self.parameter_steps = [before + moved for moved, before in zip(now, self.parameter_steps, strict=True)]
        own = [steps if moved else 0 for moved, steps in zip(now, self.parameter_steps, strict=True)]
        if all(steps == step + 1 or self._is_alike(i, steps, groups) for i, steps in enumerate(own)):
            return None
        self._update.rests = True
        return own

    def unused(self) -> list[int]:
        """Those that the optimizer would move now, had the loss been made of them."""
        each = enumerate(zip(self._recorded, self._update.group_of, strict=True))
        return [i for i, ((_, p), group) in each if group is not None and p.requires_grad and p.grad is None]

    def _is_alike(self, i: int, steps: int, groups: list[Hyperparameters]) -> bool:
        """Whether U moves a parameter as if every step had moved it."""
        group = self._update.group_of[i]
        if group is None or not self._recorded[i][1].requires_grad or self._slots(i, group):
            return False
        return steps > 0 or not self._update.moves_unused(i, groups[group])

    def _refuse(self, now: list[bool], step: int) -> None:
        for (name, parameter), moves in zip(self._recorded, now, strict=True):
            if moves and not parameter.requires_grad:
                raise RecordingRefused(
                    f"The parameter {name!r} is frozen in step {step} but has a gradient of before, by which the optimizer "
                    "moves it: set its .grad to None when it is frozen."
                )
        if self._trainer.world_size > 1:
            self._refuse_not_averaged(now, step)
        known = groups_of(self._optimizer) if any(p.grad is not None for _, p in self._left_out) else {}
        for name, parameter in self._left_out:
            if parameter.grad is not None and id(parameter) in known:
                raise RunError(
                    f"The parameter {name!r} is trained from step {step} on and was not when the training began, so it is not "
                    f"recorded: pass TrajectoryRecorder(..., frozen={TRAINED_LATER!r}), which records such parameters from the "
                    "start."
                )

    def _refuse_not_averaged(self, now: list[bool], step: int) -> None:
        finds_unused = getattr(self._trainer.strategy.model, "find_unused_parameters", None)
        for (name, parameter), moves in zip(self._recorded, now, strict=True):
            if moves and name in self._frozen_at_first:
                raise RecordingRefused(
                    f"The parameter {name!r} was frozen when the training began, and DistributedDataParallel does not average "
                    f"its gradient in step {step}: train with one process, or begin with it unfrozen."
                )
            if not moves and parameter.requires_grad and finds_unused is False:
                raise RecordingRefused(
                    f"The parameter {name!r} gets no gradient in step {step}, and without all of them "
                    "DistributedDataParallel does not average those of the processes: give the trainer "
                    "strategy='ddp_find_unused_parameters_true', or freeze the parameter with requires_grad_(False)."
                )

    def numbers(self, group: int, h: Hyperparameters, step: int) -> Hyperparameters:
        """The further numbers that the rule needs of a group with hyper-parameters ``h``, the same of all its parameters.

        Raises:
            RecordingRefused: they differ, as other steps have moved the one than the other.
        """
        numbers: Numbers | None = self._update.rule.numbers
        if numbers is None:
            return {}
        own = h.get(PARAMETER_STEPS)
        moved = [i for i, of in enumerate(self._update.group_of) if of == group and (own is None or own[i])]
        found: list[Hyperparameters] = []
        for i in moved if own is not None else moved[:1]:  # all are in step
            parameter = self._recorded[i][1]
            given = h if own is None else {**h, "step": own[i]}
            found.append(numbers(parameter, self._optimizer.state.get(parameter, {}), given))
            if found[-1] != found[0]:
                first, other = self._recorded[moved[0]][0], self._recorded[i][0]
                raise RecordingRefused(
                    f"The parameters {first!r} and {other!r} are in one parameter group, but before step {step} not the same "
                    f"steps have moved both, by which {type(self._optimizer).__name__} counts: give each a group of its "
                    "own, or train with AdamW."
                )
        return found[0] if found else numbers(self._recorded[0][1], {}, h)
