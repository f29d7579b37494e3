"""A batch taken apart: what it is made of as leaves, with a row a sample, and how it is put together again."""

from __future__ import annotations

import dataclasses
import json
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.record.batches import graphs
from lightning_acc.record.batches.giving import TakenApart, Withheld, unflatten
from lightning_acc.record.batches.leaves import FACT, JSON, RESERVED, ROWS, SHARED, SINGLE, TEXT, Leaves, disagreement, encoded
from lightning_acc.record.batches.structure import PLAIN, Structure, kind_of, parts_of

REMEDY = "let the loader's collate_fn return tensors with a row a sample, in tuples, lists or dicts"


def flatten(batch: Any, size: int | None = None, like: Structure | None = None) -> tuple[Leaves, Structure]:
    """Take a batch apart; ``unflatten`` is the inverse.

    Args:
        batch: tensors, arrays, texts and numbers in tuples, lists, mappings, named tuples and dataclasses.
        size: how many samples it has; by default as many as most of its tensors have rows.
        like: the structure of an earlier batch, which tells what belongs to the samples where that may be by chance.

    Raises:
        RunError: the batch holds something else, or nothing of it belongs to the samples.
    """
    if isinstance(batch, TakenApart):
        return dict(batch.leaves), batch.structure
    for whole, parts in reversed(_KNOWN.get()):
        if whole is batch:
            return dict(parts.leaves), parts.structure
    if size is not None and like and (leaves := _as_before(batch, size, like)) is not None:
        return leaves, like
    taking = _Taking(_size(batch) if size is None else size)
    structure = taking.part(batch, "", like)
    if not taking.has_rows:
        rows = ", ".join(f"{name!r} has {n}" for name, n in _sizes(batch, "")) or "it holds none"
        raise RunError(f"No tensor of a batch of {taking.size} samples has a row for each ({rows}): {REMEDY}, in their order.")
    return taking.leaves, structure


def _as_before(batch: Any, size: int, like: Structure) -> Leaves | None:
    """The leaves of a list, a tuple or a dict of tensors with a row a sample, as an earlier one was; None of all others.

    What ``_Taking`` makes of it, in a fifth of the time: most batches are such, and a training waits for each.
    """
    kind, parts = kind_of(like)
    if kind != type(batch).__name__ or type(batch) not in (list, tuple, dict) or len(parts) != len(batch):
        return None
    leaves: Leaves = {}
    for key, before in parts.items() if kind == "dict" else enumerate(parts):
        part = batch.get(key) if kind == "dict" else batch[key]
        if type(part) is not Tensor or "leaf" not in before or not part.ndim or len(part) != size:
            return None
        if part.layout != torch.strided or part.is_nested:
            return None
        leaves[before["leaf"]] = part.detach()
    return leaves


_KNOWN: ContextVar[tuple[tuple[Any, TakenApart], ...]] = ContextVar("batches that are put together", default=())


@contextmanager
def put_together(batch: Any) -> Iterator[Any]:
    """The batch, put together where it is ``TakenApart``; in here ``flatten`` knows what it is made of."""
    if not isinstance(batch, TakenApart):
        yield batch
        return
    whole = unflatten(batch.structure, batch.leaves)
    before = _KNOWN.set((*_KNOWN.get(), (whole, batch)))
    try:
        yield whole
    finally:
        _KNOWN.reset(before)


