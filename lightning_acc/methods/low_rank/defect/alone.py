"""A sweep back, and what removals make of the update alone, which ``defect`` is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from lightning_acc.core.devices import CPU
from lightning_acc.core.optimizers import Hyperparameters, State, Update, clipped
from lightning_acc.core.products import Point, Pulled
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Step
from lightning_acc.methods.low_rank.back import Scratch, of_the_query
from lightning_acc.methods.low_rank.defect.touched import CACHED, Units, units
from lightning_acc.methods.low_rank.defect.windows import Windows
from lightning_acc.methods.rules import AdjointSgdIe


class AdjointDefect(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps ``c_t`` and ``G_t`` of every step, and ``lambda_e`` where windows end.

    Where the query is read, ``c_t`` holds its gradient, too: so a shift is read on its way through a window.

    Args:
        n_steps: T.
        ends: the steps before which windows end.
        rows: where to keep them: 2 T + len(ends) * parts of the state, (p,) each.

    Attributes:
        n_steps: T.
        final: ``lambda_T``.
    """

    final: State

    def __init__(self, n_steps: int, ends: Sequence[int], rows: Scratch | Tensor) -> None:
        self.n_steps, self._rows = n_steps, rows
        self._place = {end: i for i, end in enumerate(ends)}
        self._t = n_steps

    def curvature(self, t: int) -> Tensor:
        """``c_t``, (p,)."""
        return self._rows[t]

    def gradient(self, t: int) -> Tensor:
        """``G_t``, (p,)."""
        return self._rows[self.n_steps + t]

    def at(self, end: int) -> State:
        """``lambda_e`` of a window's end, (p,) of each part of the state."""
        if end == self.n_steps:
            return self.final
        parts = len(self.final)
        first = 2 * self.n_steps + self._place[end] * parts
        return tuple(self._rows[first + k] for k in range(parts))

    def init(self, query_gradient: Tensor, state: State, n_samples: int) -> tuple[State, Tensor]:
        """The adjoint after the last step, (p,), and the scores, (n_samples,), none yet."""
        carry = super().init(query_gradient, state, n_samples)
        self.final = tuple(of_the_query(part).clone() for part in carry[0])
        return carry

    def see(self, point: Point, pulled: Pulled) -> None:
        """One step back."""
        self._t -= 1
        self.curvature(self._t).copy_(of_the_query(pulled.curvature))
        self.gradient(self._t).copy_(point.gradient)
        if self._t in self._place:
            for row, part in zip(self.at(self._t), pulled.adjoint, strict=True):
                row.copy_(of_the_query(part))

    def read_again(self, carry: tuple[State, Tensor], query_gradient: Tensor) -> tuple[State, Tensor]:
        """The query is read here, too: its gradient (p,) joins the adjoint (p,), and what is kept of the step."""
        gradient = of_the_query(query_gradient).to(CPU)
        self.curvature(self._t).add_(gradient)
        if self._t in self._place:
            self.at(self._t)[0].add_(gradient)
        return super().read_again(carry, query_gradient)


