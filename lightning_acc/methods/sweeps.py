"""The driver: takes a method through the steps of a replay, for one chunk of removals."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal, Removals
from lightning_acc.core.replay import Replay, Tape
from lightning_acc.methods.rules import AdjointSgdIe, ForwardMethod

Progress = Callable[[float], None]
"""Told the fraction of the work done, from 0 to 1, now and then."""


def forward(
    replay: Replay, method: ForwardMethod, removals: Sequence[Removal], progress: Progress = lambda _: None
) -> tuple[Tensor, Tensor]:
    """Final parameters of the run (p,) and their shifts (n, p) under n removals."""
    visited = _visited(replay, removals)
    if not visited:
        theta = Tape(replay, memory=0).final[0]
        return theta, theta.new_zeros(len(removals), len(theta))
    chunk = Removals([removals[i] for i in visited])
    state = replay.initial
    carry = method.init(state, chunk)
    for t in range(len(replay)):
        step = replay.step(t)
        if method.follows_run:
            point = step.at(state)
            carry, state = method.advance(point, carry, chunk), point.next()
        else:
            carry = method.advance(step, carry, chunk)
        progress((t + 1) / len(replay))
    theta, found = method.finish(carry, state)
    replay.confirm(theta)
    # A removal that no step saw changes nothing: its shift is 0 by definition, not up to round-off.
    shifts = theta.new_zeros(len(removals), len(theta))
    shifts[visited] = found
    return theta, shifts


def reverse(replay: Replay, method: AdjointSgdIe, query: Query, memory: int, progress: Progress = lambda _: None) -> Tensor:
    """Scores (n_samples,) of removing each sample by itself, for one query, in one sweep back through the run."""
    tape = Tape(replay, memory)
    progress(0.25)
    gradient = query.gradient(replay.objective, tape.final[0])
    carry = method.init(gradient, tape.final, replay.run.n_samples)
    for done, (step, state) in enumerate(tape.backwards(), start=1):
        carry = method.advance(step.at(state), carry)
        progress(0.25 + 0.75 * done / len(replay))
    return carry[1]


def _visited(replay: Replay, removals: Sequence[Removal]) -> list[int]:
    seen = torch.zeros(replay.run.n_samples, dtype=torch.bool)
    for step in replay.run.steps:
        seen[step.sample_ids] = True
    return [i for i, removal in enumerate(removals) if any(seen[j] for j in removal)]
