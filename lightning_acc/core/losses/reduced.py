"""What each sample of a batch contributes to its loss.

A loss is made of values that belong to samples, and of reductions over them: ``cross_entropy``, ``mean``, a masked ``sum``
divided by the mask's own. Of the result of each reduction is kept what every sample contributes to it, ``loss = sum_i c_i``,
and that is followed through what is linear (sums of losses, factors). So one forward pass over the batch is enough, and
dropout, noise and rounding are the batch's own.

The rows of a tensor are taken to belong to the samples in order, as many to each: (B, ...), or (B * tokens, ...). Whether that
is so the recorder checks (``recorder.checks.decomposition``). Which functions of torch are understood is in ``reductions``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import torch
from torch import Tensor

from lightning_acc.errors import RunError


class Lost(NamedTuple):
    """Why something is no sum over the samples.

    Attributes:
        why: in words, said of the loss, as the rest of a sentence.
        couples: whether that makes a sample's part of it depend on the others.
    """

    why: str
    couples: bool = False


class NotSeparable(RunError):
    """What each sample contributes to the loss is not seen.

    Args:
        lost: where it was lost sight of.
    """

    def __init__(self, lost: Lost) -> None:
        super().__init__(
            f"What each sample contributes to the loss is not seen: {lost.why}. Define per_sample_loss(self, batch) on the "
            "module: the losses of the samples, shape (B,), or a pair of these and their weights in the mean."
        )
        self.lost = lost


@dataclass(frozen=True, eq=False)
class Reduced:
    """A result of reductions over a batch, of shape S, by what each sample contributes to it.

    Attributes:
        contributions: (B, *S), whose sum over the samples is the result, but for the penalty; None where it is not asked for.
        weights: what each sample weighs in the mean that the result is, (B,), with the sum 1; None where all weigh the same.
        counted: whether these may be others in the next batch: tokens, masks, classes are counted.
        total: whether the result is a sum over the samples, in which each has the weight 1.
        penalty: the terms of the result that no sample is in, S; None where there are none, or they are not asked for.
    """

    contributions: Tensor | None
    weights: Tensor | None = None
    counted: bool = False
    total: bool = False
    penalty: Tensor | None = None

    def mapped(self, function: Callable[[Tensor], Tensor]) -> Reduced:
        """With what ``function``, which is linear, makes of the contributions and of the penalty; weights as they are."""
        if self.contributions is None:
            return self
        penalty = None if self.penalty is None else function(self.penalty[None])[0]
        return replace(self, contributions=function(self.contributions), penalty=penalty)


class Seen:
    """What has been seen of the results of one ``training_step``.

    Args:
        size: B, the number of samples.
        weights_only: see the weights of the samples alone, and leave every number exactly as it is.
        own: the module's own tensors. What is made of these alone is in no sample; without them, that is not followed.
    """

    def __init__(self, size: int, weights_only: bool = False, own: Iterable[Tensor] = ()) -> None:
        self.size = size
        self.weights_only = weights_only
        self._reduced: dict[int, Reduced] = {}
        self._lost: dict[int, Lost] = {}
        self._nothing: set[int] = set()
        self._kept: list[Tensor] = [*own]
        """Alive, so that no other tensor gets the identity of one of these."""
        self._apart = set(map(id, self._kept))
        self._follows = bool(self._apart)

    @property
    def empty(self) -> bool:
        """Whether no tensor is known of yet."""
        return not self._kept

    def of(self, thing: object) -> Reduced | None:
        """How a tensor was reduced over the samples; None where it was not, or is no tensor."""
        return self._reduced.get(id(thing)) if isinstance(thing, Tensor) else None

    def found(self, loss: Tensor) -> Reduced:
        """How the scalar ``loss`` is made.

        Raises:
            NotSeparable: that is not seen.
        """
        reduced = self.of(loss)
        if reduced is None:
            raise NotSeparable(self.why_lost(loss) or Lost("no mean and no sum over the samples makes it that torch computes"))
        return reduced

    def keep(self, result: Tensor, reduced: Reduced) -> Tensor:
        """Remember how ``result`` was made; returns it."""
        self._kept.append(result)
        self._reduced[id(result)] = reduced
        self._lost.pop(id(result), None)
        return result

    def lose(self, result: Any, why: Lost) -> Any:
        """Remember why ``result`` is no sum over the samples; returns it."""
        if isinstance(result, Tensor):
            self._kept.append(result)
            self._reduced.pop(id(result), None)
            self._lost[id(result)] = why
        return result

    def is_nothing(self, result: Any) -> Any:
        """Remember that ``result`` is a multiple by the number 0, of a penalty that is switched off; returns it."""
        self._kept.append(result)
        self._nothing.add(id(result))
        return result

    def nothing(self, thing: object) -> bool:
        """Whether a tensor is such a multiple."""
        return id(thing) in self._nothing

    def apart(self, thing: object) -> bool:
        """Whether a tensor is made of the module's own tensors alone, so that no sample is in it."""
        return id(thing) in self._apart

    def follow(self, call: Call, result: Any) -> None:
        """See whether ``result`` is made of the module's own tensors alone."""
        if not self._follows:
            return
        results = result if isinstance(result, (tuple, list)) else (result,)
        if call.function not in OF_DATA and all(map(self.apart, tensors_in((call.args, call.kwargs)))):
            for tensor in tensors_in(results):
                self._kept.append(tensor)
                self._apart.add(id(tensor))
        else:  # what was apart may have been written to
            self._apart.difference_update(map(id, tensors_in((*call.args[: call.writes], *results))))

    def why_lost(self, *operands: object) -> Lost | None:
        """Why the first of these that is no sum over the samples is none."""
        return next((self._lost[id(operand)] for operand in operands if id(operand) in self._lost), None)

    def by_sample(self, values: Tensor) -> Tensor | None:
        """Values (N, ...) as (B, N / B, ...); None where N is no multiple of B."""
        if not values.ndim or not values.shape[0] or values.shape[0] % self.size:
            return None
        return values.reshape(self.size, values.shape[0] // self.size, *values.shape[1:])


class Call:
    """A call of a function of torch.

    Args:
        function: the function.
        args: what it is called with.
        kwargs: the same by name.
    """

    def __init__(self, function: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.function, self.args, self.kwargs = function, args, kwargs

    @cached_property
    def result(self) -> Any:
        """What the function returns: it is called once."""
        return self.function(*self.args, **self.kwargs)

    @property
    def name(self) -> str:
        """The function's name, without the underscores of operators and of those that write in place."""
        return str(self.function.__name__).strip("_")

    @property
    def writes(self) -> int:
        """How many of its first arguments the function may write to."""
        name = str(self.function.__name__)
        return 1 if name == "__setitem__" or name.startswith("__i") or (name.endswith("_") and not name.endswith("__")) else 0

    @property
    def operands(self) -> tuple[Any, Any]:
        """Of a function of two."""
        return self.args[0], self.args[1] if len(self.args) > 1 else self.kwargs["other"]


OF_DATA = (torch.tensor, torch.as_tensor, torch.asarray, torch.from_numpy, torch.frombuffer, Tensor.new_tensor)
"""What makes tensors of Python's or NumPy's data, which may be that of the samples."""


def tensors_in(things: Any) -> Iterator[Tensor]:
    """The tensors in arguments, lists and dicts of them."""
    if isinstance(things, Tensor):
        yield things
    elif isinstance(things, (tuple, list)):
        for thing in things:
            yield from tensors_in(thing)
    elif isinstance(things, dict):
        yield from tensors_in(list(things.values()))


Rule = Callable[[Seen, Call], Any]
"""Takes what has been seen and a call; returns the result, and has it remembered how that was made."""


def shares(counts: Tensor) -> Tensor:
    """Weights (B,) in proportion to the sums of ``counts`` (B, ...) of each sample; 0 where there are none."""
    own = counts.detach().reshape(len(counts), -1).double().sum(1)
    total = own.sum()
    return own / torch.where(total == 0, 1, total)
