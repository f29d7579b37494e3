"""What a method is to everything above: one entry of the registry, which says how it runs and answers for itself."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

from torch import Tensor

from lightning_acc.arguments import shown
from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.record.record import Record


@dataclass(frozen=True)
class Question:
    """What is asked of every removal.

    Attributes:
        query: what is read.
        readout: ``"exact"`` or ``"linear"``.
        keep_shifts: whether the shifts themselves are wanted.
        memory: bytes to compute with.
    """

    query: Query
    readout: str
    keep_shifts: bool
    memory: int


@dataclass(frozen=True)
class Answer:
    """What a method says of n removals.

    Attributes:
        scores: (n,).
        shifts: (n, p), where they were asked for.
        details: how it was done, by the names in the method's ``details``.
        more: further columns of the table, (n,) each.
    """

    scores: Tensor
    shifts: Tensor | None = None
    details: dict[str, Any] = field(default_factory=dict)
    more: dict[str, Tensor] = field(default_factory=dict)


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

    def settled(self, run: Record, keep_shifts: bool) -> Method:
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
    def pieces(self, replay: Replay, removals: Sequence[Removal], question: Question) -> list[list[Removal]]:
        """The removals in pieces that are worked on at once, within the question's memory.

        Raises:
            RequestError: it cannot answer this question on this run.
        """

    @abstractmethod
    def answer(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The scores of one piece; ``progress`` is told the fraction done."""

    def smaller(self, piece: list[Removal], question: Question) -> list[list[Removal]]:
        """A piece that ran out of memory in two; by itself where that would not help."""
        middle = len(piece) // 2
        return [piece[:middle], piece[middle:]] if middle else [piece]

    def scratch_bytes(self, replay: Replay) -> int:
        """Of the temporary files of a piece."""
        return 0

    def warnings(self, details: Sequence[dict[str, Any]]) -> list[str]:
        """What a reader of the scores must know, given the details of all pieces."""
        return []
