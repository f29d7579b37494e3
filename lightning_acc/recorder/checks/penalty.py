"""Terms of a loss that no sample is in: penalties on the weights.

Where the reductions of ``training_step`` show the samples' losses, what is added to these is taken for such a term; then it is
the same whatever the batch, and stays where a sample is left out. Taken one sample at a time, ``training_step`` would give it
to every sample, and it would vanish with the samples. So the first batch is followed through the loss: every tensor made of the
batch, integers and all, is known by the operation that made it. Where the loss is a sum, one side of which the batch is not
in, that side is such a term.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from lightning_acc.core.losses.batch import Batch
from lightning_acc.core.losses.per_sample import whole_loss_of_training_step
from lightning_acc.core.objective import Objective
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.recorder.checks.decomposition import COUPLED, Coupled, relative_difference, tolerance_of
from lightning_acc.recorder.checks.refusals import RecordingRefused

SUMS = ("add", "sub", "rsub", "stack", "cat")
LINEAR = ("mul", "div", "neg", "view", "_unsafe_view", "squeeze", "unsqueeze", "select", "clone", "_to_copy", "alias", "expand")
"""What a multiple of a sum, or the same number in another form, is made by."""
REDUCTIONS = ("sum", "mean")


@dataclass(frozen=True, eq=False)
class Apart:
    """A tensor that the batch is not in; ``node`` is where it stands in the autograd graph, if there."""

    node: Any
    size: int


@dataclass(frozen=True, eq=False)
class Made:
    """A tensor that the batch is in: ``operation``, without the underscore of those in place, of these ``operands``."""

    operation: str
    operands: tuple[Made | Apart, ...]
    size: int


class Followed(TorchDispatchMode):
    """Follows the tensors of ``batch`` through everything that is computed in here; ``own`` belongs to no batch."""

    def __init__(self, batch: Leaves, own: Tensor) -> None:
        super().__init__()
        self._own = _place(own)
        self._made: dict[int, Made] = {}
        self._places: set[int] = set()
        self._kept: list[Any] = [own]
        """Alive, so that no other tensor gets the address of one of these."""
        for leaf in batch.values():
            self._remember(leaf, Made("batch", (), leaf.numel()))

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        operands = tuple(self.made_of(part) for part in tree_leaves((args, kwargs)) if isinstance(part, Tensor))
        results = function(*args, **(kwargs or {}))
        if any(isinstance(operand, Made) for operand in operands):
            operation = str(function._schema.name).rpartition("::")[2]
            operation = operation.rstrip("_") or operation
            for result in tree_leaves(results):
                if isinstance(result, Tensor):
                    self._remember(result, Made(operation, operands, result.numel()))
        return results

    def made_of(self, tensor: Tensor) -> Made | Apart:
        """How a tensor was made, as it is now: it may be written to later."""
        if id(tensor) in self._made:
            return self._made[id(tensor)]
        if _place(tensor) in self._places:  # a part of it was written to
            return Made("written", (), tensor.numel())
        return Apart(tensor.grad_fn, tensor.numel())

    def _remember(self, tensor: Tensor, made: Made) -> None:
        self._kept.append(tensor)
        self._made[id(tensor)] = made
        if _place(tensor) != self._own:
            self._places.add(_place(tensor))


def _place(tensor: Tensor) -> int:
    try:
        return int(tensor.untyped_storage()._cdata)
    except (NotImplementedError, RuntimeError):  # sparse, and other kinds without one
        return -id(tensor)


def without_samples(made: Made) -> list[Any]:
    """The nodes of the terms of a loss that the batch is not in."""
    nodes: list[Any] = []
    todo = [made]
    while todo:
        made = todo.pop()
        inside = [operand for operand in made.operands if isinstance(operand, Made)]
        if made.operation in SUMS:
            nodes += [operand.node for operand in made.operands if isinstance(operand, Apart) and operand.node is not None]
            todo += [part for part in inside if part.size == 1 or of_terms(part)]
        elif made.operation in LINEAR and len(inside) == 1 and (made.operation != "div" or made.operands[0] is inside[0]):
            todo += [part for part in inside if part.size == 1 or of_terms(part)]
        elif made.operation in REDUCTIONS and len(inside) == 1:
            todo += [part for part in inside if of_terms(part)]
    return nodes


def of_terms(made: Made) -> bool:
    """Whether a tensor holds terms of a loss, such as one a task: single numbers put together, and what is made of them."""
    if made.operation in ("stack", "cat"):
        return all(part.size == 1 for part in made.operands)
    inside = [operand for operand in made.operands if isinstance(operand, Made)]
    return made.operation in (*SUMS, *LINEAR) and bool(inside) and all(of_terms(part) for part in inside)


def refuse_dependent_penalty(objective: Objective, theta: Tensor, batch: Batch) -> None:
    """Refuse what would be taken for a penalty, but depends on the batch.

    Args:
        objective: the module's losses, penalised.
        theta: parameters (p,).
        batch: the first one.

    Raises:
        Coupled: its gradient is another one where each sample of the batch is the first, or the last.
    """
    leaves = batches.cast(batch.leaves, objective.dtype, objective.device)
    size = batches.batch_size(leaves)
    slopes = []
    for rows in (torch.arange(size), torch.zeros(size, dtype=torch.int64), torch.full((size,), size - 1)):
        leaf = theta.detach().requires_grad_()
        with batch.random_numbers(objective.device):
            penalty = objective.terms(leaf, batches.rows(leaves, rows))[-1]
        slopes.append(torch.autograd.grad(penalty, leaf, materialize_grads=True)[0])
    for other in slopes[1:]:
        if not relative_difference(other, slopes[0]) <= tolerance_of(objective):
            raise Coupled(
                "training_step adds a term to the loss that is no mean and no sum over the samples, but changes with them: its "
                f"gradient on the first batch is {100 * relative_difference(other, slopes[0]):.2g} % off where each of the "
                f"samples is the same one. {COUPLED}"
            )


class HasPenalty(RecordingRefused):
    """The loss has a term that no sample is in."""


def refuse_penalty(objective: Objective, theta: Tensor, leaves: Leaves, tolerance: float) -> None:
    """Refuse a ``training_step`` that adds a term which no sample is in, such as a penalty on the weights.

    Args:
        objective: the module's losses.
        theta: parameters (p,).
        leaves: the first batch.
        tolerance: largest part of the gradient that counts as none.

    Raises:
        HasPenalty: there is such a term.
    """
    there = batches.cast(leaves, objective.dtype, objective.device)
    inputs = {name: leaf.detach().clone() for name, leaf in there.items()}
    leaf = theta.detach().clone().requires_grad_()
    try:
        with Followed(inputs, leaf) as followed:
            loss = objective.call(leaf, whole_loss_of_training_step, batches.TakenApart(inputs, objective.structure))
    except Exception:  # tensors of a kind that cannot be followed: their loss itself has been computed before
        return
    made = followed.made_of(loss)
    if not isinstance(made, Made):  # the batch went through NumPy or Python, and is lost sight of
        return
    nodes = without_samples(made)
    if not nodes:
        return
    (whole,) = torch.autograd.grad(loss, leaf, retain_graph=True)
    for node in nodes:
        node.register_prehook(lambda gradients: tuple(torch.zeros_like(gradient) for gradient in gradients))
    (of_samples,) = torch.autograd.grad(loss, leaf)
    share = float((whole - of_samples).norm() / whole.norm().clamp_min(torch.finfo(theta.dtype).tiny))
    if share > tolerance:
        raise HasPenalty(
            f"training_step adds a term to the loss that no sample is in; it makes {100 * share:.2g} % of the gradient of the "
            "first batch. A penalty on the weights belongs into the optimizer's weight_decay; no other such term can be left "
            "out with a sample."
        )
