"""The copy of a LightningModule that replays call."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from typing import Any

from torch import Tensor, nn

from lightning_acc.core.modules.compiled import plain_copy
from lightning_acc.core.stand_in.attributes import CONTAINERS, MOST, OF_EVERY_MODULE
from lightning_acc.core.stand_in.trainer import Metric, Optimizer, Silent, Trainer


def silent_copy(module: nn.Module, known: Mapping[str, Any] | None = None) -> nn.Module:
    """A copy of a LightningModule that logs nothing, whose trainer is a stand-in, and whose metrics record nothing.

    The module itself is left as it is.

    Args:
        module: the LightningModule, which may be in the middle of a step.
        known: what was recorded of its trainer; see ``facts``.
    """
    trainer = Trainer(known or {})
    twin = _copied(module, trainer)
    trainer.of(twin)
    for name, part in twin.named_modules():
        if "_trainer" in part.__dict__:  # also of LightningModules within it
            part.__dict__["_trainer"] = trainer
            one, schedulers = Optimizer(trainer), Optimizer(trainer)
            mute = {"optimizers": lambda *_, one=one, **__: one, "lr_schedulers": lambda *_, one=schedulers, **__: one}
            part.__dict__.update(mute, log=_nothing, log_dict=_nothing, print=_nothing)
        if any(base.__module__.startswith("torchmetrics") for base in type(part).__mro__):
            stand_in = Metric(trainer, name, isinstance(part, nn.ModuleDict))
            part.__dict__.update(forward=stand_in, compute=stand_in, update=_nothing)
    return twin


def trainer_of(twin: nn.Module) -> Trainer | None:
    """The stand-in of a copy."""
    trainer = twin.__dict__.get("_trainer")
    return trainer if isinstance(trainer, Trainer) else None


def _nothing(*_: Any, **__: Any) -> None:
    return None


def _copied(module: nn.Module, trainer: Trainer) -> nn.Module:
    """A copy, without what belongs to the training, of what of it can be copied."""
    memo: dict[int, Any] = {}
    for part in module.modules():
        if part.__dict__.get("_trainer") is not None:
            memo[id(part.__dict__["_trainer"])] = trainer
    for value in _values(module):
        if isinstance(value, Tensor) and value.grad_fn is not None:  # of the graph of the step in the making
            memo[id(value)] = value.detach().clone()
    try:
        return plain_copy(module, memo)
    except Exception:  # something in it cannot be copied, such as a lock or an open file
        for value in _values(module):
            if not isinstance(value, (Tensor, nn.Module)) and id(value) not in memo:
                try:
                    copy.deepcopy(value, dict(memo))
                except Exception:
                    memo[id(value)] = Silent()
    return plain_copy(module, memo)


def _values(module: nn.Module) -> Iterator[Any]:
    """The attributes of a module and of those within it, and what lists and dicts among them hold."""
    for part in module.modules():
        todo = [value for name, value in part.__dict__.items() if name not in OF_EVERY_MODULE]
        while todo:
            value = todo.pop()
            if not isinstance(value, CONTAINERS):
                yield value
            elif len(value) <= MOST:
                todo += value.values() if isinstance(value, dict) else value
