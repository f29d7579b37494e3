"""What the recorder cannot describe exactly, refused before training starts with the cause and the remedy."""

from __future__ import annotations

import random
import sys
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
except ModuleNotFoundError:  # the same library under its other name
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # type: ignore[no-redef]

from lightning_acc.core.modules.compiled import is_compiled
from lightning_acc.core.modules.precision import PRECISIONS
from lightning_acc.core.optimizers import NO_FUNCTION, RULES
from lightning_acc.errors import RunError


class RecordingRefused(RunError, MisconfigurationException):
    """The training cannot be recorded exactly; says why and what to do."""


def refuse_if(reason: str | None) -> None:
    """Refuse the training for this reason, where there is one.

    Raises:
        RecordingRefused: there is.
    """
    if reason:
        raise RecordingRefused(f"TrajectoryRecorder cannot record this training: {reason}.")


ALTERING_CALLBACKS = {
    "ModelPruning": "sets parameters to 0 outside the optimizer's step: record the training before it or after it",
}
"""Lightning callbacks that change what is trained, or how, unseen, and what to do; with those derived from them.

Of others nothing is known by their names: the first steps, some later ones and the audit show whether they alter anything.
"""

HOOKS = ("optimizer_step", "configure_gradient_clipping", "backward", "on_after_backward", "optimizer_zero_grad")
"""LightningModule methods that, overridden, may change gradients or parameters; most log, or set a learning rate."""


KEEP_BATCH_STATISTICS = "keep-batch-statistics"
TRAINED_LATER = "trained-later"
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
"""What is tested: one device; ``ddp``, ``ddp_fork``, ``ddp_spawn``."""
SHARDING = {"FSDPStrategy", "ModelParallelStrategy", "DeepSpeedStrategy"}
"""Strategies under which no process holds all parameters."""


