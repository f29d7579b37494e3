"""Results are sealed as the record is: a file carries the SHA-256 of itself, and of the name it is stored under.

The record's files have their hashes in the manifest, which results have no part in. So the content of a result, JSON or the
metadata of a Parquet file, holds a blank under the key ``seal``; the hash is that of the whole file with the blank in its
place, and takes the blank's place. Both are of one length, so that the file stays what it was to every other reader.
"""

from __future__ import annotations

import json
import re
from typing import Any

from lightning_acc.errors import RunError
from lightning_acc.record.store import Store, digest

KEY = "seal"
_MARK = b"lightning_acc:sha256:"
BLANK = (_MARK + b"0" * 64).decode()
"""What a file that will be sealed holds under ``KEY``."""
_SEAL = re.compile(re.escape(_MARK) + rb"([0-9a-f]{64})")


class DamagedResult(RunError):
    """A result is not what was written, or does not belong here: it can be computed again."""


def sealed(data: bytes, name: str) -> bytes:
    """``data``, which holds ``BLANK``, as it is stored under ``name``.

    Raises:
        RunError: it holds none, or several.
    """
    if len(_SEAL.findall(data)) != 1:
        raise RunError(f"{name} cannot be sealed: among what it holds is the text {_MARK.decode()!r}, which is kept for seals.")
    return data.replace(BLANK.encode(), _MARK + _hash(data, name))


def opened(data: bytes, store: Store, name: str, remedy: str) -> bytes:
    """``data``, read from ``name``, where it is what was sealed.

    Raises:
        DamagedResult: it is not; ends with ``remedy``.
    """
    found = _SEAL.findall(data)
    if len(found) != 1 or found[0] != _hash(data.replace(_MARK + found[0], BLANK.encode()), name):
        raise damaged(store, name, remedy)
    return data


def damaged(store: Store, name: str, remedy: str) -> DamagedResult:
    """That a result is not what this version writes there."""
    cause = "is damaged, or was written by an older version or under another name"
    return DamagedResult(f"{store.locate(name)} {cause}: {remedy}.")


def to_json(content: dict[str, Any], name: str) -> bytes:
    """Plain JSON, sealed."""
    return sealed(json.dumps({KEY: BLANK, **content}, indent=1).encode(), name)


def from_json(store: Store, name: str, remedy: str) -> dict[str, Any]:
    """What ``to_json`` wrote.

    Raises:
        DamagedResult: the file holds something else.
    """
    try:
        content = parsed(opened(store.read(name), store, name, remedy))
        return {key: value for key, value in content.items() if key != KEY}
    except (ValueError, AttributeError) as error:
        raise damaged(store, name, remedy) from error


def parsed(data: bytes | str) -> Any:
    """JSON.

    Raises:
        ValueError: it is none, or nested without end.
    """
    try:
        return json.loads(data)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error


def _hash(data: bytes, name: str) -> bytes:
    return digest(name.encode() + b"\0" + data).encode()
