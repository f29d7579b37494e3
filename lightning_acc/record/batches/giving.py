"""A batch put together again from its structure and its leaves, as the module was given it.

Nothing is imported for it and no code of a class is run: a named tuple or a dataclass is of its own class where that is
imported already, and else something with the same fields. Graphs are the one exception: torch_geometric, where it is imported,
joins them by the code of their class, which must be a kind of its ``Data`` and be imported already.
"""

from __future__ import annotations

import collections
import functools
import inspect
import json
import sys
import types
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from lightning_acc.record.batches import graphs
from lightning_acc.record.batches.leaves import decoded
from lightning_acc.record.batches.structure import TENSORS, WORDS, Structure, kind_of


class Entries(dict[str, Any]):
    """A dict whose entries are attributes too, as those of a Hugging Face ``BatchEncoding`` are."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(name) from None

    def to(self, *_: Any, **__: Any) -> Entries:
        """Itself: its tensors are where they are computed with."""
        return self


class Withheld(list[Any]):
    """A list that cannot be given back, as many samples are computed with at once; whoever looks into it is told so."""

    def _refuse(self, *_: Any, **__: Any) -> Any:
        raise RuntimeError("what is no tensor cannot be read while many samples are computed with at once")

    __len__ = __iter__ = __getitem__ = __contains__ = __reversed__ = __eq__ = __add__ = __repr__ = __str__ = _refuse
    __hash__ = None


@dataclass(frozen=True)
class TakenApart:
    """A batch that is taken apart."""

    leaves: Mapping[str, Any]
    structure: Structure


def unflatten(structure: Structure, leaves: Mapping[str, Any]) -> Any:
    """Put a batch together from its structure and its leaves."""
    kind, content = kind_of(structure)
    if kind in TENSORS:
        return leaves[content] if kind == "leaf" else leaves[content][0]
    if kind in WORDS:
        return _words(kind, content, leaves)
    if kind == "constant":
        return content
    if kind == "numpy":
        return unflatten(content, leaves).detach().cpu().numpy()
    if kind == "tuple-of":
        found = unflatten(content, leaves)
        return found if isinstance(found, Withheld) else tuple(found)
    if kind == "joined":
        return graphs.rows(content[0], content[1], leaves)
    if kind == "graphs":
        fields = {name: unflatten(part, leaves) for name, part in content["fields"].items()}
        return graphs.joined(_imported(content["class"], graphs.is_kind), fields)
    if kind in ("named", "dataclass"):
        make = _named_tuple if kind == "named" else _dataclass
        return make(content["class"], {name: unflatten(part, leaves) for name, part in content["fields"].items()})
    if kind in ("dict", "mapping"):
        parts = {key: unflatten(value, leaves) for key, value in content.items()}
        return Entries(parts) if kind == "mapping" else parts
    listed = [unflatten(value, leaves) for value in content]
    return tuple(listed) if kind == "tuple" else listed


def _words(kind: str, name: str, leaves: Mapping[str, Any]) -> Any:
    if kind == "fact":
        return json.loads(decoded(name, leaves)[0])
    try:
        found = decoded(name, leaves)
    except RuntimeError:
        return Withheld()
    return found if kind == "texts" else list(map(json.loads, found))


def _named_tuple(words: str, fields: dict[str, Any]) -> Any:
    found = _imported(words, lambda kind: issubclass(kind, tuple) and _own(kind, "_fields") == tuple(fields))
    return tuple.__new__(found or _like(words.rpartition(".")[2].rpartition(":")[2], tuple(fields)), fields.values())


@functools.cache
def _like(name: str, fields: Sequence[str]) -> type[Any]:
    return collections.namedtuple(name if name.isidentifier() else "Batch", fields, rename=True)


def _dataclass(words: str, fields: dict[str, Any]) -> Any:
    def fits(kind: type[Any]) -> bool:
        known = set(_own(kind, "__dataclass_fields__") or ())
        return set(fields) <= known and not any(_has_a_setter(kind, name) for name in fields)

    found = _imported(words, fits)
    if found is None:
        return types.SimpleNamespace(**fields)
    made = object.__new__(found)
    for name, value in fields.items():
        object.__setattr__(made, name, value)  # also of one that is frozen
    return made


def _own(kind: type[Any], name: str) -> Any:
    return type.__getattribute__(kind, "__dict__").get(name)


def _imported(words: str, fits: Callable[[type[Any]], bool]) -> type[Any] | None:
    """The class that is meant, where this process has imported it and it is of the kind that is wanted."""
    place, _, name = words.partition(":")
    found: Any = sys.modules.get(place)
    for part in name.split("."):
        found = inspect.getattr_static(found, part, None)
    return found if issubclass(type(found), type) and fits(found) and not _has_a_finalizer(found) else None


def _has_a_finalizer(kind: type[Any]) -> bool:
    return any("__del__" in type.__getattribute__(base, "__dict__") for base in type.__getattribute__(kind, "__mro__"))


def _has_a_setter(kind: type[Any], name: str) -> bool:
    """Whether setting an attribute runs code of the class; that of a slot is Python's own."""
    found = inspect.getattr_static(kind, name, None)
    return hasattr(type(found), "__set__") and not isinstance(found, types.MemberDescriptorType)
