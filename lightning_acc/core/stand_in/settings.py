"""What hooks and callbacks set a module to: the weight of a loss, a temperature, a rate of dropout that changes in training.

A *setting* is a number, a text, a truth value or None in a plain attribute of a module or of a layer within it, under the name
that ``named_modules`` gives the layer. Settings that stay the same are the module's own business. Of those that change, the
record has what they were in the first step, and what they are where each step since begins: a replay goes by that, as it goes
by the recorded learning rate. So it does of what ``training_step`` itself counts.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import numpy as np
from torch import nn

from lightning_acc.core.modules.compiled import ORIGINAL, plain_name
from lightning_acc.core.stand_in.attributes import OF_EVERY_MODULE
from lightning_acc.errors import RunError

Settings = dict[str, Any]
"""Values by the names of their attributes, as ``alpha`` or ``net.1.p``."""
NO_SETTINGS = {"training", "track_running_stats"}
"""The modes of layers, which are recorded as they are at first."""
LONGEST = 1000
"""Letters of a text; longer ones are data."""
NOT_THE_USERS = {"torch", "pytorch_lightning", "lightning", "builtins"}
_UNKNOWN = object()


class Watched:
    """Sees how the settings of ``module`` change from its first step on.

    Args:
        module: a LightningModule in training.
        known: of an earlier part of the training, what the settings that have changed since were in its first step.

    Attributes:
        first: those that have changed by now, as they were in the first step.
    """

    def __init__(self, module: nn.Module, known: Mapping[str, Any]) -> None:
        self.first: Settings = dict(known)
        parts = {plain_name(name): part for name, part in module.named_modules() if not _counts_by_itself(part)}
        others = OF_EVERY_MODULE | NO_SETTINGS | _of_lightning(module)
        self._places = [
            (f"{path}.{name}" if path else name, part.__dict__, name, value)
            for path, part in parts.items()
            for name, value in {**_of_classes(part), **part.__dict__}.items()
            if name not in others and is_setting(value)
        ]
        self._newest = self._before = self._values()
        self._now: Settings = self._changed()

    def _values(self) -> list[Any]:
        return [held.get(name, default) for _, held, name, default in self._places]

    def now(self) -> Settings:
        """Those that have changed by now, as they are."""
        values = self._values()
        if not all(map(operator.is_, values, self._newest)):
            self._newest = values
            self._now = self._changed()
        return self._now

    def _changed(self) -> Settings:
        found = {}
        for (name, *_), before, now in zip(self._places, self._before, self._newest, strict=True):
            if now is before and name not in self.first:
                continue
            value, first = _plain(now), _plain(before)
            if value is _UNKNOWN or (name not in self.first and type(value) is type(first) and value == first):
                continue
            self.first.setdefault(name, first)
            found[name] = value
        return found


def is_setting(value: Any) -> bool:
    """Whether a value can be one."""
    return _plain(value) is not _UNKNOWN


def set_to(module: nn.Module, settings: Settings) -> None:
    """Give a module these settings.

    Raises:
        RunError: it has no such layer.
    """
    for name, value in settings.items():
        held, key = _place(module, name)
        held[key] = value


@contextmanager
def put_into(module: nn.Module, settings: Settings) -> Iterator[None]:
    """In here the module has these settings; afterwards those of before.

    Raises:
        RunError: it has no such layer.
    """
    places = [_place(module, name) for name in settings]
    before = [(held, key, held.get(key, _UNKNOWN)) for held, key in places]
    set_to(module, settings)
    try:
        yield
    finally:
        for held, key, value in before:
            if value is _UNKNOWN:
                held.pop(key, None)
            else:
                held[key] = value


def _place(module: nn.Module, name: str) -> tuple[dict[str, Any], str]:
    path, _, key = name.rpartition(".")
    if key in OF_EVERY_MODULE | NO_SETTINGS:
        raise RunError(f"The record sets {name!r}, in which torch keeps what is its own: restore the run, or record it again.")
    try:
        return module.get_submodule(path).__dict__, key
    except AttributeError:
        raise RunError(
            f"The module has no layer {path!r}, whose {key!r} changes in the recorded training: give the one that was trained."
        ) from None


def _counts_by_itself(part: nn.Module) -> bool:
    """Whether it is a metric, which keeps what it has seen and says nothing of the loss; or the shell of a compiled layer."""
    return ORIGINAL in part._modules or any(kind.__module__.startswith("torchmetrics") for kind in type(part).__mro__)


def _of_classes(part: nn.Module) -> dict[str, Any]:
    """What the user's own classes give their modules, until that is set."""
    own = [kind for kind in type(part).__mro__ if kind.__module__.partition(".")[0] not in NOT_THE_USERS]
    return {name: value for kind in reversed(own) for name, value in vars(kind).items() if not name.startswith("__")}


def _of_lightning(module: nn.Module) -> set[str]:
    """The attributes in which Lightning keeps what it needs."""
    known: set[str] = set()
    for kind in type(module).__mro__:
        if kind.__name__ == "LightningModule":
            known |= kind().__dict__.keys()
    return known


def _plain(value: Any) -> Any:
    """A setting as JSON has it; ``_UNKNOWN`` of what is none."""
    if isinstance(value, np.generic):
        value = value.item()
    usable = value is None or type(value) in (bool, int, float, str)
    if type(value) is float:
        usable = math.isfinite(value)
    return value if usable and not (isinstance(value, str) and len(value) > LONGEST) else _UNKNOWN
