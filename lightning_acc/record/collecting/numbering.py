"""Numbers for what samples are made of: equal contents have the same number, whichever samples they are of.

A content is known by its hash. Most data sets give a sample the same content at every visit, and comparing two contents costs
a tenth of hashing one: so the first contents of the samples are kept in memory, as far as there is room, and only what differs
from them is hashed.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from numpy.typing import NDArray

from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves

KEPT_BYTES = 256 * 2**20
"""Of contents that are kept in memory to compare others with; beyond them all are hashed."""

Signature = tuple[object, ...]
Words = list[NDArray[np.generic]]
"""The bytes of each leaf's rows, (B, words), in words of 8 bytes where they can be."""


class Numbering:
    """Gives contents their numbers, in the order in which they are met."""

    def __init__(self) -> None:
        self._numbers: dict[bytes, int] = {}
        self._firsts: dict[Signature, _Firsts] = {}
        self._kept_bytes = 0

    def known(self, leaves: Leaves, numbers: Iterable[int]) -> None:
        """Take over contents that have their numbers already."""
        self._numbers.update(zip(batches.digests(leaves), numbers, strict=True))

    def __call__(self, leaves: Leaves, sample_ids: Sequence[int] | None = None) -> tuple[list[int], list[int], Leaves]:
        """Number the rows of a batch.

        Args:
            leaves: contiguous tensors in the CPU's memory, (B, ...), that stay as they are.
            sample_ids: which sample each row is, where that is known.

        Returns:
            The numbers of all rows, (B,); those that were not there before, (n,); and the contents of these.
        """
        numbers = [-1] * batches.batch_size(leaves)
        words = _words(leaves)
        firsts = self._firsts.setdefault(batches.packed_signature(leaves), _Firsts())
        if sample_ids is not None:
            firsts.find(sample_ids, words, numbers)
        unknown = [row for row, number in enumerate(numbers) if number < 0]
        if not unknown:
            return numbers, [], {}
        new: list[int] = []
        some = leaves if len(unknown) == len(numbers) else batches.rows(leaves, torch.tensor(unknown))
        for row, key in zip(unknown, batches.digests(some), strict=True):
            if key not in self._numbers:
                self._numbers[key] = len(self._numbers)
                new.append(row)
            numbers[row] = self._numbers[key]
        size = sum(rows.shape[1] * rows.itemsize for rows in words)
        if sample_ids is not None and self._kept_bytes + size * len(unknown) <= KEPT_BYTES:
            self._kept_bytes += size * firsts.keep(sample_ids, words, numbers, unknown)
        if len(new) < len(numbers):
            leaves = batches.rows(leaves, torch.tensor(new)) if new else {}
        return numbers, [numbers[row] for row in new], leaves


class _Firsts:
    """The first contents of samples, and their numbers; all of the same names, dtypes and shapes."""

    def __init__(self) -> None:
        self._place: dict[int, int] = {}
        self._kept: Words = []
        """The numbers of the contents, and their words; the rows beyond those of ``_place`` are room for more."""
        self._found: Words = []
        """Those of the newest batch; new memory would take longer than what is done with it."""

    def find(self, sample_ids: Sequence[int], words: Words, numbers: list[int]) -> None:
        """Put into ``numbers`` those of the rows that are what they were at first."""
        places = [self._place.get(sample, -1) for sample in sample_ids]
        if max(places, default=-1) < 0:
            return
        place = np.array(places)
        if [len(rows) for rows in self._found] != [len(place)] * len(self._kept):
            self._found = [np.empty((len(place), *kept.shape[1:]), kept.dtype) for kept in self._kept]
        for kept, rows in zip(self._kept, self._found, strict=True):
            kept.take(place, 0, out=rows, mode="clip")
        first, *firsts = self._found
        same = place >= 0
        for now, then in zip(words, firsts, strict=True):
            if not np.array_equal(now, then):
                same &= (now == then).all(1)
        numbers[:] = np.where(same, first, -1).tolist()

    def keep(self, sample_ids: Sequence[int], words: Words, numbers: list[int], rows: list[int]) -> int:
        """Keep those of these rows whose samples are new, and return how many that are."""
        new = {sample_ids[row]: row for row in reversed(rows) if sample_ids[row] not in self._place}
        start, end = len(self._place), len(self._place) + len(new)
        added = [np.array(numbers, np.int64), *words]
        self._kept = [_with_room(kept, end) for kept in self._kept or [part[:0] for part in added]]
        for kept, part in zip(self._kept, added, strict=True):
            kept[start:end] = part[list(new.values())]
        self._place.update(zip(new, range(start, end), strict=True))
        return len(new)


def _with_room(kept: NDArray[np.generic], size: int) -> NDArray[np.generic]:
    """The same rows in an array of at least ``size`` rows."""
    if len(kept) >= size:
        return kept
    larger = np.empty((max(size, 2 * len(kept)), *kept.shape[1:]), kept.dtype)
    larger[: len(kept)] = kept
    return larger


def _words(leaves: Leaves) -> Words:
    rows = [batches.row_bytes(leaf) for _, leaf in sorted(leaves.items()) if leaf.numel()]
    return [part.view(np.int64) if part.shape[1] % 8 == 0 else part for part in rows]
