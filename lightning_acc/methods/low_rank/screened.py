"""Screened: acc-low-rank for so many samples that few of their shifts can be followed through the training.

What ACC-SGD-IE adds to SGD-IE is of second order: it is felt by the few removals whose influence is largest, and SGD-IE's
sweep back tells which these are. So of all removals,

* the R most influential are **followed**: their shifts D are propagated as ACC-SGD-IE does, exactly, and read exactly. All
  share the batch's Hessian, so that each costs less than a training;
* for the next few hundred, the two things that are missing from SGD-IE's score are **modelled**:
  ``second = -sum_t <gamma_t, sum_i w_i H_i x>``, with x a rough shift that contracts by the averaged Hessian's eigenvalues
  in a basis Q of its top eigenvectors, and not at all outside; and the query's curvature along the **fresh** shift, which
  the last visit leaves and which is propagated exactly from there on, a few steps in most cases; it is known at the end of
  the run alone, and left out where the query is read at several steps. How much of either is really there, the followed ones
  tell: their second order is regressed on the same figures, so that ``score = SGD-IE + b_1 second + b_2 curvature``;
* of the others the query's curvature along SGD-IE's own shift is known from a few adjoints that went back beside the query's
  (``core.queries.curvature``): the second order of the followed ones is regressed on it, too, ``score = SGD-IE + b_3 curve``;
  where that does not hold, they keep SGD-IE's score.

With R at least the number of removals this is ACC-SGD-IE, exactly. Otherwise a score depends a little on the removals it was
screened among.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.products import Point, Removed
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import basis as bases
from lightning_acc.methods.low_rank.back import Back
from lightning_acc.methods.low_rank.tracked import updated, updated_by_range
from lightning_acc.methods.memory import query_rows
from lightning_acc.methods.method import Question
from lightning_acc.methods.reading import Gathered
from lightning_acc.methods.rules import without_the_removed

DIRECTIONS, PLACES = 30, 16
"""Directions of the basis, and steps that the Hessian is averaged over for it."""
MOST_MODELLED = 384
FRESH_SHARE = 1 / 6
"""Fresh shifts are propagated, all together, through so many steps as a share of those the followed ones take."""
TRUSTED, TRUSTED_CURVES = 0.7, 0.5
"""Largest relative errors, left-one-out on the followed removals, with which the model is used, and the curvature of the query:
with this all the others are corrected, of which most are far smaller than those it is seen of."""
ENOUGH = 8
"""With fewer that are followed nothing is modelled on them."""


@dataclass(frozen=True)
class Screened:
    """Scores of n removals.

    Attributes:
        scores: (n,).
        uncertainty: how far off each may be, (n,): what the second order changed, or would by the size of the first.
        followed: how many removals were followed exactly.
        modelled: how many more were corrected by the model.
        model_error: relative error (root mean square) of the model on the followed removals, each left out of it once; None
            where nothing can be.
        curve_error: the same of what the curvature of the query says of them.
    """

    scores: Tensor
    uncertainty: Tensor
    followed: int
    modelled: int
    model_error: float | None
    curve_error: float | None


def screened(
    replay: Replay,
    back: Back,
    removals: Sequence[Removal],
    question: Question,
    followed: int,
    models: bool,
    progress: Callable[[float], None] = lambda _: None,
) -> Screened:
    """Score n removals, the most influential of them as ACC-SGD-IE does: one pass forward.

    Args:
        replay: of the run.
        back: what the sweep back tells.
        removals: n removals.
        question: what is asked; its memory is for the shifts.
        followed: how many removals are followed exactly, at most.
        models: whether others are modelled on these.
        progress: told the fraction done.
    """
    total, objective, moments = len(replay), replay.objective, question.moments
    rows = query_rows(replay, question.query, question.memory) if question.readout == "exact" else None
    gathered = Gathered(moments)

    def curvature(t: int, theta: Tensor, of: Tensor) -> Tensor:
        """What the query's curvature adds along shifts at step t, with the step's share; of an average, at its last step."""
        if rows is None:
            return of.new_zeros(len(of))
        linear, read = of @ back.gradients[t], gathered(t, theta, of)
        return (0.0 if read is None else moments.share * question.query.changes(objective, read[0], read[1], rows)) - linear

    first = back.of(removals).to(back.final)
    last = _last_steps(replay, removals)
    followed, most = counts(replay, len(removals), question.memory, followed)
    chosen, followed = _chosen(first, last, total, followed, most if models else 0)
    basis = bases.empty(back.final)
    if len(chosen) > followed:  # some are modelled
        basis = bases.find(back.places[:: -(-len(back.places) // PLACES)], min(DIRECTIONS, len(back.final) - 1))
    shifts = Shifts(Removals([removals[i] for i in chosen]), followed, last[chosen], basis, replay)
    state, curved = replay.initial, first.new_zeros(followed)
    if 0 in moments.weights:  # of an average
        curved += curvature(0, state[0], shifts.exact[0])
    for t in range(total):
        point = replay.step(t).at(state)
        shifts.advance(t, point, back.gammas[t].to(replay.device))
        state = point.next()
        if t + 1 in moments.weights:
            curved += curvature(t + 1, state[0], shifts.exact[0])
        progress((t + 1) / total)

    truly = shifts.second + curved
    corrections, sizes, error = truly, shifts.second.abs() + curved.abs(), None
    if shifts.modelling:
        figures = shifts.rough_second[:, None]
        if moments.steps == (total,) and moments.average is None:  # the fresh shifts are those of the end alone
            figures = torch.cat([figures, curvature(total, state[0], shifts.latest)[:, None]], 1)
        coefficients, error = _regressed(figures[:followed], truly)
        parts = coefficients * figures[followed:]
        corrections, sizes = torch.cat([truly, parts.sum(1)]), torch.cat([sizes, parts.abs().sum(1)])
        if error is None or error > TRUSTED:
            chosen, corrections, sizes = chosen[:followed], truly, sizes[:followed]
    scores, curves, curve_error = first.clone(), back.curved(removals).to(first), None
    if len(back.curves) and followed >= ENOUGH:
        (share,), curve_error = _regressed(curves[chosen[:followed], None], truly)
        if curve_error is not None and curve_error <= TRUSTED_CURVES:
            scores += share * curves
    scores[chosen] = first[chosen] + corrections
    # The second order grows with the square of the first: by how much, those that were followed tell.
    squares = first[chosen[:followed]] ** 2
    ratio = sizes[:followed] @ squares / (squares @ squares).clamp_min(1e-300)
    uncertainty = first**2 * (ratio if followed else torch.nan)
    uncertainty[chosen] = sizes
    return Screened(scores, uncertainty, followed, len(chosen) - followed, error, curve_error)


def counts(replay: Replay, n: int, memory: int, followed: int) -> tuple[int, int]:
    """How many of n removals are followed, and how many are modelled at most, within ``memory`` bytes."""
    size = sum(part.nbytes for part in replay.initial)
    followed = min(n, followed, max(1, memory // (8 * size)))
    return followed, min(n - followed, MOST_MODELLED, memory // (4 * size)) if followed >= ENOUGH else 0


class Shifts:
    """The shifts of the chosen removals, taken forward step by step.

    Args:
        removals: m removals, the most influential first.
        followed: so many of them are followed exactly; if that is not all, figures to model the others by are taken of all.
        last: the last step that sees each of them, (m,).
        basis: directions in which rough shifts contract.
        replay: of the run.
    """

    def __init__(self, removals: Removals, followed: int, last: Tensor, basis: bases.Basis, replay: Replay) -> None:
        self._removals, self._last = removals, last
        # Directions that the average Hessian would let grow are left alone: it does not stay the same for so long.
        self._basis, self._values = basis.vectors, basis.values.clamp_min(0)
        like, parts, m = replay.initial[0], len(replay.initial), len(last)
        self.exact = [like.new_zeros(followed, len(like)) for _ in range(parts)]
        """Of those that are followed: the shifts of the parts of the state, (R, p) each."""
        self.second = like.new_zeros(followed)
        """``-sum_t <gamma_t, sum_i w_i H_i D>``, (R,)."""
        self.modelling = m > followed
        # The raw shift u, as it was after the step that last saw the removal; after its last visit, what that visit left.
        self._rows = [like.new_zeros(m if self.modelling else 0, len(like)) for _ in range(parts)]
        self._z = [like.new_zeros(m, basis.directions) for _ in range(parts)]
        """The rough shift in the basis."""
        self.rough_second = like.new_zeros(m)
        """The same with the rough shift, (m,)."""
        self._since = torch.eye(parts).to(like).repeat(len(replay) + 1, 1, 1)
        """By the step a removal was last seen at, plus 1: the product of all updates since."""
        self._seen = torch.zeros(m, dtype=torch.int64)

    @property
    def latest(self) -> Tensor:
        """What the last visits left of the parameters' shifts, (m, p), after the last step."""
        return self._rows[0]

    def advance(self, t: int, point: Point, gamma: Tensor) -> None:
        """Take step t, linearised at the recorded run's state; ``gamma`` is (p,)."""
        step = point.step
        responses = [(at, drift.to(gamma), source.to(gamma)) for at, drift, source in step.optimizer.responses(step.groups)]
        removed = point.removed(self._removals, curved=True)
        who, followed = removed.removals, len(self.second)
        near = who < followed
        started = torch.nonzero(self._seen[:followed])[:, 0]
        fresh = torch.nonzero(self._last < t)[:, 0] if self.modelling else who[:0]
        moved = self.exact[0] if len(started) == followed else self.exact[0][started]
        curved = point.hessian_product(torch.cat([moved, self._rows[0][fresh]]) if len(fresh) else moved)
        change = curved[: len(started)]
        if len(started) < followed:
            change = torch.zeros_like(self.exact[0]).index_copy_(0, started.to(change.device), change)
        if near.any():
            shifts = torch.zeros_like(removed.gradients)
            shifts[near] = self.exact[0][who[near]]
            own = removed.hessian_product(shifts)[near]
            self.second[who[near]] -= own @ gamma
            change = without_the_removed(change, who[near], removed.gradients[near], own)
        self.exact = updated_by_range(self.exact, change, responses)
        if self.modelling:
            ((_, drift, source),) = responses  # nothing is modelled where they differ
            self._model(t, removed, gamma, drift, source)
            self._put(fresh, updated([part[fresh] for part in self._rows], curved[len(started) :], drift, source))
            self._since[: t + 1] = drift @ self._since[: t + 1]
        self._seen[who] = t + 1

    def _model(self, t: int, removed: Removed, gamma: Tensor, drift: Tensor, source: Tensor) -> None:
        who = removed.removals
        rows = torch.stack([part[who] for part in self._rows], 1)
        raw = list((self._since[self._seen[who]] @ rows).unbind(1))
        rough = raw[0] + (self._z[0][who] - raw[0] @ self._basis) @ self._basis.T
        self.rough_second[who] -= removed.hessian_product(rough) @ gamma
        change = self._z[0] * self._values
        change[who] -= removed.gradients @ self._basis
        self._z = updated(self._z, change, drift, source)
        for part in raw:
            part[self._last[who] == t] = 0.0
        self._put(who, updated(raw, -removed.gradients, drift, source))

    def _put(self, who: Tensor, parts: list[Tensor]) -> None:
        for part, new in zip(self._rows, parts, strict=True):
            part[who] = new