class _Taking:
    """Takes apart a batch of ``size`` samples."""

    def __init__(self, size: int) -> None:
        self.size = size
        self.leaves: Leaves = {}
        self.has_rows = False

    def part(self, part: Any, name: str, like: Structure | None) -> Structure:
        """One part of the batch."""
        kind, old = kind_of(like) if like else ("", None)
        if isinstance(part, Tensor):
            return self._tensor(part, name or "batch", kind)
        if isinstance(part, np.ndarray):
            inner = kind_of(old)[0] if kind == "numpy" and old else ""
            return {"numpy": self._tensor(_tensor_of(part, name), name or "batch", inner)}
        if part is None or isinstance(part, Withheld):
            return {"constant": part}
        if isinstance(part, np.generic):
            part = part.item()
        if graphs.is_batch(part):
            return self._graphs(part, name)
        if isinstance(part, PLAIN):
            self.leaves.update(encoded(name + FACT, [json.dumps(part)] * self.size))
            return {"fact": name + FACT}
        if type(part).__name__ == "PackedSequence":
            raise RunError(
                f"A batch holds{_at(name)} a PackedSequence, whose rows are no samples: pad it, and pack it in training_step."
            )
        if isinstance(part, (list, tuple)) and not hasattr(part, "_fields"):
            return self._listed(part, name, kind, old)
        before = parts_of(kind, old) or {}
        if isinstance(part, Mapping):
            for key in part:
                if not isinstance(key, str):
                    raise RunError(f"A batch has the key {key!r}; use strings as the keys of a dict batch.")
            plain = isinstance(part, dict) and not hasattr(type(part), "__getattr__")
            return {"dict" if plain else "mapping": self._parts(part, name, before)}
        if isinstance(part, tuple):
            fields = dict(zip(part._fields, part, strict=True))  # type: ignore[attr-defined]
            return {"named": {"class": _class(part), "fields": self._parts(fields, name, before)}}
        if dataclasses.is_dataclass(part) and not isinstance(part, type):
            fields = {field.name: getattr(part, field.name) for field in dataclasses.fields(part) if hasattr(part, field.name)}
            return {"dataclass": {"class": _class(part), "fields": self._parts(fields, name, before)}}
        graphs.refuse_others(part, _at(name))
        raise RunError(f"A batch holds{_at(name)} a {type(part).__name__}, which cannot be recorded; {REMEDY}.")

    def _parts(self, parts: Mapping[str, Any], name: str, before: Mapping[str, Structure]) -> dict[str, Structure]:
        inner = f"{name}/" if name else ""
        return {key: self.part(value, inner + key, before.get(key)) for key, value in parts.items()}

    def _graphs(self, batch: Any, name: str) -> Structure:
        kind, values = graphs.taken_apart(batch, _at(name))
        self.has_rows, inner = True, f"{name}/" if name else ""
        fields: dict[str, Structure] = {}
        for key, of_each in values.items():
            first = of_each[0]
            dim = graphs.dimension(batch, key, first) if isinstance(first, Tensor) else None
            if dim is not None:
                self.leaves.update(graphs.ragged(inner + key + ROWS, of_each, dim))
                fields[key] = {"joined": [inner + key + ROWS, dim]}
            elif isinstance(first, Tensor):
                fields[key] = self._tensor(graphs.stacked(inner + key, of_each), inner + key, "leaf")
            else:
                fields[key] = self._listed(of_each, inner + key, "", None)
                if not fields[key].keys() & {"texts", "objects"}:
                    raise RunError(
                        f"The graphs of a batch hold under {inner + key!r} what is no tensor, text or number: leave it out."
                    )
        return {"graphs": {"class": _class_of(kind), "fields": fields}}

    def _tensor(self, tensor: Tensor, name: str, kind: str) -> Structure:
        if name.endswith(RESERVED):
            raise RunError(f"A batch has the key {name!r}, whose end has a meaning here: give it another name.")
        if tensor.layout != torch.strided or tensor.is_nested:
            what = "nested" if tensor.is_nested else f"sparse ({tensor.layout})"
            raise RunError(
                f"A batch holds{_at(name)} a tensor that is {what}, whose samples are no rows: make it dense in the collate_fn."
            )
        tensor = tensor.detach()
        if not tensor.ndim:
            self.leaves[name + SINGLE] = tensor.expand(self.size)
            return {"single": name + SINGLE}
        if len(tensor) == self.size and kind != "shared":
            self.leaves[name], self.has_rows = tensor, True
            return {"leaf": name}
        if self.size > 1 and kind != "shared" and tensor.ndim > 1 and tensor.shape[1] == self.size:
            raise RunError(
                f"The tensor {name!r} of a batch of {self.size} samples has the shape {tuple(tensor.shape)}, whose second "
                "dimension counts them and not the first: transpose it in the collate_fn (batch_first=True)."
            )
        if self.size > 1 and kind != "shared" and len(tensor) % self.size == 0 and len(tensor):
            raise RunError(
                f"The tensor {name!r} of a batch of {self.size} samples has {len(tensor)} rows, so that it cannot be told "
                f"which are whose: give it the shape ({self.size}, {len(tensor) // self.size}, ...) in the collate_fn."
            )
        self.leaves[name + SHARED] = tensor.expand(self.size, *tensor.shape)
        return {"shared": name + SHARED}

    def _listed(self, part: Any, name: str, kind: str, old: Any) -> Structure:
        wrapped = kind == "tuple-of"
        kind, old = kind_of(old) if wrapped else (kind, old)
        alike = len(part) == self.size and bool(part) and kind not in ("list", "tuple")
        found: Structure | None = None
        if alike and all(isinstance(entry, str) for entry in part) and kind != "objects":
            self.leaves.update(encoded(name + TEXT, part))
            found = {"texts": name + TEXT}
        elif alike and (_is_json(part) and not all(isinstance(entry, Tensor) for entry in part)):
            self.leaves.update(encoded(name + JSON, [json.dumps(entry) for entry in part]))
            found = {"objects": name + JSON}
        if found is not None:
            return {"tuple-of": found} if isinstance(part, tuple) else found
        before = parts_of(kind, old) or {}
        parts = list(self._parts({str(i): entry for i, entry in enumerate(part)}, name, before).values())
        if alike and self.size > 1 and parts and all(kind_of(entry)[0] == "shared" for entry in parts):
            raise RunError(
                f"A batch holds{_at(name)} a list of {len(part)} tensors, one a sample, of which none has a row a sample: "
                "stack them in the collate_fn, filled up to one shape where they differ."
            )
        return {"tuple" if isinstance(part, tuple) else "list": parts}


