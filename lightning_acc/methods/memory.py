"""How many removals fit into a memory budget at once, and what a piece of work adds to a process at its peak, in bytes.

The figures are measured on the run itself: the tensors autograd keeps for one forward pass over the largest batch.
"""

from __future__ import annotations

import bisect
import itertools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TypeVar

from lightning_acc.core import tape
from lightning_acc.core.losses.tracing import saved_bytes
from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.record import batches

T = TypeVar("T")

LARGEST_CHUNK = 512
"""More removals at a time gain no speed; smaller chunks stay in the processor's caches."""
MOST_IN_TURN = 16
"""Of those that are taken one after another: the training that they share is little beside so many, and no more is lost with a
worker that dies."""


@dataclass(frozen=True)
class Copies:
    """What removals need at the peak of a step; upper bounds, measured with scripts/bench_methods.py, not exact.

    Attributes:
        vectors: parameter-sized vectors for each state that is worked on together with others.
        activations: copies of what autograd keeps for the batch, for each of these.
        tangents: further such vectors, for each tensor of the state.
        beside: states that a chunk carries beside those of its removals.
        in_turn: whether a removal is taken to the last step before the next one is, so that its parameters there are all that
            is held of it.
    """

    vectors: int
    activations: int
    tangents: int = 0
    beside: int = 0
    in_turn: bool = False

    def step(self, replay: Replay) -> int:
        """Bytes for each state that is worked on."""
        vectors = self.vectors + self.tangents * len(replay.initial)
        return int(vectors * replay.initial[0].nbytes + self.activations * replay.activation_bytes)

    def carried(self, replay: Replay, removals: int, kept: int = 0) -> int:
        """Bytes that a chunk holds from step to step and, at the steps asked about, for its shifts, of which ``kept`` stay."""
        vector, state = replay.initial[0].nbytes, len(replay.initial)
        if self.in_turn:
            return int((removals * (1 + kept) + (1 + self.beside) * state) * vector)
        return int((removals + self.beside) * (state + 2 + kept) * vector)

    def chunk(self, replay: Replay, removals: int, kept: int = 0) -> int:
        """Bytes of a chunk at the peak of a step."""
        together = 1 if self.in_turn else min(removals + self.beside, replay.states_at_once)
        return self.carried(replay, removals, kept) + together * self.step(replay)


TRAINING = Copies(4, 3, beside=1)
"""A training among others, beside which the undisturbed one goes along."""
IN_TURN = Copies(4, 3, beside=1, in_turn=True)
"""One training after another, from where the undisturbed one is."""


def chunk_size(replay: Replay, name: str, copies: Copies, memory: int, kept: int = 0) -> int:
    """The number of removals for the method ``name`` to sweep at once within ``memory`` bytes, ``kept`` shifts of each being
    kept.

    Raises:
        RequestError: not even one fits.
    """
    needed = copies.chunk(replay, 1, kept)
    if needed > memory:
        raise RequestError(
            f"One removal of {name} needs about {needed / 2**30:.2f} GB on this run, more than the budget of "
            f"{memory / 2**30:.2f} GB: give memory_gb={1.1 * needed / 2**30:.2g} or more."
        )
    most = MOST_IN_TURN if copies.in_turn else LARGEST_CHUNK
    return bisect.bisect_right(range(most), memory, lo=1, key=lambda n: copies.chunk(replay, n + 1, kept))


def chunks(removals: Sequence[Removal], size: int) -> list[list[Removal]]:
    """Removals in chunks of at most ``size``, as even as can be; an even number of chunks where there is work for two.

    The chunks depend on the run and the budget alone, never on how many workers there are: so do the bits of the scores.
    """
    return even_pieces(removals, size, for_two=len(removals) >= 64)


