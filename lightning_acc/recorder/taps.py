"""What is tapped of a training, and stays as it is: which samples each batch holds, and what they weigh in its loss.

The loader's batch sampler is wrapped before Lightning calls ``iter`` on it, so that workers, prefetching and persistent
workers are covered: indices wait in a queue until the batch they belong to is yielded.
"""

from __future__ import annotations

import copy
from collections import deque
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader, IterableDataset

from lightning_acc.core.losses.per_sample import weights_of
from lightning_acc.core.losses.reductions import Reductions
from lightning_acc.core.stand_in import Settings, Watched
from lightning_acc.record.batches import Leaves, Structure
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.checks.rows import CheckedCollate, first_rows

REFUSED_THERE = f"{RecordingRefused.__module__}.{RecordingRefused.__qualname__}: "
"""What stands before a refusal in the last line of a traceback."""


class SampleTap:
    """Taps the training loaders Lightning processes; ``next_ids`` gives the samples of the next batch it delivers.

    Attributes:
        n_samples: size of the data set of the loader whose batches are being delivered.
        dataset: the data set itself.

    Args:
        check_rows: look at what the loaders' collate functions do to the samples of a batch.
        count: tell samples by their place in the data set; else nothing is told of them, and any loader will do.
    """

    def __init__(self, check_rows: bool = True, count: bool = True) -> None:
        self.n_samples = 0
        self.dataset: Any = None
        self._check_rows, self._count = check_rows, count
        self._looked = False
        self._first: tuple[Leaves, Structure] | None = None
        self._delivered: deque[list[int]] = deque()
        self._strategy: Any = None
        self._trainer: Any = None

    def install(self, trainer: Any) -> None:
        """Tap every training loader ``trainer`` processes from now on."""
        strategy = trainer.strategy
        process = strategy.process_dataloader

        def process_and_tap(loader: Any) -> Any:
            loader = process(loader)
            return self._tap(loader) if trainer.training else loader

        strategy.process_dataloader = process_and_tap
        self._strategy, self._trainer = strategy, trainer

    @property
    def loaders(self) -> list[Any]:
        """Those the trainer takes training batches from now; a callback that tries batch sizes has others processed, too."""
        return list(self._trainer.fit_loop._combined_loader.flattened)

    def refuse_several(self) -> None:
        """Refuse a training whose samples are told by their number and come from several loaders, or from none."""
        if self._count and len(self.loaders) != 1:
            refuse_if(f"there are {len(self.loaders)} training loaders: train from exactly one DataLoader")

    def remove(self) -> None:
        """Undo ``install``."""
        if self._strategy is not None:
            vars(self._strategy).pop("process_dataloader", None)
            self._strategy = None

    def next_ids(self) -> list[int]:
        """Ids of the samples in the oldest batch that was delivered and not asked about yet, in order."""
        if not self._delivered:
            raise RecordingRefused(
                "A training batch came from somewhere else than a DataLoader, so its samples are not known: train from a "
                "torch DataLoader over a map-style dataset."
            )
        return self._delivered.popleft()

    def take_first(self, batch: Any) -> tuple[Leaves, Structure] | None:
        """The first rows of the first batch, as it was delivered; once, and only where they are to be looked at.

        Of a loader that is no DataLoader they are those of ``batch``, as it has become since.
        """
        if self._check_rows and not self._looked and not any(isinstance(loader, DataLoader) for loader in self.loaders):
            self._first, self._looked = first_rows(batch), True
        first, self._first = self._first, None
        return first

    def _tap(self, loader: Any) -> Any:
        if self._count:
            refuse_loader(loader)
        elif not isinstance(loader, DataLoader):
            return loader
        attribute = "sampler" if loader.batch_sampler is None else "batch_sampler"
        recording = _RecordingSampler(getattr(loader, attribute), len(loader.dataset)) if self._count else None
        collate = CheckedCollate(loader.collate_fn, whole=loader.batch_sampler is None)
        collate.done = collate.done or not self._check_rows
        tap = self

        class Tapped(type(loader)):  # type: ignore[misc]
            def __iter__(self) -> Iterator[Any]:
                # At once, not in a generator: the loader draws its random seed here, and must do so when it always did.
                batches: Iterator[Any] = super().__iter__()
                if not any(self is loader for loader in tap.loaders):
                    collate.done = True
                    return batches
                collate.done = collate.done or self.num_workers > 0  # of this loader's workers, the later ones need not look
                tap._delivered = deque()
                tap.dataset, tap.n_samples = self.dataset, len(self.dataset) if tap._count else 0
                return tap._deliver(batches, recording, tap._delivered)

        Tapped.__name__ = Tapped.__qualname__ = type(loader).__name__
        tapped = copy.copy(loader)
        if recording is not None:
            object.__setattr__(tapped, attribute, recording)  # DataLoader forbids the plain assignment
        tapped.collate_fn = collate
        object.__setattr__(tapped, "__class__", Tapped)
        return tapped

    def _deliver(self, batches: Iterator[Any], sampler: _RecordingSampler | None, delivered: deque[list[int]]) -> Iterator[Any]:
        pending: deque[list[int]] | None = None
        for batch in _refusals_in_one_sentence(batches):
            if pending is None and sampler is not None:
                # Now the sampler has been asked for an iterator, also by a loader whose own __iter__ is a generator.
                pending = sampler.pending
            if self._check_rows and not self._looked:
                self._first = first_rows(batch)
                self._looked = self._first is not None
            if pending is not None:
                delivered.append(pending.popleft())
            yield batch


