"""Raw shifts as sums of outer products: for each visit of a sample out + in numbers of each linear layer, not out * in.

The same numbers as ``dense``, for single samples and modules whose trained parameters are all in linear layers. The inner
product of a sample's Hessian-vector product with one of its earlier gradients ``delta_v a_v^T`` is, layer by layer,

    < delta' a^T + delta a'^T , delta_v a_v^T >  =  (delta' . delta_v) (a . a_v) + (delta . delta_v) (a' . a_v).
"""

from __future__ import annotations

from collections.abc import Iterable

import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank.factors import Factors, LinearFactors
from lightning_acc.methods.low_rank.method import RawShifts, Seen


class Visits:
    """Where the occurrences of n samples stand in the order of training.

    Args:
        steps: sample ids (B,) of every step.
        owners: for every sample id, which removal it is, or -1; (n_samples,).
        n: number of removals.

    Attributes:
        rows: for every step, the rows of the batch that count.
        owners: for every step, which removal each of these belongs to.
        first: number of the first occurrence of every step, and of one step more.
    """

    def __init__(self, steps: Iterable[Tensor], owners: Tensor, n: int) -> None:
        steps = list(steps)
        self.rows = [torch.nonzero(owners[ids] >= 0)[:, 0] for ids in steps]
        self.owners = [owners[ids[rows]] for ids, rows in zip(steps, self.rows, strict=True)]
        self.first = torch.tensor([0, *(len(rows) for rows in self.rows)]).cumsum(0).tolist()
        together = torch.cat([owners[:0], *self.owners])
        counts = torch.bincount(together, minlength=n)
        order = torch.argsort(together, stable=True)
        place = torch.empty_like(order)
        place[order] = torch.arange(len(order)) - torch.repeat_interleave(counts.cumsum(0) - counts, counts)
        self._table = torch.full((n, int(counts.max()) if n else 0), len(order))
        self._table[together, place] = torch.arange(len(order))

    @property
    def total(self) -> int:
        """Number of occurrences."""
        return int(self.first[-1])

    def before(self, t: int, who: Tensor) -> tuple[Tensor, Tensor]:
        """Numbers of the occurrences of these removals (m,) before step t, (m, v), and which of the entries are any."""
        past = self._table[who]
        known = past < self.first[t]
        most = int(known.sum(1).max()) if len(who) else 0
        return past[:, :most].clamp_max(max(0, self.first[t] - 1)), known[:, :most]


