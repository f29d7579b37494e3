"""The update's defect: acc-low-rank for optimizers whose update is no affine function, such as Adam, and for clipping.

SGD-IE linearises the gradient and the update; here the update is not linearised. With ``lambda_t`` the adjoint of SGD-IE's
sweep back, ``gamma_t = (dU/dG)^T lambda_{t+1}`` and ``c_t = (dG/dtheta)^T gamma_t``, let ``D~`` follow a removal R by the
update alone, exactly, and without any Hessian,

    D~' = U(s_t + D~, G_t - sum_{i in R and batch t} w_i g_i) - U(s_t, G_t),

from a visit until L steps after the last one. Windows that touch are one. Then

    score(R) = sum over the steps t of its windows  <c_t, D~_t>  +  sum over the ends e of its windows  <lambda_e, D~_e>.

Where U is affine the sum telescopes to SGD-IE's score, for any L. Where it is not, it holds what the optimizer makes of the
removal that no derivative tells: a second moment that the sample alone had filled, a gradient that is clipped no more.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from lightning_acc.core.optimizers import RULES, Hyperparameters, State, clipped
from lightning_acc.core.products import Pulled
from lightning_acc.core.queries.curvature import along
from lightning_acc.core.removals import Removal, Removals, summed
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Point, Step
from lightning_acc.methods import sweeps
from lightning_acc.methods.low_rank.back import of_the_query, scratch
from lightning_acc.methods.method import Question
from lightning_acc.methods.rules import AdjointSgdIe
from lightning_acc.record.record import Record

WINDOW_EPOCHS = 2
CACHED = defaultdict(lambda: 2**24, cpu=2**17)
"""Numbers of a part of the state that are taken through an update together, by kind of device: what stays in a core's caches,
where more is slower; what keeps a card busy."""


@dataclass(frozen=True)
class Defect:
    """Scores of n removals.

    Attributes:
        scores: (n,).
        first: what SGD-IE says of them, (n,).
        followed: which of them were followed, the others having SGD-IE's score, (m,).
    """

    scores: Tensor
    first: Tensor
    followed: Tensor


def defect(
    replay: Replay,
    removals: Sequence[Removal],
    question: Question,
    followed: int,
    at_once: int,
    window: int,
    progress: Callable[[float], None] = lambda _: None,
    curves: int = 0,
) -> Defect:
    """Score n removals by what the optimizer makes of them.

    Args:
        replay: of the run.
        removals: n removals.
        question: what is asked; its memory is for the states of the sweep back.
        followed: so many are followed, those of the largest scores by SGD-IE; the others keep these.
        at_once: so many of them are followed in one pass.
        window: L, the number of steps that each is followed for after a visit.
        progress: told the fraction done.
        curves: directions of the query's curvature, which is read along SGD-IE's shifts; 0 reads linearly.
    """
    ends = window_ends(replay, removals, window)
    with scratch(replay, vectors_kept(replay, ends)) as rows:
        adjoints = AdjointDefect(len(replay), ends, rows)
        found = sweeps.reverse(replay, adjoints, question, lambda done: progress(0.2 * done), curves).cpu()
        found = summed(found, removals).reshape(1 + curves, -1)
        first = found[0]
        chosen = first.abs().argsort(descending=True, stable=True)[:followed]
        scores, done = first.clone(), 0
        for part in chosen.split(at_once):
            shifts = UpdateAlone(replay, Removals([removals[i] for i in part]), adjoints, window)
            for t in range(len(replay)):
                shifts.advance(t, replay.step(t))
                progress(0.2 + 0.8 * (done + len(part) * (t + 1) / len(replay)) / len(chosen))
            shifts.finish()
            scores[part] = shifts.scores.cpu()
            done += len(part)
    return Defect(scores + along(found[1:]), first, chosen)


def has_a_defect(run: Record) -> bool:
    """Whether the update of a run is no affine function: that of its optimizer is not, or it clips."""
    rule = RULES.get(run.manifest["optimizer"]["name"])
    clips = any(run.steps[t].groups[0]["gradient_clip_val"] for t in (0, run.n_steps - 1))
    return clips or rule is None or not rule.affine


def window_steps(replay: Replay) -> int:
    """L: the steps of two epochs."""
    occurrences = sum(len(step.sample_ids) for step in replay.records)
    return -(-WINDOW_EPOCHS * replay.run.n_samples * len(replay) // max(1, occurrences))


def window_ends(replay: Replay, removals: Sequence[Removal], window: int) -> list[int]:
    """The numbers of steps, less than all, after which a window of any of the removals ends."""
    owners = Removals(removals)
    last = torch.full((len(removals),), len(replay))
    ends: set[int] = set()
    for t, step in enumerate(replay.records):
        visited = owners.occurrences(step.sample_ids)[0].unique()
        before = last[visited] + window + 1
        ends.update(before[before < t].tolist())
        last[visited] = t
    return sorted(end for end in ends.union((last + window + 1).tolist()) if end < len(replay))


def vectors_kept(replay: Replay, ends: Sequence[int] = ()) -> int:
    """How many vectors (p,) ``AdjointDefect`` keeps: two of every step, and ``lambda_e`` of these ends of windows."""
    return 2 * len(replay) + len(ends) * len(replay.initial)


def _blocks(columns: slice, size: int) -> Iterator[slice]:
    """Columns in blocks of so many, or a few less."""
    total = columns.stop - columns.start
    number = max(1, -(-total // size))
    for i in range(number):
        yield slice(columns.start + total * i // number, columns.start + total * (i + 1) // number)


class AdjointDefect(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps ``c_t`` and ``G_t`` of every step, and ``lambda_e`` where windows end.

    Where the query is read, ``c_t`` holds its gradient, too: so a shift is read on its way through a window.

    Args:
        n_steps: T.
        ends: see ``window_ends``.
        rows: where to keep them, (2 T + len(ends) * parts of the state, p).

    Attributes:
        curvatures: ``c_t``, (T, p).
        gradients: ``G_t``, (T, p).
        final: ``lambda_T``.
    """

    final: State

    def __init__(self, n_steps: int, ends: Sequence[int], rows: Tensor) -> None:
        self.curvatures, self.gradients, self._rows = rows.tensor_split((n_steps, 2 * n_steps))
        self._place = {end: i for i, end in enumerate(ends)}
        self._t = n_steps

    def at(self, end: int) -> State:
        """``lambda_e`` of a window's end, (p,) of each part of the state."""
        if end == len(self.curvatures):
            return self.final
        i, parts = self._place[end], len(self.final)
        return tuple(self._rows[i * parts : (i + 1) * parts])

    def init(self, query_gradient: Tensor, state: State, n_samples: int) -> tuple[State, Tensor]:
        """The adjoint after the last step, (p,), and the scores, (n_samples,), none yet."""
        carry = super().init(query_gradient, state, n_samples)
        self.final = tuple(of_the_query(part).clone() for part in carry[0])
        return carry

    def see(self, point: Point, pulled: Pulled) -> None:
        """One step back."""
        self._t -= 1
        self.curvatures[self._t] = of_the_query(pulled.curvature)
        self.gradients[self._t] = point.gradient
        if self._t in self._place:
            for row, part in zip(self.at(self._t), pulled.adjoint, strict=True):
                row.copy_(of_the_query(part))

    def read_again(self, carry: tuple[State, Tensor], query_gradient: Tensor) -> tuple[State, Tensor]:
        """The query is read here, too: its gradient (p,) joins the adjoint (p,), and what is kept of the step."""
        self.curvatures[self._t] += of_the_query(query_gradient)
        if self._t in self._place:
            self.at(self._t)[0].add_(of_the_query(query_gradient))
        return super().read_again(carry, query_gradient)


