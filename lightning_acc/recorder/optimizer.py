"""The trainer's optimizer as F sees it: flat parameters, gradient and slots, and the hyper-parameters of a step."""

from __future__ import annotations

import math
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.objective import ParameterLayout
from lightning_acc.core.optimizers import RULES, State, Update
from lightning_acc.errors import RunError
from lightning_acc.record.writer import NotFinite
from lightning_acc.recorder.checks.decomposition import GRADIENT_TOLERANCE
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if


class TrainedOptimizer:
    """Reads the one optimizer of ``trainer`` and the parameters of ``module`` it trains; changes neither.

    Attributes:
        layout: the trained parameters and their order in flat vectors.
        group_of: the index of the parameter group of each.
        update: U of this optimizer.

    Raises:
        RecordingRefused: the parameters are not of one dtype.
    """

    def __init__(self, trainer: Any, module: torch.nn.Module) -> None:
        self._trainer = trainer
        self._optimizer = trainer.optimizers[0]
        self.name = type(self._optimizer).__name__
        groups = self._optimizer.param_groups
        group_of = {id(p): i for i, group in enumerate(groups) for p in group["params"]}
        trained = [(name, p) for name, p in module.named_parameters() if p.requires_grad and id(p) in group_of]
        dtypes = {p.dtype for _, p in trained}
        if len(dtypes) != 1 or not dtypes <= GRADIENT_TOLERANCE.keys():
            refuse_if(f"the trained parameters are of dtype {sorted(map(str, dtypes))}: use all float32 or all float64")
        self._names = [name for name, _ in trained]
        self._parameters = [p for _, p in trained]
        self.layout = ParameterLayout([(name, list(p.shape)) for name, p in trained])
        self.group_of = [group_of[id(p)] for p in self._parameters]
        self._rule = RULES[self.name]
        self.update = Update(self.name, self.layout, self.group_of, max(len(self._rule.slots(group)) for group in groups))
        self.with_gradient: list[bool] | None = None
        """Whether each parameter had a gradient in the newest step."""

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one snapshot."""
        return sum(p.numel() * p.element_size() for p in self._parameters)

    def parameters(self) -> Tensor:
        """A copy of the flat parameters (p,)."""
        return torch.cat([p.detach().reshape(-1) for p in self._parameters]).cpu()

    def state(self) -> State:
        """The parameters and the optimizer's slots as F keeps them, flat (p,) each; 0 where it has no slot yet."""
        return self.parameters(), *(
            torch.cat([self._slot(i, slot) for i in range(len(self._parameters))]).cpu() for slot in range(self.update.slots)
        )

    def _slot(self, i: int, slot: int) -> Tensor:
        parameter = self._parameters[i]
        names = self._rule.slots(self._optimizer.param_groups[self.group_of[i]])
        value = self._optimizer.state.get(parameter, {}).get(names[slot]) if slot < len(names) else None
        return torch.zeros_like(parameter).reshape(-1) if value is None else _dense(value).reshape(-1)

    def gradient(self, step: int) -> Tensor:
        """The flat gradient (p,) of step number ``step``, before clipping.

        Raises:
            NotFinite: it is not finite.
        """
        parts = [torch.zeros_like(p) if p.grad is None else p.grad for p in self._parameters]
        gradient = torch.cat([_dense(part).reshape(-1) for part in parts]).cpu()
        if not torch.isfinite(gradient).all():
            raise NotFinite(
                f"The loss or its gradient is not finite in step {step} of the training, so there is nothing to attribute: "
                "look for NaN or infinite values in the data, or lower the learning rate."
            )
        return gradient

    def has_gradient(self) -> bool:
        """Whether any parameter has one; else ``training_step`` returned None and the optimizer does nothing."""
        return any(p.grad is not None for p in self._parameters)

    def hyperparameters(self, step: int) -> list[dict[str, Any]]:
        """What step number ``step`` will use, for each parameter group.

        Raises:
            RecordingRefused: a parameter without a gradient would be treated otherwise than F does.
            RunError: one is no finite number, from which no parameters come.
        """
        algorithm = self._trainer.gradient_clip_algorithm
        for_all = {
            "step": step + 1,
            "gradient_clip_val": self._trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm or "norm")),
        }
        groups = [
            {**{key: _plain(group[key]) for key in self._rule.hyperparameters}, **for_all}
            for group in self._optimizer.param_groups
        ]
        self._refuse_missing_gradients(groups, step)
        for key, value in ((key, value) for group in groups for key, value in group.items() if key not in for_all):
            if isinstance(value, float) and not math.isfinite(value):
                raise RunError(
                    f"The optimizer's {key} is {value} in step {step}: give the scheduler, or the optimizer, a number."
                )
        return groups

    def _refuse_missing_gradients(self, groups: list[dict[str, Any]], step: int) -> None:
        # torch.optim skips a parameter without a gradient; F gives it a zero gradient. The two agree unless the parameter
        # would still move, by weight decay or by what its slots have gathered.
        present = [p.grad is not None for p in self._parameters]
        before = self.with_gradient or present
        self.with_gradient = present
        for name, group, now, then in zip(self._names, self.group_of, present, before, strict=True):
            if (not now and groups[group].get("weight_decay")) or (now != then and self._rule.slots(groups[group])):
                raise RecordingRefused(
                    f"The parameter {name!r} gets no gradient in step {step - (now and 1)}, but its optimizer has weight "
                    "decay or a memory: freeze it with requires_grad_(False), or use it always."
                )


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, Tensor) else value


def _dense(tensor: Tensor) -> Tensor:
    """A tensor with all its numbers: gradients of ``nn.Embedding(sparse=True)`` hold only those of the rows that were used."""
    tensor = tensor.detach()
    return tensor if tensor.layout == torch.strided else tensor.to_dense()
