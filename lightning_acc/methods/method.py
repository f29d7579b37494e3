"""What a method is to everything above: one entry of the registry, which says how it runs and answers for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from torch import Tensor

from lightning_acc.arguments import shown
from lightning_acc.core.queries import Query
from lightning_acc.core.queries.moments import Moments
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError


@dataclass(frozen=True)
class Question:
    """What is asked of every removal.

    Attributes:
        query: what is read.
        moments: when.
        readout: ``"exact"`` or ``"linear"``.
        keep_shifts: whether the shifts themselves are wanted.
        memory: bytes to compute with.
        each: whether each example of the query is asked about by itself, and not their mean.
    """

    query: Query
    moments: Moments
    readout: str
    keep_shifts: bool
    memory: int
    each: bool = False


@dataclass(frozen=True)
class Answer:
    """What a method says of n removals.

    Attributes:
        scores: (n,); (n, examples) where each example was asked about.
        shifts: where the query was read, at the steps asked about or at their average, (readings, n, p), where they were to be
            kept.
        thetas: the run's own parameters there, (readings, p).
        details: how it was done, by the names in the method's ``details``.
        more: further columns of the table, (n,) each.
    """

    scores: Tensor
    shifts: Tensor | None = None
    thetas: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Tensor] = field(default_factory=dict)

    def on_cpu(self) -> Answer:
        """The same, wherever it was computed."""
        shifts, thetas = (None if part is None else part.cpu() for part in (self.shifts, self.thetas))
        more = {name: figures.cpu() for name, figures in self.more.items()}
        return replace(self, scores=self.scores.cpu(), shifts=shifts, thetas=thetas, more=more)


class Method(ABC):
    """An entry of the registry.

    Attributes:
        name: what users call it.
        readout: the readout it has unless asked otherwise.
        is_truth: whether it is what the others estimate.
        is_relative: whether a score depends on the removals that are asked about with it.
        is_baseline: whether it is there to be compared with, and never recommended.
        details: names of what it tells of how it was done, beside the scores.
    """

    name: str
    readout: str
    is_truth: bool = False
    is_baseline: bool = False
    is_relative: bool = False
    details: ClassVar[tuple[str, ...]] = ()

    def configured(self, **options: Any) -> Method:
        """The method with these options of its own, None of which is given where it has none.

        Raises:
            RequestError: it has no such option, or not such a value.
        """
        for option, value in options.items():
            if value is not None:
                raise RequestError(
                    f"{option}={shown(value)} is no option of {self.name}: leave it out, or choose another method."
                )
        return self

    def settled(self, replay: Replay, keep_shifts: bool) -> Method:
        """The method with what it chooses by itself on this run."""
        return self

    @property
    def options(self) -> dict[str, str]:
        """Its options, as conditions of a table."""
        return {}

    @property
    def label(self) -> str:
        """What its tables are called: its name, then the options that are not as usual."""
        return self.name

    def default_readout(self, keep_shifts: bool) -> str:
        """The readout where none is asked for."""
        return "exact" if keep_shifts else self.readout

    @abstractmethod
    def check(self, replay: Replay) -> None:
        """Refuse a run that the method does not describe.

        Raises:
            RequestError: it does not.
        """

    @abstractmethod
    def pieces(self, replay: Replay, removals: Sequence[Removal], question: Question) -> list[list[Removal]]:
        """The removals in pieces that are worked on at once, within the question's memory.

        Raises:
            RequestError: it cannot answer this question on this run.
        """

    def blocks(
        self, replay: Replay, removals: Sequence[Removal], examples: Sequence[int], question: Question
    ) -> list[tuple[list[Removal], list[int]]]:
        """A question about each of ``examples`` in blocks of removals and examples that are worked on at once.

        Unless a method has a better way, the pieces of removals, with all examples.
        """
        return [(piece, list(examples)) for piece in self.pieces(replay, removals, question)]

    @abstractmethod
    def answer(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The scores of one piece; ``progress`` is told the fraction done."""

    def is_one_sweep(self, question: Question) -> bool:
        """Whether one sweep back through the run answers for all removals."""
        return False

    def smaller(self, piece: list[Removal], question: Question) -> list[list[Removal]]:
        """A piece that ran out of memory in two; by itself where that would not help."""
        middle = len(piece) // 2
        return [piece[:middle], piece[middle:]] if middle else [piece]

    def least_bytes(self, replay: Replay, each: bool = False) -> int:
        """Without which not even one removal can be asked about; ``each``: about one example of the query."""
        return 0

    def scratch_bytes(self, replay: Replay, memory: int) -> int:
        """Of the temporary files of a piece, which has so much ``memory`` in bytes."""
        return 0

    def told(self, details: dict[str, Any], n: int) -> dict[str, Any]:
        """What the conditions of n scores say of the details of one piece of them."""
        return details

    def warnings(self, details: Sequence[dict[str, Any]]) -> list[str]:
        """What a reader of the scores must know, given the details of all pieces."""
        return []


def one_by_one(
    method: Method, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
) -> Answer:
    """The answer about each example of a query, by a method that can ask about one thing at a time."""
    n = question.query.n_examples
    answers = []
    for i in range(n):
        alone = replace(question, query=question.query.picked([i]), each=False)
        answers.append(method.answer(replay, removals, alone, lambda done, i=i: progress((i + done) / n)))  # type: ignore[misc]
    return Answer(torch.stack([answer.scores for answer in answers], 1), details=answers[0].details)
