"""What a cost is measured in: the recorded training, taken once more."""

from __future__ import annotations

import time

import torch

import lightning_acc as la
from lightning_acc.core.replay import Replay


def bare_replay(run: la.Run) -> float:
    """Seconds of processor time of the recorded training, taken again on one thread."""
    torch.set_num_threads(1)
    replay = Replay(run)
    state = replay.initial
    for t in range(len(replay)):  # what is read from files is in memory after the first turn
        replay.step(t)
    started = time.process_time()
    for t in range(len(replay)):
        state = replay.step(t)(state)
    return time.process_time() - started
