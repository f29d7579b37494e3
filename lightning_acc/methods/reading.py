"""Reading a query: when, of whom, and how, for every method in the same way."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import query_rows
from lightning_acc.methods.method import Question


class Reading:
    """The mean over the steps asked about of ``query(theta + D) - query(theta)``, collected while a sweep goes by them.

    Attributes:
        scores: (n,), or (n, examples) where each example is asked about; None before the first of these steps.
    """

    def __init__(self, replay: Replay, question: Question) -> None:
        self._replay, self._question = replay, question
        self._rows: int | None = None
        self._shifts: list[Tensor] = []
        self._thetas: list[Tensor] = []
        self.scores: Tensor | None = None

    def __call__(self, t: int, theta: Tensor, shifts: Tensor) -> None:
        """See the parameters (p,) of the run after ``t`` steps, a step asked about, and the shifts (n, p) there."""
        objective, q = self._replay.objective, self._question
        if q.readout == "linear":
            slope = gradient(self._replay, q, theta)
            read = shifts @ (slope.T if q.each else slope)
        else:
            if self._rows is None:
                self._rows = query_rows(self._replay, q.query, q.memory)
            read = q.query.changes(objective, theta, shifts, self._rows, q.each)
            read = read if len(q.moments.steps) == 1 else q.moments.share * read
        self.scores = read if self.scores is None else self.scores + read
        if q.keep_shifts:
            self._shifts.append(shifts)
            self._thetas.append(theta)

    @property
    def shifts(self) -> Tensor | None:
        """(steps, n, p), where they were kept."""
        return torch.stack(self._shifts) if self._shifts else None

    @property
    def thetas(self) -> Tensor | None:
        """(steps, p), beside the shifts."""
        return torch.stack(self._thetas) if self._thetas else None


def gradient(replay: Replay, question: Question, theta: Tensor) -> Tensor:
    """The gradient of what is asked at one of its steps, with its share in the mean: (p,), or (examples, p)."""
    query, objective = question.query, replay.objective
    found = query.gradients(objective, theta) if question.each else query.gradient(objective, theta)
    return found if len(question.moments.steps) == 1 else question.moments.share * found
