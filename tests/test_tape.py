"""A tape gives every state back, within any budget, with as few steps taken again as can be."""

from __future__ import annotations

import errno
import io
import os
import shutil
import tempfile
import time
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import make, record

import lightning_acc as la
from lightning_acc.core import tape as tapes
from lightning_acc.core.ranks import ALONE
from lightning_acc.core.replay import Replay
from lightning_acc.core.tape import Tape, filed, held, taken, taken_again
from lightning_acc.methods.memory import of_the_tape


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
        self.length, self.checked_at, self.steps, self.ranks = length, length, 0, ALONE
        self.initial = (torch.zeros(1, dtype=torch.float64),)

    def __len__(self) -> int:
        return self.length

    def step(self, t: int) -> Any:
        def take(state: Any) -> Any:
            assert state[0].item() == t
            self.steps += 1
            return (state[0] + 1,)

        return take


@pytest.mark.parametrize("on_disk", [0, 1, 5, 100])
@pytest.mark.parametrize("states", [0, 1, 2, 3, 4, 7, 30, 100])
@pytest.mark.parametrize("length", [1, 2, 3, 5, 12, 33, 60])
def test_every_step_is_visited_once_backwards_within_the_budget(length: int, states: int, on_disk: int) -> None:
    replay: Any = Numbers(length)
    tape, visited = Tape(replay, 8 * states, disk=8 * on_disk), []
    assert tape.final.item() == replay.steps == length
    most = max(min(2, length), min(states, length))
    assert held(replay, 8 * states) == most
    assert filed(replay, 8 * states, 8 * on_disk) == min(on_disk, length - most)
    for _, state in tape.backwards():
        visited.append(int(state[0].item()))
        assert tape._kept.in_memory + 1 <= most or len(tape._kept) == visited[-1] == 0
        assert len(tape._kept) + 1 <= most + on_disk
    assert visited == list(reversed(range(length)))
    again = taken(length, max(1, min(length, most + on_disk) - 1)) - (length - 1)
    assert again == 0 or most + on_disk < length
    assert replay.steps == length + again
    assert taken_again(replay, 8 * states, 8 * on_disk) * length == pytest.approx(again)
    assert not len(tape._kept)


@pytest.mark.parametrize("room", [0, None])
@pytest.mark.parametrize("states", [2, 3, 5])
def test_scores_do_not_depend_on_the_budget(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, states: int, room: int | None
) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9}))
    whole = la.score(run, "sgd-ie", ray_address=None, check=0, save=False).values
    if room is not None:
        monkeypatch.setattr(tapes, "room", lambda: room)
    replay = Replay(run)
    budget = states * 2 * run.n_parameters * 8
    assert (taken_again(replay, budget) > 0) == (room == 0)
    assert (filed(replay, budget) > 0) == (room is None)
    memory = budget + (2**30 - of_the_tape(replay, 2**30))
    assert of_the_tape(replay, memory) == budget
    tight = la.score(run, "sgd-ie", ray_address=None, check=0, save=False, memory_gb=memory / 2**30).values
    assert tight.tolist() == whole.tolist()


@pytest.mark.parametrize("fit", [0, 1, 5, 100])
def test_a_disk_that_others_fill_costs_steps_and_no_state(monkeypatch: pytest.MonkeyPatch, fit: int) -> None:
    class Filling(io.BytesIO):
        def write(self, data: Any) -> int:
            if self.tell() >= 8 * fit:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Filling())
    replay: Any = Numbers(33)
    tape, visited = Tape(replay, 8 * 4, disk=8 * 29), []
    for _, state in tape.backwards():
        visited.append(int(state[0].item()))
        assert tape._kept.in_memory <= 3
        assert len(tape._kept) <= 3 + fit
    assert visited == list(reversed(range(33)))
    assert (replay.steps == 33) == (fit >= 29)
    assert replay.steps <= 33 + taken(33 - fit, 3)


def test_a_disk_that_is_slower_than_the_steps_is_left_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    class Slow(io.BytesIO):
        def write(self, data: Any) -> int:
            time.sleep(0.02)
            return super().write(data)

    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Slow())
    for patience, fit in ((60.0, range(29, 30)), (0.05, range(1, 4))):
        monkeypatch.setattr(tapes, "SLOW", patience)
        replay: Any = Numbers(33)
        tape = Tape(replay, 8 * 4, disk=8 * 29)
        assert len(tape._kept._steps) in fit
        assert [int(state[0].item()) for _, state in tape.backwards()] == list(reversed(range(33)))
        assert (replay.steps == 33) == (29 in fit)


def test_a_quarter_of_what_is_free_is_taken_and_given_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = tmp_path / "temporary"
    folder.mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    usage = shutil.disk_usage(folder)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=4 * 8 * 3 + 1 if path == str(folder) else 0))
    replay: Any = Numbers(9)
    assert filed(replay, 16) == 3
    tape = Tape(replay, 16)
    descriptor = tape._kept._file.fileno()  # type: ignore[union-attr]
    assert os.fstat(descriptor).st_size == 8 * 3
    del tape
    with pytest.raises(OSError, match="Bad file"):
        os.fstat(descriptor)
    assert not list(folder.iterdir())