def _refusals_in_one_sentence(batches: Iterator[Any]) -> Iterator[Any]:
    """What a worker process refuses comes with its traceback; its last line is the refusal."""
    try:
        yield from batches
    except RecordingRefused as error:
        raise RecordingRefused(str(error).strip().splitlines()[-1].removeprefix(REFUSED_THERE)) from None


class _RecordingSampler:
    """A sampler that notes what it yields, in a new queue for every iterator.

    Args:
        sampler: of samples or of batches.
        n_samples: length of the data set.
    """

    def __init__(self, sampler: Any, n_samples: int) -> None:
        self._sampler, self._n_samples = sampler, n_samples
        self.pending: deque[list[int]] = deque()

    def __iter__(self) -> Iterator[Any]:
        pending: deque[list[int]] = deque()
        self.pending = pending
        return self._note(iter(self._sampler), pending)

    def _note(self, samples: Iterator[Any], pending: deque[list[int]]) -> Iterator[Any]:
        for index in samples:
            ids = _ids(index)
            pending.append(ids)
            for i in (min(ids, default=0), max(ids, default=0)):
                if not 0 <= i < max(self._n_samples, 1):
                    raise RecordingRefused(
                        f"The sampler yields the index {i}, but the training data set says that it has {self._n_samples} "
                        "samples: let its __len__ count all of them, and the sampler yield indices from 0."
                    )
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
        return list(map(int, index)) if hasattr(index, "__iter__") else [int(index)]
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
            f"The training data comes from a {type(loader).__name__}, whose samples have no ids: use a "
            "torch.utils.data.DataLoader, or let the batches hold ids and pass TrajectoryRecorder(..., sample_id=...)."
        )
    if isinstance(loader.dataset, IterableDataset):
        raise RecordingRefused(
            f"The training data is an iterable dataset ({type(loader.dataset).__name__}), whose samples have no ids: "
            "let its batches hold ids and pass TrajectoryRecorder(..., sample_id=...), or use a map-style dataset (for Hugging "
            "Face datasets: load without streaming)."
        )
    if not getattr(loader, "in_order", True):
        raise RecordingRefused(
            "The training DataLoader has in_order=False, so its batches lose their ids: use in_order=True, or let the batches "
            "hold ids and pass TrajectoryRecorder(..., sample_id=...)."
        )
    if not hasattr(loader.dataset, "__len__"):
        raise RecordingRefused("The training dataset has no length: define __len__, so that its samples can be counted.")


class LossTap:
    """Observes ``training_step`` where it is asked to; what it computes stays the same, bit for bit.

    Args:
        trainer: the Lightning trainer.
        known: settings of the module that have changed in an earlier part of the training, see ``Watched``.

    Attributes:
        settings: those that have changed since the first step, as they are in the newest forward pass.
    """

    def __init__(self, trainer: Any, known: Settings) -> None:
        self.settings: Settings = {}
        self._watched: Watched | None = None
        self._strategy = trainer.strategy
        self._size: int | None = None
        self._weights: Tensor | None = None
        step = self._strategy.training_step

        def observed(*args: Any, **kwargs: Any) -> Any:
            self._watched = self._watched or Watched(trainer.lightning_module, known)  # its hooks have begun the step by now
            self.settings = self._watched.now()
            if self._size is None:
                return step(*args, **kwargs)
            with Reductions(self._size, weights_only=True) as reductions:
                output = step(*args, **kwargs)
            reduced = reductions.seen.of(output.get("loss") if isinstance(output, Mapping) else output)
            if reduced is not None:
                self._weights = weights_of(reduced, self._size, "weighted", torch.float64).detach().cpu().clone()
            return output

        self._strategy.training_step = observed

    def settings_now(self) -> Settings:
        """Those that have changed by now, as they are."""
        return {} if self._watched is None else self._watched.now()

    def settings_at_first(self) -> Settings:
        """The same as they were in the first step, or before it, where that has changed them itself."""
        self.settings_now()
        return {} if self._watched is None else self._watched.first

    def observe(self, size: int | None) -> None:
        """Observe the next step, on a batch of ``size`` samples; None: do not."""
        self._size, self._weights = size, None

    def take(self) -> Tensor | None:
        """What the samples of the batch weigh, (B,), float64; None where it was not observed or not seen."""
        weights, self._weights = self._weights, None
        return weights

    def remove(self) -> None:
        """Give the trainer its own method back."""
        vars(self._strategy).pop("training_step", None)
