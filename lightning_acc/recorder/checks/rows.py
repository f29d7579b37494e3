"""A row of a batch is one sample: what makes rows of several (mixup, cutmix), or puts them in another order, is found.

Whatever makes a batch of samples is asked twice, under the same random numbers: once as it is, and once with the samples
beside the first one in another order. All else being equal, down to the longest sample and the number of random numbers drawn,
the first row stays as it was, unless other samples are in it. Padding, normalising, masking at random pass; mixing does not.
"""

from __future__ import annotations

import copy
import functools
import inspect
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import default_collate, default_convert

from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves, Structure
from lightning_acc.recorder.checks.randomness import seeded
from lightning_acc.recorder.checks.refusals import RecordingRefused

ROWS = 8
"""Samples that are looked at."""
SEEDS = 12
"""Random states: batches may be mixed now and then only, and hardly."""
PATIENCE = 2.0
"""Seconds after which no further random state is tried."""
ROUNDING = 1e-3
"""Largest change of a row, relative to the largest number around, that is not taken for another sample in it."""
AS_THEY_ARE = "as-they-are"
HOOKS = ("on_before_batch_transfer", "transfer_batch_to_device", "on_after_batch_transfer")

Maker = Callable[[list[int]], Any]
"""Makes the batch of the samples at these places."""


def refuse_rows(make: Maker, n: int, what: str, *holders: Any) -> None:
    """Refuse what makes rows that are no samples.

    Args:
        make: makes a batch; what it raises means that it cannot be asked, and nothing is said.
        n: how many samples there are.
        what: its name.
        holders: what has generators of its own, or counts its calls: put back afterwards.

    Raises:
        RecordingRefused: several samples are in one row, or the rows are in another order than the samples.
    """
    first, others = [0], list(range(1, n))
    same = others[1:] + others[:1] if n > 2 else [0]
    started = time.perf_counter()
    outcomes: list[Leaves] = []
    for seed in range(SEEDS):
        before, after = (_ask(make, first + beside, seed, holders) for beside in (others, same))
        if before is None or after is None:
            return
        if _row_changes(before, after):
            raise RecordingRefused(
                f"A row of a batch is made of several samples: {what} changes a row where other samples stand beside it, as "
                "mixup and cutmix do, so that no sample can be left out. Leave the mixing out, or pass "
                f"TrajectoryRecorder(..., mixed_rows={AS_THEY_ARE!r}), under which each row, as it is, counts as the sample "
                "whose index led to it."
            )
        outcomes.append(before)
        if time.perf_counter() - started > PATIENCE:
            break
    if any(_keys(outcome) != _keys(outcomes[0]) for outcome in outcomes):
        return  # drawn at random: rows cannot be told from each other
    turned = _ask(make, others + first, 0, holders)
    rows = _keys(outcomes[0])
    if turned is not None and _keys(turned) != rows[1:] + rows[:1] and sorted(_keys(turned)) == sorted(rows):
        raise RecordingRefused(
            f"The rows of a batch are not in the order of its samples: {what} sorts them, so that a row belongs to another id "
            f"than it is recorded under. Leave them in order, or pass TrajectoryRecorder(..., mixed_rows={AS_THEY_ARE!r})."
        )


def _ask(make: Maker, order: list[int], seed: int, holders: tuple[Any, ...]) -> Leaves | None:
    with seeded(*holders, seed=seed), _attributes_kept(*holders):
        try:
            leaves, _ = batches.flatten(make(order), len(order))
        except Exception:
            return None
    return {name: leaf.detach().cpu() for name, leaf in leaves.items() if batches.is_of_samples(name)}


def _row_changes(before: Leaves, after: Leaves) -> bool:
    """Whether the first row is another one, where the two have the same shape."""
    for name in before.keys() & after.keys():
        a, b = before[name], after[name]
        if a.shape != b.shape or a.dtype != b.dtype or torch.equal(a[0], b[0]):
            continue
        if torch.equal(a, a[:1].expand_as(a)):  # a fact about the batch, told to each row
            continue
        if not a.is_floating_point():
            return True
        scale = ROUNDING * float(torch.nan_to_num(a).abs().max())
        if float(torch.nan_to_num(a[0] - b[0]).abs().max()) > scale:
            return True
    return False


