"""The driver of acc-low-rank: one sweep back for a query, the basis, then one pass forward that tracks the removals."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import CACHE_BYTES, Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank.back import sweep_back
from lightning_acc.methods.low_rank.dense import DenseShifts
from lightning_acc.methods.low_rank.factored import FactoredShifts, Visits
from lightning_acc.methods.low_rank.factors import LinearFactors, factors_for
from lightning_acc.methods.low_rank.method import AccLowRank, RawShifts
from lightning_acc.methods.low_rank.outputs import OutputShifts
from lightning_acc.methods.low_rank.protocol import split_for
from lightning_acc.record.record import Run

PARAMETERS, OUTPUTS, SCREENED = STATES = ("parameters", "outputs", "screened")
"""What is kept of each raw shift: itself, or the gradients in the outputs that it came from; or whole shifts of a few."""
LEFT_TO_CONTRACT = 0.0002
"""Directions that the whole training contracts by less than this exponent are left out of the basis."""
LARGEST_RANK, SMALLEST_CAP = 256, 20
WORK = 6e11
"""The rank that is chosen keeps occurrences * parameters * rank below this (about a minute), where that leaves 20."""
FEWEST_FOLLOWED, FOLLOWED_WORK = 12, 4e11
"""Screened, as many are followed as keep occurrences * parameters * followed below this, and at least so many."""
EXACT_WORK = 3e11
"""Multiplications spent on the exact readout: removals * examples * parameters."""
TRUSTED = 0.5
"""Largest relative error of the shifts' linear readout with which they are still used."""
TESTED = 256
"""How many removals' shifts are held against the sweep back."""


@dataclass(frozen=True)
class Pass:
    """What the pass found for n removals.

    Attributes:
        scores: with the linear readout, (n,).
        first: what SGD-IE says of them, (n,).
        final: parameters of the run, (p,).
        gradient: of the query there, (p,).
        basis: the basis used.
        shift_error: relative error (root mean square) of what some of the shifts, spread over all, say of the query to first
            order: the sweep back knows that exactly.
        shifts: gives the estimated shifts (m, p) of removals by index (m,).
    """

    scores: Tensor
    first: Tensor
    final: Tensor
    gradient: Tensor
    basis: bases.Basis
    shift_error: float
    shifts: Callable[[Tensor], Tensor]


def low_rank(
    replay: Replay,
    removals: Sequence[Removal],
    query: Query,
    memory: int,
    rank: int | None = None,
    progress: Callable[[float], None] = lambda _: None,
    state: str = PARAMETERS,
) -> Pass:
    """Score removals by acc-low-rank.

    Args:
        replay: of the run.
        removals: n removals.
        query: what to read.
        memory: bytes for the states of the sweep back; the gradients of the query along the run go to a temporary file.
        rank: directions of the basis; None chooses.
        progress: told the fraction done.
        state: what is kept of the raw shifts, one of ``STATES``.

    Raises:
        RequestError: the optimizer's update is not one affine function for all parameters, there is no such rank, or the
            removals or the module cannot be followed in this state.
    """
    total = len(replay)
    check(replay, removals, state)
    if rank is not None and rank < 0:
        raise RequestError(f"rank={rank} is no number of directions: give 0 or more, or None.")
    with sweep_back(replay, query, memory, lambda done: progress(0.2 * done)) as back:
        if rank is None:
            time = sum(gain(replay, t) for t in range(total))
            basis = bases.find(back.places, largest_rank(replay), LEFT_TO_CONTRACT / max(time, 1e-30))
        else:
            basis = bases.find(back.places, rank)
        progress(0.25)
        tracked = tracker(replay, removals, basis, state)
        current = replay.initial
        for t in range(total):
            step = replay.step(t)
            tracked.advance(t, step, current, back.gammas[t])
            current = step(current)
            progress(0.25 + 0.75 * (t + 1) / total)
    gradient = back.gradient
    error = _shift_error(tracked, gradient, len(removals))
    return Pass(tracked.scores, tracked.first, current[0], gradient, basis, error, tracked.shifts)


def _shift_error(tracked: AccLowRank, gradient: Tensor, n: int) -> float:
    some = torch.linspace(0, n - 1, min(n, TESTED)).round().long().unique()
    scores = tracked.scores[some]
    found = torch.cat([scores[:0], *(tracked.shifts(part) @ gradient for part in some.split(16))])
    return float((found - scores).norm() / scores.norm().clamp_min(1e-300))


def read_exactly(run: Run, n: int, query: Query) -> int:
    """How many of n removals are read exactly, the most influential: a minute or two of work. Others are by so much smaller,
    and the curvature of the query along their shifts by its square."""
    return min(n, max(LARGEST_RANK, int(EXACT_WORK / (query.n_examples * run.n_parameters))))


