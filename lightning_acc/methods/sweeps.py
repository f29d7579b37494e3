"""The driver: takes a rule through the steps of a replay, for one chunk of removals."""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor

from lightning_acc.core.audit import confirm
from lightning_acc.core.optimizers import State
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.core.tape import Tape
from lightning_acc.methods.memory import of_the_tape
from lightning_acc.methods.method import Question
from lightning_acc.methods.reading import Slopes
from lightning_acc.methods.rules import AdjointSgdIe, ForwardRule, LeaveOneOut

Progress = Callable[[float], None]
"""Told the fraction of the work done, from 0 to 1, now and then."""


class Shifted(NamedTuple):
    """Where a forward sweep ends.

    Attributes:
        theta: final parameters of the run, (p,).
        shifts: of the parameters under n removals, (n, p).
        bend: the most that each shift changed the gradient by on the way, as a share of the largest gradient so far, (n,);
            0 where the rule linearises nothing.
    """

    theta: Tensor
    shifts: Tensor
    bend: Tensor


def forward(
    replay: Replay,
    rule: ForwardRule[Any],
    removals: Sequence[Removal],
    progress: Progress = lambda _: None,
    reading: Callable[[int, Tensor, Tensor], None] = lambda t, theta, shifts: None,
    steps: Collection[int] = (),
) -> Shifted:
    """Take n removals forward through the run.

    Args:
        replay: of the run.
        rule: carries the shifts.
        removals: n removals.
        progress: told the fraction done.
        reading: told the run's parameters (p,) and the shifts (n, p) after each of ``steps``.
        steps: numbers t.
    """
    visits = first_visits(replay, removals)
    order = sorted((i for i, first in enumerate(visits) if first < len(replay)), key=visits.__getitem__)
    chunk, seen = Removals([removals[i] for i in order]), 0
    if not order:
        rule = LeaveOneOut()  # of nothing: the run itself

    def shifted(carry: Any) -> tuple[Tensor, Tensor]:
        theta, moved = rule.finish(carry)
        # A removal that no step has seen changes nothing: its shift is 0 by definition, not up to round-off.
        shifts = theta.new_zeros(len(removals), len(theta))
        shifts[order[:seen]] = moved[:seen]
        return theta, shifts

    carry = rule.init(replay.initial, chunk)
    checked = replay.initial[0]
    if 0 in steps:  # of an average
        reading(0, *shifted(carry))
    for t in range(1, len(replay) + 1):
        before, seen = seen, sum(visits[i] < t for i in order)
        rule.wake(carry, before, seen)
        carry = rule.advance(replay.step(t - 1), carry, chunk.part(0, seen))
        if t == replay.checked_at:
            checked = rule.finish(carry)[0]
        if t in steps and t < len(replay):
            reading(t, *shifted(carry))
        progress(t / len(replay))
    confirm(replay, checked, linear=not isinstance(rule, LeaveOneOut))
    theta, shifts = shifted(carry)
    if len(replay) in steps:
        reading(len(replay), theta, shifts)
    bend = theta.new_zeros(len(removals))
    if rule.bend is not None:
        bend[order] = rule.bend
    return Shifted(theta, shifts, bend)


def in_turn(
    replay: Replay,
    removals: Sequence[Removal],
    progress: Progress = lambda _: None,
    reading: Callable[[int, Tensor, Tensor], None] = lambda t, theta, shifts: None,
) -> Shifted:
    """Retrain without n removals, one after another, in the memory of two states and of what is read.

    To the last bit what ``forward`` does by ``LeaveOneOut``, where that works on states one by one.

    The run is taken once. Where it comes to the step that first sees a removal, a copy of its state goes on from there to the
    end without that.

    Args:
        replay: of the run.
        removals: n removals.
        progress: told the fraction done.
        reading: told the run's parameters (p,) and the shifts (n, p) at the end.
    """
    visits, total = first_visits(replay, removals), len(replay)
    done, work = 0, total + sum(total - first for first in visits)
    run = tuple(part.clone()[None] for part in replay.initial)
    checked = run[0][0].clone()
    shifts = checked.new_zeros(len(removals), len(checked))

    def went(step: Step, state: State, weights: Tensor) -> None:
        nonlocal done
        step.advance(state, weights)
        done += 1
        progress(done / work)

    for t in range(total):
        for i in (i for i, first in enumerate(visits) if first == t):
            without, removed = tuple(part.clone() for part in run), Removals([removals[i]])
            for later in range(t, total):
                step = replay.step(later)
                went(step, without, step.weights_without(removed))
            shifts[i] = without[0][0]
        step = replay.step(t)
        went(step, run, step.weights[None])
        if t + 1 == replay.checked_at:
            checked = run[0][0].clone()
    confirm(replay, checked, linear=False)
    theta = run[0][0]
    for i, first in enumerate(visits):
        if first < total:  # of one that no step has seen it is 0 by definition, not up to round-off
            shifts[i] -= theta
    reading(total, theta, shifts)
    return Shifted(theta, shifts, theta.new_zeros(len(removals)))


def reverse(
    replay: Replay, rule: AdjointSgdIe, question: Question, progress: Progress = lambda _: None, curves: int = 0
) -> Tensor:
    """Scores (n_samples,) of removing each sample by itself, for one query, in one sweep back through the run.

    Where each example of the query is asked about, (examples, n_samples), from their adjoints side by side; with so many
    ``curves``, directions of its curvature (``reading.Slopes``), (1 + curves, n_samples).
    """
    slopes = Slopes(replay, question, curves)
    tape = Tape(replay, of_the_tape(replay, question.memory, question.each or curves > 0), slopes.see)
    confirm(replay, tape.checked)
    progress(0.25)
    carry = rule.init(slopes(len(replay), tape.final), replay.initial, replay.run.n_samples)
    for done, (step, state) in enumerate(tape.backwards(), start=1):
        carry = rule.advance(step.at(state), carry)
        if len(replay) - done in question.moments.weights:
            carry = rule.read_again(carry, slopes(len(replay) - done, state[0]))
        progress(0.25 + 0.75 * done / len(replay))
    replay.ranks.add_up(carry[1])
    return carry[1]


def first_visits(replay: Replay, removals: Sequence[Removal]) -> list[int]:
    """For each removal the first step that sees any of its samples; the number of all steps where none does."""
    first = np.full(replay.run.n_samples, len(replay))
    for t, step in enumerate(replay.records):
        np.minimum.at(first, step.sample_ids.numpy(), t)
    return [min(first[list(removal)].tolist(), default=len(replay)) for removal in removals]