class UpdateAlone:
    """``s + D~`` of n removals, taken forward through the run; collects their scores.

    The run itself goes along: shifts are differences between results of the same operations, so that round-off cancels.

    Args:
        replay: of the run.
        removals: n removals.
        adjoints: of the sweep back.
        windows: in which steps each is followed.

    Attributes:
        scores: (n,).
    """

    def __init__(self, replay: Replay, removals: Removals, adjoints: AdjointDefect, windows: Windows) -> None:
        self._replay, self._removals, self._adjoints, self._windows = replay, removals, adjoints, windows
        self._own = tuple(part.clone() for part in replay.initial)
        self._parts = [Followed(part, len(removals), replay.device) for part in units(replay)]
        self._last = torch.full((len(removals),), -1)
        """The last step that saw each of them; -1 of those in no window."""
        self.scores = replay.initial[0].new_zeros(len(removals))

    def advance(self, t: int, step: Step) -> None:
        """Take step t."""
        device, update = self._replay.device, self._replay.update
        gradient, curvature = self._adjoints.gradient(t).to(device), self._adjoints.curvature(t).to(device)
        who, without = self._gradients_without(step, gradient)
        (gradient,) = clipped([gradient], step.groups)
        left = (self._last >= 0) & (self._windows.end(self._last) == t)
        left[who] = False  # the next window begins where the last one ends: they are one
        self._end(left, t)
        self._last[who] = t
        given = update.given(step.groups)
        for part in self._parts:
            own, h = part.units.each_of(self._own), given[part.units.parameter]
            seen = Seen(who, part.units.of(without), part.units.of(gradient).contiguous())
            part.begin(seen, own)
            part.advance(update, seen, own[0], part.units.of(curvature).contiguous(), h, self.scores)
            here = part.units.columns
            update.in_one_pass(tuple(one[here] for one in self._own), gradient[here], h)

    def _gradients_without(self, step: Step, gradient: Tensor) -> tuple[Tensor, Tensor]:
        """The k removals that the step has seen samples of, (k,), and what clipping leaves of the gradient (p,) without each,
        (k, p)."""
        who = self._removals.occurrences(step.sample_ids)[0].unique()
        found = gradient.new_empty(len(who), len(gradient))
        for some, rows in zip(who.split(step.states_at_once), found.split(step.states_at_once), strict=True):
            removed = step.removed(self._own[0], self._removals.only(some))  # of those alone that it has seen
            torch.sub(gradient, removed.gradients, out=rows)
        return who, clipped([found], step.groups)[0]

    def begin(self, t: int, count: int) -> None:
        """Windows of so many removals begin with step t, in as many units as usual: to see what the next step takes."""
        self._last[:count] = t
        for part in self._parts:
            part.begin_as_usual(count, part.units.each_of(self._own))

    def finish(self) -> None:
        """The last windows end after the last step."""
        self._end(self._last >= 0, self._adjoints.n_steps)

    def _end(self, who: Tensor, e: int) -> None:
        """The windows of these (n,) end after e steps."""
        if who.any():
            adjoint = tuple(part.to(self._replay.device) for part in self._adjoints.at(e))
            for part in self._parts:
                part.end(who, part.units.each_of(self._own), part.units.each_of(adjoint), self.scores)
            self._last[who] = -1


class Seen(NamedTuple):
    """What a step makes of a range of the parameters.

    Attributes:
        who: the k removals that it has seen samples of, (k,).
        without: the gradient without each, (k, U, width).
        gradient: that of the run, (U, width).
    """

    who: Tensor
    without: Tensor
    gradient: Tensor


@dataclass
class Block:
    """Some units of some removals that are taken through the update together.

    Attributes:
        owners: whose, (m,).
        units: which, (m,).
        parts: of the state, (m, width) each.
    """

    owners: Tensor
    units: Tensor
    parts: State

    def __len__(self) -> int:
        return len(self.owners)

    def and_then(self, other: Block) -> Block:
        """Both as one."""
        parts = zip(self.parts, other.parts, strict=True)
        return Block(torch.cat([self.owners, other.owners]), torch.cat([self.units, other.units]), tuple(map(torch.cat, parts)))

    def only(self, rows: Tensor) -> Block:
        """Of these rows alone, by their numbers."""
        return Block(self.owners[rows], self.units[rows], tuple(part.index_select(0, rows) for part in self.parts))

    def divided(self, mine: Tensor) -> tuple[Block, Block]:
        """The rows that are ``mine``, (m,), and the others."""
        count, none = int(mine.sum()), mine.new_empty(0, dtype=torch.long)
        if count in (0, len(mine)):
            return (self, self.only(none)) if count else (self.only(none), self)
        return self.only(mine.nonzero()[:, 0]), self.only((~mine).nonzero()[:, 0])


