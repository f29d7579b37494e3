"""A batch taken apart into named tensors (``taking``) and put together again (``giving``).

Its *leaves* are a flat dict from a name such as ``"0"`` or ``"tokens/ids"`` to a tensor whose first dimension counts the
samples (``leaves``); its *structure* is plain JSON that says what they make up (``structure``).
"""

from lightning_acc.record.batches.giving import TakenApart, unflatten
from lightning_acc.record.batches.leaves import (
    LENGTH,
    Leaves,
    batch_size,
    cast,
    digests,
    has_rows,
    in_dims,
    is_joined,
    is_of_samples,
    is_ragged,
    is_words,
    packed,
    packed_pieces,
    packed_rows,
    packed_signature,
    readable,
    row,
    row_bytes,
    row_signature,
    rows,
    said_of_batch,
    shared,
    signature,
    stacked,
    unmapped,
    unpacked,
)
from lightning_acc.record.batches.structure import Structure, first_difference, leaf_names
from lightning_acc.record.batches.taking import flatten, put_together

__all__ = [
    "LENGTH",
    "Leaves",
    "Structure",
    "TakenApart",
    "batch_size",
    "cast",
    "digests",
    "first_difference",
    "flatten",
    "has_rows",
    "in_dims",
    "is_joined",
    "is_of_samples",
    "is_ragged",
    "is_words",
    "leaf_names",
    "packed",
    "packed_pieces",
    "packed_rows",
    "packed_signature",
    "put_together",
    "readable",
    "row",
    "row_bytes",
    "row_signature",
    "rows",
    "said_of_batch",
    "shared",
    "signature",
    "stacked",
    "unflatten",
    "unmapped",
    "unpacked",
]
