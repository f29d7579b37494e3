"""What a cost is measured in: the recorded training, taken once more."""

from __future__ import annotations

import time

import torch

import lightning_acc as la
from lightning_acc.core.replay import Replay


def bare_replay(run: la.Run, device: str = "cpu") -> float:
    """Seconds of the recorded training, taken again: of one thread's processor time, or on a GPU of the clock."""
    torch.set_num_threads(1)
    replay = Replay(run, device=torch.device(device))
    state = replay.initial
    for t in range(len(replay)):  # what is read from files is in memory after the first turn
        replay.step(t)
    clock = time.process_time if device == "cpu" else time.perf_counter
    started = clock()
    for t in range(len(replay)):
        state = replay.step(t)(state)
    state[0].sum().item()  # a GPU has ended, too
    return clock() - started
