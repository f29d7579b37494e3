"""The entry of acc-low-rank: in which form it takes a run, and what it makes of the passes.

Runs of moderate size are **tracked**: all removals at once, in the directions that training contracts in. Larger ones are
**screened**: the few most influential removals are followed exactly, some hundreds more are modelled on them. Where the
update is not affine, as Adam's is not, it is its **defect** that is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from lightning_acc import arguments
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank import budget
from lightning_acc.methods.low_rank.back import scratch_bytes
from lightning_acc.methods.low_rank.defect import defect, has_a_defect, vectors_kept, window_steps
from lightning_acc.methods.low_rank.screened import screened
from lightning_acc.methods.low_rank.tracked import tracked
from lightning_acc.methods.memory import even_pieces
from lightning_acc.methods.method import Answer, Method, Question, one_by_one
from lightning_acc.methods.swept import refuse_without_derivative

TRACKED, SCREENED, DEFECT = "tracked", "screened", "defect"
TRUSTED = 0.5
"""Largest relative error of the shifts' linear readout with which they are still used."""


class LowRank(Method):
    """acc-low-rank.

    Args:
        directions: in how many it follows the contraction of the training; None chooses.
        followed: how many removals it follows exactly, the rest being screened; None chooses.
        form: ``"tracked"``, ``"screened"`` or ``"defect"``; None until it is ``settled``.
        unusual: whether that is not the form this run would be given by itself.
        most: how many follow the update where its defect is; None: all.
    """

    name = "acc-low-rank"
    readout = "exact"
    details = (
        *("directions_used", "largest_left_out", "shift_error", "fallback", "read_exactly"),
        *("followed_exactly", "modelled", "model_error"),
        *("followed_by_the_update", "window"),
    )

    def __init__(
        self,
        directions: int | None = None,
        followed: int | None = None,
        form: str | None = None,
        unusual: bool = False,
        most: int | None = None,
    ) -> None:
        self.directions, self.followed, self.form, self.unusual, self.most = directions, followed, form, unusual, most

    def configured(self, **options: Any) -> LowRank:
        """With ``directions``, or with ``followed``, whole numbers from 0."""
        directions, followed = options.pop("directions", None), options.pop("followed", None)
        super().configured(**options)
        for option, value in (("directions", directions), ("followed", followed)):
            number = arguments.index(value)
            if value is not None and (number is None or number < 0):
                words = f"{option}={arguments.shown(value)} is no number for {self.name}"
                raise RequestError(f"{words}: give a whole one, 0 or more.")
        if directions is not None and followed is not None:
            raise RequestError(
                f"directions={directions} and followed={followed} ask {self.name} for its two forms at once: give one of them."
            )
        return LowRank(directions, followed)

    def settled(self, replay: Replay, keep_shifts: bool) -> LowRank:
        """By its defect where the update is not affine; screened as asked for, or where not all directions training contracts
        in are affordable; else tracked.

        Raises:
            RequestError: shifts are to be kept of removals that are screened, or directions or shifts are asked for where the
                update is not affine.
        """
        if has_a_defect(replay.run):
            return self._by_defect(replay, keep_shifts)
        affordable = budget.TRACKED_WORK / budget.training_work(replay)
        usual = SCREENED if affordable < min(budget.MOST_DIRECTIONS, replay.run.n_parameters) else TRACKED
        form = usual
        if self.followed is not None:
            form = SCREENED
            if keep_shifts:
                raise RequestError(f"followed={self.followed} has the shifts of a few removals alone: leave one out.")
        elif self.directions is not None or keep_shifts:
            form = TRACKED
        asked = self.followed is not None or self.directions is not None
        return LowRank(self.directions, self.followed, form, unusual=form != usual and not asked)

    def _by_defect(self, replay: Replay, keep_shifts: bool) -> LowRank:
        given = f"directions={self.directions}" if self.directions is not None else f"keep_shifts={keep_shifts}"
        if keep_shifts or self.directions is not None:
            raise RequestError(
                f"{given} of {self.name} is for updates that are affine, as SGD's is without clipping, which this run's are "
                "not: leave it out, or use acc-sgd-ie."
            )
        most = budget.most_by_the_update(replay) if self.followed is None else self.followed
        return LowRank(None, self.followed, DEFECT, most=None if most >= replay.run.n_samples else most)

    @property
    def is_relative(self) -> bool:  # type: ignore[override]
        """Where the most influential of those asked about alone are followed."""
        return self.form == SCREENED or self.most is not None

    def default_readout(self, keep_shifts: bool) -> str:
        """Linear by the defect, whose shifts are too rough for another."""
        return "linear" if self.form == DEFECT else super().default_readout(keep_shifts)

    @property
    def options(self) -> dict[str, str]:
        """The form, and how many directions and how many followed were asked for."""
        given = (("directions", self.directions), ("followed", self.followed))
        return {"form": str(self.form), **{name: "chosen" if value is None else str(value) for name, value in given}}

    @property
    def label(self) -> str:
        """The name, and the option that was given, or the form where that is not what the run would be given by itself."""
        if self.unusual:
            return f"{self.name}.{self.form}"
        if self.followed is not None:
            return f"{self.name}.{self.followed}-followed"
        return self.name if self.directions is None else f"{self.name}.{self.directions}-directions"

    def check(self, replay: Replay) -> None:
        """Refuse what acc-low-rank does not describe.

        Raises:
            RequestError: the run's update is affine, but not the same for all parameters, or nothing has a derivative.
        """
        if has_a_defect(replay.run):
            refuse_without_derivative(replay, self.name)
            return
        for t in (0, len(replay) - 1):
            obstacle = replay.update.not_uniform(replay.run.steps[t].groups)
            if obstacle is not None:
                raise RequestError(
                    f"{self.name} follows SGD with one setting for all parameters, which this run is not: {obstacle}. Use "
                    "acc-sgd-ie, or sgd-ie for many samples."
                )

    def pieces(self, replay: Replay, removals: Sequence[Removal], question: Question) -> list[list[Removal]]:
        """As many as can be tracked at once; screened, all.

        Raises:
            RequestError: it cannot answer this question on this run.
        """
        self.check(replay)
        if self.form == DEFECT and question.readout == "exact":
            raise RequestError(
                f"readout='exact' takes shifts that {self.name} has of updates that are affine alone, as SGD's is without "
                "clipping, which this run's are not: use readout='linear', or acc-sgd-ie."
            )
        if self.is_relative:
            return even_pieces(removals, max(1, len(removals)))
        if self.form == DEFECT:
            return even_pieces(removals, budget.piece_by_the_update(replay, question.memory))
        return even_pieces(removals, budget.removals_at_once(budget.bytes_needed(replay), question.memory))

    def blocks(
        self, replay: Replay, removals: Sequence[Removal], examples: Sequence[int], question: Question
    ) -> list[tuple[list[Removal], list[int]]]:
        """Example by example: each needs a pass of its own."""
        return [(piece, [example]) for example in examples for piece in self.pieces(replay, removals, question)]

    def smaller(self, piece: list[Removal], question: Question) -> list[list[Removal]]:
        """Screened removals are screened together."""
        return [piece] if self.is_relative else super().smaller(piece, question)

    def least_bytes(self, replay: Replay, each: bool = False) -> int:
        """Of one removal that is tracked, or follows the update; screened, it fits its removals to what there is."""
        if self.form == SCREENED:
            return 0
        return sum((budget.bytes_by_the_update if self.form == DEFECT else budget.bytes_needed)(replay))

    def scratch_bytes(self, replay: Replay) -> int:
        """Of the sweep back."""
        return scratch_bytes(replay, vectors_kept(replay) if self.form == DEFECT else None)

    def answer(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The scores of one piece, how uncertain each is, and how they came about."""
        if question.each:
            return one_by_one(self, replay, removals, question, progress)
        if self.form == SCREENED:
            return self._screened(replay, removals, question, progress)
        if self.form == DEFECT:
            return self._defect(replay, removals, question, progress)
        return self._tracked(replay, removals, question, progress)

    def _tracked(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """What the second order changed bounds, in practice, what the third and all after it would: the correction by the
        own Hessians, the curvature of the query, and how far the shift's own linear readout is off. Their sum is the
        uncertainty.
        """
        n, most = len(removals), budget.most_directions(replay)
        exactly = 0
        if question.readout == "exact":
            exactly = budget.read_exactly(replay.run, n, question.query, question.moments.readings)
        passed = tracked(replay, removals, question, self.directions, most, exactly, lambda done: progress(0.9 * done))
        details: dict[str, Any] = {
            "directions_used": passed.basis.directions,
            "largest_left_out": passed.basis.left,
            "shift_error": passed.shift_error,
        }
        scores, uncertainty = passed.scores, (passed.scores - passed.first).abs()
        if passed.shift_error > TRUSTED:
            # Gradients taken at shifts as rough as these would make the scores worse, not better.
            if self.directions is None and not question.keep_shifts:
                instead = self._screened(replay, removals, question, lambda done: progress(0.9 + 0.1 * done))
                details = {**details, **instead.details, "fallback": SCREENED}
                return Answer(instead.scores, details=details, more=instead.more)
            details["fallback"] = "sgd-ie"
            scores = passed.first
        elif exactly:
            details["read_exactly"] = exactly
            uncertainty[passed.read] += passed.curvature.abs() + (passed.linear - scores[passed.read]).abs()
            scores[passed.read] += passed.curvature
        return Answer(scores, passed.shifts, passed.thetas, details, {"uncertainty": uncertainty})

    def _screened(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The same, with the most influential removals followed exactly."""
        followed = budget.most_followed(replay) if self.followed is None else self.followed
        passed = screened(replay, removals, question, followed, lambda done: progress(0.99 * done))
        details: dict[str, Any] = {"followed_exactly": passed.followed, "modelled": passed.modelled}
        if passed.model_error is not None:
            details["model_error"] = passed.model_error
        return Answer(passed.scores, details=details, more={"uncertainty": passed.uncertainty})

    def _defect(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """What the update itself changed bounds, in practice, what all that is left out would."""
        most = len(removals) if self.most is None else self.most
        at_once = budget.removals_at_once(budget.bytes_by_the_update(replay), question.memory)
        window = window_steps(replay)
        passed = defect(replay, removals, question, most, at_once, window, lambda done: progress(0.99 * done))
        changed, sizes = (passed.scores - passed.first).abs(), passed.first.abs()
        uncertainty = sizes * (changed.sum() / sizes[passed.followed].sum())  # of those that keep SGD-IE's score
        uncertainty[passed.followed] = changed[passed.followed]
        details = {"followed_by_the_update": len(passed.followed), "window": window}
        return Answer(passed.scores, details=details, more={"uncertainty": uncertainty})

    def warnings(self, details: Sequence[dict[str, Any]]) -> list[str]:
        """That shifts were too rough, and what the scores are instead."""
        failed = [one for one in details if "fallback" in one]
        if not failed:
            return []
        instead = "its scores are those of sgd-ie. Give more directions, or confirm the top of the ranking with loo."
        if any(one["fallback"] == SCREENED for one in failed):
            instead = "the most influential removals were followed instead, as followed= does at once."
        error = max(float(one["shift_error"]) for one in failed)
        return [
            f"In {failed[0]['directions_used']} directions the shifts that {self.name} takes gradients at are too rough "
            f"(relative error {error:.2f}): {instead}"
        ]
