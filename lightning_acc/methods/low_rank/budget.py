"""How much of its work acc-low-rank does on a run: as much as is worth a few trainings, or a minute or two."""

from __future__ import annotations

import torch

from lightning_acc.core.devices import ON_CPU
from lightning_acc.core.optimizers import RULES
from lightning_acc.core.queries import Query
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record

MOST_DIRECTIONS, SMALLEST_CAP = 256, 20
TRACKED_WORK = 6e11
"""As many directions are chosen as keep the multiplications of a training forward, times directions, below this (about a
minute), where that leaves 20."""
MOST_FOLLOWED, FEWEST_FOLLOWED, FOLLOWED_WORK = 256, 12, 4e11
"""Screened, as many are followed as keep the same, times followed, below this, and at least so many."""
DEFECT_TRAININGS, STEP_NUMBERS, MULTIPLICATIONS, ROW_NUMBERS, PASSES = 20, 200_000, 25, 3000, 5
"""As many removals follow the update as cost so many trainings. A step of a training takes as long as the update, in one pass,
of so many numbers, and of one more for every 25 multiplications of its forward pass; each removal takes as long as that of 3000
beside its own, and where a step sees it, as the multiplications of its own sample, or of the whole batch where that cannot be
taken apart, as with dropout. An update in many passes takes 5 times as long. Those that fit the memory of a CPU's default go
together, and the run's own update beside them. Measured with scripts/bench_defect.py."""
SWEEPS, SWEEP_TRAININGS = 2, 3
"""Removals that follow the update are worked on in pieces that cost so many sweeps back, each so many trainings: every piece
makes one of its own."""
EXACT_WORK = 3e11
"""Multiplications spent on the exact readout: removals * examples * parameters."""


def read_exactly(run: Record, n: int, query: Query, times: int = 1) -> int:
    """How many of n removals are read exactly, the most influential: a minute or two of work. Others are by so much smaller,
    and the curvature of the query along their shifts by its square.

    Args:
        run: the run.
        n: of the removals.
        query: what is read.
        times: at how many steps.
    """
    affordable = int(EXACT_WORK / (query.n_examples * run.n_parameters * times))
    return min(n, max(MOST_DIRECTIONS // times, affordable))


def bytes_needed(replay: Replay) -> tuple[int, int]:
    """Bytes for each of the removals that are tracked together, and for a step on top of them all.

    That is the state, and at a step vectors and activations of those it sees, as for exact ACC.
    """
    vector, parts, largest = replay.initial[0].nbytes, len(replay.initial), _largest_step(replay)
    return parts * vector, 6 * (largest * vector + replay.activation_bytes)


def bytes_by_the_update(replay: Replay) -> tuple[int, int]:
    """Bytes for each of the removals that follow the update together, and for a step on top of them all.

    That is the state, and the gradient without the removal; and at a step the run's own state, what the sweep back has kept of
    it, and vectors and activations of as many samples as single gradients are taken of together.
    """
    vector, parts, largest = replay.initial[0].nbytes, len(replay.initial), _largest_step(replay)
    together = min(largest, replay.states_at_once)
    at_a_step = (parts + 3 + 4 * together) * vector + 6 * replay.activation_bytes * together // max(1, largest)
    return (parts + 1) * vector, at_a_step


def _largest_step(replay: Replay) -> int:
    return max((len(step.sample_ids) for step in replay.records), default=0)


def removals_at_once(needed: tuple[int, int], memory: int) -> int:
    """How many of the removals can be worked on together within ``memory`` bytes.

    Args:
        needed: bytes for each of them, and on top of them all.
        memory: what there is.

    Raises:
        RequestError: not even one can.
    """
    each, at_a_step = needed
    if memory < each + at_a_step:
        raise RequestError(
            f"acc-low-rank needs about {(each + at_a_step) / 2**30:.2g} GB for a single removal of this run, more than the "
            f"budget of {memory / 2**30:.2g} GB: give memory_gb={1.1 * (each + at_a_step) / 2**30:.2g} or more."
        )
    return (memory - at_a_step) // each


def most_directions(replay: Replay) -> int:
    """The number of directions that is not exceeded unless asked for."""
    affordable = int(TRACKED_WORK / training_work(replay))
    return min(MOST_DIRECTIONS, max(SMALLEST_CAP, affordable), replay.run.n_parameters)


def most_followed(replay: Replay) -> int:
    """How many removals are followed exactly where they are screened, unless asked for."""
    return min(MOST_FOLLOWED, max(FEWEST_FOLLOWED, int(FOLLOWED_WORK / training_work(replay))))


def most_by_the_update(replay: Replay) -> int:
    """How many removals follow the update where its defect is, unless asked for."""
    return max(FEWEST_FOLLOWED, _by_the_update(replay, DEFECT_TRAININGS))


def piece_by_the_update(replay: Replay, memory: int) -> int:
    """How many removals that follow the update are one piece of the work."""
    return max(removals_at_once(bytes_by_the_update(replay), memory), _by_the_update(replay, SWEEPS * SWEEP_TRAININGS))


def _by_the_update(replay: Replay, trainings: float) -> int:
    """How many removals follow the update at the price of so many trainings."""
    run = replay.run
    in_steps = training_work(replay) / MULTIPLICATIONS
    occurrences = sum(len(step.sample_ids) for step in run.steps)
    apart = replay.step(0).single_samples(torch.zeros(1, 1, dtype=torch.long)) is not None
    visits = in_steps / run.n_samples if apart else in_steps / run.n_steps * occurrences / run.n_samples
    rule = RULES.get(run.manifest["optimizer"]["name"])
    passes = 1 if rule and rule.one_pass else PASSES
    each_bytes, at_a_step = bytes_by_the_update(replay)
    together = max(1, (ON_CPU - at_a_step) // each_bytes)
    each = run.n_steps * passes * (ROW_NUMBERS + run.n_parameters) * (1 + 1 / together) + visits
    return int(trainings * (run.n_steps * STEP_NUMBERS + in_steps) / each)


def training_work(replay: Replay) -> float:
    """Multiplications of the forward passes of a training; of a network of linear layers, occurrences * parameters."""
    occurrences = sum(len(step.sample_ids) for step in replay.run.steps)
    return max(1.0, replay.multiplications * occurrences / max(1, _largest_step(replay)))
