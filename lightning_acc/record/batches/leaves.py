"""The leaves of batches: tensors by name, whose first dimension counts the samples.

What is no tensor of one shape for all samples is one here all the same, told by the end of its name. A *ragged* leaf holds
rows of different lengths, such as the bytes of a text or the nodes of a graph: (B, longest, ...), filled up with zeros, and
beside it, under its name and ``#length``, the lengths (B,). A *shared* leaf is one tensor that belongs to no sample: (B, ...),
the same in every row, of which the memory is that of one.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from lightning_acc.errors import RunError

Leaves = dict[str, Tensor]

TEXT, JSON, FACT = "#text", "#json", "#fact"
"""Ends of the names of ragged leaves: texts; other things, as JSON; what is said once of a whole batch, as JSON."""
SHARED = "#shared"
SINGLE = "#single"
"""End of the names of single numbers that are said of a whole batch; each row holds them."""
LENGTH = "#length"
ROWS = "#rows"
"""End of the names of ragged leaves of tensors: nodes and edges of graphs."""
READ = (TEXT, JSON, FACT)
"""Ends of ragged leaves that Python reads."""
RAGGED = (*READ, ROWS)
RESERVED = (*RAGGED, SHARED, SINGLE, LENGTH)
OF_BATCHES = (SINGLE, FACT, FACT + LENGTH)


def batch_size(leaves: Mapping[str, Tensor]) -> int:
    """The number of samples: the common first dimension of all leaves.

    Raises:
        RunError: there is no tensor, or the first dimensions differ.
    """
    sizes = {name: (leaf.shape[0] if leaf.ndim else 0) for name, leaf in leaves.items()}
    if not sizes:
        raise RunError("A batch holds no tensor; let the loader's collate_fn return tensors.")
    if len(set(sizes.values())) > 1:
        raise RunError(disagreement(sizes))
    return next(iter(sizes.values()))


def disagreement(sizes: Mapping[str, int]) -> str:
    """In words, that tensors do not have as many rows as each other."""
    return (
        "The tensors of a batch disagree on the number of samples: "
        + ", ".join(f"{name!r} has {size}" for name, size in sizes.items())
        + ". The first dimension of every tensor must count the samples of the batch."
    )


def rows(leaves: Leaves, index: Tensor) -> Leaves:
    """The samples at ``index``, whose shape replaces the first dimension of every leaf."""
    return {
        name: leaf[0].expand(*index.shape, *leaf.shape[1:]) if name.endswith(SHARED) else leaf[index]
        for name, leaf in leaves.items()
    }


def row(leaves: Leaves, number: int) -> Leaves:
    """One sample, without the dimension that counts them and without what fills up its ragged leaves."""
    found = {name: leaf[number] for name, leaf in leaves.items()}
    return {name: leaf[: int(found[name + LENGTH])] if name.endswith(RAGGED) else leaf for name, leaf in found.items()}


def stacked(samples: Sequence[Leaves]) -> Leaves:
    """Single samples, as of ``row``, as a batch; the inverse of ``row``."""
    return unpacked(packed_rows(samples))


def cast(leaves: Leaves, dtype: torch.dtype, device: torch.device | None = None) -> Leaves:
    """Floating-point leaves in ``dtype``, others as they are; all but what Python reads, words and lengths, on ``device``."""
    found = {}
    for name, leaf in leaves.items():
        kind = dtype if leaf.is_floating_point() else leaf.dtype
        read = name.endswith((*READ, LENGTH))
        place = leaf.device if device is None or read else device
        if name.endswith(SHARED):
            found[name] = leaf[:1].to(place, kind).expand_as(leaf)
        else:
            found[name] = leaf.to(place, kind)
    return found


def shared(leaves: Leaves) -> Leaves:
    """The tensors that belong to no sample, each as it is, by the names of their leaves."""
    return {name: leaf[0] for name, leaf in leaves.items() if name.endswith(SHARED)}


def in_dims(leaves: Leaves) -> dict[str, int | None]:
    """For ``torch.vmap`` over the samples: what belongs to no single one is not mapped over, and can so be read by Python."""
    return {name: 0 if is_of_samples(name) else None for name in leaves}


def unmapped(leaves: Leaves) -> Leaves:
    """The leaves to map over by ``in_dims``."""
    dims = in_dims(leaves)
    return {name: leaf if dims[name] == 0 else leaf[0] for name, leaf in leaves.items()}


def signature(leaves: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """Names, dtypes and shapes of the rows of leaves: contents that are alike in it can be stored in one file."""
    return tuple(
        (name, leaves[name].dtype, tuple(leaves[name].shape[2 if name.endswith(RAGGED) else 1 :]))
        for name in sorted(leaves)
        if not name.endswith(SHARED)
    )


def packed_signature(tensors: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The ``signature`` of leaves that are stored as these tensors."""
    return tuple((name, tensors[name].dtype, tuple(tensors[name].shape[1:])) for name in sorted(tensors))


