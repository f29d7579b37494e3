"""What the forms of acc-low-rank cost on a run, in trainings of it.

All is counted in **numbers** that an update takes, in one pass over them. A step of a training takes as long as 200 000, and
as one more for every 25 multiplications of its forward pass; taken for one of many removals together, as 6000 and the same; a
product with the Hessian of its batch as 18 000 and 0.6 times that. Measured on a core by scripts/bench_defect.py and
scripts/bench_scaling.py, rather too high than too low: a price is what a run has at any time, on any machine, so that scores
depend on neither.
"""

from __future__ import annotations

import torch

from lightning_acc.core.devices import ON_CPU
from lightning_acc.core.optimizers import RULES
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank.defect.touched import kept_share, numbers_in_time
from lightning_acc.methods.low_rank.defect.windows import Windows
from lightning_acc.methods.low_rank.screened import DIRECTIONS, MOST_MODELLED, PLACES

STEP_NUMBERS, MULTIPLICATIONS, TOGETHER = 200_000, 25, 75
"""Of a step; the multiplications that take as long as a number; and those that are done in one large product."""
ROW_NUMBERS, PASSES, SEEN = 3000, 5, 5
"""What a removal that follows the update takes beside its own numbers; how many times as long as one pass many take; and as how
many passes a step that sees it."""
OWN_TENSOR, OWN_PASSES = 30_000, 3
"""What an update that is not affine takes in a training, more than SGD: for each tensor, and passes over all numbers."""
SWEEP, CALL = 4.5, 2.5
"""A sweep back, in trainings; and products with the Hessian of a batch, in steps of no numbers, beside their vectors."""


class Prices:
    """The prices on one run.

    Args:
        replay: of the run.
    """

    def __init__(self, replay: Replay) -> None:
        run = self._run = replay.run
        self._replay, self._steps, self._p, self._parts = replay, len(replay), run.n_parameters, len(replay.initial)
        self._seen = sum(len(step.sample_ids) for step in replay.records)
        self._batch = self._seen / self._steps
        self._work = training_work(replay) / self._steps / MULTIPLICATIONS
        self._step = STEP_NUMBERS + self._work
        self._row = self._work + 2 * ROW_NUMBERS + self._parts * self._p / 2
        self._product = 0.6 * self._work + 6 * ROW_NUMBERS + self._parts * self._p / 2
        self._call = CALL * STEP_NUMBERS / self._step

    def retrained(self, n: int) -> float:
        """Of training again without each of n removals, many at a time."""
        return n * self._row / self._step

    def tracked(self, n: int, directions: int) -> float:
        """Of n removals whose shifts are tracked in so many directions: a sweep back, the basis, and the pass forward."""
        p, batch, parts = self._p, self._batch, self._parts
        searched = 0.0 if directions >= p else self.basis(directions, bases.MOST_STEPS)
        own = 4 * self._work + batch * (2 * ROW_NUMBERS + (8 + 2 * parts) * p)
        algebra = (5 * batch * p * directions + (n * parts + p) * directions**2) / TOGETHER
        forward = 1.5 + 3 * self._call + (own + directions * self._product + algebra) / self._step
        pieces = -(-n * parts * p * self._replay.initial[0].element_size() // ON_CPU)
        return max(1, pieces) * (SWEEP + searched + forward)

    def basis(self, directions: int, places: int) -> float:
        """Of the search for so many directions, by products at so many steps."""
        products = bases.ITERATIONS * min(places, self._steps) / self._steps
        return products * (self._call + (directions + bases.OVERSAMPLING) * self._product / self._step)

    def curve(self) -> float:
        """Of a direction of the query's curvature, whose adjoint goes back beside the query's own."""
        return 1.2 * self._product / self._step

    def screening(self) -> float:
        """Of what the removals that are followed exactly share: the sweep back, and the run once more beside them."""
        return SWEEP + 1.5 + 2 * self._call

    def followed(self, examples: int) -> float:
        """Of each that is followed exactly, and read on so many examples of the query."""
        return 1.2 * self._product / self._step + self._visits() + self.reading(examples)

    def modelling(self) -> float:
        """Of modelling some on those that are followed."""
        return self.basis(DIRECTIONS, PLACES) + min(MOST_MODELLED, self._run.n_samples) * self._visits()

    def _visits(self) -> float:
        """Of the gradients and own Hessian products of a removal, where steps see it."""
        return self._batch / self._run.n_samples * (2 * ROW_NUMBERS + 12 * self._p) / self._step

    def reading(self, examples: int) -> float:
        """Of the query, read on so many examples at one removal's parameters."""
        return examples * training_work(self._replay) / self._seen / TOGETHER / (self._steps * self._step)

    def by_the_update(self, windows: Windows) -> float:
        """Of each that follows the update in such windows.

        It takes the numbers that it touches through its own update while it is in a window, beside those of the run, which all
        take that fit the memory of a CPU's default share; and where a step sees it, five times as many as there are for its
        gradient, what is left without that, and a window's beginning and end; and the multiplications of its own sample; of six
        where random numbers (dropout) are taken apart, as two by themselves take; or twice those of the whole batch where that
        cannot be.
        """
        step = self._replay.step(0)
        apart = step.single_samples(torch.zeros(1, 1, dtype=torch.long)) is not None
        visits = (
            self._work / self._run.n_samples * (1 if apart else min(6, 2 * self._batch) if step.apart() else 2 * self._batch)
        )
        visits += SEEN * self._p * self._batch / self._run.n_samples
        rule = RULES.get(self._run.manifest["optimizer"]["name"])
        passes = 1 if rule and rule.one_pass else PASSES
        each, at_a_step = bytes_by_the_update(self._replay)
        inside = windows.share(self._replay)
        together = max(1, (ON_CPU - at_a_step) // each) / inside
        followed = (ROW_NUMBERS + numbers_in_time(self._replay)) * inside + (ROW_NUMBERS + self._p) / together
        own = OWN_TENSOR * len(self._replay.layout.sizes) + OWN_PASSES * self._p
        return (passes * followed + visits) / (self._step + own)


def bytes_needed(replay: Replay) -> tuple[int, int]:
    """Bytes for each of the removals that are tracked together, and for a step on top of them all.

    That is the state, and at a step vectors and activations of those it sees, as for exact ACC.
    """
    vector, parts, largest = replay.initial[0].nbytes, len(replay.initial), _largest_step(replay)
    return parts * vector, 6 * (largest * vector + replay.activation_bytes)


def bytes_by_the_update(replay: Replay) -> tuple[int, int]:
    """Bytes for each of the removals that are in a window together, and for a step on top of them all.

    That is what of the state it touches, and the gradient without the removal; and at a step the run's own state, what the
    sweep back has kept of it, and vectors and activations of as many samples as single gradients are taken of together.
    """
    vector, parts, largest = replay.initial[0].nbytes, len(replay.initial), _largest_step(replay)
    together = min(largest, replay.states_at_once)
    at_a_step = (parts + 3 + 4 * together) * vector + 6 * replay.activation_bytes * together // max(1, largest)
    return round((parts * kept_share(replay) + 1) * vector), at_a_step


def training_work(replay: Replay) -> float:
    """Multiplications of the forward passes of a training; of a network of linear layers, occurrences * parameters."""
    occurrences = sum(len(step.sample_ids) for step in replay.records)
    return max(1.0, replay.multiplications * occurrences / max(1, _largest_step(replay)))


def _largest_step(replay: Replay) -> int:
    return max((len(step.sample_ids) for step in replay.records), default=0)
