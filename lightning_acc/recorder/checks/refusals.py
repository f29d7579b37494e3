"""What the recorder cannot describe exactly, refused before training starts with the cause and the remedy."""

from __future__ import annotations

import random
from typing import Any

import numpy as np
import torch
from torch import nn

try:
    from lightning_fabric.utilities.exceptions import MisconfigurationException
except ModuleNotFoundError:  # the same library under its other name
    from lightning.fabric.utilities.exceptions import MisconfigurationException  # type: ignore[no-redef]

from lightning_acc.core.objective import AUTOCAST
from lightning_acc.core.optimizers import RULES
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
    "StochasticWeightAveraging",
    "WeightAveraging",
    "EMAWeightAveraging",
    "BaseFinetuning",
    "BackboneFinetuning",
    "ModelPruning",
    "LambdaCallback",
}
"""Lightning callbacks that change the parameters, or how they are trained, outside the optimizer's step."""

ALTERING_HOOKS = ("optimizer_step", "configure_gradient_clipping", "backward", "on_after_backward", "optimizer_zero_grad")
"""LightningModule methods that, overridden, may change gradients or parameters unseen."""


KEEP_BATCH_STATISTICS = "keep-batch-statistics"
STRATEGIES = ("SingleDeviceStrategy", "DDPStrategy")
"""What is tested: one device; ``ddp``, ``ddp_fork``, ``ddp_spawn``."""


def trainer_refusal(trainer: Any, module: Any, allow_untested: bool = False) -> str | None:
    """Why this trainer and module cannot be recorded; None where they can."""
    strategy = type(trainer.strategy).__name__
    if strategy not in STRATEGIES and not allow_untested:
        return (
            f"the strategy {strategy} is untested: use one device or strategy='ddp', or pass "
            "TrajectoryRecorder(..., allow_untested=True) where every process holds all parameters"
        )
    if getattr(trainer.strategy, "_ddp_comm_hook", None) is not None:
        return "a DDP communication hook changes the gradients between the processes unseen: leave it out"
    if not module.automatic_optimization:
        return "automatic_optimization=False hides the optimizer's steps: use automatic optimisation"
    if str(trainer.precision) not in AUTOCAST:
        return (
            f"precision={trainer.precision!r} is not repeated exactly by a replay (the loss is scaled, steps are left out, or "
            f"the parameters themselves are rounded): use one of {', '.join(AUTOCAST)}"
        )
    compiled = _compiled(module)
    if compiled:
        return (
            f"{compiled} is compiled by torch.compile, whose rounding F does not repeat and which cannot be differentiated "
            "twice: record the training of the plain module"
        )
    names = {base.__name__ for callback in trainer.callbacks for base in type(callback).__mro__}
    altering = sorted(names & ALTERING_CALLBACKS)
    if altering:
        return f"the callback {altering[0]} changes the parameters outside the optimizer's step: leave it out"
    base = next(kind for kind in type(module).__mro__ if kind.__name__ == "LightningModule")
    overridden = [name for name in ALTERING_HOOKS if getattr(type(module), name) is not getattr(base, name)]
    if overridden:
        return (
            f"{type(module).__name__} overrides {overridden[0]}, which may change gradients or parameters unseen: "
            "leave it to Lightning"
        )
    return None


def _compiled(module: Any) -> str | None:
    if getattr(module, "_compiler_ctx", None) is not None or module._compiled_call_impl is not None:
        return "the module"
    for name, part in module.named_modules():
        if type(part).__name__ == "OptimizedModule" or part._compiled_call_impl is not None:
            return f"the layer {name!r}"
    return None


def optimizer_refusal(trainer: Any, resumed: bool = False) -> str | None:
    """Why the configured optimizers cannot be recorded; None where they can.

    ``resumed`` tells that the record of what was before is at hand.
    """
    if len(trainer.optimizers) != 1:
        return f"there are {len(trainer.optimizers)} optimizers: configure exactly one"
    optimizer = trainer.optimizers[0]
    name = type(optimizer).__name__
    if name not in RULES or not type(optimizer).__module__.startswith(RULES[name].package):
        return (
            f"the optimizer {type(optimizer).__module__}.{name} is not known: use one of {', '.join(sorted(RULES))}, or teach "
            "it with lightning_acc.register_optimizer"
        )
    if (optimizer.state or trainer.global_step) and not resumed:
        return (
            f"training goes on from an earlier state (global_step={trainer.global_step}), whose record is not here: record "
            "from the start with a fresh optimizer, or resume from a checkpoint that was written while it was recorded"
        )
    return None


def module_refusal(module: nn.Module, batch_norm: str) -> str | None:
    """Why the module's layers, in the modes they are in now, couple the samples of a batch; None where they do not.

    ``batch_norm`` is the recorder's argument.
    """
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
    """State of the random number generators that are not recorded: Python's, NumPy's, the GPU's."""
    state: dict[str, Any] = np.random.get_state(legacy=False)
    gpu = torch.cuda.get_rng_state().numpy().tobytes() if torch.cuda.is_initialized() else None
    return random.getstate(), state["state"]["key"].tobytes(), state["state"]["pos"], gpu