def bytes_needed(replay: Replay, removals: Sequence[Removal], state: str = PARAMETERS) -> tuple[int, int]:
    """Bytes for each of the removals that are tracked together, and for a step on top of them all."""
    vector = replay.initial[0].nbytes
    if state == OUTPUTS and len(replay):
        parts, rank, number = len(replay.initial), largest_rank(replay), replay.initial[0].element_size()
        outputs = split_for(replay).of(replay.step(0), replay.initial[0])
        at_a_step = 4 * rank * (outputs.numel() * number + vector) + 4 * CACHE_BYTES + 16 * replay.activation_bytes
        if factors_for(replay.objective, replay.step(0), replay.initial[0]) is None:
            at_a_step += 6 * len(outputs) * vector
        return ((2 * parts + 1) * rank + parts * outputs.shape[1]) * number, at_a_step
    factors = _factors(replay, removals)
    if factors is None:
        # The state, and at a step vectors and activations of those it sees, as for exact ACC.
        largest = max((len(step.sample_ids) for step in replay.run.steps), default=0)
        return len(replay.initial) * vector, 6 * (largest * vector + replay.activation_bytes)
    visits = sum(len(step.sample_ids) for step in replay.run.steps) / max(1, replay.run.n_samples)
    numbers = sum(sum(layer.weight[1]) for layer in factors.layers) + len(replay.initial)
    rank = largest_rank(replay)
    each = int(max(1.0, visits) * numbers + 3 * len(replay.initial) * rank) * replay.initial[0].element_size()
    return each, 3 * rank * (replay.activation_bytes + vector)


def removals_at_once(replay: Replay, removals: Sequence[Removal], memory: int, state: str = PARAMETERS) -> int:
    """How many of the removals can be tracked together within ``memory`` bytes. Screened, all: fewer are followed then.

    Raises:
        RequestError: not even one can.
    """
    if state == SCREENED:
        return max(1, len(removals))
    each, at_a_step = bytes_needed(replay, removals, state)
    if memory < each + at_a_step:
        raise RequestError(
            f"acc-low-rank needs about {(each + at_a_step) / 2**30:.2g} GB for a single removal of this run, more than the "
            f"budget of {memory / 2**30:.2g} GB: give memory_gb={1.1 * (each + at_a_step) / 2**30:.2g} or more."
        )
    return (memory - at_a_step) // each


def _factors(replay: Replay, removals: Sequence[Removal]) -> LinearFactors | None:
    if len(replay) and all(len(removal) == 1 for removal in removals):
        return factors_for(replay.objective, replay.step(0), replay.initial[0])
    return None


def tracker(replay: Replay, removals: Sequence[Removal], basis: bases.Basis, state: str = PARAMETERS) -> AccLowRank:
    """The method, set up for n removals; their shifts as outputs where asked for, as factors where that can be, or vectors."""
    n, parts = len(removals), len(replay.initial)
    raw: RawShifts
    factors = _factors(replay, removals)
    owners = torch.full((replay.run.n_samples,), -1)
    if all(len(removal) == 1 for removal in removals):
        owners[[removal[0] for removal in removals]] = torch.arange(n)
    if state == OUTPUTS and len(replay):
        raw = OutputShifts(split_for(replay), factors, owners, replay.step, basis.vectors, replay.initial, n)
    elif factors is not None:
        raw = FactoredShifts(factors, Visits((s.sample_ids for s in replay.run.steps), owners, n), basis.vectors, parts, n)
    else:
        raw = DenseShifts(Removals(removals), basis.vectors, parts)
    return AccLowRank(basis.vectors, raw, parts, n, len(replay))


def check(replay: Replay, removals: Sequence[Removal] = (), state: str = PARAMETERS) -> None:
    """Refuse what acc-low-rank does not describe.

    Raises:
        RequestError: the run's update is not affine, or not the same for all parameters; or the removals or the module
            cannot be followed in this state.
    """
    steps = replay.run.steps
    for t in (0, len(steps) - 1) if len(steps) else ():
        obstacle = replay.update.not_uniform(steps[t].groups)
        if obstacle is not None:
            raise RequestError(
                f"acc-low-rank follows SGD with one setting for all parameters, which this run is not: {obstacle}. Use "
                "acc-sgd-ie, or sgd-ie for many samples."
            )
    if state == OUTPUTS:
        if any(len(removal) != 1 for removal in removals):
            raise RequestError("state='outputs' follows single samples: score groups with state='parameters'.")
        if len(steps):
            split_for(replay)


def gain(replay: Replay, t: int) -> float:
    """By how much step t's update moves a parameter in the end, for each unit of its gradient: lr / (1 - momentum)."""
    drift, source = replay.update.response(replay.run.steps[t].groups)
    moved = []
    for _ in range(10):  # after 1, 2, 4, ... steps
        moved.append(abs(float(source[0])))
        source, drift = drift @ source, drift @ drift
    return max(moved)


def largest_rank(replay: Replay) -> int:
    """The rank that is not exceeded unless asked for."""
    affordable = int(WORK / _training_work(replay.run))
    return min(LARGEST_RANK, max(SMALLEST_CAP, affordable), replay.run.n_parameters)


def most_followed(run: Run) -> int:
    """How many removals are followed exactly where they are screened, unless asked for."""
    return min(LARGEST_RANK, max(FEWEST_FOLLOWED, int(FOLLOWED_WORK / _training_work(run))))


def chosen_state(run: Run) -> str:
    """The state that suits a run: removals are screened where not all directions that training contracts are affordable."""
    return SCREENED if WORK / _training_work(run) < min(LARGEST_RANK, run.n_parameters) else PARAMETERS


def _training_work(run: Run) -> float:
    return max(1.0, float(sum(len(step.sample_ids) for step in run.steps)) * run.n_parameters)
