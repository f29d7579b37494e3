"""Reading a query: when, of whom, and how, for every method in the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_acc.core.audit import confirm_average
from lightning_acc.core.queries import Query, curvature
from lightning_acc.core.queries.moments import Moments
from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import query_rows
from lightning_acc.methods.method import Question


class Gathered:
    """Makes of what is seen at each of the steps asked about what a query is read at: that itself, or its average."""

    def __init__(self, moments: Moments) -> None:
        self._moments = moments
        self._sums: list[Tensor] = []

    def __call__(self, t: int, *seen: Tensor) -> tuple[Tensor, ...] | None:
        """What to read after ``t`` steps, one of those asked about, having ``seen`` this; None where there is more to come."""
        if self._moments.average is None:
            return seen
        weight = self._moments.weights[t]
        self._sums = self._sums or [torch.zeros_like(part) for part in seen]
        for total, part in zip(self._sums, seen, strict=True):
            total.add_(part, alpha=weight)
        return tuple(self._sums) if t == self._moments.last else None


class Reading:
    """The mean over the steps asked about of ``query(theta + D) - query(theta)``, collected while a sweep goes by them.

    Attributes:
        scores: (n,), or (n, examples) where each example is asked about; None before the first of these steps.
    """

    def __init__(self, replay: Replay, question: Question) -> None:
        self._replay, self._question = replay, question
        self._gathered = Gathered(question.moments)
        self._rows: int | None = None
        self._shifts: list[Tensor] = []
        self._thetas: list[Tensor] = []
        self.scores: Tensor | None = None

    def __call__(self, t: int, theta: Tensor, shifts: Tensor) -> None:
        """See the parameters (p,) of the run after ``t`` steps, a step asked about, and the shifts (n, p) there."""
        objective, q = self._replay.objective, self._question
        gathered = self._gathered(t, theta, shifts)
        if gathered is None:
            return
        theta, shifts = gathered
        if q.moments.average is not None:
            confirm_average(self._replay, q.moments.name, theta)
        if q.readout == "linear":
            slope = gradient(self._replay, q, theta)
            read = shifts @ (slope.T if q.each else slope)
        else:
            if self._rows is None:
                beside = (len(self._replay.initial) + 2) * shifts.nbytes  # what the sweep carries meanwhile
                self._rows = query_rows(self._replay, q.query, q.memory - beside)
            read = q.query.changes(objective, theta, shifts, self._rows, q.each)
            read = read if q.moments.readings == 1 else q.moments.share * read
        self.scores = read if self.scores is None else self.scores + read
        if q.keep_shifts:
            self._shifts.append(shifts)
            self._thetas.append(theta)

    @property
    def shifts(self) -> Tensor | None:
        """(readings, n, p), where they were kept."""
        return torch.stack(self._shifts) if self._shifts else None

    @property
    def thetas(self) -> Tensor | None:
        """(readings, p), beside the shifts."""
        return torch.stack(self._thetas) if self._thetas else None


class Slopes:
    """What an adjoint gets at each of the steps asked about, the last of them first.

    That is the query's gradient there, with its share in the mean: (p,), or (examples, p). Of an average it is the gradient *at
    the average*, times the weight of the step, so that a pass forward has to ``see`` all of its steps before.

    Args:
        replay: of the run.
        question: what is asked.
        curves: so many directions of its curvature come beside the gradient, as rows after it: (1 + curves, p). The scores of a
            sample in these tell, by half the mean of their squares, what the query's curvature makes of its shift. They are 0
            where that is not known (``is_curved``).
    """

    def __init__(self, replay: Replay, question: Question, curves: int = 0) -> None:
        self._replay, self._question, self._curves = replay, question, curves
        self._gathered = Gathered(question.moments)
        self._at_average: Tensor | None = None

    def see(self, t: int, theta: Tensor) -> None:
        """The parameters (p,) of the run after ``t`` steps."""
        moments = self._question.moments
        if moments.average is None or t not in moments.weights:
            return
        gathered = self._gathered(t, theta)
        if gathered is not None:
            confirm_average(self._replay, moments.name, gathered[0])
            self._at_average = self._read(t, gathered[0])

    def __call__(self, t: int, theta: Tensor) -> Tensor:
        """Of the step ``t``, after which the parameters are ``theta`` (p,)."""
        if self._at_average is None:
            return self._read(t, theta)
        return self._question.moments.weights[t] * self._at_average

    def _read(self, t: int, theta: Tensor) -> Tensor:
        slope = gradient(self._replay, self._question, theta)
        if not self._curves:
            return slope
        found = curvature.directions(self._question.query, self._replay.objective, theta, self._curves, seed=t)
        curved = theta.new_zeros(self._curves, len(theta)) if found is None else found
        # Those of several steps are independent, so that the squares of their sums have the sum of the squares in the mean.
        return torch.cat([slope[None], curved * self._question.moments.share**0.5])


def is_curved(replay: Replay, query: Query) -> bool:
    """Whether the curvature of the query is known."""
    return curvature.directions(query, replay.objective, replay.initial[0], 1, seed=0) is not None


def gradient(replay: Replay, question: Question, theta: Tensor) -> Tensor:
    """The gradient of what is asked where it is read once, with its share in the mean: (p,), or (examples, p)."""
    query, objective = question.query, replay.objective
    found = query.gradients(objective, theta) if question.each else query.gradient(objective, theta, replay.ranks)
    return found if question.moments.readings == 1 else question.moments.share * found
