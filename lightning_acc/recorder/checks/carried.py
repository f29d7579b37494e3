"""A step is a function of its parameters and its batch: what else the loss is made of is found, and named.

Two things are looked for. What ``training_step`` *carries* from one step to the next: called again on one batch, after it was
called on another, it gives another loss at the same parameters and under the same random numbers. And what it *reads* of the
training (a learning rate, a metric) and no replay knows.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.losses.per_sample import whole_loss_of_training_step
from lightning_acc.core.objective import Objective
from lightning_acc.core.stand_in import is_setting, set_to
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.recorder.checks.refusals import RecordingRefused

SAME = {torch.float32: 1e-6, torch.float64: 1e-12, torch.bfloat16: 1e-2, torch.float16: 1e-3}
"""Largest relative difference between the losses of two calls that counts as none."""


def refuse_carried(objective: Objective, theta: Tensor, batch: Batch) -> None:
    """Refuse a ``training_step`` that is another function the second time, or gives no number.

    Args:
        objective: the module's losses.
        theta: parameters (p,).
        batch: the first batch.

    Raises:
        RecordingRefused: it is; names what it keeps.
    """
    leaves = batches.cast(batch.leaves, objective.dtype, objective.device)
    other = batches.rows(leaves, torch.zeros(batches.batch_size(leaves), dtype=torch.int64))
    versions = {name: leaf._version for name, leaf in leaves.items()}
    losses: list[float] = []
    tensors: list[dict[str, tuple[float, float]]] = []

    def loss(at: Tensor, of: Leaves) -> float:
        with batch.random_numbers(objective.device):
            taken = batches.TakenApart(of, objective.structure)
            return float(objective.call_once(at, whole_loss_of_training_step, taken).detach())

    this, another = partial(loss, theta, leaves), partial(loss, 0.9 * theta, other)
    with objective.attributes.kept():
        attributes = objective.attributes.values()
        try:
            for call in (this, another, this):
                tensors.append(_tensors(objective))
                losses.append(call())
        except Exception:  # what fails is told by those who need the loss
            return
        changed = objective.attributes.changed(attributes)
    for name, sums in tensors[0].items():
        if not sums == tensors[1][name] == tensors[2][name]:
            raise RecordingRefused(
                f"The {name} changes while training, and it is not known how, as training_step writes to it: keep it fixed, or "
                "set the layer it belongs to into evaluation mode."
            )
    first, _, again = losses
    if not math.isfinite(first):
        refuse_read(objective)
    carried = {name: attributes.get(name) for name in changed}
    if not _alike(first, again, objective) and not _counts(objective, carried, this, another):
        for name in (name for name, leaf in leaves.items() if leaf._version != versions[name]):
            raise RecordingRefused(
                f"training_step writes to its batch, to the tensor {name!r}, and gives another loss when it is given the batch "
                f"again ({first:.6g} and {again:.6g}), as every replay does: compute out of place, as x = x - mean, or on a "
                "clone of the tensor."
            )
        what = ", ".join(changed) or "something outside of the module"
        raise RecordingRefused(
            f"training_step carries {what} from one step to the next: on the first batch it gives the loss {first:.6g}, and "
            f"{again:.6g} after it was called on another, so that a step is no function of its batch and its parameters. Begin "
            "each step anew, or put what is carried into the batch."
        )


def _alike(first: float, again: float, objective: Objective) -> bool:
    return abs(again - first) <= SAME[objective.dtype] * abs(first)


def _counts(objective: Objective, carried: Mapping[str, Any], this: Callable[[], float], another: Callable[[], float]) -> bool:
    """Whether the loss is another the second time for settings alone, which every step changes alike: these are recorded.

    Args:
        objective: the module's losses.
        carried: the attributes that ``training_step`` changes, as they are before.
        this: calls it on the first batch.
        another: on other parameters and another batch.
    """
    module, counters = objective.submodule(""), {name: value for name, value in carried.items() if is_setting(value)}
    before = {name.removeprefix("self."): value for name, value in counters.items()}

    def counted(call: Callable[[], float]) -> tuple[float, list[Any]]:
        set_to(module, before)
        found, now = call(), objective.attributes.values()
        return found, [now[name] for name in counters]

    with objective.attributes.kept():
        (first, mine), (_, others), (again, _) = (counted(call) for call in (this, another, this))
    return bool(counters) and mine == others and all(map(is_setting, mine)) and _alike(first, again, objective)


def refuse_read(objective: Objective, number: int = 0) -> None:
    """Refuse a loss that is no number, or cannot be computed, where something was read that no replay knows.

    Raises:
        RecordingRefused: something was.
    """
    read = ", ".join(sorted(objective.trainer.read)) if objective.trainer else ""
    if read:
        raise RecordingRefused(
            f"The loss is made of {read}, which no replay knows: in step {number} it is no number without. Keep it out of the "
            "loss, and log it only; a torchmetrics metric has a function of the same name that a loss can be made of."
        )


def _tensors(objective: Objective) -> dict[str, tuple[float, float]]:
    """What changes where a tensor of the module does, by the tensor's kind and name."""
    sums = {}
    for kind, named in objective.named_tensors().items():
        for name, value in named.items():
            numbers = torch.nan_to_num(torch.view_as_real(value.detach()) if value.is_complex() else value.detach()).double()
            sums[f"{kind} {name!r}"] = (float(numbers.sum()), float(numbers.abs().sum()))
    return sums


class Shared:
    """The tensors of the batches that have no row a sample, and so must be the same in all of them.

    Attributes:
        tensors: these, by the names of their leaves.
    """

    def __init__(self) -> None:
        self.tensors: Leaves = {}

    def see(self, shared: Leaves, number: int) -> None:
        """Keep those of the first batch; compare those of the one of step ``number`` with them.

        Raises:
            RecordingRefused: they are others.
        """
        for name, tensor in shared.items():
            first = self.tensors.setdefault(name, tensor.detach().cpu().clone())
            if not torch.equal(tensor.cpu(), first):
                raise RecordingRefused(
                    f"The tensor {name.rpartition('#')[0]!r} has no row a sample (its shape is {tuple(tensor.shape)}) and is "
                    f"another one in step {number}, so that it cannot be told which sample is in it: give it a row a sample in "
                    "the collate_fn; what is said of the whole batch may be a single number."
                )
