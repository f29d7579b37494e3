"""How many removals fit into a memory budget at once.

The figures are measured on the run itself: the tensors autograd keeps for one forward pass over the largest batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

from lightning_acc.errors import RequestError
from lightning_acc.queries import Query
from lightning_acc.replay import Replay, saved_bytes
from lightning_acc.trajectory import batches

# Copies of (a parameter-sized vector, the activations of the batch) that one removal needs at the peak of a step.
# Measured with scripts/bench_methods.py; they are upper bounds on the models there, not exact.
COPIES = {"loo": (7, 3), "acc-sgd-ie": (9, 6), "sgd-ie": (9, 6), "tracin": (9, 1)}
LARGEST_CHUNK = 512
"""More removals at a time gain no speed; smaller chunks stay in the processor's caches."""


def bytes_per_removal(replay: Replay, method: str) -> int:
    """Bytes that one more removal in a chunk adds to the peak."""
    vectors, activations = COPIES[method]
    vector = replay.initial[0].nbytes
    return int(vectors * vector * len(replay.initial) + activations * replay.activation_bytes)


def chunk_size(replay: Replay, method: str, memory: int) -> int:
    """The number of removals to sweep at once within ``memory`` bytes.

    Raises:
        RequestError: not even one fits.
    """
    each = bytes_per_removal(replay, method)
    # LOO carries one row more, the run with nothing removed.
    fit = memory // each - (method == "loo")
    if fit < 1:
        raise RequestError(
            f"One removal of {method} needs about {2 * each / 2**30:.2f} GB on this run, more than the budget of "
            f"{memory / 2**30:.2f} GB: give memory_gb={2 * each / 2**30:.1f} or more."
        )
    return int(min(fit, LARGEST_CHUNK))


def chunks(removals: Sequence[tuple[int, ...]], size: int) -> list[list[tuple[int, ...]]]:
    """Removals in chunks of at most ``size``, as even as can be; an even number of chunks where there is work for two.

    The chunks depend on the run and the budget alone, never on how many workers there are: so do the bits of the scores.
    """
    n = len(removals)
    count = -(-n // size)
    if n >= 64:
        count += count % 2
    edges = [n * i // count for i in range(count + 1)] if count else []
    return [list(removals[a:b]) for a, b in itertools.pairwise(edges)]


def query_rows(replay: Replay, query: Query, memory: int) -> int:
    """How many parameter vectors a query may be evaluated at together."""
    leaves, structure = max(query.batches, key=lambda batch: batches.batch_size(batch[0]))
    leaves = batches.cast(leaves, replay.dtype)
    objective = replay.objective
    with objective.evaluating():
        saved = saved_bytes(lambda theta: query.batch_sum(objective, theta, leaves, structure), replay.initial[0])
    return max(1, int(memory // (2 * saved + 4 * replay.initial[0].nbytes)))
