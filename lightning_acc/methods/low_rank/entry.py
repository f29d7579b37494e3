"""The entry of acc-low-rank: in which form it takes a run, and what it makes of the passes.

A ranking of all samples may cost 25 trainings of the run, or as many as are asked for. Where 25 pay for following all
directions of the parameters, the removals are **tracked** in these, which is ACC-SGD-IE. Where not, and what is asked for pays
for training again without each sample, all are **retrained** without, which is the truth. Otherwise they are tracked in the
directions that training contracts most, if these are nearly all that it contracts in; or **screened**: the few most influential
removals are followed exactly, some hundreds more are modelled on them. Where the update is affine but not the same for all
parameters, as in groups with rates of their own, they are retrained without, or screened and nothing is modelled. Where it is
not affine, as Adam's is not, its **defect** is followed.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank import budget
from lightning_acc.methods.low_rank.back import Back, scratch_bytes, sweep_back
from lightning_acc.methods.low_rank.basis import Basis
from lightning_acc.methods.low_rank.choice import DEFECT, RETRAINED, SCREENED, Chosen, not_uniform
from lightning_acc.methods.low_rank.defect.scores import defect, has_a_defect, vectors_kept
from lightning_acc.methods.low_rank.prices import Prices, bytes_by_the_update, bytes_needed
from lightning_acc.methods.low_rank.screened import ENOUGH, screened
from lightning_acc.methods.low_rank.tracked import LEFT_TO_CONTRACT, LEFT_TOO_MUCH, duration, tracked
from lightning_acc.methods.memory import even_pieces, filed_bytes
from lightning_acc.methods.method import Answer, Question, one_by_one
from lightning_acc.methods.reading import is_curved
from lightning_acc.methods.swept import RETRAINING, refuse_other_losses, refuse_without_derivative

TRUSTED = 0.5
"""Largest relative error of the shifts' linear readout with which they are still used."""


