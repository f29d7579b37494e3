"""Removals: sets of sample ids whose loss weights become 0 in every step."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_acc.errors import RequestError

Removal = tuple[int, ...]


Wanted = Mapping[str, Iterable[int]] | Iterable[int] | Iterable[Iterable[int]] | None
"""Removals as users give them: None means every sample by itself, ids mean singletons, lists mean groups; or by name."""


def named(removals: Wanted, n_samples: int) -> tuple[list[Removal], dict[Removal, str]]:
    """Removals as sorted tuples of ids, and the names of those that have one.

    Raises:
        RequestError: an id does not exist.
    """
    if not isinstance(removals, Mapping):
        return parse(removals, n_samples), {}
    parsed = parse(removals.values(), n_samples)
    return parsed, {removal: str(name) for removal, name in zip(parsed, removals, strict=True)}


def parse(removals: Iterable[int] | Iterable[Iterable[int]] | None, n_samples: int) -> list[Removal]:
    """Removals as sorted tuples of ids.

    Raises:
        RequestError: an id does not exist.
    """
    if removals is None:
        return [(i,) for i in range(n_samples)]
    parsed: list[Removal] = []
    for removal in removals:
        ids = removal if isinstance(removal, Iterable) and not isinstance(removal, str) else [removal]
        try:
            parsed.append(tuple(sorted({_index(i) for i in ids})))
        except TypeError:
            raise RequestError(f"{removal!r} is no removal: give sample ids, or lists of sample ids.") from None
        wrong = [i for i in parsed[-1] if not 0 <= i < n_samples]
        if wrong:
            raise RequestError(
                f"There is no sample {wrong[0]}: the training data of this run has the ids 0 to {n_samples - 1}."
            )
    return parsed


def _index(value: object) -> int:
    if isinstance(value, bool) or not hasattr(value, "__index__"):
        raise TypeError
    return int(value.__index__())


class Removals:
    """Looks up which removals contain the samples of a batch."""

    def __init__(self, removals: Sequence[Removal]) -> None:
        ids = np.array([i for removal in removals for i in removal], dtype=np.int64)
        owners = np.repeat(np.arange(len(removals)), [len(removal) for removal in removals])
        order = np.argsort(ids, kind="stable")
        self.ids, self.owners = ids[order], owners[order]
        self.count = len(removals)

    def __len__(self) -> int:
        return self.count

    def occurrences(self, sample_ids: Tensor) -> tuple[Tensor, Tensor]:
        """Pairs (removal, position in the batch) of all occurrences to be removed, sorted by removal; two (pairs,) tensors."""
        wanted = sample_ids.numpy()
        left = np.searchsorted(self.ids, wanted, "left")
        counts = np.searchsorted(self.ids, wanted, "right") - left
        position = np.repeat(np.arange(len(wanted)), counts)
        within = np.arange(counts.sum()) - np.repeat(np.cumsum(counts) - counts, counts)
        removal = self.owners[np.repeat(left, counts) + within]
        order = np.lexsort((position, removal))
        return torch.from_numpy(removal[order]), torch.from_numpy(position[order])
