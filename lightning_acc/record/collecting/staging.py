"""Contents get their numbers beside the training: comparing a batch takes as long as a small step, and can wait for a few."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence

import torch

from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting.background import Background
from lightning_acc.record.collecting.collected import Contents
from lightning_acc.record.collecting.numbering import Numbering
from lightning_acc.record.steps import Integers, integers, zeros

BATCHES, BYTES = 16, 8 * 2**20
"""Batches, or bytes of them, that are gathered before a thread numbers them; as many more may wait until it has."""


class Staging:
    """Batches on their way to the numbers of their contents, in the order in which they come.

    Attributes:
        numbering: gives the numbers.
        new_bytes: of the contents that were new; whoever takes them may count anew.
    """

    def __init__(self) -> None:
        self.numbering = Numbering()
        self.new_bytes = 0
        self._new: Contents = defaultdict(list)
        self._waiting: list[tuple[Leaves, Sequence[int] | None, Integers]] = []
        self._bytes = 0
        self._background = Background()
        self._failed: BaseException | None = None

    def add(self, leaves: Leaves, sample_ids: Sequence[int] | None) -> Integers:
        """Number the rows of a batch in the CPU's memory as it is now; their B numbers are there after ``take``.

        Raises:
            BaseException: what stopped the numbering of a batch before.
        """
        own = {  # a copy, as a training step may write to its batch
            name: leaf.clone(memory_format=torch.contiguous_format) for name, leaf in leaves.items() if batches.has_rows(name)
        }
        found = zeros(batches.batch_size(own))
        self._waiting.append((own, sample_ids, found))
        self._bytes += sum(leaf.nbytes for leaf in own.values())
        if len(self._waiting) >= BATCHES or self._bytes >= BYTES:
            self._start()
        return found

    def take(self) -> Contents:
        """The contents that are new since this was asked last, once all batches are numbered.

        Raises:
            BaseException: what stopped that; again and again, for what came later has no numbers.
        """
        self._start()
        self._background.wait()
        new, self._new = self._new, defaultdict(list)
        return new

    def _start(self) -> None:
        if self._failed is not None:
            raise self._failed
        waiting, self._waiting, self._bytes = self._waiting, [], 0
        if waiting:
            self._background.run(lambda: self._number(waiting))

    def _number(self, waiting: list[tuple[Leaves, Sequence[int] | None, Integers]]) -> None:
        try:
            for leaves, sample_ids, place in waiting:
                found, new, contents = self.numbering(leaves, sample_ids)
                place[:] = integers(found)
                if new:
                    stored = batches.packed(contents)
                    self._new[batches.packed_signature(stored)].append((new, stored))
                    self.new_bytes += sum(leaf.nbytes for leaf in stored.values())
        except BaseException as error:
            self._failed = error
            raise
