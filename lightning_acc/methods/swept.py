"""Methods that sweep: forward with the shifts of some removals, or, read linearly, once back for all samples."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

from lightning_acc.core.queries.moments import Moments
from lightning_acc.core.removals import Removal, summed
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods import memory, sweeps
from lightning_acc.methods.memory import IN_TURN, TRAINING, Copies, filed_bytes
from lightning_acc.methods.method import Answer, Method, Question
from lightning_acc.methods.reading import Reading
from lightning_acc.methods.rules import AdjointSgdIe, ForwardRule, LeaveOneOut

FURTHEST = 1.0
"""A shift that changes the gradient by more than its own size has left the region where a line can be true."""


def refuse_without_derivative(replay: Replay, what: str) -> None:
    """Refuse ``what``, which takes the derivative of the optimizer's update, where that says nothing.

    Raises:
        RequestError: it says nothing.
    """
    if replay.update.rule.no_derivative is not None:
        raise RequestError(
            f"{what} follows the derivative of the update, which is 0 for {replay.run.manifest['optimizer']['name']} because "
            f"{replay.update.rule.no_derivative}: use acc-sgd-ie or loo, which take the update itself."
        )


def refuse_other_losses(replay: Replay, what: str) -> None:
    """Refuse ``what`` where it would draw other random numbers than the training did, or compute something else.

    Raises:
        RequestError: it would.
    """
    if not replay.draws.alike:
        random = any(any(record.rng) for record in replay.records)
        does = "draw other random numbers (dropout)" if random else "give other losses"
        raise RequestError(
            f"{what} takes operations that can be differentiated twice, and those of {replay.run.path} {does} on "
            f"{replay.device.type} than the fused ones of its training, as attention may: record it with "
            "attn_implementation='eager', or within torch.nn.attention.sdpa_kernel(SDPBackend.MATH); or use loo."
        )
    if replay.draws.once_differentiable:
        raise RequestError(
            f"{what} differentiates the loss twice, and a function of this module is marked with once_differentiable: use "
            "method='loo', or write the backward of that function of operations that torch differentiates."
        )


class Swept(Method):
    """A method of two rules.

    Args:
        name: what users call it.
        forward: carries shifts; a chunk of removals at a time.
        copies: what a removal needs in memory then.
        reverse: carries the adjoint of a query; answers for all samples at once, with the linear readout, which then is
            the usual one. None where the rule is not linear in the removal.
        is_truth, is_baseline: see ``Method``.
        differentiates: whether it needs the derivative of the optimizer's update.
    """

    def __init__(
        self,
        name: str,
        forward: type[ForwardRule[Any]],
        copies: Copies,
        reverse: type[AdjointSgdIe] | None = None,
        is_truth: bool = False,
        is_baseline: bool = False,
        differentiates: bool = False,
    ) -> None:
        self.name, self.forward, self.copies, self.reverse = name, forward, copies, reverse
        self.is_truth, self.is_baseline, self.differentiates = is_truth, is_baseline, differentiates
        self.readout = "exact" if reverse is None else "linear"

    def check(self, replay: Replay) -> None:
        """Refuse an optimizer without a derivative, where the method needs one; and losses that are not the training's.

        Raises:
            RequestError: it has none, or they are others.
        """
        if self.differentiates:
            refuse_without_derivative(replay, self.name)
        if not self.is_truth:
            refuse_other_losses(replay, self.name)

    def pieces(self, replay: Replay, removals: Sequence[Removal], question: Question) -> list[list[Removal]]:
        """All at once where one sweep back answers for them, else chunks that fit into memory."""
        self.check(replay)
        if self._back(question) is not None:
            return [list(removals)]
        kept = question.moments.readings if question.keep_shifts or question.moments.average else 0
        copies = self.copies_for(replay, question.moments)
        size = memory.chunk_size(replay, self.name, copies, question.memory, kept) if removals else 1
        return memory.chunks(removals, size)

    def blocks(
        self, replay: Replay, removals: Sequence[Removal], examples: Sequence[int], question: Question
    ) -> list[tuple[list[Removal], list[int]]]:
        """All removals at once, with as many examples as go back together within memory; else the pieces of removals."""
        self.check(replay)
        if self._back(question) is None:
            return super().blocks(replay, removals, examples, question)
        size = memory.adjoints_at_once(replay, self.name, question.memory)
        return [(list(removals), part) for part in memory.even_pieces(examples, size)]

    def copies_for(self, replay: Replay, moments: Moments) -> Copies:
        """What a removal needs in memory, read at these steps.

        States so long that they are worked on one by one go to the end in turn, where they are read only there.
        """
        if self.is_truth and replay.states_at_once == 1 and len(moments.steps) == 1:
            return IN_TURN
        return self.copies

    def least_bytes(self, replay: Replay, each: bool = False) -> int:
        """Of a chunk of one; or of one example, where adjoints go back."""
        if self.reverse is None:
            return self.copies.chunk(replay, 1)
        return memory.example_bytes(replay) if each else 0

    def scratch_bytes(self, replay: Replay, memory: int) -> int:
        """Of the states of a sweep back."""
        return 0 if self.reverse is None else filed_bytes(replay, memory)

    def answer(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The scores of one piece."""
        back = self._back(question)
        if back is not None:
            per_sample = sweeps.reverse(replay, back(), question, progress).cpu()
            return Answer(summed(per_sample, removals).movedim(-1, 0))
        reading = Reading(replay, question)
        told = partial(_all_but_reading, progress)
        if self.copies_for(replay, question.moments).in_turn:
            bend = sweeps.in_turn(replay, removals, told, reading).bend
        else:
            bend = sweeps.forward(replay, self.forward(), removals, told, reading, question.moments.weights).bend
        scores = reading.scores
        assert scores is not None
        finite = scores.isfinite()
        more = {} if self.is_truth else {"diverged": ~((bend <= FURTHEST) & (finite.all(1) if question.each else finite))}
        return Answer(scores, reading.shifts, reading.thetas, more=more)

    def is_one_sweep(self, question: Question) -> bool:
        """Where its rule goes back."""
        return self._back(question) is not None

    def smaller(self, piece: list[Removal], question: Question) -> list[list[Removal]]:
        """A reverse sweep is no smaller for fewer removals."""
        return [piece] if self.is_one_sweep(question) else super().smaller(piece, question)

    def _back(self, question: Question) -> type[AdjointSgdIe] | None:
        return self.reverse if question.readout == "linear" and not question.keep_shifts else None


def _all_but_reading(progress: Callable[[float], None], done: float) -> None:
    progress(0.95 * done)


RETRAINING = Swept("loo", LeaveOneOut, TRAINING, is_truth=True)
"""The truth."""
