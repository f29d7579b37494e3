"""The trainer's optimizer as F sees it: flat parameters, gradient and slots, and the hyper-parameters of a step."""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.modules.compiled import is_compiled, plain_name
from lightning_acc.core.modules.precision import rounded_to
from lightning_acc.core.objective import ParameterLayout
from lightning_acc.core.optimizers import PARAMETER_STEPS, RULES, UNUSED, State, Update
from lightning_acc.core.stand_in import OF_BATCHES, SETTINGS, Settings, place_in
from lightning_acc.errors import RunError
from lightning_acc.record.schema.keys import DTYPES
from lightning_acc.record.writer import NotFinite
from lightning_acc.recorder.checks.decomposition import GRADIENT_TOLERANCE
from lightning_acc.recorder.checks.refusals import refuse_if, sharded
from lightning_acc.recorder.moved import Moved, groups_of


class TrainedOptimizer:
    """Reads the one optimizer of ``trainer`` and the parameters of ``module`` it trains; changes neither.

    Args:
        trainer: the Lightning trainer.
        module: the LightningModule.
        later: whether parameters that are frozen, or not the optimizer's, may be trained later, and so are recorded.

    Attributes:
        layout: the trained parameters and their order in flat vectors.
        update: U of this optimizer.
        moved: which of the parameters each step moves.
        rounded_to: the dtype by whose rounding the training's gradient may differ from F's.

    Raises:
        RecordingRefused: the parameters are not of one dtype.
    """

    def __init__(self, trainer: Any, module: torch.nn.Module, later: bool = False) -> None:
        self._trainer = trainer
        self._optimizer = trainer.optimizers[0]
        self.name = type(self._optimizer).__name__
        group_of = groups_of(self._optimizer)
        named = [(plain_name(name), p) for name, p in module.named_parameters()]
        as_yet = {id(p): p.dtype for _, p in named if p.requires_grad and id(p) in group_of}
        joining = set(as_yet.values()) if later else set()  # a frozen part in other numbers, as a teacher, is no backbone
        trained = [(name, p) for name, p in named if id(p) in as_yet or p.dtype in joining]
        left_out = [(name, p) for name, p in named if id(p) not in as_yet and p.dtype not in joining]
        if any(hasattr(p, "full_tensor") for _, p in trained):  # a part of a DTensor, under a strategy of the user's own
            refuse_if(sharded(type(trainer.strategy).__name__))
        dtypes = {p.dtype for _, p in trained}
        if len(dtypes) != 1 or not dtypes <= GRADIENT_TOLERANCE.keys():
            usable = ", ".join(str(dtype).removeprefix("torch.") for dtype in GRADIENT_TOLERANCE)
            refuse_if(f"the trained parameters are of dtype {sorted(map(str, dtypes))}: use one of {usable} for all")
        self._parameters = [p for _, p in trained]
        self.layout = ParameterLayout([(name, list(p.shape)) for name, p in trained])
        self._rule = RULES[self.name]
        self._values: list[Any] = []
        """What the parameter groups had for the rule in the step before, where that can only be replaced."""
        self._told: list[dict[str, Any]] = []
        placed = [group_of.get(id(p)) for p in self._parameters]
        self.update = Update(self.name, self.layout, placed, slots=0)
        self.update.slots = max(len(self._slots(i)) for i in range(len(placed)))
        self.rounded_to = rounded_to(str(trainer.precision), self._parameters[0].dtype, is_compiled(module))
        self.moved = Moved(trainer, trained, left_out, self.update)

    @property
    def device(self) -> torch.device:
        """Where it trains, and where F is compared with it."""
        return self._parameters[0].device

    @property
    def parameter_bytes(self) -> int:
        """Bytes of one snapshot."""
        return sum(p.numel() * p.element_size() for p in self._parameters)

    def parameters(self) -> Tensor:
        """A copy of the flat parameters (p,)."""
        with torch.no_grad():
            return torch.cat([p.reshape(-1) for p in self._parameters])

    def state(self) -> State:
        """The parameters and the optimizer's slots as F keeps them, flat (p,) each; 0 where it has no slot yet."""
        return self.parameters(), *(
            torch.cat([self._slot(i, slot) for i in range(len(self._parameters))]) for slot in range(self.update.slots)
        )

    def _slot(self, i: int, slot: int) -> Tensor:
        parameter, names = self._parameters[i], self._slots(i)
        value = self._optimizer.state.get(parameter, {}).get(names[slot]) if slot < len(names) else None
        return torch.zeros_like(parameter).reshape(-1) if value is None else _dense(value).expand_as(parameter).reshape(-1)

    def _slots(self, i: int) -> tuple[str, ...]:
        """The names of what the optimizer keeps of a parameter; of one that is in no group as yet, as in the first one."""
        group = self._optimizer.param_groups[self.update.group_of[i] or 0]
        return self._rule.slots({**group, "shape": tuple(self._parameters[i].shape)})

    def gradient(self, step: int) -> Tensor:
        """The flat gradient (p,) of step number ``step``, before clipping.

        Raises:
            NotFinite: it is not finite.
        """
        each = zip(self._parameters, self.update.group_of, strict=True)
        parts = [torch.zeros_like(p) if p.grad is None or group is None else p.grad for p, group in each]
        gradient = torch.cat([_dense(part).reshape(-1) for part in parts])
        if getattr(self._optimizer, "_step_supports_amp_scaling", False):  # a fused one divides by the scale itself
            gradient = gradient / (self.loss_scale or 1.0)
        if not torch.isfinite(gradient).all():
            raise NotFinite(
                f"The loss or its gradient is not finite in step {step} of the training, so there is nothing to attribute: "
                "look for NaN or infinite values in the data, or lower the learning rate."
            )
        return gradient

    @property
    def loss_scale(self) -> float | None:
        """What the loss of this step was multiplied with on its way back (16-mixed); None where it was not."""
        scaler = getattr(self._trainer.precision_plugin, "scaler", None)
        return float(scaler.get_scale()) if scaler is not None and scaler.is_enabled() else None

    def is_skipped(self) -> bool:
        """Whether the loss scaler is going to leave this step out, as the gradient is beyond the range of float16."""
        if self.loss_scale is None:
            return False
        return not all(bool(torch.isfinite(p.grad).all()) for p in self._parameters if p.grad is not None)

    def has_gradient(self) -> bool:
        """Whether any parameter has one; else ``training_step`` returned None and the optimizer does nothing."""
        return any(p.grad is not None for p in self._parameters)

    def hyperparameters(self, step: int, settings: Sequence[Settings] = ()) -> list[dict[str, Any]]:
        """What step number ``step`` will use, for each parameter group; and the module's ``settings`` for each batch.

        Raises:
            RecordingRefused: a parameter moves otherwise than F moves it.
            RunError: one is no finite number, from which no parameters come; or a parameter moves that is not recorded.
        """
        self.moved.in_groups(step)
        algorithm = self._trainer.gradient_clip_algorithm
        alone = self._trainer.world_size == 1  # else the batches of all processes make a step
        for_all = {
            "step": step + 1,
            **place_in(self._trainer),
            **({SETTINGS: settings[-1]} if any(settings) else {}),
            **({OF_BATCHES: list(settings)} if any(one != settings[-1] for one in settings) and alone else {}),
            "gradient_clip_val": self._trainer.gradient_clip_val,
            "gradient_clip_algorithm": str(getattr(algorithm, "value", algorithm or "norm")),
            **({} if self.loss_scale is None else {"loss_scale": self.loss_scale}),
        }
        groups = [{**h, **for_all} for h in self._of_groups(step)]
        own = self.moved.steps_of_each(groups, step)
        for i, h in enumerate(groups):
            if own is not None:
                h[PARAMETER_STEPS] = own
                h[UNUSED] = self.moved.unused()
            if numbers := self.moved.numbers(i, h, step):
                _refuse_not_finite(numbers, step)
                h.update(numbers)
        return groups

    def _of_groups(self, step: int) -> list[dict[str, Any]]:
        """What each parameter group has for the rule, as plain numbers; most often that of the step before."""
        used = [{key: group[key] for key in self._rule.hyperparameters} for group in self._optimizer.param_groups]
        values = [value for h in used for value in h.values()]
        if len(values) == len(self._values) and all(map(operator.is_, values, self._values)):
            return self._told
        self._told = [{key: _plain(value) for key, value in h.items()} for h in used]
        for h in self._told:
            _refuse_not_finite(h, step)
        dtypes = [{key: dtype for key, value in h.items() if (dtype := _dtype(value)) is not None} for h in used]
        if any(dtypes):  # arithmetic with a tensor rounds as its dtype does
            self._told = [{**h, "dtypes": of_tensors} for h, of_tensors in zip(self._told, dtypes, strict=True)]
        self._values = values if all(map(_stays, values)) else []
        return self._told


