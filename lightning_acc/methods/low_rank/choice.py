"""In which form acc-low-rank takes a run: by what is asked for, or by what is worth so many trainings of it."""

from __future__ import annotations

from typing import Any

from lightning_acc import arguments
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.low_rank import budget
from lightning_acc.methods.low_rank.defect.scores import has_a_defect
from lightning_acc.methods.low_rank.defect.windows import Windows, usual
from lightning_acc.methods.low_rank.prices import Prices
from lightning_acc.methods.method import Method

TRACKED, SCREENED, DEFECT, RETRAINED = "tracked", "screened", "defect", "retrained"


class Chosen(Method):
    """The options of acc-low-rank, and its form.

    Args:
        directions: in how many it follows the contraction of the training; None chooses.
        followed: how many removals it follows exactly, the rest being screened; None chooses.
        trainings: what a ranking of all samples may cost, where it chooses; None: 25.
        form: ``"tracked"``, ``"screened"``, ``"defect"`` or ``"retrained"``; None until it is ``settled``.
        unusual: whether that is not the form this run would be given by itself.
        most: how many follow the update where its defect is; None: all.
    """

    name = "acc-low-rank"

    def __init__(
        self,
        directions: int | None = None,
        followed: int | None = None,
        trainings: int | None = None,
        form: str | None = None,
        unusual: bool = False,
        most: int | None = None,
    ) -> None:
        self.directions, self.followed, self.trainings = directions, followed, trainings
        self.form, self.unusual, self.most = form, unusual, most

    def configured(self, **options: Any) -> Chosen:
        """With ``directions`` or ``followed``, whole numbers from 0, or ``trainings``, one from 1."""
        given: dict[str, int] = {}
        for option, least in (("directions", 0), ("followed", 0), ("trainings", 1)):
            value = options.pop(option, None)
            number = arguments.index(value)
            if value is not None and (number is None or number < least):
                words = f"{option}={arguments.shown(value)} is no number for {self.name}"
                raise RequestError(f"{words}: give a whole one, {least} or more.")
            if number is not None:
                given[option] = number
        super().configured(**options)
        if len(given) > 1:
            words = " and ".join(f"{option}={number}" for option, number in given.items())
            raise RequestError(f"{words} each say how {self.name} goes about a run: give one of them.")
        return type(self)(given.get("directions"), given.get("followed"), given.get("trainings"))

    @property
    def price(self) -> int:
        """In trainings, of a ranking of all samples."""
        return budget.TRAININGS if self.trainings is None else self.trainings

    def settled(self, replay: Replay, keep_shifts: bool) -> Chosen:
        """In the form that the run is given by itself, or that what is asked for needs.

        Raises:
            RequestError: shifts are to be kept of removals that are screened, or directions or shifts are asked for where the
                update is not affine, or not the same for all parameters.
        """
        if has_a_defect(replay.run):
            return self._by_defect(replay, keep_shifts)
        form = usual = self._usual(replay)
        if self.followed is not None:
            form = SCREENED
            if keep_shifts:
                raise RequestError(f"followed={self.followed} has the shifts of a few removals alone: leave one out.")
        elif self.directions is not None or keep_shifts:
            form = TRACKED
        if form == TRACKED and (why := not_uniform(replay)):
            given = f"directions={self.directions}" if self.directions is not None else f"keep_shifts={keep_shifts}"
            raise RequestError(
                f"{given} of {self.name} is for SGD with one setting for all parameters, which this run is not: {why}. Leave "
                "it out, or use acc-sgd-ie."
            )
        asked = self.followed is not None or self.directions is not None
        return type(self)(self.directions, self.followed, self.trainings, form, unusual=form != usual and not asked)

    def _usual(self, replay: Replay) -> str:
        price, n = Prices(replay), replay.run.n_samples
        if not_uniform(replay):
            return RETRAINED if price.retrained(n) <= self.price else SCREENED
        if price.tracked(n, replay.run.n_parameters) <= min(self.price, budget.TRAININGS):
            return TRACKED
        if price.retrained(n) <= self.price:
            return RETRAINED
        return TRACKED if budget.most_directions(replay, self.price) else SCREENED

    def _by_defect(self, replay: Replay, keep_shifts: bool) -> Chosen:
        given = f"directions={self.directions}" if self.directions is not None else f"keep_shifts={keep_shifts}"
        if keep_shifts or self.directions is not None:
            raise RequestError(
                f"{given} of {self.name} is for updates that are affine, as SGD's is without clipping, which this run's are "
                "not: leave it out, or use acc-sgd-ie."
            )
        n, most = replay.run.n_samples, self.followed
        if most is None:
            fully = budget.most_by_the_update(replay, min(self.price, budget.TRAININGS), usual(replay)) >= n
            if not fully and Prices(replay).retrained(n) <= self.price:
                return type(self)(trainings=self.trainings, form=RETRAINED)
            most = budget.most_by_the_update(replay, self.price, self.windows(replay))
        return type(self)(None, self.followed, self.trainings, DEFECT, most=None if most >= n else most)

    def windows(self, replay: Replay) -> Windows:
        """Those in which removals follow the update."""
        return budget.windows(replay, self.price, self.followed)

    def piece_by_the_update(self, replay: Replay, n: int, memory: int) -> int:
        """How many of n removals that follow the update are one piece of the work."""
        price = self.price if self.followed is None else None
        return budget.piece_by_the_update(replay, n, memory, self.windows(replay), price)

    @property
    def options(self) -> dict[str, str]:
        """The form, and how many directions, how many followed and how many trainings were asked for."""
        given = (("directions", self.directions), ("followed", self.followed))
        chosen = {name: "chosen" if value is None else str(value) for name, value in given}
        return {"form": str(self.form), **chosen, "trainings": str(self.price)}

    @property
    def label(self) -> str:
        """The name, and the option that was given, or the form where that is not what the run would be given by itself."""
        if self.unusual:
            return f"{self.name}.{self.form}"
        given = (("followed", self.followed), ("directions", self.directions), ("trainings", self.trainings))
        return ".".join([self.name, *(f"{value}-{option}" for option, value in given if value is not None)])


def not_uniform(replay: Replay) -> str | None:
    """Why the update is not one affine function for all parameters, in its first step or its last; None where it is."""
    reasons = (replay.update.not_uniform(replay.run.steps[t].groups) for t in (0, len(replay) - 1))
    return next((reason for reason in reasons if reason), None)
