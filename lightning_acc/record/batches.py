"""A batch taken apart into named tensors and put together again.

A batch is a tensor, or tuples, lists and dicts of tensors whose first dimension counts the samples. Its *structure* is
plain JSON; its *leaves* are a flat dict from a name such as ``"0"`` or ``"tokens/ids"`` to the tensor.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_acc.errors import RunError

Structure = dict[str, Any]
Leaves = dict[str, Tensor]


def flatten(batch: Any) -> tuple[Leaves, Structure]:
    """Take a batch apart; ``unflatten`` is the inverse.

    Raises:
        RunError: the batch holds something other than tensors, and constants, in tuples, lists and dicts.
    """
    leaves: Leaves = {}
    return leaves, _flatten(batch, "", leaves)


def _flatten(part: Any, name: str, leaves: Leaves) -> Structure:
    if isinstance(part, Tensor):
        name = name or "batch"
        leaves[name] = part
        return {"leaf": name}
    inner = f"{name}/" if name else ""
    if isinstance(part, Mapping):
        for key in part:
            if not isinstance(key, str):
                raise RunError(f"A batch has the key {key!r}; use strings as the keys of a dict batch.")
        return {"dict": {key: _flatten(value, inner + key, leaves) for key, value in part.items()}}
    if isinstance(part, (tuple, list)) and not hasattr(part, "_fields"):
        if any(isinstance(value, str) for value in part):
            raise RunError(
                f"A batch holds strings{f' under {name!r}' if name else ''}, which are not recorded: let the data set or the "
                "collate_fn turn them into tensors (token ids), or leave them out (for Hugging Face datasets: "
                "dataset.remove_columns, or set_format('torch', columns=[...]))."
            )
        kind = "tuple" if isinstance(part, tuple) else "list"
        return {kind: [_flatten(value, f"{inner}{i}", leaves) for i, value in enumerate(part)]}
    if part is None or isinstance(part, (bool, int, float, str)):
        return {"constant": part}
    raise RunError(
        f"A batch holds {name or 'at its top'} a {type(part).__name__}, which cannot be recorded; "
        "let the loader's collate_fn return tensors in tuples, lists or dicts."
    )


def first_difference(before: Structure, now: Structure, name: str = "") -> str:
    """In words, where two structures that are not equal begin to differ."""
    (kind, old), *_ = before.items()
    (other, new), *_ = now.items()
    place = f"{name!r}" if name else "it"
    if kind != other:
        return f"{place} is a {other} and not a {kind}"
    if kind == "constant":
        return f"{place} is {new!r} and not {old!r}, but what differs from batch to batch must be a tensor with a row a sample"
    keys = (sorted(old), sorted(new)) if kind == "dict" else (range(len(old)), range(len(new)))
    if keys[0] != keys[1]:
        return f"{place} holds {', '.join(map(str, keys[1]))} and not {', '.join(map(str, keys[0]))}"
    differing = next(key for key in keys[0] if old[key] != new[key])
    return first_difference(old[differing], new[differing], f"{name}/{differing}" if name else str(differing))


def unflatten(structure: Structure, leaves: Mapping[str, Any]) -> Any:
    """Put a batch together from its structure and its leaves."""
    (kind, content), *_ = structure.items()
    if kind == "leaf":
        return leaves[content]
    if kind == "dict":
        return {key: unflatten(value, leaves) for key, value in content.items()}
    if kind == "constant":
        return content
    parts = [unflatten(value, leaves) for value in content]
    return tuple(parts) if kind == "tuple" else parts


def leaf_names(structure: Any) -> list[str]:
    """The names of the leaves of a structure.

    Raises:
        ValueError: it is none.
    """
    if not isinstance(structure, dict) or len(structure) != 1:
        raise ValueError("no structure of a batch")
    ((kind, content),) = structure.items()
    if kind == "leaf" and isinstance(content, str):
        return [content]
    if kind == "constant" and (content is None or isinstance(content, (bool, int, float, str))):
        return []
    if (kind == "dict" and isinstance(content, dict)) or (kind in ("tuple", "list") and isinstance(content, list)):
        parts = content.values() if isinstance(content, dict) else content
        return [name for part in parts for name in leaf_names(part)]
    raise ValueError("no structure of a batch")


def batch_size(leaves: Leaves) -> int:
    """The number of samples: the common first dimension of all leaves.

    Raises:
        RunError: there is no tensor, or the first dimensions differ.
    """
    sizes = {name: (leaf.shape[0] if leaf.ndim else 0) for name, leaf in leaves.items()}
    if not sizes:
        raise RunError("A batch holds no tensor; let the loader's collate_fn return tensors.")
    if len(set(sizes.values())) > 1:
        raise RunError(
            "The tensors of a batch disagree on the number of samples: "
            + ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
            + ". The first dimension of every tensor must count the samples of the batch."
        )
    return next(iter(sizes.values()))


def rows(leaves: Leaves, index: Tensor) -> Leaves:
    """The samples at ``index``, whose shape replaces the first dimension of every leaf."""
    return {name: leaf[index] for name, leaf in leaves.items()}


def cast(leaves: Leaves, dtype: torch.dtype) -> Leaves:
    """Floating-point leaves in ``dtype``; others as they are."""
    return {name: leaf.to(dtype) if leaf.is_floating_point() else leaf for name, leaf in leaves.items()}


def signature(leaves: Leaves) -> tuple[Any, ...]:
    """Names, dtypes and shapes of the rows of leaves: contents that are alike in it can be stored in one file."""
    return tuple((name, leaves[name].dtype, tuple(leaves[name].shape[1:])) for name in sorted(leaves))


def row_bytes(leaf: Tensor) -> NDArray[np.uint8]:
    """The bytes of each row of a contiguous leaf, (B, bytes), without a copy."""
    return np.asarray(leaf.reshape(len(leaf), -1).view(torch.uint8).numpy())


def digests(leaves: Leaves) -> list[bytes]:
    """A hash of the content of each row of contiguous leaves."""
    start = hashlib.sha256(repr(signature(leaves)).encode())
    buffers = [row_bytes(leaves[name]) for name in sorted(leaves) if leaves[name].numel()]
    found = []
    for row in range(len(next(iter(leaves.values())))):
        hasher = start.copy()
        for buffer in buffers:
            hasher.update(buffer[row])
        found.append(hasher.digest())
    return found