def _stays(value: Any) -> bool:
    """Whether it can be replaced, but not written to, as a tensor and a list can."""
    return value is None or isinstance(value, (bool, int, float, str)) or (isinstance(value, tuple) and all(map(_stays, value)))


def _refuse_not_finite(h: dict[str, Any], step: int) -> None:
    for key, value in h.items():
        if isinstance(value, float) and not math.isfinite(value):
            raise RunError(f"The optimizer's {key} is {value} in step {step}: give the scheduler, or the optimizer, a number.")


def _dense(value: Tensor) -> Tensor:
    value = value.detach()
    return value.to_dense() if value.is_sparse else value


class Clipping:
    """Sees how a module clips the gradients of a step, where that is not left to the trainer.

    Args:
        trainer: the Lightning trainer.
        by_module: whether the module decides, with ``configure_gradient_clipping``.
    """

    def __init__(self, trainer: Any, by_module: bool) -> None:
        self._plugin, self._by_module = trainer.precision_plugin, by_module

    def begin(self, groups: list[dict[str, Any]]) -> None:
        """Put into the hyper-parameters ``groups`` how the step that begins is clipped, once it is: as yet it is not."""
        if not self._by_module:
            return
        for group in groups:
            group["gradient_clip_val"] = None
        clip = type(self._plugin).clip_gradients.__get__(self._plugin)

        def clip_and_note(optimizer: Any, clip_val: float = 0.0, gradient_clip_algorithm: Any = "norm") -> None:
            if clip_val > 0 and groups[0]["gradient_clip_val"] is not None:
                refuse_if("configure_gradient_clipping clips the gradients of a step twice: clip them once")
            for group in groups if clip_val > 0 else ():
                group["gradient_clip_val"] = float(clip_val)
                group["gradient_clip_algorithm"] = str(getattr(gradient_clip_algorithm, "value", gradient_clip_algorithm))
            clip(optimizer, clip_val, gradient_clip_algorithm)

        self._plugin.clip_gradients = clip_and_note

    def end(self) -> None:
        """Leave the trainer as it was."""
        vars(self._plugin).pop("clip_gradients", None)


def _plain(value: Any) -> Any:
    if isinstance(value, (list, tuple)):
        return [_plain(one) for one in value]
    return value.item() if isinstance(value, Tensor) else value


def _dtype(value: Any) -> str | None:
    """Of a tensor, or several, the dtype."""
    first = value[0] if isinstance(value, (list, tuple)) and value else value
    return str(first.dtype).removeprefix("torch.") if isinstance(first, Tensor) and first.dtype in DTYPES.values() else None
