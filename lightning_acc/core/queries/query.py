"""Queries: scalar functions of the parameters that shifts are read through.

``score(R) = query(parameters without R) - query(parameters with R)``: positive scores help, negative ones harm.
"""

from __future__ import annotations

import inspect
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_acc.arguments import shown
from lightning_acc.core.devices import CPU, generators_kept, seed
from lightning_acc.core.losses.per_sample import LossFunction
from lightning_acc.core.objective import Objective
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.core.queries.fingerprint import describe
from lightning_acc.core.ranks import ALONE, Ranks
from lightning_acc.errors import InfluenceError, RequestError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, Structure, TakenApart
from lightning_acc.record.store import digest


class Query:
    """The mean of a function over examples, in evaluation mode: by default the mean loss.

    Example::

        def margin(module, batch):
            x, y = batch
            logits = module(x)
            return logits.gather(1, y[:, None])[:, 0] - logits.mean(1)

        scores = la.score(run, query=la.Query("margin", test_loader, margin))

    Args:
        name: what tables call it: letters, digits, ``_``, ``.`` and ``-``.
        data: batches as the module is given them: a DataLoader, or any iterable of batches.
        function: takes the module and a batch, returns values of shape (B,), or one value, which counts for all B
            examples. None is the loss the module is trained with, without what no sample is in.
        like: how a batch of the training is built, where that is known: what belongs to no sample there does not here.

    Raises:
        RequestError: the name or the data cannot be used.
    """

    def __init__(
        self, name: str, data: Iterable[Any], function: LossFunction | None = None, like: Structure | None = None
    ) -> None:
        if not isinstance(name, str) or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", name):
            raise RequestError(f"{shown(name)} is no name for a query: use letters, digits, '_', '.' and '-'.")
        if function is not None and not _takes_two(function):
            raise RequestError(
                f"function={shown(function)} of the query {name!r} cannot be called with a module and a batch: give a function "
                "of these two, or None for the loss."
            )
        if isinstance(data, (str, bytes, Mapping)) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__")):
            raise RequestError(f"data={shown(data)} of the query {name!r} holds no batches: give a DataLoader, or [batch].")
        self.name = name
        self.function = function
        self.batches: list[tuple[Leaves, Structure]] = []
        self._moved: dict[tuple[int, torch.dtype, torch.device], Leaves] = {}
        for batch in data:
            leaves, structure = batches.flatten(batch, like=like)
            like = like or structure
            everything = torch.arange(batches.batch_size(leaves))  # a copy
            leaves = batches.rows({key: leaf.detach().cpu() for key, leaf in leaves.items()}, everything)
            self.batches.append((leaves, structure))
        if not self.batches or not self.n_examples:
            missing = "example" if self.batches else "batch"
            raise RequestError(f"The query {name!r} has no data: its loader gave no {missing}.")

    @property
    def n_examples(self) -> int:
        """How many examples the query averages over."""
        return sum(batches.batch_size(leaves) for leaves, _ in self.batches)

    @property
    def fingerprint(self) -> str:
        """Hash of the data and of the function, its code and all it holds: equal ones asked the same question."""
        label = "loss" if self.function is None else describe(self.function)
        return digest(label.encode() + self.encoded())

    def encoded(self) -> bytes:
        """The batches as they are stored."""
        numbered = enumerate(leaves for leaves, _ in self.batches)
        tensors = {f"{i}:{name}": leaf for i, leaves in numbered for name, leaf in batches.packed(leaves).items()}
        return safetensors.torch.save(tensors, {"structures": json.dumps([structure for _, structure in self.batches])})

    def picked(self, examples: Sequence[int]) -> Query:
        """The same question of some of its examples alone, in the order they have here."""
        wanted = torch.zeros(self.n_examples, dtype=torch.bool)
        wanted[list(examples)] = True
        kept, first = [], 0
        for leaves, structure in self.batches:
            rows = torch.nonzero(wanted[first : first + batches.batch_size(leaves)])[:, 0]
            first += batches.batch_size(leaves)
            if len(rows):
                kept.append(TakenApart(batches.rows(leaves, rows), structure))
        return Query(self.name, kept, self.function)

    def value(self, objective: Objective, theta: Tensor) -> Tensor:
        """The query at parameters ``theta`` (p,), a scalar."""
        return self.values(objective, theta[None])[0]

    def values(self, objective: Objective, thetas: Tensor, each: bool = False) -> Tensor:
        """The query at each of ``thetas`` (n, p); returns (n,), which nothing differentiates any more.

        With ``each`` what it averages over, the values of its examples: (n, examples).
        """
        parts = []
        with self.reading(objective):
            for leaves, structure in self.with_same_noise(objective):
                read = partial(self._batch_values if each else self.batch_sum, objective, structure=structure)
                values = objective.each(lambda theta, batch, read=read: read(theta, batch), thetas, leaves)
                parts.append(values.detach())  # a step that takes gradients itself hands out tensors with a graph
        return torch.cat(parts, 1) if each else sum(parts, thetas.new_zeros(len(thetas))) / self.n_examples

    def changes(self, objective: Objective, theta: Tensor, shifts: Tensor, rows: int, each: bool = False) -> Tensor:
        """``query(theta + D) - query(theta)`` for each row D of ``shifts`` (n, p), ``rows`` of them at a time.

        Returns (n,), or with ``each`` (n, examples).
        """
        parts = [shifts.new_zeros(0, *((self.n_examples,) if each else ()))]
        alone = self.values(objective, theta[None], each) if rows == 1 and len(shifts) else None
        for part in shifts.split(rows) if len(shifts) else ():
            if alone is None:
                values = self.values(objective, torch.cat([theta[None], theta + part]), each)
            else:
                values = torch.cat([alone, self.values(objective, theta + part, each)])
            # What shifts nothing changes nothing, not by the last bit two places in a batched product may differ in.
            shifted = (part != 0).any(1)
            parts.append(torch.where(shifted[:, None] if each else shifted, values[1:] - values[0], 0.0))
        return torch.cat(parts)

    def gradient(self, objective: Objective, theta: Tensor, ranks: Ranks = ALONE) -> Tensor:
        """Gradient (p,) of the query at ``theta`` (p,); of ``ranks`` each takes some of the batches."""
        total = torch.zeros_like(theta)
        leaf = theta.detach().requires_grad_()
        with self.reading(objective):
            for number, (leaves, structure) in enumerate(self.with_same_noise(objective)):
                if number % ranks.size != ranks.rank:
                    continue
                value = self.batch_sum(objective, leaf, leaves, structure)
                if not value.requires_grad:
                    raise RequestError(
                        f"The function of the query {self.name!r} has no gradient: its values are detached, counted or do not "
                        "depend on the parameters; return what torch can differentiate, or read it with readout='exact'."
                    )
                total += torch.autograd.grad(value, leaf)[0]
        ranks.add_up(total)
        return total / self.n_examples

    def gradients(self, objective: Objective, theta: Tensor) -> Tensor:
        """Gradients (examples, p) at ``theta`` (p,) of what the query averages over, each example taken by itself."""
        parts = []
        with self.reading(objective):
            for leaves, structure in self.with_same_noise(objective):
                single = {name: leaf.unsqueeze(1) for name, leaf in leaves.items()}
                parts.append(objective.gradient_of_each(partial(self.batch_sum, objective, structure=structure), theta, single))
        if not any(part.any() for part in parts):
            self.gradient(objective, theta)  # which says so, where there is none
        return torch.cat(parts)

    def with_same_noise(self, objective: Objective) -> Iterator[tuple[Leaves, Structure]]:
        """The batches, where the objective computes; for each, a function that draws random numbers draws the same at any
        parameters.
        """
        for i, (_, structure) in enumerate(self.batches):
            with generators_kept(objective.device):
                seed(objective.device, i)
                yield self._placed(i, objective), structure

    def _placed(self, number: int, objective: Objective) -> Leaves:
        """The leaves of a batch, as the objective computes with them; moved to a GPU once, and kept there."""
        leaves = self.batches[number][0]
        if objective.device == CPU:
            return batches.cast(leaves, objective.dtype)
        key = number, objective.dtype, objective.device
        if key not in self._moved:
            self._moved[key] = batches.cast(leaves, objective.dtype, objective.device)
        return self._moved[key]

    def __getstate__(self) -> dict[str, Any]:
        """Without what was moved, which stays where it is."""
        return {**self.__dict__, "_moved": {}}

    def batch_sum(self, objective: Objective, theta: Tensor, leaves: Leaves, structure: Structure) -> Tensor:
        """The function summed over the examples of one batch, at parameters ``theta`` (p,).

        Of losses that the training weighs, so many times the weighted mean, as the module itself would say.
        """
        size, batch = batches.batch_size(leaves), TakenApart(leaves, structure)
        if self.function is None and objective.reduction == "weighted":
            losses, weights, _ = objective.call(theta, objective.weighted_loss, batch)
            mean: Tensor = (weights * losses).sum()
            return size * mean
        values = self._checked(objective.call(theta, self.function or objective.loss, batch), size)
        return values.sum() if values.ndim else values * size

    def _batch_values(self, objective: Objective, theta: Tensor, leaves: Leaves, structure: Structure) -> Tensor:
        """The function of each example of one batch, (B,)."""
        size = batches.batch_size(leaves)
        batch = TakenApart(leaves, structure)
        values = self._checked(objective.call(theta, self.function or objective.loss, batch), size)
        if values.ndim or size == 1:
            return values.reshape(size)
        raise RequestError(
            f"The function of the query {self.name!r} returned one value for a batch of {size} examples: to ask about each of "
            f"them it must return a tensor of shape ({size},)."
        )

    @contextmanager
    def reading(self, objective: Objective) -> Iterator[None]:
        """In here the module is in evaluation mode, and what the function fails of becomes one sentence.

        Not inside of ``batch_sum``: what cannot be vectorised is tried one by one.
        """
        try:
            with objective.evaluating():
                yield
        except (InfluenceError, NotImplementedError):
            raise
        except (RuntimeError, TypeError, ValueError, LookupError, AttributeError) as error:
            if is_out_of_memory(error):
                raise
            words = " ".join(str(error).split())[:200].rstrip(".")
            raise RequestError(
                f"The query {self.name!r} cannot be evaluated ({type(error).__name__}: {words}): check that its function and "
                "its batches are of the kind that the module takes."
            ) from error

    def _checked(self, values: Any, size: int) -> Tensor:
        """What the function gave for a batch of ``size`` examples, where it is what a query can be read from."""
        if isinstance(values, Tensor) and values.is_floating_point() and values.shape in ((size,), ()):
            return values
        what = shown(values)
        if isinstance(values, Tensor):
            what = f"a tensor of shape {tuple(values.shape)} and {values.dtype}"
        raise RequestError(
            f"The function of the query {self.name!r} returned {what} for a batch of {size} examples: it must return a tensor "
            f"of floating point of shape ({size},), a value for each example, or one value for them all."
        )


def _takes_two(function: object) -> bool:
    """Whether ``function(module, batch)`` is a call that can be made."""
    if not callable(function):
        return False
    try:
        inspect.signature(function).bind(None, None)
    except TypeError:
        return False
    except ValueError:  # of some that are written in C nothing is known
        pass
    return True
