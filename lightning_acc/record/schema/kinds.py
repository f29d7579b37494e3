"""Kinds of values a record is made of, each with the words for it."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from lightning_acc.arguments import shown
from lightning_acc.record.batches import leaf_names

LARGEST = 1e300
"""What a hyper-parameter may be."""
_UNSHOWN = re.compile(r"[\x00-\x1f\x7f\ud800-\udfff]")
"""Characters that no terminal or file can show."""


@dataclass(frozen=True)
class Kind:
    """What a value has to be.

    Attributes:
        words: for the reader.
        holds: whether a value is.
    """

    words: str
    holds: Callable[[Any], bool]

    def or_none(self) -> Kind:
        """The same, or null."""
        return Kind(f"{self.words} or null", lambda value: value is None or self.holds(value))


def whole(low: int, high: int) -> Kind:
    """Whole numbers, which truth values are not."""
    return Kind(f"a whole number from {low:,} to {high:,}", lambda value: type(value) is int and low <= value <= high)


def among(*words: str) -> Kind:
    """One of these words."""
    return Kind(f"one of {', '.join(words)}", lambda value: isinstance(value, str) and value in words)


def several(kind: Kind) -> Kind:
    """Lists of such values."""
    return Kind(f"a list, each {kind.words}", lambda value: isinstance(value, list) and all(map(kind.holds, value)))


def named(kind: Kind) -> Kind:
    """Mappings of texts to such values."""
    return Kind(
        f"a mapping of texts, each to {kind.words}",
        lambda value: isinstance(value, dict) and all(map(_is_text, value)) and all(map(kind.holds, value.values())),
    )


def _is_text(value: Any) -> bool:
    return isinstance(value, str) and _UNSHOWN.search(value) is None


def _is_number(value: Any) -> bool:
    return type(value) in (int, float) and -LARGEST <= value <= LARGEST  # which NaN is not


def _is_shape(value: Any) -> bool:
    sizes = whole(0, 2**31)
    return (
        isinstance(value, list)
        and len(value) == 2
        and _is_text(value[0])
        and several(sizes).holds(value[1])
        and len(value[1]) <= 64
    )


def _is_structure(value: Any) -> bool:
    try:
        names = leaf_names(value)
    except (ValueError, RecursionError):
        return False
    return 0 < len(names) == len(set(names))


def _is_plain(value: Any) -> bool:
    if isinstance(value, (list, dict)):
        return all(map(_is_plain, value.values() if isinstance(value, dict) else value))
    return value is None or isinstance(value, (bool, str)) or _is_number(value)


TEXT = Kind("a text of one line", _is_text)
FLAG = Kind("true or false", lambda value: isinstance(value, bool))
LIMIT = Kind("a number", lambda value: _is_number(value) or value == float("inf"))
POSITIVE = Kind("a positive number", lambda value: _is_number(value) and value > 0)
MAPPING = Kind("a mapping", lambda value: isinstance(value, dict))
SHAPE = Kind("a name and a list of sizes", _is_shape)
STRUCTURE = Kind("the structure of a batch", _is_structure)
PLAIN = Kind("null, truth values, texts and finite numbers, or lists and mappings of them", _is_plain)
HASH = Kind("a SHA-256", lambda value: isinstance(value, str) and re.fullmatch(r"[0-9a-f]{64}", value) is not None)
_MISSING = object()


def first_fault(content: Mapping[str, Any], kinds: Mapping[str, Kind], optional: bool = False) -> str | None:
    """The first of the dotted keys of ``content`` whose value is missing, unless ``optional``, or of another kind, in words."""
    for key, kind in kinds.items():
        value: Any = content
        for word in key.split("."):
            value = value.get(word, _MISSING) if isinstance(value, dict) else _MISSING
        if value is _MISSING and not optional:
            return f"it does not say {key}"
        if value is not _MISSING and not kind.holds(value):
            return f"its {key} is {shown(value)} and not {kind.words}"
    return None
