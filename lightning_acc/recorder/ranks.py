"""Several processes: what each saw of a step, and their records merged into one.

While training, every process records its own steps in ``ranks/<rank>``, so that no step waits for an exchange beyond the
first few, which are compared with F. After the last step rank 0 merges them: a global step is the batches of all ranks, in
the order of the ranks. Padding that a distributed sampler adds is one more occurrence of the same sample.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from itertools import islice

import torch
from torch import Tensor

from lightning_acc.core.devices import States
from lightning_acc.core.stand_in import Settings
from lightning_acc.errors import RunError
from lightning_acc.record.batches import Leaves
from lightning_acc.record.record import Record
from lightning_acc.record.steps import Integers, integers
from lightning_acc.record.store import Store
from lightning_acc.record.writer import RunWriter


@dataclass
class SeenBatch:
    """A batch of the step in the making.

    Attributes:
        ids: its samples.
        contents: their B numbers in this process's record, which may not be there yet.
        leaves: its tensors.
        rng: states of the random number generators before it; once it had a forward pass, of those that it drew from.
        counts: whether it had a backward pass.
        weights: what its samples weigh in its loss, (B,), float64, where they weigh differently and that was seen.
        settings: what the module was set to, of what has changed since the first step.
    """

    ids: list[int]
    contents: Integers
    leaves: Leaves
    rng: States
    counts: bool = False
    weights: Tensor | None = None
    settings: Settings = field(default_factory=dict)

    @property
    def random(self) -> bool:
        """Whether its forward pass drew random numbers."""
        return self.counts and bool(self.rng)


def gather(seen: list[SeenBatch] | None, processes: int) -> list[SeenBatch]:
    """The batches of all processes, in the order of their ranks; all processes must call this.

    One whose record has ended gives None.

    Raises:
        RunError: one did, so that the records of all end.
    """
    if processes == 1:
        return seen or []
    everyone: list[list[SeenBatch] | None] = [None] * processes
    torch.distributed.all_gather_object(everyone, seen)
    if None in everyone:
        raise RunError(f"the recording of process {everyone.index(None)} of {processes} has ended")
    return [batch for theirs in everyone for batch in theirs or []]


def part_of(store: Store, rank: int) -> Store:
    """Where the process ``rank`` keeps its part of the record."""
    return Store(f"{store.url}/ranks/{rank}")


def merge(writer: RunWriter, processes: int, end: int | None = None) -> int:
    """Write the global steps from what all ranks recorded, as many as they have in common, and return how many.

    ``end``: those before this one alone.

    Raises:
        RunError: a rank has recorded no whole step, or its part is damaged.
    """
    runs = [Record(part_of(writer.store, rank).url, partial=True) for rank in range(processes)]
    n_steps = min(run.n_steps for run in runs)
    n_steps = n_steps if end is None else min(end, n_steps)
    called = [run.sample_names or range(run.n_samples) for run in runs] if "sample_id" in writer.header else None
    for t in range(n_steps):
        records = [run.steps[t] for run in runs]
        seen = [record.sample_ids.tolist() for record in records]
        if called is not None:  # every rank has numbers of its own
            seen = [writer.names.of([names[i] for i in theirs]) for names, theirs in zip(called, seen, strict=True)]
        of_each = [(record, iter(theirs)) for record, theirs in zip(records, seen, strict=True)]
        writer.add_step(
            {
                "sample_ids": [integers(islice(ids, size)) for record, ids in of_each for size in record.sizes],
                "contents": [writer.content_ids(leaves) for run in runs for leaves in run.batches(t)],
                "weights": torch.cat([record.weights for record in records]),
                "groups": records[0].groups,
                "rng": [state for record in records for state in record.rng],
                "names": writer.names.new(),
            }
        )
    return n_steps


def remove_parts(store: Store) -> None:
    """Delete the ranks' own records, once they are merged."""
    store.remove("ranks")