def _keys(leaves: Leaves) -> list[bytes]:
    """The content of each row."""
    parts = [_bytes(leaf) for _, leaf in sorted(leaves.items())]
    return [b"".join(row) for row in zip(*parts, strict=True)]


def _bytes(leaf: Tensor) -> list[bytes]:
    return [row.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes() if row.numel() else b"" for row in leaf]


@contextmanager
def _attributes_kept(*holders: Any) -> Iterator[None]:
    """Puts back what these objects, or those they are bound to, have set on themselves, such as a count of calls."""
    objects = []
    for holder in holders:
        while isinstance(holder, functools.partial):
            holder = holder.func
        thing = holder.__self__ if inspect.ismethod(holder) else holder
        if isinstance(getattr(thing, "__dict__", None), dict) and not isinstance(thing, type):
            objects.append((thing.__dict__, dict(thing.__dict__)))
    try:
        yield
    finally:
        for attributes, before in objects:
            attributes.clear()
            attributes.update(before)


class CheckedCollate:
    """A loader's collate_fn, looked at when the first batch of several samples is made.

    Args:
        collate: the loader's own.
        whole: whether it is handed whole batches (``batch_size=None``).
    """

    def __init__(self, collate: Callable[[Any], Any], whole: bool) -> None:
        self.collate = collate
        self.whole = whole
        self.done = collate in (default_collate, default_convert)

    def __call__(self, samples: Any) -> Any:
        """The batch of these samples."""
        if self.done or not (self.whole or (isinstance(samples, list) and len(samples) > 1)):
            return self.collate(samples)
        self.done = True
        few = first_rows(samples) if self.whole else _copied(samples[:ROWS])
        batch = self.collate(samples)
        if few is None:
            return batch
        what = f"the collate_fn {getattr(self.collate, '__qualname__', type(self.collate).__qualname__)}"
        if self.whole:
            refuse_rows(lambda order: self.collate(arranged(few, order)), _length(few), what, self.collate)
        else:
            refuse_rows(lambda order: self.collate([copy.deepcopy(few[i]) for i in order]), len(few), what, self.collate)
        return batch


def refuse_transfer(trainer: Any, few: tuple[Leaves, Structure] | None) -> None:
    """Refuse hooks that mix the rows of a batch on its way to ``training_step``; ``few`` are the first rows as delivered.

    Nothing is looked at where there are none.

    Raises:
        RecordingRefused: they do.
    """
    if few is None:
        return
    module, data = trainer.lightning_module, trainer.datamodule
    overridden = [
        f"{type(owner).__name__}.{name}"
        for owner in (module, data)
        for name in HOOKS
        if owner is not None and not getattr(type(owner), name).__module__.startswith(("pytorch_lightning.", "lightning."))
    ]
    if overridden:
        refuse_rows(lambda order: transferred(trainer, arranged(few, order)), _length(few), overridden[-1], module, data)


def transferred(trainer: Any, batch: Any, loader: int = 0) -> Any:
    """A batch of a loader after all that Lightning's loops do to it before a step."""
    batch = trainer.precision_plugin.convert_input(batch)
    batch = trainer.lightning_module._on_before_batch_transfer(batch, dataloader_idx=loader)
    return trainer.strategy.batch_to_device(batch, dataloader_idx=loader)


def first_rows(batch: Any) -> tuple[Leaves, Structure] | None:
    """A copy of the first rows of a batch; None where it has not got several, or cannot be taken apart."""
    try:
        leaves, structure = batches.flatten(batch)
        size = min(batches.batch_size(leaves), ROWS)
    except Exception:
        return None
    return ({name: leaf[:size].detach().clone() for name, leaf in leaves.items()}, structure) if size > 1 else None


def arranged(few: tuple[Leaves, Structure], order: list[int]) -> Any:
    """A batch of these rows in this order."""
    leaves, structure = few
    return batches.unflatten(structure, batches.rows(leaves, torch.tensor(order)))


def _length(few: tuple[Leaves, Structure]) -> int:
    return batches.batch_size(few[0])


def _copied(samples: Any) -> Any:
    try:
        return copy.deepcopy(samples)
    except Exception:  # of a kind that cannot be copied, and so cannot be asked about twice
        return None