def row_signature(sample: Mapping[str, Tensor]) -> tuple[Any, ...]:
    """The same of a single sample, as of ``row``."""
    return signature({name: leaf[None] for name, leaf in sample.items()})


def is_ragged(name: str) -> bool:
    """Whether a leaf of this name has rows of different lengths."""
    return name.endswith(RAGGED)


def is_joined(name: str) -> bool:
    """Whether a leaf of this name holds the nodes or edges of graphs."""
    return name.endswith(ROWS)


def is_words(name: str) -> bool:
    """Whether a leaf of this name holds the bytes of words, which Python reads."""
    return name.endswith(READ)


def has_rows(name: str) -> bool:
    """Whether a leaf of this name has a row of its own for each sample."""
    return not name.endswith(SHARED)


def is_of_samples(name: str) -> bool:
    """Whether a leaf of this name says something of single samples, and not of their batch."""
    return not name.endswith((SHARED, *OF_BATCHES))


def said_of_batch(sample: Mapping[str, Tensor]) -> dict[str, bytes]:
    """What is said of the whole batch that a single sample, as of ``row``, was in, by the names of the leaves."""
    return {name: leaf.contiguous().numpy().tobytes() for name, leaf in sample.items() if name.endswith(OF_BATCHES)}


def row_bytes(leaf: Tensor) -> NDArray[np.uint8]:
    """The bytes of each row of a contiguous leaf, (B, bytes), without a copy."""
    return np.asarray(leaf.reshape(len(leaf), -1).view(torch.uint8).numpy())


def digests(leaves: Leaves) -> list[bytes]:
    """A hash of the content of each row of contiguous leaves."""
    start = hashlib.sha256(repr(signature(leaves)).encode())
    names = [name for name in sorted(leaves) if has_rows(name) and leaves[name].numel()]
    buffers: list[tuple[Any, list[int] | None]] = [(row_bytes(leaves[name]), _ends(name, leaves)) for name in names]
    found = []
    for number in range(batch_size(leaves)):
        hasher = start.copy()
        for buffer, ends in buffers:
            hasher.update(buffer[number] if ends is None else buffer[number, : ends[number]])
        found.append(hasher.digest())
    return found


def _ends(name: str, leaves: Leaves) -> list[int] | None:
    """How many bytes of each row of a ragged leaf count."""
    if not name.endswith(RAGGED):
        return None
    entry = leaves[name][0, 0].nbytes
    return [length * entry for length in leaves[name + LENGTH].tolist()]


# ---- as they are stored: ragged leaves without what fills them up, one row after the other, and shared ones once


def packed(leaves: Leaves) -> Leaves:
    """Leaves as they are stored."""
    found = {}
    for name, leaf in leaves.items():
        if name.endswith(SHARED):
            found[name] = leaf[0].contiguous()
        elif name.endswith(RAGGED):
            counts = torch.arange(leaf.shape[1]) < leaves[name + LENGTH][:, None]
            found[name] = leaf[counts]
        else:
            found[name] = leaf.contiguous()
    return found


