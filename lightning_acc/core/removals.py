"""Removals: sets of sample ids whose loss weights become 0 in every step."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record

Removal = tuple[int, ...]


Sample = int | str
"""A sample as users name it: by its number, or, as a text, by the id that it has in the batches."""
Wanted = Mapping[str, Iterable[Sample]] | Iterable[Sample] | Iterable[Iterable[Sample]] | None
"""Removals as users give them: None means every sample by itself, ids mean singletons, lists mean groups; or by name."""


def named(removals: Wanted, record: Record) -> tuple[list[Removal], dict[Removal, str]]:
    """Removals as sorted tuples of numbers, and the names of those that have one, such as a sample that its batches name.

    Raises:
        RequestError: a sample does not exist.
    """
    groups = removals.values() if isinstance(removals, Mapping) else removals
    parsed = parse(groups, record.n_samples, number=number_by_name(record))
    called, names = record.sample_names, dict[Removal, str]()
    if called is not None:
        names = {removal: str(called[removal[0]]) for removal in parsed if len(removal) == 1}
    if isinstance(removals, Mapping):
        names.update({removal: str(name) for removal, name in zip(parsed, removals, strict=True)})
    return parsed, names


def number_by_name(record: Record) -> Callable[[str], int] | None:
    """What gives the number of a sample that is named by a text; None where batches do not name samples."""
    return record.sample_number if "sample_id" in record.manifest else None


def parse(
    removals: Iterable[Sample] | Iterable[Iterable[Sample]] | None,
    n_samples: int,
    name: str = "removals",
    number: Callable[[str], int] | None = None,
) -> list[Removal]:
    """Removals as sorted tuples of ids; ``number`` gives that of a sample that is named by a text.

    Raises:
        RequestError: an id does not exist; ``name`` is the argument that it is in.
    """
    if removals is None:
        return [(i,) for i in range(n_samples)]
    parsed: list[Removal] = []
    for removal in arguments.listed(name, removals, "sample ids, or of lists of sample ids"):
        single = _number(removal, number)
        ids = [single] if single is not None else [_number(i, number) for i in _members(removal)]
        if None in ids:
            raise RequestError(f"{arguments.shown(removal)} is no removal: give sample ids, or lists of sample ids.")
        parsed.append(tuple(sorted({i for i in ids if i is not None})))
        wrong = [i for i in parsed[-1] if not 0 <= i < n_samples]
        if wrong:
            raise RequestError(
                f"There is no sample {arguments.shown(wrong[0])}: the training data of this run has the ids 0 to "
                f"{n_samples - 1}."
            )
    return parsed


def _number(sample: Any, number: Callable[[str], int] | None) -> int | None:
    return number(sample) if number is not None and isinstance(sample, str) else arguments.index(sample)


def _members(removal: Any) -> list[Any]:
    """What a removal that is a list holds; of anything else, something that is no id."""
    try:
        return arguments.listed("removals", removal, "sample ids")
    except RequestError:
        return [None]


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

    def part(self, first: int, last: int) -> Removals:
        """Those from number ``first`` to ``last - 1``."""
        part, mine = copy.copy(self), (self.owners >= first) & (self.owners < last)
        part.ids, part.owners, part.count = self.ids[mine], self.owners[mine] - first, last - first
        return part

    def only(self, which: Tensor) -> Removals:
        """Those of the numbers ``which``, (m,), in ascending order."""
        part, numbers = copy.copy(self), which.numpy()
        mine = np.isin(self.owners, numbers)
        part.ids, part.owners, part.count = self.ids[mine], np.searchsorted(numbers, self.owners[mine]), len(numbers)
        return part

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


def summed(per_sample: Tensor, removals: Sequence[Removal]) -> Tensor:
    """Scores (..., n_samples) that add up over samples, of n removals, (..., n)."""
    parts = [per_sample[..., list(removal)].sum(-1) for removal in removals]
    return torch.stack(parts, -1) if parts else per_sample[..., :0]
