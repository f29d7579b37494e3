"""A tape gives every state back, within any budget, with as few steps taken again as can be."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import make, record

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.core.tape import Tape, held, taken, taken_again


@cache
def fewest(length: int, kept: int) -> int:
    """By trying all places for the next state that is kept."""
    if length <= 1 or kept == 1:
        return length * (length - 1) // 2
    return min(m + fewest(length - m, kept - 1) + fewest(m, kept) for m in range(1, length))


def test_the_number_of_steps_taken_is_the_smallest_there_is() -> None:
    for kept in range(1, 9):
        for length in range(1, 70):
            assert taken(length, kept) == fewest(length, kept), (length, kept)


class Numbers:
    """A replay whose state is the number of steps taken, and that counts them."""

    def __init__(self, length: int) -> None:
        self.length, self.checked_at, self.steps = length, length, 0
        self.initial = (torch.zeros(1, dtype=torch.float64),)

    def __len__(self) -> int:
        return self.length

    def step(self, t: int) -> Any:
        def take(state: Any) -> Any:
            assert state[0].item() == t
            self.steps += 1
            return (state[0] + 1,)

        return take


@pytest.mark.parametrize("states", [0, 1, 2, 3, 4, 7, 30, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 12, 33, 60])
def test_every_step_is_visited_once_backwards_within_the_budget(length: int, states: int) -> None:
    replay: Any = Numbers(length)
    tape, visited = Tape(replay, 8 * states), []
    assert tape.final.item() == replay.steps == length
    most = max(min(2, length), min(states, length))
    assert held(replay, 8 * states) == most
    for _, state in tape.backwards():
        visited.append(int(state[0].item()))
        assert len(tape._kept) + 1 <= most or len(tape._kept) == visited[-1] == 0
    assert visited == list(reversed(range(length)))
    again = taken(length, max(1, most - 1)) - (length - 1)
    assert replay.steps == length + again
    assert taken_again(replay, 8 * states) * length == pytest.approx(again)
    assert not tape._kept


@pytest.mark.parametrize("states", [2, 3, 5])
def test_scores_do_not_depend_on_the_budget(tmp_path: Path, states: int) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9}))
    whole = la.score(run, "sgd-ie", ray_address=None, check=0, save=False).values
    budget = states * 2 * run.n_parameters * 8 / 2**30
    assert taken_again(Replay(run), round(budget * 2**30)) > 0
    tight = la.score(run, "sgd-ie", ray_address=None, check=0, save=False, memory_gb=budget).values
    assert tight.tolist() == whole.tolist()
