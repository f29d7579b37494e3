"""How much of its work acc-low-rank does on a run: as much as is worth a few trainings, or a minute or two."""

from __future__ import annotations

from lightning_acc.core.optimizers import RULES
from lightning_acc.core.queries import Query
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record

MOST_DIRECTIONS, SMALLEST_CAP = 256, 20
TRACKED_WORK = 6e11
"""As many directions are chosen as keep occurrences * parameters * directions below this (about a minute), where that
leaves 20."""
MOST_FOLLOWED, FEWEST_FOLLOWED, FOLLOWED_WORK = 256, 12, 4e11
"""Screened, as many are followed as keep occurrences * parameters * followed below this, and at least so many."""
DEFECT_TRAININGS, STEP_NUMBERS, OCCURRENCES, ROW_NUMBERS, PASSES = 20, 200_000, 25, 3000, 5
"""As many removals follow the update as cost so many trainings. A step of a training takes as long as the update, in one pass,
of so many numbers, and of as many more as there are parameters for every 25 of its occurrences; each removal takes as long as
that of 3000 beside its own, and an update in many passes 5 times as long. Measured with scripts/bench_defect.py."""
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
    vector = replay.initial[0].nbytes
    largest = max((len(step.sample_ids) for step in replay.records), default=0)
    return len(replay.initial) * vector, 6 * (largest * vector + replay.activation_bytes)


def removals_at_once(replay: Replay, memory: int) -> int:
    """How many of the removals can be tracked together within ``memory`` bytes.

    Raises:
        RequestError: not even one can.
    """
    each, at_a_step = bytes_needed(replay)
    if memory < each + at_a_step:
        raise RequestError(
            f"acc-low-rank needs about {(each + at_a_step) / 2**30:.2g} GB for a single removal of this run, more than the "
            f"budget of {memory / 2**30:.2g} GB: give memory_gb={1.1 * (each + at_a_step) / 2**30:.2g} or more."
        )
    return (memory - at_a_step) // each


def most_directions(run: Record) -> int:
    """The number of directions that is not exceeded unless asked for."""
    affordable = int(TRACKED_WORK / training_work(run))
    return min(MOST_DIRECTIONS, max(SMALLEST_CAP, affordable), run.n_parameters)


def most_followed(run: Record) -> int:
    """How many removals are followed exactly where they are screened, unless asked for."""
    return min(MOST_FOLLOWED, max(FEWEST_FOLLOWED, int(FOLLOWED_WORK / training_work(run))))


def most_by_the_update(run: Record) -> int:
    """How many removals follow the update where its defect is, unless asked for."""
    step = STEP_NUMBERS + training_work(run) / run.n_steps / OCCURRENCES
    rule = RULES.get(run.manifest["optimizer"]["name"])
    passes = 1 if rule and rule.one_pass else PASSES
    return max(FEWEST_FOLLOWED, int(DEFECT_TRAININGS * step / (passes * (ROW_NUMBERS + run.n_parameters))))


def training_work(run: Record) -> float:
    """Occurrences * parameters of a training."""
    return max(1.0, float(sum(len(step.sample_ids) for step in run.steps)) * run.n_parameters)
