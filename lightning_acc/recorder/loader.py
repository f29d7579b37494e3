"""Which samples each batch of a DataLoader holds, without changing what the loader yields.

The loader's batch sampler is wrapped before Lightning calls ``iter`` on it, so that workers, prefetching and persistent
workers are covered: indices wait in a queue until the batch they belong to is yielded.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset

from lightning_acc.recorder.refusals import RecordingRefused


class SampleTap:
    """Taps the training loaders Lightning processes; ``next_ids`` gives the samples of the next batch it delivers.

    Attributes:
        loaders: how many loaders have been tapped since the last ``reset``.
        n_samples: size of the data set of the newest.
    """

    def __init__(self) -> None:
        self.loaders = 0
        self.n_samples = 0
        self._delivered: deque[list[int]] = deque()
        self._undo: Callable[[], None] = lambda: None

    def install(self, trainer: Any) -> None:
        """Tap every training loader ``trainer`` processes from now on."""
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def process_and_tap(loader: Any) -> Any:
            loader = process(loader)
            return self._tap(loader) if trainer.training else loader

        strategy.process_dataloader = process_and_tap
        self._undo = lambda: strategy.__dict__.pop("process_dataloader", None)

    def remove(self) -> None:
        """Undo ``install``."""
        self._undo()
        self._undo = lambda: None

    def next_ids(self) -> list[int]:
        """Ids of the samples in the oldest batch that was delivered and not asked about yet, in order."""
        if not self._delivered:
            raise RecordingRefused(
                "A training batch came from somewhere else than a DataLoader, so its samples are not known: train from a "
                "torch DataLoader over a map-style dataset."
            )
        return self._delivered.popleft()

    def _tap(self, loader: Any) -> Any:
        refuse_loader(loader)
        self.loaders += 1
        self.n_samples = len(loader.dataset)
        attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        recording = _RecordingSampler(getattr(loader, attribute))
        tap = self

        class Tapped(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[Any]:
                # At once, not in a generator: the loader draws its random seed here, and must do so when it always did.
                batches = super().__iter__()
                tap._delivered = deque()
                return _deliver(batches, recording, tap._delivered)

        Tapped.__name__ = Tapped.__qualname__ = type(loader).__name__
        tapped = copy.copy(loader)
        object.__setattr__(tapped, attribute, recording)  # DataLoader forbids the plain assignment
        object.__setattr__(tapped, "__class__", Tapped)
        return tapped


def _deliver(batches: Iterator[Any], sampler: _RecordingSampler, delivered: deque[list[int]]) -> Iterator[Any]:
    pending: deque[list[int]] | None = None
    for batch in batches:
        if pending is None:
            # Now the sampler has been asked for an iterator, also by a loader whose own __iter__ is a generator.
            pending = sampler.pending
        delivered.append(pending.popleft())
        yield batch


class _RecordingSampler:
    """A sampler that notes what it yields, in a new queue for every iterator."""

    def __init__(self, sampler: Any) -> None:
        self._sampler = sampler
        self.pending: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        pending: deque[list[int]] = deque()
        self.pending = pending
        return self._note(iter(self._sampler), pending)

    @staticmethod
    def _note(samples: Iterator[Any], pending: deque[list[int]]) -> Iterator[Any]:
        for index in samples:
            pending.append(_ids(index))
            yield index

    def __len__(self) -> int:
        return len(self._sampler)

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") or name == "_sampler":
            raise AttributeError(name)
        return getattr(self._sampler, name)


def _ids(index: Any) -> list[int]:
    if isinstance(index, torch.Tensor):
        index = index.tolist()
    try:
        return [int(i) for i in index] if hasattr(index, "__iter__") else [int(index)]
    except (TypeError, ValueError):
        raise RecordingRefused(
            f"The sampler yields {index!r}, but samples are recorded by their integer index in the dataset: "
            "use a sampler that yields integers."
        ) from None


def refuse_loader(loader: Any) -> None:
    """Refuse a training loader whose samples cannot be told from its indices.

    Raises:
        RecordingRefused: names the cause and the remedy.
    """
    if not isinstance(loader, DataLoader):
        raise RecordingRefused(
            f"The training data comes from a {type(loader).__name__}: use a torch.utils.data.DataLoader, "
            "whose samples have ids."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecordingRefused(
            f"The training data is an iterable dataset ({type(loader.dataset).__name__}), whose samples have no ids: "
            "use a map-style dataset (for Hugging Face datasets: load without streaming)."
        )
    if not getattr(loader, "in_order", True):
        raise RecordingRefused("The training DataLoader has in_order=False, so its batches lose their ids: use in_order=True.")
    if not hasattr(loader.dataset, "__len__"):
        raise RecordingRefused("The training dataset has no length: define __len__, so that its samples can be counted.")