class UpdateAlone:
    """``s + D~`` of n removals, taken forward through the run; collects their scores.

    The run itself goes along: shifts are differences between results of the same operations, so that round-off cancels. All is
    done range by range of the parameters, which the gradients of a step are read for once.

    Args:
        replay: of the run.
        removals: n removals.
        adjoints: of the sweep back.
        window: L.

    Attributes:
        scores: (n,).
    """

    def __init__(self, replay: Replay, removals: Removals, adjoints: AdjointDefect, window: int) -> None:
        self._replay, self._removals, self._adjoints, self._window = replay, removals, adjoints, window
        self._own = tuple(part.clone() for part in replay.initial)
        self._ranges = replay.update.ranges()
        self._parts = [tuple(p[columns].repeat(len(removals), 1) for p in self._own) for columns, _ in self._ranges]
        """Of each range, (n, its size) of each part of the state."""
        self._last = torch.full((len(removals),), -1)
        """The last step that saw each of them; -1 of those in no window, whose parts are anything."""
        self.scores = replay.initial[0].new_zeros(len(removals))

    def advance(self, t: int, step: Step) -> None:
        """Take step t."""
        device, update = self._replay.device, self._replay.update
        gradient, curvature = self._adjoints.gradients[t].to(device), self._adjoints.curvatures[t].to(device)
        without = self._gradients_without(step, gradient)
        (gradient,) = clipped([gradient], step.groups)
        who = torch.tensor(list(without), dtype=torch.long)
        left = self._last + self._window + 1 == t
        left[who] = False  # the next window begins where the last one ends: they are one
        self._end(left & (self._last >= 0), t)
        self.begin(t, who[self._last[who] < 0])
        self._last[who] = t
        given = update.given(step.groups)
        for (columns, parameter), parts in zip(self._ranges, self._parts, strict=True):
            for block in _blocks(columns, CACHED[device.type] if update.rule.by_number else columns.stop):
                here = slice(block.start - columns.start, block.stop - columns.start)
                changed = {i: row[block] for i, row in without.items()}
                states, own = tuple(part[:, here] for part in parts), tuple(part[block] for part in self._own)
                self._take(states, own, gradient[block], changed, curvature[block], given[parameter])

    def _take(
        self, states: State, own: State, gradient: Tensor, without: dict[int, Tensor], curvature: Tensor, h: Hyperparameters
    ) -> None:
        """Take some numbers of all that are in a window through the update, and then those of the run.

        Args:
            states: views (n, size).
            own: of the run, views (size,).
            gradient: (size,), clipped.
            without: the same without each of the removals that the step has seen.
            curvature: ``c_t``, (size,).
            h: what is given of their parameter.
        """
        n, size = states[0].shape
        rows = max(1, min(n, CACHED[gradient.device.type] // size)) if states[0].is_contiguous() else 1
        inside = self._last >= 0
        read, is_inside = torch.zeros_like(self.scores), inside.tolist()
        gradients, moved = gradient.expand(rows, -1).contiguous(), torch.empty_like(states[0][:rows])
        for first in range(0, n, rows):
            last = min(first + rows, n)
            if not any(is_inside[first:last]):
                continue
            some, given = tuple(part[first:last] for part in states), gradients[: last - first]
            torch.mv(torch.sub(some[0], own[0], out=moved[: last - first]), curvature, out=read[first:last])
            changed = [i for i in range(first, last) if i in without]
            if rows == 1:
                given = without[first][None] if changed else given
            else:
                for i in changed:
                    given[i - first] = without[i]
            self._replay.update.in_one_pass(some, given, h)
            if rows > 1:  # as they were, for the next
                for i in changed:
                    given[i - first] = gradient
        self.scores += torch.where(inside.to(read.device), read, 0.0)
        self._replay.update.in_one_pass(own, gradient, h)

    def _gradients_without(self, step: Step, gradient: Tensor) -> dict[int, Tensor]:
        """What clipping leaves of the gradient (p,) without each of the removals that the step has seen samples of."""
        found: dict[int, Tensor] = {}
        for first in range(0, len(self._removals), step.states_at_once):
            part = self._removals.part(first, min(first + step.states_at_once, len(self._removals)))
            removed = step.removed(self._own[0], part)
            if len(removed.removals):
                (rows,) = clipped([gradient - removed.gradients], step.groups)
                found.update(zip((first + removed.removals).tolist(), rows, strict=True))
        return found

    def begin(self, t: int, who: Tensor) -> None:
        """The windows of the removals ``who``, (m,), begin with step t."""
        self._last[who] = t
        for (columns, _), parts in zip(self._ranges, self._parts, strict=True):
            for part, own in zip(parts, self._own, strict=True):
                part[who] = own[columns]

    def finish(self) -> None:
        """The last windows end after the last step."""
        self._end(self._last >= 0, len(self._adjoints.curvatures))

    def _end(self, who: Tensor, e: int) -> None:
        """The windows of these (n,) end after e steps."""
        ended = torch.nonzero(who)[:, 0]
        if len(ended):
            adjoint = tuple(part.to(self._replay.device) for part in self._adjoints.at(e))
            for (columns, _), parts in zip(self._ranges, self._parts, strict=True):
                for part, own, by in zip(parts, self._own, adjoint, strict=True):
                    self.scores[ended] += (part[ended] - own[columns]) @ by[columns]
            self._last[ended] = -1
