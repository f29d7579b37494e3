"""The contents of a run: what its samples are made of, told apart by number."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.record.store import digest

NUMBERS = "#"
"""Name of the tensor that says which contents a file holds."""


class Contents:
    """All contents of a run; ``contents[numbers]`` gives the leaves of some, which must be alike in shape.

    Args:
        files: the tensors of each file of samples, by its name.
        shared: the tensors that belong to no sample, by the names of their leaves.
        fault: makes the error for what is wrong with a file.

    Raises:
        RunError: the files do not number the contents from 0.
    """

    def __init__(self, files: Mapping[str, Leaves], shared: Leaves, fault: Callable[[str, str], RunError]) -> None:
        self._fault = fault
        self._shared = shared
        merged: dict[object, list[str]] = {}
        for name, tensors in files.items():
            merged.setdefault(batches.packed_signature(tensors), []).append(name)
        numbers = torch.cat([tensors[NUMBERS] for tensors in files.values()]) if files else torch.empty(0, dtype=torch.int64)
        if not torch.equal(numbers.sort().values, torch.arange(len(numbers))):
            raise fault(next(iter(files)), f"its {NUMBERS} and those of the files beside it do not number the contents from 0")
        # One tensor for contents that are alike, whatever file they are in.
        self._alike = [(parts[0], _joined([files[name] for name in parts])) for parts in merged.values()]
        self._places = torch.empty(len(numbers), 2, dtype=torch.int64)
        for i, (_, tensors) in enumerate(self._alike):
            self._places[tensors[NUMBERS], 0] = i
            self._places[tensors[NUMBERS], 1] = torch.arange(len(tensors[NUMBERS]))

    def __getitem__(self, numbers: Tensor) -> Leaves:
        places = self._places[numbers]
        kinds = places[:, 0].unique().tolist()
        if len(kinds) > 1:
            raise self._fault(self._alike[kinds[0]][0], "samples of a batch have different shapes")
        _, tensors = self._alike[kinds[0]]
        found = batches.unpacked({**tensors, **self._shared}, places[:, 1])
        del found[NUMBERS]
        return found

    def digests(self, numbers: bool = True) -> list[str]:
        """A hash of each content, by number: of the names, dtypes, shapes and bytes of its leaves.

        What is said of whole batches is no content of a sample. Without ``numbers`` leaves of a single number, such as labels,
        are passed over, unless there are no others.
        """
        found = [""] * len(self._places)
        for _, tensors in self._alike:
            names = [name for name in sorted(tensors) if name != NUMBERS and batches.is_of_samples(name)]
            if not numbers:
                ragged = [name for name in names if batches.is_ragged(name.removesuffix(batches.LENGTH))]
                names = [name for name in names if tensors[name].ndim > 1 or name in ragged] or names
            kinds = [[name, str(tensors[name].dtype), list(tensors[name].shape[1:])] for name in names]
            kind = json.dumps(kinds).encode()
            pieces = [batches.packed_pieces(name, tensors) for name in names]
            for i, number in enumerate(tensors[NUMBERS].tolist()):
                found[number] = digest(kind + b"".join(piece[i].tobytes() for piece in pieces))
        return found


def _joined(parts: list[Leaves]) -> Leaves:
    return {name: torch.cat([part[name] for part in parts]) for name in parts[0]} if len(parts) > 1 else parts[0]