def _size(batch: Any) -> int:
    """The number of rows that most of the tensors of a batch have; of its lists, where it has none.

    Raises:
        RunError: there is none, or as many have another.
    """
    sizes = dict(_sizes(batch, ""))
    if not sizes:
        raise RunError("A batch holds no tensor; let the loader's collate_fn return tensors.")
    (size, votes), *others = Counter(sizes.values()).most_common()
    if others and others[0][1] == votes:
        raise RunError(disagreement(sizes))
    return size


def _sizes(part: Any, name: str) -> Iterator[tuple[str, int]]:
    if graphs.is_batch(part):
        yield name or "batch", part.num_graphs
        return
    graphs.refuse_others(part, _at(name))
    if isinstance(part, (Tensor, np.ndarray)):
        if part.ndim:
            yield name or "batch", len(part)
        return
    if dataclasses.is_dataclass(part) and not isinstance(part, (type, Mapping)):
        part = {field.name: getattr(part, field.name, None) for field in dataclasses.fields(part)}
    if isinstance(part, (list, tuple)) and not isinstance(part, Withheld):
        part = {str(i): entry for i, entry in enumerate(part)}
    if isinstance(part, Mapping):
        for key, value in part.items():
            yield from _sizes(value, f"{name}/{key}" if name else str(key))


def _tensor_of(array: np.ndarray, name: str) -> Tensor:
    try:
        return torch.from_numpy(np.ascontiguousarray(array) if array.ndim else array.copy())
    except TypeError:
        raise RunError(f"A batch holds{_at(name)} a NumPy array of {array.dtype}, which is no tensor: {REMEDY}.") from None


def _is_json(part: Any) -> bool:
    """Whether JSON gives back what it is made of."""
    if isinstance(part, (list, tuple)):
        return all(
            isinstance(entry, PLAIN) or entry is None or (type(entry) in (list, dict) and _is_json(entry)) for entry in part
        )
    return isinstance(part, dict) and all(isinstance(key, str) for key in part) and _is_json(list(part.values()))


def _class(part: Any) -> str:
    return _class_of(type(part))


def _class_of(kind: type[Any]) -> str:
    return f"{kind.__module__}:{kind.__qualname__}"


def _at(name: str) -> str:
    return f" under {name!r}" if name else ""