class LowRank(Chosen):
    """acc-low-rank, in the form it was ``settled`` in."""

    readout = "exact"
    details = (
        *("directions_used", "largest_left_out", "shift_error", "fallback", "read_exactly"),
        *("followed_exactly", "modelled", "model_error", "curve_error"),
        *("followed_by_the_update", "window"),
    )

    @property
    def is_relative(self) -> bool:  # type: ignore[override]
        """Where the most influential of those asked about alone are followed."""
        return self.form == SCREENED or self.most is not None

    def default_readout(self, keep_shifts: bool) -> str:
        """Linear by the defect, unless the query's curvature is asked for, which costs more."""
        return "linear" if self.form == DEFECT else super().default_readout(keep_shifts)

    def check(self, replay: Replay) -> None:
        """Refuse what acc-low-rank does not describe.

        Raises:
            RequestError: the update has no derivative, or the losses would be others than the training's.
        """
        refuse_other_losses(replay, self.name)
        if has_a_defect(replay.run):
            refuse_without_derivative(replay, self.name)

    def pieces(self, replay: Replay, removals: Sequence[Removal], question: Question) -> list[list[Removal]]:
        """As many as can be tracked at once; screened, all.

        Raises:
            RequestError: it cannot answer this question on this run.
        """
        self.check(replay)
        if self.form == RETRAINED:
            return RETRAINING.pieces(replay, removals, question)
        if self.form == DEFECT and question.readout == "exact":
            self._refuse_uncurved(replay, question)
        if self.is_relative:
            return even_pieces(removals, max(1, len(removals)))
        if self.form == DEFECT:
            return even_pieces(removals, self.piece_by_the_update(replay, len(removals), question.memory))
        return even_pieces(removals, budget.removals_at_once(bytes_needed(replay), question.memory))

    def blocks(
        self, replay: Replay, removals: Sequence[Removal], examples: Sequence[int], question: Question
    ) -> list[tuple[list[Removal], list[int]]]:
        """Example by example: each needs a pass of its own."""
        if self.form == RETRAINED:
            return RETRAINING.blocks(replay, removals, examples, question)
        return [(piece, [example]) for example in examples for piece in self.pieces(replay, removals, question)]

    def smaller(self, piece: list[Removal], question: Question) -> list[list[Removal]]:
        """Screened removals are screened together."""
        return [piece] if self.is_relative else super().smaller(piece, question)

    def least_bytes(self, replay: Replay, each: bool = False) -> int:
        """Of one removal that is tracked, or follows the update; screened, it fits its removals to what there is."""
        if self.form == SCREENED:
            return 0
        if self.form == RETRAINED:
            return RETRAINING.least_bytes(replay, each)
        return sum((bytes_by_the_update if self.form == DEFECT else bytes_needed)(replay))

    def scratch_bytes(self, replay: Replay, memory: int) -> int:
        """Of the sweep back."""
        if self.form == RETRAINED:
            return 0
        vectors = vectors_kept(replay, self.windows(replay).ends_at_most(replay)) if self.form == DEFECT else None
        return scratch_bytes(replay, vectors) + filed_bytes(replay, memory)

    def answer(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """The scores of one piece, how uncertain each is, and how they came about."""
        if self.form == RETRAINED:
            return RETRAINING.answer(replay, removals, question, progress)
        if question.each:
            return one_by_one(self, replay, removals, question, progress)
        if self.form == DEFECT:
            return self._defect(replay, removals, question, progress)
        curves = self._curves(replay, removals, question) if self.form == SCREENED else 0
        with sweep_back(replay, question, lambda done: progress(0.2 * done), curves) as back:
            if self.form == SCREENED:
                left = self.price - curves * Prices(replay).curve()
                return self._screened(replay, back, removals, question, left, lambda done: progress(0.2 + 0.8 * done))
            basis = self._basis(replay, back, question)
            progress(0.3)
            chosen = self.directions is None and not question.keep_shifts
            if chosen and basis.left * duration(replay) > LEFT_TOO_MUCH:
                left = self.price - Prices(replay).basis(basis.directions, bases.MOST_STEPS)
                instead = self._screened(replay, back, removals, question, left, lambda done: progress(0.3 + 0.7 * done))
                told = {"directions_used": basis.directions, "largest_left_out": basis.left, "fallback": SCREENED}
                return replace(instead, details={**told, **instead.details})
            return self._tracked(replay, back, basis, removals, question, lambda done: progress(0.3 + 0.7 * done))

    def _basis(self, replay: Replay, back: Back, question: Question) -> Basis:
        """Of the directions asked for, or of those that are affordable and that the training contracts."""
        if self.directions is not None:
            return bases.find(back.places, self.directions)
        most = budget.most_directions(replay, self.price) or budget.FEWEST_DIRECTIONS
        return bases.find(back.places, most, LEFT_TO_CONTRACT / max(duration(replay), 1e-30))

    def _tracked(
        self,
        replay: Replay,
        back: Back,
        basis: Basis,
        removals: Sequence[Removal],
        question: Question,
        progress: Callable[[float], None],
    ) -> Answer:
        """What the second order changed bounds, in practice, what the third and all after it would: the correction by the
        own Hessians, the curvature of the query, and how far the shift's own linear readout is off. Their sum is the
        uncertainty.
        """
        exactly = 0
        if question.readout == "exact":
            exactly = budget.read_exactly(replay, len(removals), question.query, question.moments.readings, self.price)
        passed = tracked(replay, back, basis, removals, question, exactly, progress)
        details: dict[str, Any] = {
            "directions_used": passed.basis.directions,
            "largest_left_out": passed.basis.left,
            "shift_error": passed.shift_error,
        }
        scores, uncertainty = passed.scores, (passed.scores - passed.first).abs()
        if passed.shift_error > TRUSTED:
            # Gradients taken at shifts as rough as these would make the scores worse, not better.
            details["fallback"] = "sgd-ie"
            scores = passed.first
        elif exactly:
            details["read_exactly"] = exactly
            uncertainty[passed.read] += passed.curvature.abs() + (passed.linear - scores[passed.read]).abs()
            scores[passed.read] += passed.curvature
        return Answer(scores, passed.shifts, passed.thetas, details, {"uncertainty": uncertainty})

    def _screened(
        self,
        replay: Replay,
        back: Back,
        removals: Sequence[Removal],
        question: Question,
        trainings: float,
        progress: Callable[[float], None],
    ) -> Answer:
        """The same, with the most influential removals followed exactly."""
        followed = self._followed(replay, question, trainings)
        affordable = self.followed is not None or budget.models(replay, trainings)
        models = affordable and not_uniform(replay) is None
        passed = screened(replay, back, removals, question, followed, models, progress)
        details: dict[str, Any] = {"followed_exactly": passed.followed, "modelled": passed.modelled}
        errors = {"model_error": passed.model_error, "curve_error": passed.curve_error}
        details |= {name: error for name, error in errors.items() if error is not None}
        return Answer(passed.scores, details=details, more={"uncertainty": passed.uncertainty})

    def _followed(self, replay: Replay, question: Question, trainings: float) -> int:
        """How many removals are followed exactly for so many trainings, or were asked for."""
        if self.followed is not None:
            return self.followed
        times = question.moments.readings if question.readout == "exact" else 0
        return budget.most_followed(replay, trainings, question.query, times)

    def _curves(self, replay: Replay, removals: Sequence[Removal], question: Question) -> int:
        """In how many directions the query's curvature is told: none where all are followed, or too few to see if it helps."""
        curves = budget.curves(replay, question.memory, self.price) if question.readout == "exact" else 0
        left = self.price - curves * Prices(replay).curve()
        can_be_seen = ENOUGH <= self._followed(replay, question, left) < len(removals)
        return curves if can_be_seen and is_curved(replay, question.query) else 0

    def _refuse_uncurved(self, replay: Replay, question: Question) -> None:
        """Refuse to read what follows the update exactly, which is done by the query's curvature, where that is not known.

        Raises:
            RequestError: no curvature is seen in the query, or its directions are not affordable.
        """
        why = None
        if not budget.curves(replay, question.memory, self.price):
            why = f"{budget.FEWEST_CURVES} directions of it take more than memory_gb or trainings allow"
        elif not is_curved(replay, question.query):
            why = f"the query {question.query.name!r} is not made of losses of torch.nn.functional, which it is known of"
        if why is not None:
            raise RequestError(
                f"readout='exact' of {self.name} reads a run of {replay.run.manifest['optimizer']['name']} by the query's "
                f"curvature, but {why}: use readout='linear', or acc-sgd-ie."
            )

    def _defect(
        self, replay: Replay, removals: Sequence[Removal], question: Question, progress: Callable[[float], None]
    ) -> Answer:
        """What the update itself changed bounds, in practice, what all that is left out would."""
        most = len(removals) if self.most is None else self.most
        at_once = budget.removals_at_once(bytes_by_the_update(replay), question.memory)
        windows = self.windows(replay)
        curves = budget.curves(replay, question.memory, self.price) if question.readout == "exact" else 0
        passed = defect(replay, removals, question, most, at_once, windows, lambda done: progress(0.99 * done), curves)
        changed, sizes = (passed.scores - passed.first).abs(), passed.first.abs()
        uncertainty = sizes * (changed.sum() / sizes[passed.followed].sum())  # of those that keep SGD-IE's score
        uncertainty[passed.followed] = changed[passed.followed]
        details = {"followed_by_the_update": len(passed.followed), "window": windows.length}
        return Answer(passed.scores, details=details, more={"uncertainty": uncertainty})

    def told(self, details: dict[str, Any], n: int) -> dict[str, Any]:
        """That all follow the update, piece by piece, where not the most influential alone do."""
        return details if self.is_relative or self.form != DEFECT else {**details, "followed_by_the_update": n}

    def warnings(self, details: Sequence[dict[str, Any]]) -> list[str]:
        """That shifts were too rough, and what the scores are instead."""
        failed = [one for one in details if one.get("fallback", SCREENED) != SCREENED]
        if not failed:
            return []
        error = max(float(one["shift_error"]) for one in failed)
        return [
            f"In {failed[0]['directions_used']} directions the shifts that {self.name} takes gradients at are too rough "
            f"(relative error {error:.2f}): its scores are those of sgd-ie. Give more directions or trainings, or confirm the "
            "top of the ranking with loo."
        ]
