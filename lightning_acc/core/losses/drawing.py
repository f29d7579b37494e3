"""Random numbers of some rows of a batch: those that the rows have in the whole batch."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode


class NotByRow(RuntimeError):
    """Random numbers are drawn in a way that tells no rows."""


class AsInTheBatch(TorchDispatchMode):
    """In here what draws random numbers for some rows of a batch draws them for the whole batch, and takes those of the rows.

    A tensor whose first dimension is the number of the rows, or a multiple of it, as where a row is many tokens, is taken to
    count them there; of any other all rows have the same. Whether a module keeps to that is to be seen before it is believed.
    Of two rows at least, as of one it cannot be told where in memory others would be.

    Args:
        rows: which, (rows,).
        size: of the batch.

    Raises:
        NotByRow: an operation draws in another way, as ``multinomial`` does.
    """

    def __init__(self, rows: Tensor, size: int) -> None:
        super().__init__()
        self._rows, self._size = rows, size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.nondeterministic_seeded not in func.tags:
            return func(*args, **kwargs)
        name = func._schema.name.removeprefix("aten::")
        if name in ("rand", "randn"):
            return self._taken(lambda size: func(size, *args[1:], **kwargs), args[0])
        like, others = args[0], args[1:]
        if not isinstance(like, Tensor) or any(isinstance(other, Tensor) for other in others):
            raise NotByRow(name)
        if name == "native_dropout":
            p, training = others
            if not training:
                return func(*args, **kwargs)
            mask = self._taken(lambda size: func(_empty(like, size).zero_(), p, training)[1], like.shape)
            return like * mask / (1 - p) if p < 1 else torch.zeros_like(like), mask
        if name in ("bernoulli_", "uniform_", "normal_", "exponential_"):
            return like.copy_(self._taken(lambda size: func(_empty(like, size), *others, **kwargs), like.shape))
        if name in ("rand_like", "randn_like") or (name == "bernoulli" and others):
            return self._taken(lambda size: func(_empty(like, size), *others, **kwargs), like.shape)
        raise NotByRow(name)

    def _taken(self, draw: Callable[[list[int]], Tensor], size: Sequence[int]) -> Tensor:
        """The rows of what ``draw`` gives of the size that the whole batch has."""
        count, rest = divmod(size[0], len(self._rows)) if len(size) else (0, 1)
        if rest or not count:
            return draw(list(size))
        whole = draw([self._size * count, *size[1:]])
        index = (self._rows[:, None] * count + torch.arange(count)).reshape(-1)
        return whole[index.to(whole.device)]


def _empty(like: Tensor, size: Sequence[int]) -> Tensor:
    """A tensor of the size whose dimensions lie in memory in the order that those of ``like`` do: so numbers are drawn."""
    order = sorted(range(like.ndim), key=lambda dim: -like.stride()[dim])
    return like.new_empty([size[dim] for dim in order]).permute([order.index(dim) for dim in range(like.ndim)])