def packed_rows(samples: Sequence[Leaves]) -> Leaves:
    """Single samples, as of ``row``, as the leaves of a batch are stored."""
    return {
        name: samples[0][name]
        if name.endswith(SHARED)
        else (torch.cat if name.endswith(RAGGED) else torch.stack)([sample[name] for sample in samples])
        for name in samples[0]
    }


def unpacked(tensors: Leaves, places: Tensor | None = None) -> Leaves:
    """The inverse of ``packed``; of the rows at ``places`` (m,) alone, where these are given."""
    if places is None:
        places = torch.arange(next(len(leaf) for name, leaf in tensors.items() if not name.endswith((*RAGGED, SHARED))))
    found = {}
    for name, leaf in tensors.items():
        if name.endswith(SHARED):
            found[name] = leaf.expand(len(places), *leaf.shape)
        elif name.endswith(RAGGED):
            lengths = tensors[name + LENGTH]
            found[name] = _filled_up(leaf, (lengths.cumsum(0) - lengths)[places], lengths[places])
        else:
            found[name] = leaf[places]
    return found


def packed_pieces(name: str, tensors: Leaves) -> list[np.ndarray]:
    """What a leaf, stored in ``tensors``, holds of each row, as bytes."""
    leaf = tensors[name]
    flat = leaf.contiguous().reshape(len(leaf), math.prod(leaf.shape[1:])).view(torch.uint8).numpy()
    if name.endswith(RAGGED):
        return np.split(flat, tensors[name + LENGTH].cumsum(0)[:-1].numpy())
    return list(flat)


def _filled_up(flat: Tensor, starts: Tensor, lengths: Tensor) -> Tensor:
    """The pieces of ``flat`` that begin at ``starts`` (m,) as rows (m, longest, ...)."""
    longest = int(lengths.max()) if len(lengths) else 0
    filled = flat.new_zeros(len(starts), longest, *flat.shape[1:])
    steps = torch.arange(longest)
    counts = steps < lengths[:, None]
    filled[counts] = flat[(starts[:, None] + steps)[counts]]
    return filled


# ---- texts


def encoded(name: str, words: Sequence[str]) -> Leaves:
    """Texts as a ragged leaf ``name``, with its lengths."""
    pieces = [
        torch.frombuffer(bytearray(b), dtype=torch.uint8) if b else torch.zeros(0, dtype=torch.uint8) for b in map(_utf8, words)
    ]
    lengths = torch.tensor([len(piece) for piece in pieces], dtype=torch.int64)
    return {name: torch.nn.utils.rnn.pad_sequence(pieces, batch_first=True), name + LENGTH: lengths}


def _utf8(text: str) -> bytes:
    return text.encode("utf-8", "surrogatepass")


def decoded(name: str, leaves: Mapping[str, Tensor]) -> list[str]:
    """The texts of a ragged leaf ``name``.

    Raises:
        RuntimeError: it is vectorised over, so that its numbers cannot be read.
    """
    lengths = leaves[name + LENGTH].tolist()
    buffers = leaves[name].numpy()
    return [bytes(buffer[:length]).decode("utf-8", "surrogatepass") for buffer, length in zip(buffers, lengths, strict=True)]


def readable(sample: Mapping[str, Tensor]) -> dict[str, Any]:
    """What a single sample, as of ``row``, is made of, for people: tensors, and what its texts say, by name."""
    found: dict[str, Any] = {}
    for name, leaf in sample.items():
        if not is_of_samples(name) or name.endswith(LENGTH):
            continue
        plain = name.rpartition("#")[0] if name.endswith(RAGGED) else name
        words = bytes(leaf.numpy()).decode("utf-8", "replace") if name.endswith(READ) else ""
        found[plain] = leaf if not name.endswith(READ) else json.loads(words) if name.endswith(JSON) else words
    return found
