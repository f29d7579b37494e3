"""When a query is read: at the end of the run, along it, at single steps, at a checkpoint, at an average of the parameters.

``score(R)`` is the mean over these steps of ``query(parameters without R) - query(parameters with R)``. The end is the papers'
question. It is also a noisy place: nothing has trained over what the last steps saw. Read along the run, a score is what the
sample did to the learning curve.

What is deployed is often an average that a callback kept (EMA, SWA), ``sum_t c_t theta_t``. It is linear in the trajectory: a
removal shifts it by ``sum_t c_t D_t``, and an adjoint gets ``c_t`` times the query's gradient *at the average* at each step t.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from lightning_acc import arguments
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record
from lightning_acc.record.store import digest

At = str | int | Iterable[int]
"""As users say it: ``"end"``, ``"along"``, ``"along:K"``, a step, a list of steps, or a name in ``run.checkpoints`` or
``run.averages``."""
END, ALONG = "end", "along"
PLACES = 20
"""``along`` reads at every so manieth step, and at so many at least, unless asked for another number.

Of a run of thousands of steps twenty places are too few: what each sample did there is noise.
"""


@dataclass(frozen=True)
class Moments:
    """The steps a query is read at.

    Attributes:
        steps: numbers t, in order, each once: the parameters after t steps.
        name: what tables call them.
        average: the weights c_t of these steps, where the query is read once, at the average ``sum_t c_t theta_t``; None where
            it is read at each of them.
    """

    steps: tuple[int, ...]
    name: str
    average: tuple[float, ...] | None = None

    @property
    def last(self) -> int:
        """The last of them: what comes later in the run is not asked about."""
        return self.steps[-1]

    @property
    def readings(self) -> int:
        """How many times the query is read."""
        return len(self.steps) if self.average is None else 1

    @property
    def share(self) -> float:
        """What each reading counts for in the mean."""
        return 1 / self.readings

    @cached_property
    def weights(self) -> dict[int, float]:
        """By step, what it counts for: in the mean of the readings, or in the average that is read."""
        return dict(zip(self.steps, self.average or (self.share,) * len(self.steps), strict=True))


def in_words(name: str) -> str:
    """How a reader is told of steps that are called ``name``."""
    return name if name.startswith(ALONG) else f"at {name}"


def file_part(name: str) -> str:
    """What names of files say of steps that are called ``name``: short, and different for different ones."""
    if name.partition(":")[0] in (END, ALONG):
        return name.replace(":", "-")
    if "," in name:
        return f"steps-{digest(name.encode())[:8]}"
    return f"step-{name}" if name.isdecimal() else name  # of an average


def find(record: Record, at: At) -> Moments:
    """The steps of a run that are meant.

    Raises:
        RequestError: there are no such steps, or no such checkpoint.
    """
    total = record.n_steps
    if isinstance(at, str):
        if at == END:
            return _named((total,), total)
        if match := re.fullmatch(rf"{ALONG}(?::(\d{{1,9}}))?", at):
            count = _places(total) if match[1] is None else int(match[1])
            if count < 1:
                raise RequestError(f"at={at!r} reads nowhere: give a number of steps from 1.")
            return _named(_spread(total, count), total)
        known = record.checkpoints
        if at not in known:
            averages = record.averages
            if at in averages:
                return Moments(tuple(averages[at]["steps"].tolist()), at, tuple(averages[at]["weights"].tolist()))
            has = f"this run has the checkpoints {', '.join(known)}" if known else "this run has no checkpoints"
            has += f", and the averages {', '.join(averages)}" if averages else ""
            raise RequestError(
                f"at={arguments.shown(at)} is no moment of a run: give {END!r}, {ALONG!r}, a step from 1 to {total}, a list of "
                f"steps, or the name of a checkpoint or of an average of the parameters; {has}."
            )
        return _named((_step(known[at], total),), total)
    if not isinstance(at, Iterable):
        return _named((_step(at, total),), total)
    steps = {_step(step, total) for step in at}
    if not steps:
        raise RequestError(f"at=[] reads nowhere: give steps from 1 to {total}.")
    return _named(tuple(sorted(steps)), total)


def _step(step: Any, total: int) -> int:
    number = arguments.index(step)
    if number is None or not 1 <= number <= total:
        raise RequestError(
            f"at={arguments.shown(step)} is no moment of this run: give steps from 1 to {total}; before the first, no removal "
            "has changed anything."
        )
    return number


def _places(total: int) -> int:
    return max(PLACES, total // PLACES)


def _spread(total: int, count: int) -> tuple[int, ...]:
    """``count`` steps spread evenly over a run, its end among them; all, where it has no more."""
    count = min(count, total)
    return tuple(sorted({max(1, round(total * k / count)) for k in range(1, count + 1)}))


def _named(steps: tuple[int, ...], total: int) -> Moments:
    """The same steps have the same name, however they were asked for."""
    if steps == (total,):
        return Moments(steps, END)
    if steps == _spread(total, _places(total)):
        return Moments(steps, ALONG)
    if len(steps) > 1 and steps == _spread(total, len(steps)):
        return Moments(steps, f"{ALONG}:{len(steps)}")
    return Moments(steps, ",".join(map(str, steps)))
