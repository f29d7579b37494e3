"""What stands in for a trainer, a logger, an optimizer and a metric."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from lightning_acc.errors import RunError
from lightning_acc.record.record import Record

RECORDED = (
    "max_epochs",
    "min_epochs",
    "max_steps",
    "min_steps",
    "num_training_batches",
    "estimated_stepping_batches",
    "accumulate_grad_batches",
    "gradient_clip_val",
    "log_every_n_steps",
    "check_val_every_n_epoch",
    "world_size",
    "num_nodes",
    "num_devices",
    "precision",
)
"""What a trainer tells that stays the same from the first step to the last."""
Place = dict[str, Any]
"""Where a training is, and so each step: ``PLACES``, as a trainer tells them; of its module the ``SETTINGS`` that change."""
PLACES = ("global_step", "current_epoch")
SETTINGS, OF_BATCHES = "settings", "settings_of_batches"
"""Under what the hyper-parameters of a step have those; and those of each accumulated batch, where these differ."""
OF_ONE_PROCESS: dict[str, Any] = {"global_rank": 0, "local_rank": 0, "node_rank": 0, "is_global_zero": True}
OF_TRAINING: dict[str, Any] = {"sanity_checking": False, "testing": False, "predicting": False, "is_last_batch": False}


class NotInReplays(RunError, AttributeError):
    """A step asks for something that it has in training alone."""


def facts(trainer: Any) -> dict[str, Any]:
    """What is recorded of a trainer, for stand-ins in replays."""
    found = {}
    for name in RECORDED:
        value = getattr(trainer, name, None)
        if isinstance(value, (int, str)) or (isinstance(value, float) and abs(value) != float("inf")):
            found[name] = value
    return {**found, "logger": bool(trainer.loggers)}


def place_in(told: Any) -> Place:
    """Where a step is, by what is ``told`` of it: a trainer, or its recorded hyper-parameters, which older records have not."""
    if isinstance(told, Mapping):
        return {**{name: told.get(name, 0) for name in PLACES}, SETTINGS: told.get(SETTINGS, {})}
    return {name: int(getattr(told, name)) for name in PLACES}


def place_at_end(run: Record, until: int) -> Place:
    """Where ``run`` is after its first ``until`` steps, as a query reads it: after the last one, hooks may have set more."""
    place = place_in(run.steps[until - 1].groups[0])
    final = run.manifest.get("final_settings", {}) if until == run.n_steps else {}
    return {**place, SETTINGS: {**place[SETTINGS], **final}}


class Silent:
    """Takes whatever is called on it, and does nothing: a logger, a lock, an open file."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return self

    def __call__(self, *_: Any, **__: Any) -> Any:
        """Itself."""
        return self

    def __getitem__(self, _: Any) -> Any:
        return self

    def __enter__(self) -> Any:
        return self

    def __exit__(self, *_: Any) -> None:
        return None

    def __iter__(self) -> Iterator[Any]:
        return iter(())

    def __deepcopy__(self, _: Any) -> Any:
        return self


class Trainer:
    """Stands in for the trainer of a training.

    Args:
        known: what was recorded of the trainer.

    Attributes:
        read: names of what was read and is not known.
        place: gives the step and the epoch it tells.
    """

    def __init__(self, known: Mapping[str, Any]) -> None:
        self.read: set[str] = set()
        self.place: Callable[[], Place] = lambda: dict.fromkeys(PLACES, 0)
        self._known = dict(known)
        self.logger = Silent() if self._known.pop("logger", True) else None
        self.loggers = [self.logger] if self.logger else []
        self.callbacks: list[Any] = []
        self.state = SimpleNamespace(fn="fit", status="running", stage="train")

    def of(self, module: nn.Module) -> None:
        """The copy it belongs to."""
        self._module = module

    @property
    def training(self) -> bool:
        """Whether the module is in training mode; queries read it in evaluation mode."""
        return self._module.training

    @property
    def validating(self) -> bool:
        """The opposite."""
        return not self._module.training

    @property
    def callback_metrics(self) -> dict[str, Tensor]:
        """None are known."""
        self.read.add("self.trainer.callback_metrics")
        return {}

    logged_metrics = progress_bar_metrics = callback_metrics

    @property
    def optimizers(self) -> list[Any]:
        """One that knows no learning rate."""
        return [Optimizer(self)]

    def __getattr__(self, name: str) -> Any:
        if name in OF_ONE_PROCESS or name in OF_TRAINING:
            return {**OF_ONE_PROCESS, **OF_TRAINING}[name]
        if name.startswith("_"):
            raise AttributeError(name)
        if name in PLACES:
            return self.place()[name]
        if name in self._known:
            return self._known[name]
        raise NotInReplays(
            f"training_step reads self.trainer.{name}, which no replay has: read it in __init__ or configure_model and keep "
            "what the loss needs of it in a plain attribute or a buffer."
        )

    def number(self, what: str) -> float:
        """Stands for a number that is not known."""
        self.read.add(what)
        return float("nan")


class Optimizer:
    """Stands in for an optimizer or a scheduler: its numbers are not known, its steps do nothing."""

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    @property
    def param_groups(self) -> list[dict[str, Any]]:
        """One group, of as many hyper-parameters as are asked for."""
        return [_Unknown(self._trainer)]

    def get_last_lr(self) -> list[float]:
        """One learning rate."""
        return [self._trainer.number("the learning rate")]

    @property
    def optimizer(self) -> Optimizer:
        """Itself, inside of what Lightning wraps it in."""
        return self

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return Silent()


class _Unknown(dict[str, Any]):
    """Hyper-parameters of which none is known."""

    def __init__(self, trainer: Trainer) -> None:
        super().__init__()
        self._trainer = trainer

    def __missing__(self, name: str) -> float:
        return self._trainer.number(f"the optimizer's {name}")

    def get(self, name: str, default: Any = None) -> Any:
        """The same of a name that may not be there."""
        return self[name]


class Metric:
    """Stands in for what a metric of torchmetrics makes of a batch."""

    def __init__(self, trainer: Trainer, name: str, several: bool) -> None:
        self._trainer, self._name, self._several = trainer, name, several

    def __call__(self, *_: Any, **__: Any) -> Any:
        """No number; or, of several metrics, a mapping of whatever name to none."""
        value = torch.full((), self._trainer.number(f"the metric self.{self._name}"))
        return _Values(value) if self._several else value


class _Values(dict[str, Any]):
    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self._value = value

    def __missing__(self, name: str) -> Tensor:
        return self._value
