"""Averages of the parameters that callbacks keep beside the training (EMA, SWA): which steps are in them, with which weights.

What such a callback does is seen, and not computed again from its options: how many updates its average has had tells the
steps after which it was updated; its averaging function, tried on numbers, tells what each update keeps of the average and what
it takes of the parameters. So the average is ``sum_t c_t theta_t``, whatever rule chose the steps.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from typing import Any

import safetensors.torch
import torch
from torch import Tensor
from torch.optim.swa_utils import get_swa_avg_fn

from lightning_acc.record.writer import RunWriter

KNOWN = ("WeightAveraging", "StochasticWeightAveraging")
"""Lightning's callbacks, under either of its names, whose averages are known to be such; with those derived from them."""
PROBE = (0.7, -0.4)
"""What is averaged to see whether a function is linear."""


class Averages:
    """The averages that the callbacks of ``trainer`` keep.

    Args:
        trainer: the Lightning trainer.
        before: of a training that is resumed, for each average the step after which each of its updates came.
    """

    def __init__(self, trainer: Any, before: Sequence[list[int]] = ()) -> None:
        self._callbacks = [callback for callback in trainer.callbacks if _kind(callback)]
        before = before or [[] for _ in self._callbacks]
        self.updates = [list(steps) for steps in before]
        """For each average the step after which each of its updates came."""
        self._followed = [
            len(before) == len(self._callbacks) and len(steps) == _count(callback)
            for callback, steps in zip(self._callbacks, before, strict=False)
        ]

    def __bool__(self) -> bool:
        return bool(self._callbacks)

    def see(self, step: int) -> None:
        """All updates since the last look came after ``step`` steps."""
        for callback, steps in zip(self._callbacks, self.updates, strict=False):
            steps += [step] * (_count(callback) - len(steps))

    def write(self, writer: RunWriter) -> None:
        """Write what the averages are made of, as moments that queries can be read at."""
        taken: list[str] = []
        for callback, steps, followed in zip(self._callbacks, self.updates, self._followed, strict=False):
            name = _name(callback, taken)
            taken.append(name)
            weights = _weights(callback, steps) if followed and len(steps) == _count(callback) else None
            parameters = dict(_averaged(callback).named_parameters())
            reason = None
            if weights is None:
                reason = "it is no sum of the parameters after recorded steps, each times a number"
            elif not weights:
                reason = "it was never updated"
            elif writer.header["loss"]["batch_norm"]:
                reason = "the averaged model has running statistics of its own, which queries do not read"
            if reason or weights is None:
                warnings.warn(
                    f"The average that {type(callback).__name__} keeps is no moment to read a query at: {reason}. The trained "
                    "parameters are recorded all the same.",
                    UserWarning,
                    stacklevel=2,
                )
                continue
            tensors = {
                "steps": torch.tensor(list(weights)),
                "weights": torch.tensor(list(weights.values()), dtype=torch.float64),
                "theta": torch.cat([parameters[one].detach().reshape(-1).cpu() for one, _ in writer.header["layout"]]),
            }
            data = safetensors.torch.save(tensors)
            writer.write_file(f"averages/{name}.safetensors", data, callback=type(callback).__name__)


def _kind(callback: Any) -> str | None:
    names = {base.__name__ for base in type(callback).__mro__}
    return next((kind for kind in KNOWN if kind in names), None)


def _count(callback: Any) -> int:
    """How many updates the average has had."""
    if _kind(callback) == "WeightAveraging":
        return int(callback._average_model.n_averaged)
    return int(callback._init_n_averaged if callback.n_averaged is None else callback.n_averaged)


def _averaged(callback: Any) -> Any:
    """The module that holds the averaged parameters."""
    model = callback._average_model
    return model.module if _kind(callback) == "WeightAveraging" else model


def _name(callback: Any, taken: list[str]) -> str:
    """``ema`` where each update keeps the same share, ``swa`` of StochasticWeightAveraging, else ``average``; with a number
    where it is not the first of that name."""
    kept = [_update(callback, n) for n in (1, 2)]
    name = "swa" if _kind(callback) == "StochasticWeightAveraging" else "average"
    name = "ema" if kept[0] is not None and kept[0] == kept[1] else name
    others = sum(other.partition("-")[0] == name for other in taken)
    return f"{name}-{others}" if others else name


def _update(callback: Any, n: int) -> tuple[float, float] | None:
    """What an update keeps of an average of ``n``, and what it takes of the parameters; None where it is not linear."""
    before, now = torch.tensor([[1.0, 0.0, PROBE[0]], [0.0, 1.0, PROBE[1]]], dtype=torch.float64)
    after = _function(callback)(before, now, torch.tensor(n))
    keeps, takes = after[:2].tolist()
    return (keeps, takes) if abs(float(after[2]) - keeps * PROBE[0] - takes * PROBE[1]) < 1e-12 else None


def _function(callback: Any) -> Callable[[Tensor, Tensor, Tensor], Tensor]:
    if _kind(callback) == "StochasticWeightAveraging":
        return callback._avg_fn  # type: ignore[no-any-return]
    model = callback._average_model
    if model.multi_avg_fn is None:
        return model.avg_fn or get_swa_avg_fn()  # type: ignore[no-any-return]

    def in_place(before: Tensor, now: Tensor, number: Tensor) -> Tensor:
        model.multi_avg_fn([before], [now], number)
        return before

    return in_place


def _weights(callback: Any, steps: list[int]) -> dict[int, float] | None:
    """The weight of each step, in order, in an average whose updates came after ``steps``; the first of them copies.

    None where the average is not linear in the parameters.
    """
    weights: dict[int, float] = {}
    rest = 1.0
    for n in reversed(range(len(steps))):
        update = _update(callback, n) if n else (0.0, 1.0)
        if update is None:
            return None
        keeps, takes = update
        weights[steps[n]] = weights.get(steps[n], 0.0) + rest * takes
        rest *= keeps
    return {step: weights[step] for step in sorted(weights) if weights[step]}