def even_pieces(removals: Sequence[T], size: int, for_two: bool = False) -> list[list[T]]:
    """Removals, or what else, in pieces of at most ``size``, as even as can be; with ``for_two`` an even number of them."""
    n = len(removals)
    count = -(-n // size)
    if for_two:
        count += count % 2
    return [list(removals[part.start : part.stop]) for part in evenly(n, count)]


def evenly(n: int, count: int) -> list[range]:
    """0 to n - 1 in so many parts, as even as can be."""
    edges = [n * i // count for i in range(count + 1)] if count else []
    return list(itertools.starmap(range, itertools.pairwise(edges)))


def adjoints_at_once(replay: Replay, name: str, memory: int) -> int:
    """The number of examples whose adjoints the method ``name`` takes back together, half of ``memory`` being the tape's.

    Raises:
        RequestError: not even one fits.
    """
    each = example_bytes(replay)
    if memory < each:
        raise RequestError(
            f"One example of {name} needs about {each / 2**30:.2f} GB on this run, more than the budget of "
            f"{memory / 2**30:.2f} GB: give memory_gb={1.1 * each / 2**30:.1f} or more."
        )
    return int(min(memory // each, LARGEST_CHUNK // 2))


def example_bytes(replay: Replay) -> int:
    """Bytes for each example whose adjoint goes back: its adjoint and its scores; at a step the new adjoint, gamma and what
    autograd makes on the way; and as much for the tape."""
    vector, parts = replay.initial[0].nbytes, len(replay.initial)
    return 2 * ((4 * parts + 3) * vector + 2 * replay.run.n_samples * replay.initial[0].element_size())


def query_rows(replay: Replay, query: Query, memory: int) -> int:
    """How many parameter vectors a query may be evaluated at together."""
    fit = int(memory // (2 * _query_saved(replay, query) + 4 * replay.initial[0].nbytes))
    return max(1, min(fit, replay.states_at_once))


def _query_saved(replay: Replay, query: Query, without_data: bool = False) -> int:
    """Bytes autograd would keep for the largest batch of the query, with or without the batch itself."""
    leaves, structure = max(query.batches, key=lambda batch: batches.batch_size(batch[0]))
    leaves = batches.cast(leaves, replay.dtype, replay.device)
    objective = replay.objective
    shared = [*objective.tensors(), *leaves.values()] if without_data else []
    with query.reading(objective):
        return saved_bytes(lambda theta: query.batch_sum(objective, theta, leaves, structure), replay.initial[0], shared)


def chunk_bytes(replay: Replay, copies: Copies, query: Query, memory: int, removals: int) -> int:
    """Bytes a chunk of ``removals`` adds at its peak: in the sweep, or in the exact readout of ``query`` after it."""
    carried = copies.carried(replay, removals)
    rows = min(removals, query_rows(replay, query, memory - carried)) + 1
    readout = rows * (_query_saved(replay, query, without_data=True) + replay.initial[0].nbytes)
    return max(copies.chunk(replay, removals), carried + readout)


def of_the_tape(replay: Replay, memory: int, each: bool = False) -> int:
    """Bytes for the states of a sweep back within ``memory``, of which its steps have the rest; ``each``: the adjoints of many
    examples, which have half of it."""
    return memory // 2 if each else max(0, memory - _step_back(replay))


def filed_bytes(replay: Replay, memory: int) -> int:
    """Bytes of the temporary file of a sweep back within ``memory``."""
    return tape.filed(replay, of_the_tape(replay, memory)) * sum(part.nbytes for part in replay.initial)


def _step_back(replay: Replay) -> int:
    """Bytes of a step back: the adjoint before and after it, six vectors on the way, and what autograd keeps to differentiate
    twice."""
    return (2 * len(replay.initial) + 6) * replay.initial[0].nbytes + 8 * replay.activation_bytes


def reverse_bytes(replay: Replay, memory: int) -> int:
    """Bytes a reverse sweep adds at its peak: the states it holds, one step, and a number for every sample."""
    state = sum(part.nbytes for part in replay.initial)
    numbers = replay.run.n_samples * replay.initial[0].element_size()
    return tape.held(replay, of_the_tape(replay, memory)) * state + _step_back(replay) + numbers