def _last_steps(replay: Replay, removals: Sequence[Removal]) -> Tensor:
    """The last step that saw something of each removal, -1 where none did; (n,)."""
    last = torch.full((replay.run.n_samples,), -1)
    for t, step in enumerate(replay.records):
        last[step.sample_ids] = t
    return torch.tensor([max((int(last[i]) for i in removal), default=-1) for removal in removals])


def _chosen(first: Tensor, last: Tensor, total: int, followed: int, most: int) -> tuple[Tensor, int]:
    """The removals to look at, the most influential first, and how many of them to follow exactly.

    Those to model are taken as long as the steps from their last visits to the end, together, are affordable.
    """
    order = first.abs().argsort(descending=True, stable=True).cpu()
    order = order[last[order] >= 0]
    near, rest = order[:followed], order[followed:]
    ages = (total - 1 - last[near]).sum() + (total - 1 - last[rest]).cumsum(0)
    affordable = int((ages <= FRESH_SHARE * len(near) * total).sum())
    return torch.cat([near, rest[: min(most, affordable)]]), len(near)


def _regressed(figures: Tensor, target: Tensor) -> tuple[Tensor, float | None]:
    """Coefficients (k,) of the figures (R, k) that give the target (R,), by least squares; and their relative error.

    The error is that of predicting each one from the others, by the leverages of the regression; None where a removal that
    is followed has no finite figures, as without it the run diverges.
    """
    if not bool(torch.isfinite(figures).all() and torch.isfinite(target).all()):
        return figures.new_zeros(figures.shape[1]), None
    inverse = torch.linalg.pinv(figures.double(), rtol=1e-6)
    coefficients = inverse @ target.double()
    leverages = (figures.double() * inverse.T).sum(1)
    left_out = (target.double() - figures.double() @ coefficients) / (1 - leverages).clamp_min(1e-6)
    return coefficients.to(figures), float(left_out.norm() / target.double().norm().clamp_min(1e-300))
