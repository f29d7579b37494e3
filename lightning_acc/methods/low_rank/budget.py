"""How much of its work acc-low-rank does on a run: as much as is worth so many trainings of it."""

from __future__ import annotations

from collections.abc import Callable

from lightning_acc.core.queries import Query
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank.defect.windows import Windows, usual
from lightning_acc.methods.low_rank.prices import SWEEP, Prices, bytes_by_the_update
from lightning_acc.methods.memory import example_bytes

TRAININGS = 25
"""That a ranking of all samples may cost, unless asked for."""
MOST_DIRECTIONS, FEWEST_DIRECTIONS = 256, 16
"""In more directions shifts are hardly truer, in fewer hardly ever true."""
FEWEST_FOLLOWED = 1
"""So many removals are followed at any price."""
SHARE = 0.25
"""Of the budget: the most that each of these may take: reading tracked shifts exactly, modelling, the query's curvature."""
MOST_CURVES, FEWEST_CURVES = 12, 4
"""With so many directions of the query's curvature it is told to 40 %, which with fewer tells little."""
SHORTEST = 8
"""Steps that removals follow the update for after a visit, at least: most of what an optimizer makes of a removal that no
derivative tells is there then."""
SWEEPS = 2
"""Removals that follow the update are worked on in pieces that cost so many sweeps back: every piece makes one of its own."""


def most_directions(replay: Replay, trainings: float) -> int:
    """In how many directions shifts are tracked, unless asked for: all there are where these are affordable, else as many as
    are; 0 where that is too few."""
    price, n, p = Prices(replay), replay.run.n_samples, replay.run.n_parameters
    if price.tracked(n, p) <= trainings:
        return p
    most = _largest(min(MOST_DIRECTIONS, p), lambda directions: price.tracked(n, directions) <= trainings)
    return most if most >= FEWEST_DIRECTIONS else 0


def most_followed(replay: Replay, trainings: float, query: Query, times: int = 1) -> int:
    """How many removals are followed exactly where they are screened, unless asked for; the query is read so many times."""
    price = Prices(replay)
    left = trainings - price.screening() - (price.modelling() if models(replay, trainings) else 0.0)
    return max(FEWEST_FOLLOWED, int(left / price.followed(query.n_examples * times)))


def curves(replay: Replay, memory: int, trainings: float) -> int:
    """In how many directions the query's curvature is told of the removals that are not followed: as many as are affordable,
    and fit into half of ``memory``; 0 where these are too few."""
    fit = min(int(SHARE * trainings / Prices(replay).curve()), memory // example_bytes(replay) - 1, MOST_CURVES)
    return fit if fit >= FEWEST_CURVES else 0


def models(replay: Replay, trainings: float) -> bool:
    """Whether those that are not followed are modelled: that is affordable."""
    return Prices(replay).modelling() <= SHARE * trainings


def read_exactly(replay: Replay, n: int, query: Query, times: int, trainings: float) -> int:
    """How many of n removals that are tracked are read exactly, the most influential. Others are by so much smaller, and the
    curvature of the query along their shifts by its square.

    Args:
        replay: of the run.
        n: of the removals.
        query: what is read.
        times: at how many steps.
        trainings: what all may cost.
    """
    affordable = int(SHARE * trainings / Prices(replay).reading(query.n_examples * times))
    return min(n, max(FEWEST_FOLLOWED, affordable))


def windows(replay: Replay, trainings: float, followed: int | None = None) -> Windows:
    """In which windows removals follow the update: the longest, up to the usual ones, in which following all is affordable, or
    the shortest. So many as are ``followed`` at any price are in the usual ones."""
    chosen = usual(replay)
    while chosen.length > SHORTEST and followed is None:
        if most_by_the_update(replay, trainings, chosen) >= replay.run.n_samples:
            break
        length = max(SHORTEST, chosen.length // 2)
        chosen = Windows(length, length // 2)
    return chosen


def most_by_the_update(replay: Replay, trainings: float, chosen: Windows) -> int:
    """How many removals follow the update in these windows where its defect is, unless asked for."""
    return max(FEWEST_FOLLOWED, int((trainings - SWEEP) / Prices(replay).by_the_update(chosen)))


def piece_by_the_update(replay: Replay, n: int, memory: int, chosen: Windows, trainings: float | None) -> int:
    """How many of n removals that follow the update in these windows are one piece of the work.

    As many as share one sweep back at least, and no fewer than leave all within so many ``trainings``, if that is asked for.
    """
    each = Prices(replay).by_the_update(chosen)
    least = int(SWEEPS * SWEEP / each)
    if trainings is not None:
        sweeps = max(1, int((trainings - n * each) / SWEEP))
        least = max(least, -(-n // sweeps))
    return max(removals_at_once(bytes_by_the_update(replay), memory), least)


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


def _largest(most: int, affordable: Callable[[int], bool]) -> int:
    """The largest number up to ``most`` that is affordable, as all below it are; 0 where none is."""
    low, high = 0, most
    while low < high:
        middle = -(-(low + high) // 2)
        low, high = (middle, high) if affordable(middle) else (low, middle - 1)
    return low
