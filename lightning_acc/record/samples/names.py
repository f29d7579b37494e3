"""What the batches call their samples, where that is not a place in a data set: each name is given a number.

The numbers are 0, 1, 2 ... in the order in which the names were first seen, and a file of steps holds the names that were new
in its steps. Where the names of a whole record are the whole numbers from 0 on, each once, they are the numbers of its samples.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_acc.arguments import shown
from lightning_acc.errors import RequestError, RunError

Name = int | str
KINDS = {"integers": int, "texts": str}
"""What the names of a record may be; all are of one kind."""
COLUMN = "id"
"""The column of a description that says by name which sample a row is about."""


class Numbers:
    """Numbers the names of a training, in the order in which they come."""

    def __init__(self) -> None:
        self._numbers: dict[Name, int] = {}
        self._names: list[Name] = []
        self._told = 0

    def __len__(self) -> int:
        return len(self._names)

    def __contains__(self, name: object) -> bool:
        return name in self._numbers

    def of(self, names: Sequence[Name]) -> list[int]:
        """The numbers of these names; new names get new ones.

        Raises:
            RunError: some are integers and others texts.
        """
        for name in names:
            if self._names and type(name) is not type(self._names[0]):
                raise RunError(
                    f"Some ids of samples are integers and others texts, such as {shown(self._names[0])} and {shown(name)}: "
                    "let all be of one kind."
                )
            if name not in self._numbers:
                self._numbers[name] = len(self._names)
                self._names.append(name)
        return [self._numbers[name] for name in names]

    def new(self) -> list[Name]:
        """The names, in order, that are new since this was asked last."""
        told, self._told = self._told, len(self._names)
        return self._names[told:]


def packed(names: Sequence[Name]) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Names as tensors, and the metadata beside them."""
    parts = [str(name).encode() for name in names]
    tensors = {
        "names": torch.frombuffer(bytearray(b"".join(parts)), dtype=torch.uint8) if any(parts) else torch.empty(0).byte(),
        "name_ends": torch.tensor([len(part) for part in parts], dtype=torch.int64).cumsum(0),
    }
    kind = next(kind for kind, of in KINDS.items() if isinstance(names[0], of))
    return tensors, {"names": json.dumps(kind)}


def unpacked(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> list[Name]:
    """The inverse of ``packed``.

    Raises:
        ValueError: these are no names.
    """
    ends, kind = tensors["name_ends"].tolist(), KINDS.get(str(metadata.get("names")))
    data = tensors["names"].numpy().tobytes()
    if kind is None:
        raise ValueError(f"its names are said to be {shown(metadata.get('names'))}, not one of {', '.join(KINDS)}")
    if sorted(ends) != ends or not 0 <= min(ends, default=0) <= max(ends, default=0) == len(data):
        raise ValueError(f"its name_ends do not increase from 0 to {len(data):,}")
    try:
        return [kind(data[start:end].decode()) for start, end in zip([0, *ends], ends, strict=False)]
    except ValueError as error:
        raise ValueError(f"its names are no {metadata['names']} ({' '.join(str(error).split())[:100]})") from error


class SampleNames:
    """The names of the samples of a finished record.

    Args:
        names: in the order they were first seen.

    Attributes:
        by_number: the names, by the number of their sample.
        plain: whether they are these numbers themselves.

    Raises:
        ValueError: a name is there twice.
    """

    def __init__(self, names: Sequence[Name]) -> None:
        self.plain = isinstance(names[0], int) and sorted(map(int, names)) == list(range(len(names)))
        self.by_number: list[Any] = list(range(len(names))) if self.plain else list(names)
        self._numbers = {name: number for number, name in enumerate(self.by_number)}
        self._seen = torch.tensor(names, dtype=torch.int64) if self.plain else None
        if len(self._numbers) < len(names):
            raise ValueError("a name of a sample is there twice")

    def numbers(self, seen: Tensor) -> Tensor:
        """The numbers of samples of which the record has the place in the order they were first seen."""
        return seen if self._seen is None else self._seen[seen]

    def number(self, name: Name) -> int | None:
        """The number of a sample; of one whose name is an integer also by its digits. None where there is no such sample."""
        if isinstance(name, str) and isinstance(self.by_number[0], int):
            try:
                name = int(name)
            except ValueError:
                return None
        return self._numbers.get(name)

    def rows(self, table: pa.Table) -> pa.Table:
        """The rows of a table about the samples, by their numbers; empty ones where it tells nothing."""
        places = {name: row for row, name in enumerate(table[COLUMN].to_pylist())}
        return table.take(pa.array([places.get(name) for name in self.by_number], pa.int64()))


def number_of(known: SampleNames | None, name: Name, n_samples: int) -> int:
    """The number of the sample that is called ``name``.

    Raises:
        RequestError: there is none.
    """
    if known is None:
        raise RequestError(
            f"There is no sample {shown(name)}: the samples of this run have no names, but the numbers 0 to {n_samples - 1} "
            "(TrajectoryRecorder(..., sample_id=...) records names)."
        )
    number = known.number(name)
    if number is None:
        raise RequestError(
            f"There is no sample {shown(name)} in this run: its {n_samples} samples are called by the ids in its batches, "
            f"such as {shown(known.by_number[0])}."
        )
    return number