def trainer_refusal(trainer: Any, module: Any, allow_untested: bool = False) -> str | None:
    """Why this trainer and module cannot be recorded; None where they can."""
    strategy = type(trainer.strategy).__name__
    if SHARDING & {base.__name__ for base in type(trainer.strategy).__mro__}:
        return sharded(strategy)
    if strategy not in STRATEGIES and not allow_untested:
        return (
            f"the strategy {strategy} is untested: use one device or strategy='ddp', or pass "
            "TrajectoryRecorder(..., allow_untested=True) where every process holds all parameters"
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        return "a DDP communication hook changes the gradients between the processes unseen: leave it out"
    if not module.automatic_optimization:
        return "automatic_optimization=False hides the optimizer's steps: use automatic optimisation"
    if str(trainer.precision) not in PRECISIONS:
        return (
            f"precision={trainer.precision!r} puts layers with number formats of their own in place of the module's, which no "
            f"replay can do without their library and its device: use one of {', '.join(PRECISIONS)}"
        )
    altering = sorted(_kinds_of_callbacks(trainer) & ALTERING_CALLBACKS.keys())
    return f"the callback {altering[0]} {ALTERING_CALLBACKS[altering[0]]}" if altering else None


def _kinds_of_callbacks(trainer: Any) -> set[str]:
    return {base.__name__ for callback in trainer.callbacks for base in type(callback).__mro__}


def unfreezes(trainer: Any) -> bool:
    """Whether a callback of Lightning's is there to give the optimizer more parameters on the way."""
    return "BaseFinetuning" in _kinds_of_callbacks(trainer)


def overridden(module: Any, hooks: Sequence[str] = HOOKS) -> list[str]:
    """Which of these methods the module's class defines by itself."""
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    return [name for name in hooks if getattr(type(module), name) is not getattr(base, name)]


def with_suspects(refusal: RecordingRefused, module: Any) -> RecordingRefused:
    """What was found to be wrong with a step, and which of the module's own methods may have done it."""
    names = [*overridden(module), *overridden(module, ("on_before_optimizer_step",))]
    if not names:
        return refusal
    remedy = "let it leave gradients and parameters as they are, or leave it to Lightning"
    return RecordingRefused(
        f"{refusal} {type(module).__name__} overrides {' and '.join(names)}, where this may come from: {remedy}."
    )


def sharded(strategy: str) -> str:
    """That no process holds all parameters."""
    return (
        f"the strategy {strategy} shares the parameters out among the processes, and none holds those a record is made of: "
        "use strategy='ddp', or one device with gradient accumulation in place of the other processes"
    )


def compiled_refusal(module: nn.Module, random_numbers: bool) -> str | None:
    """Why a module's gradient may be another than its losses' because it is compiled; None where that is no reason."""
    inductor = sys.modules.get("torch._inductor.config")
    if not random_numbers or inductor is None or inductor.fallback_random or not is_compiled(module):
        return None
    return (
        f"{type(module).__name__} draws random numbers (dropout) in code that torch.compile makes, which draws others: "
        "set torch._inductor.config.fallback_random = True before training, or compile with another backend"
    )


def optimizer_refusal(trainer: Any, resumed: bool = False) -> str | None:
    """Why the configured optimizers cannot be recorded; None where they can.

    ``resumed`` tells that the record of what was before is at hand.
    """
    if len(trainer.optimizers) != 1:
        return f"there are {len(trainer.optimizers)} optimizers: configure exactly one"
    optimizer = trainer.optimizers[0]
    name, package = type(optimizer).__name__, type(optimizer).__module__
    if name in NO_FUNCTION and package.startswith("torch.optim"):
        return f"the optimizer {name} {NO_FUNCTION[name]}"
    if not _is_known(optimizer):
        return (
            f"the optimizer {package}.{name} is not known: use one of torch.optim ({', '.join(sorted(RULES))}), or teach "
            "it with lightning_acc.register_optimizer"
        )
    if (_has_stepped(optimizer) or trainer.global_step) and not resumed:
        return (
            f"training goes on from an earlier state (global_step={trainer.global_step}), whose record is not here: record "
            "from the start with a fresh optimizer, or resume from a checkpoint that was written while it was recorded"
        )
    return None


def _is_known(optimizer: torch.optim.Optimizer) -> bool:
    rule = RULES.get(type(optimizer).__name__)
    if rule is None or not type(optimizer).__module__.startswith(rule.package):
        return False
    return all(key in group for group in optimizer.param_groups for key in rule.hyperparameters)


def _has_stepped(optimizer: torch.optim.Optimizer) -> bool:
    """Whether it has a state of former steps; Adagrad has one before the first."""
    return any(float(kept.get("step", 1)) > 0 for kept in optimizer.state.values() if kept)


def module_refusal(module: nn.Module, batch_norm: str) -> str | None:
    """Why the module's layers cannot be replayed, or, in their modes, couple the samples of a batch; None where neither.

    ``batch_norm`` is the recorder's argument.
    """
    for name, part in module.named_modules():
        if isinstance(part, torch.jit.ScriptModule) and next(part.parameters(), None) is not None:
            return (
                f"the layer {name!r} is TorchScript, which takes no parameters but its own: leave torch.jit out of the "
                "training, or compile with torch.compile"
            )
    for name, part in batch_norms(module).items():
        if isinstance(part, nn.SyncBatchNorm):
            return (
                f"the layer {name!r} is a SyncBatchNorm in training mode, whose statistics couple the processes: freeze it in "
                "evaluation mode (.eval()), or use GroupNorm or LayerNorm"
            )
        if batch_norm != KEEP_BATCH_STATISTICS:
            return (
                f"the layer {name!r} is a {type(part).__name__} in training mode, whose statistics couple the samples of a "
                "batch: freeze it in evaluation mode (.eval()), use GroupNorm or LayerNorm, or pass "
                f"TrajectoryRecorder(..., batch_norm={KEEP_BATCH_STATISTICS!r}), under which a removed sample leaves the "
                "loss but stays in the statistics of its batches"
            )
    return None


def batch_norms(module: nn.Module) -> dict[str, nn.Module]:
    """The batch normalisation layers in training mode, by name."""
    kind = nn.modules.batchnorm._BatchNorm
    return {name: part for name, part in module.named_modules() if isinstance(part, kind) and part.training}


def foreign_random_state() -> tuple[Any, ...]:
    """State of the random number generators that are not recorded: Python's, NumPy's."""
    state: dict[str, Any] = np.random.get_state(legacy=False)
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"]
