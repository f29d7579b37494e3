"""What of the parameters a removed sample's gradients touch.

An update that goes number by number leaves every number that the sample never touched exactly as the run has it: the weights of
an image's dark pixels, the embeddings of words that a text does without. So the state of a removal that follows the update is
kept for **units** alone, the rows or columns of a parameter that its gradients were not zero on.
"""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import evenly

CACHED = defaultdict(lambda: 2**24, cpu=2**18)
"""Numbers of a part of the states that are taken through an update together, by kind of device: what stays in a core's caches,
where more is slower; what keeps a card busy."""
GATHERED, NARROWEST = 1.7, 8
"""How much longer a number takes that is looked up by its unit; and the fewest numbers of a unit, with fewer of which it takes
longer still."""
PLACES, SAMPLES, OF_A_LARGE_MODEL = 4, 32, 4
"""Steps, and samples of these in all, that tell what a sample touches; and the samples of a model that is taken one by one."""


@dataclass(frozen=True)
class Units:
    """A range of the flat parameters in U units of one width.

    Attributes:
        columns: the range.
        parameter: index of a parameter in it.
        count: U; 1 where the range is touched as a whole.
        turned: they are the columns of a matrix, not its rows.
        share: of them all, that a sample touches.
    """

    columns: slice
    parameter: int
    count: int = 1
    turned: bool = False
    share: float = 1.0

    @property
    def size(self) -> int:
        """Numbers of the range."""
        return int(self.columns.stop - self.columns.start)

    def of(self, flat: Tensor) -> Tensor:
        """The range of vectors (..., p) by units, a view (..., U, width)."""
        part = flat[..., self.columns]
        shape = (-1, self.count) if self.turned else (self.count, -1)
        matrix: Tensor = part.unflatten(-1, shape)
        return matrix.mT if self.turned else matrix

    def each_of(self, state: State) -> State:
        """The range of each part of a state (p,), by units, (U, width)."""
        return tuple(self.of(part).contiguous() for part in state)


_KNOWN: WeakKeyDictionary[Replay, list[Units]] = WeakKeyDictionary()


def units(replay: Replay) -> list[Units]:
    """The parameters of a run in ranges that are updated by themselves, in the units in which least of them is touched.

    A range that is touched as a whole has at most ``CACHED`` numbers, if the update goes number by number.
    """
    if replay not in _KNOWN:
        _KNOWN[replay] = list(_units(replay))
    return _KNOWN[replay]


def kept_share(replay: Replay) -> float:
    """Of the memory for a whole state, what one takes of which only what is touched is kept: with the numbers of its units, and
    a margin for samples that touch more than most."""
    kept = sum(part.size * (min(1.0, 1.25 * part.share) * 1.25 if part.count > 1 else 1.0) for part in units(replay))
    return kept / replay.run.n_parameters


def numbers_in_time(replay: Replay) -> float:
    """How many numbers of each part of the state take as long as what a removal touches, in the mean."""
    return sum(part.share * part.size * (GATHERED if part.count > 1 else 1) for part in units(replay))


def _units(replay: Replay) -> Iterator[Units]:
    update, most = replay.update, CACHED[replay.device.type]
    if not update.rule.by_number:
        yield from (Units(columns, parameter) for columns, parameter in update.ranges())
        return
    apart = _apart(replay)
    ends = list(itertools.accumulate(update.layout.sizes, initial=0))
    for columns, first in update.ranges():
        start, parameter = columns.start, first
        for k in range(first, len(update.layout.sizes)):
            if ends[k] < columns.stop and k in apart:
                yield from (Units(part, parameter) for part in _blocks(slice(start, ends[k]), most))
                yield apart[k]
                start, parameter = ends[k + 1], k + 1
        yield from (Units(part, parameter) for part in _blocks(slice(start, columns.stop), most))


def _blocks(columns: slice, size: int) -> Iterator[slice]:
    """Columns in blocks of so many, or a few less."""
    total = columns.stop - columns.start
    for part in evenly(total, -(-total // size)):
        yield slice(columns.start + part.start, columns.start + part.stop)


def _apart(replay: Replay) -> dict[int, Units]:
    """The parameters that are taken by units, by their index: where that takes less time."""
    if _clips_by_norm(replay):  # which changes all numbers, where it does any
        return {}
    touched = _touched(replay)
    found, first = {}, 0
    for k, (_, shape) in enumerate(replay.layout.shapes):
        columns = slice(first, first + shape.numel())
        first = columns.stop
        if len(shape) < 2 or not shape.numel():
            continue
        ways = [Units(columns, k, shape[0]), Units(columns, k, shape.numel() // shape[0], turned=True)]
        by_share = [(float(way.of(touched).any(-1).double().mean()), way) for way in ways if way.size >= NARROWEST * way.count]
        share, way = min(by_share, key=lambda one: one[0], default=(1.0, ways[0]))
        if GATHERED * share < 1:
            found[k] = Units(columns, k, way.count, way.turned, share)
    return found


def _clips_by_norm(replay: Replay) -> bool:
    def by_norm(groups: list[dict[str, Any]]) -> bool:
        return any(h["gradient_clip_val"] and h.get("gradient_clip_algorithm") != "value" for h in groups)

    return any(by_norm(replay.run.steps[t].groups) for t in (0, len(replay) - 1))


def _touched(replay: Replay) -> Tensor:
    """Which numbers the gradients of some samples are not zero on, at the run's first or last parameters; (samples, p)."""
    most = SAMPLES if replay.states_at_once > 1 else OF_A_LARGE_MODEL
    thetas = [replay.initial[0], replay.placed(replay.run.snapshot(replay.checked_at))]
    places = sorted({round(i * (len(replay) - 1) / max(1, PLACES - 1)) for i in range(PLACES)})
    found = []
    for t in places:
        step = replay.step(t)
        seen = step.sample_ids[step.weights.cpu() != 0].unique()
        some = seen[:: max(1, len(seen) // max(1, most // len(places)))][: max(1, most // len(places))]
        for part in some.split(max(1, min(replay.states_at_once, len(some)))):
            removals = Removals([(int(i),) for i in part])
            found.append(torch.stack([step.removed(theta, removals).gradients != 0 for theta in thetas]).any(0).cpu())
    return torch.cat(found)