class FactoredShifts(RawShifts):
    """Keeps the factors of every visit, and what became of it in the optimizer's state.

    Args:
        factors: takes gradients apart.
        visits: the occurrences of the removed samples.
        basis: Q, (p, r).
        parts: number of tensors of the state.
        n: number of removals.
    """

    def __init__(self, factors: LinearFactors, visits: Visits, basis: Tensor, parts: int, n: int) -> None:
        self._factors, self._visits = factors, visits
        self._directions = torch.cat([basis.T, basis.new_zeros(1, len(basis))])
        """The columns of Q, and below them the gamma of the step."""
        self._q = [layer.of(self._directions[:-1])[0] for layer in factors.layers]
        shapes = [layer.weight[1] for layer in factors.layers]
        self._inputs = [basis.new_empty(visits.total, shape[1]) for shape in shapes]
        self._deltas = [basis.new_empty(visits.total, shape[0]) for shape in shapes]
        self._sizes = basis.new_zeros(visits.total, parts)
        """How much of each visit's gradient there is in each part of the state."""
        self._a = basis.new_zeros(n, parts, basis.shape[1])
        """Q^T u, in each part of the state."""
        self._weights, self._projected = basis.new_zeros(0), basis.new_zeros(0)
        self._t = 0

    def removals_in(self, t: int, step: Step) -> Tensor:
        who: Tensor = torch.unique(self._visits.owners[t])
        return who

    def see(self, t: int, step: Step, state: State, gamma: Tensor, z: Tensor, mixing: Tensor) -> Seen:
        visits, r = self._visits, len(self._directions) - 1
        self._directions[r] = gamma
        f = self._factors(step, state[0], self._directions)
        contraction = _contraction(f, self._q, step.weights, r)
        self._t = t
        rows, owners = visits.rows[t], visits.owners[t]
        who = self.removals_in(t, step)
        inverse = torch.searchsorted(who, owners)
        self._a[who] = mixing @ self._a[who]
        y, z, mixing = (z - self._a[who, 0])[inverse], z[inverse], mixing[inverse]  # of each occurrence
        weights = self._weights = step.weights[rows]

        past, known = visits.before(t, owners)
        self._sizes[past[known]] = torch.einsum("mkl,mvl->mvk", mixing, self._sizes[past])[known]
        sizes = self._sizes[past][..., 0] * known
        everyone = len(rows) == len(step.sample_ids)
        projected = gamma.new_zeros(len(rows), r)
        curved = gamma.new_zeros(len(rows), r)  # Q^T H_i gamma
        own = gamma.new_zeros(len(rows), r)
        first = gamma.new_zeros(len(rows))
        second = gamma.new_zeros(len(rows))
        for i, direction in enumerate(self._q):
            a, delta = f.inputs[i][rows], f.deltas[i][rows]
            moved, bent, direct = f.input_changes[i], f.delta_changes[i], f.direct[i]
            if not everyone:
                bent, direct = bent[:, rows], direct[:, rows]
            along = torch.einsum("mo,kmo->mk", delta, direct)
            projected += along[:, :r]
            first += along[:, r]
            curved += torch.einsum("mo,kmo->mk", bent[r], direct[:r])
            own += torch.einsum("mo,kmo->mk", torch.einsum("mk,kmo->mo", z, bent[:r]), direct[:r])
            products = torch.einsum("mo,mvo->mv", bent[r], self._deltas[i][past])
            inputs = self._inputs[i][past]
            kernel = torch.einsum("mi,mvi->mv", a, inputs)
            if self._factors.layers[i].bias is not None:
                kernel = kernel + 1
            second += (products * kernel * sizes).sum(1)
            if moved is not None:
                moved = moved if everyone else moved[:, rows]
                curved += torch.einsum("mo,koi,mi->mk", delta, direction, moved[r])
                own += torch.einsum("mo,koi,mi->mk", delta, direction, torch.einsum("mk,kmi->mi", z, moved[:r]))
                kernel = torch.einsum("mo,mvo->mv", delta, self._deltas[i][past])
                second += (kernel * torch.einsum("mi,mvi->mv", moved[r], inputs) * sizes).sum(1)
            place = slice(visits.first[t], visits.first[t + 1])
            self._inputs[i][place], self._deltas[i][place] = a, delta
        second += (curved * y).sum(1)

        def together(values: Tensor) -> Tensor:
            weighted = values * weights.reshape(-1, *[1] * (values.ndim - 1))
            return values.new_zeros(len(who), *values.shape[1:]).index_add(0, inverse, weighted)

        self._projected = together(projected)
        return Seen(self._projected, together(own), together(first), together(second), contraction)

    def add(self, drift: Tensor, source: Tensor) -> None:
        visits, t = self._visits, self._t
        who = torch.unique(visits.owners[t])
        self._a[who] = drift @ self._a[who] - source[:, None] * self._projected[:, None]
        past, known = visits.before(t, who)
        self._sizes[past[known]] = self._sizes[past[known]] @ drift.T
        self._sizes[visits.first[t] : visits.first[t + 1]] = -self._weights[:, None] * source

    def shifts(self, removals: Tensor, z: Tensor, mixing: Tensor) -> Tensor:
        past, known = self._visits.before(self._t + 1, removals)
        sizes = torch.einsum("mk,mvk->mv", mixing[:, 0], self._sizes[past]) * known
        u = sizes.new_zeros(len(removals), self._directions.shape[1])
        for i, layer in enumerate(self._factors.layers):
            weight, bias = layer.of(u)
            deltas = sizes[..., None] * self._deltas[i][past]
            weight += torch.einsum("mvo,mvi->moi", deltas, self._inputs[i][past])
            if bias is not None:
                bias += deltas.sum(1)
        y = z - torch.einsum("mk,mkr->mr", mixing[:, 0], self._a[removals])
        return u + y @ self._directions[:-1]


def _contraction(f: Factors, directions: list[Tensor], weights: Tensor, r: int) -> Tensor:
    """``M = sum_i w_i Q^T H_i Q``, (r, r), from the changes along the first r directions."""
    total = weights.new_zeros(r, r)
    for direction, moved, bent, direct, delta in zip(
        directions, f.input_changes, f.delta_changes, f.direct, f.deltas, strict=True
    ):
        total += direct[:r].flatten(1) @ (weights[:, None] * bent[:r]).flatten(1).T
        if moved is not None:
            products = torch.einsum("mo,kmi->koi", weights[:, None] * delta, moved[:r])
            total += direction.flatten(1) @ products.flatten(1).T
    return total