class Followed:
    """What n removals have made of a range of the parameters: of the units that they touched, each from then on.

    Args:
        units: the range.
        n: removals.
        device: where it is.
    """

    def __init__(self, units: Units, n: int, device: torch.device) -> None:
        self.units = units
        self._inside = torch.zeros(n, units.count, dtype=torch.bool, device=device)
        self._blocks: list[Block] = []

    def begin(self, seen: Seen, own: State) -> None:
        """Follow what the samples of a step touch, from the run's state (U, width) before it."""
        if len(seen.who) and self.units.count == 1:
            self._begin(seen.who, torch.ones_like(self._inside[: len(seen.who)]), own)
        elif len(seen.who):
            self._begin(seen.who, (seen.without != seen.gradient).any(-1), own)

    def begin_as_usual(self, n: int, own: State) -> None:
        """Follow as many units as samples touch in the mean, of each of the first n removals others."""
        some = torch.arange(max(1, round(self.units.share * self.units.count)))
        touched = torch.zeros(n, self.units.count, dtype=torch.bool)
        touched.scatter_(1, (torch.arange(n)[:, None] + some) % self.units.count, True)
        self._begin(torch.arange(n), touched.to(self._inside.device), own)

    def _begin(self, who: Tensor, touched: Tensor, own: State) -> None:
        who = who.to(self._inside.device)
        rows, places = (touched & ~self._inside[who]).nonzero(as_tuple=True)
        self._inside[who] |= touched
        most = self._most(own[0])
        for some, at in zip(rows.split(most), places.split(most), strict=True):
            self._blocks.append(Block(who[some], at, tuple(part.index_select(0, at) for part in own)))
        self._pack(most)

    def advance(self, update: Update, seen: Seen, own: Tensor, curvature: Tensor, h: Hyperparameters, scores: Tensor) -> None:
        """Read all along ``curvature``, and take them through the update.

        Args:
            update: U.
            seen: of the step.
            own: parameters of the run, (U, width).
            curvature: ``c_t``, (U, width).
            h: what the update is given of their parameter.
            scores: (n,), to which the readings are added.
        """
        at = scores.new_full((len(scores),), -1, dtype=torch.long)
        at[seen.who.to(at.device)] = torch.arange(len(seen.who), device=at.device)
        for block in self._blocks:
            scores.index_add_(0, block.owners, _along(block.parts[0] - _rows(own, block.units), curvature, block.units))
            gradient = seen.gradient.index_select(0, block.units)  # a copy, which is written to
            if len(seen.who):
                place = at[block.owners]
                (rows,) = (place >= 0).nonzero(as_tuple=True)
                gradient[rows] = seen.without[place[rows], block.units[rows]]
            update.in_one_pass(block.parts, gradient, h)

    def end(self, who: Tensor, own: State, adjoint: State, scores: Tensor) -> None:
        """The windows of the removals ``who``, (n,), end: they are read along ``adjoint``, and followed no more.

        Args:
            who: (n,), bool.
            own: state of the run, (U, width) of each part.
            adjoint: ``lambda_e``, (U, width) of each part.
            scores: (n,), to which the readings are added.
        """
        who = who.to(self._inside.device)
        self._inside[who] = False
        left: list[Block] = []
        for block in self._blocks:
            ended, stays = block.divided(who[block.owners])
            for part, start, by in zip(ended.parts, own, adjoint, strict=True):
                moved = part - _rows(start, ended.units)
                scores.index_add_(0, ended.owners, _along(moved, by, ended.units))
            left.append(stays)
        self._blocks = left
        self._pack(self._most(own[0]))

    def _most(self, of_one: Tensor) -> int:
        """Units that are taken through an update together."""
        return max(1, CACHED[of_one.device.type] // of_one.shape[-1])

    def _pack(self, most: int) -> None:
        """Neighbours that are few become one."""
        packed: list[Block] = []
        for block in self._blocks:
            if packed and len(packed[-1]) + len(block) <= most:
                packed[-1] = packed[-1].and_then(block)
            elif len(block):
                packed.append(block)
        self._blocks = packed


def _rows(table: Tensor, units: Tensor) -> Tensor:
    """A row of the table (U, width) for each of the units (m,); where it has but one, a view."""
    return table.expand(len(units), -1) if len(table) == 1 else table.index_select(0, units)


def _along(moved: Tensor, table: Tensor, units: Tensor) -> Tensor:
    """The product (m,) of each row of ``moved`` (m, width), which may be written over, with that of its unit."""
    return moved @ table[0] if len(table) == 1 else moved.mul_(table.index_select(0, units)).sum(1)
