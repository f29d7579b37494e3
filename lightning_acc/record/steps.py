"""The steps of a record: as they are seen, and as they are read, file by file when they are asked for."""

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, TypeAlias, TypedDict

import numpy as np
import torch
from torch import Tensor

from lightning_acc.record.samples.names import Name

if TYPE_CHECKING:
    from lightning_acc.record.record import Record


Integers: TypeAlias = "array[int]"
"""Of int64, as a step is seen: to make a tensor of the few of a batch takes ten times as long."""
RECENT = 8
"""Steps that are kept as they were read."""
RANDOM = {"cpu": "", "cuda": "_cuda"}
"""Ends of the names of what is stored of random number generators, by the kind of their device."""


class SeenStep(TypedDict):
    """One optimizer step: its occurrences in order, their contents and loss weights, and the hyper-parameters.

    ``sample_ids`` and ``contents`` are those of each batch that it accumulated, of int64, with one number an occurrence; the
    contents must be there when the step is written. ``weights`` are float64, of shape (occurrences,), ``rng`` the states of the
    random number generators that the forward pass of each batch drew from, before it, by the kind of their device. ``names``
    are those of the samples that are new, where batches name them.
    """

    sample_ids: list[Integers]
    contents: list[Integers]
    weights: Tensor
    groups: list[dict[str, Any]]
    rng: list[dict[str, Tensor]]
    names: list[Name]


def integers(given: Iterable[int]) -> Integers:
    """The same as int64."""
    return array("q", given)


def zeros(n: int) -> Integers:
    """Room for ``n`` integers."""
    return array("q", bytes(8 * n))


def joined(parts: Iterable[Integers]) -> Tensor:
    """Those of all parts, in order, in one tensor (n,)."""
    return torch.from_numpy(np.concatenate([np.frombuffer(part, np.int64) for part in parts]))


@dataclass(frozen=True)
class StepRecord:
    """One optimizer step as it was recorded.

    Attributes:
        sample_ids: ids of the occurrences the step saw, in order, shape (occurrences,).
        weights: loss weight of each occurrence, shape (occurrences,), float64.
        contents: number of each occurrence's content, for ``Record.contents``, shape (occurrences,).
        groups: hyper-parameters of each parameter group of the optimizer.
        sizes: occurrences in each of the batches whose gradients the step accumulated; usually one.
        rng: for each of these batches, the states of torch's random number generators before its forward pass, by the kind of
            their device (``"cpu"``, ``"cuda"``), of those that it drew from.
    """

    sample_ids: Tensor
    weights: Tensor
    contents: Tensor
    groups: list[dict[str, Any]]
    sizes: list[int]
    rng: list[dict[str, Tensor]]

    @property
    def settings(self) -> list[dict[str, Any] | None]:
        """For each of the batches what the module was set to, where that differs; see ``lightning_acc.core.stand_in``."""
        return self.groups[0].get("settings_of_batches") or [None] * len(self.sizes)

    @property
    def hyperparameters(self) -> dict[str, Any]:
        """Hyper-parameters by name; a tuple of one value per parameter group where the groups differ."""
        values = {key: tuple(group[key] for group in self.groups) for key in self.groups[0]}
        return {key: value[0] if len(set(map(str, value))) == 1 else value for key, value in values.items()}


class Steps(Sequence[StepRecord]):
    """The steps of a run, read file by file when they are asked for."""

    def __init__(self, record: Record) -> None:
        self._record = record
        # A sweep asks several times for the step it is at.
        self._recent = functools.lru_cache(RECENT)(self._read)

    def __len__(self) -> int:
        return self._record.n_steps

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        if index < 0:
            index += len(self)
        if not 0 <= index < len(self):
            raise IndexError(f"step {index} of a run with {len(self)} steps")
        return self._recent(int(index))

    def _read(self, index: int) -> StepRecord:
        tensors, i, metadata = self._record._locate(index)
        first, last = tensors["offsets"][i : i + 2].tolist()
        start, end = tensors["batch_offsets"][i : i + 2].tolist()
        rng: list[dict[str, Tensor]] = [{} for _ in range(start, end)]
        for kind, end_of_name in RANDOM.items():
            drawn = tensors.get(f"rng_batches{end_of_name}")
            if drawn is None:
                continue
            for row in ((drawn >= start) & (drawn < end)).nonzero()[:, 0].tolist():
                # A copy: set_state crashes on memory that is not aligned, as inside a file.
                rng[int(drawn[row]) - start][kind] = tensors[f"rng{end_of_name}"][row].clone()
        return StepRecord(
            sample_ids=self._record._numbers(tensors["sample_ids"][first:last]),
            weights=tensors["weights"][first:last],
            contents=tensors["contents"][first:last],
            groups=metadata["groups"][i],
            sizes=tensors["batch_sizes"][start:end].tolist(),
            rng=rng,
        )

    def __iter__(self) -> Iterator[StepRecord]:
        return (self[t] for t in range(len(self)))
