"""Self-influence: how far each training sample moved the model towards itself, ``sum_t lr_t |w_i g_i(theta_t)|^2``.

It is TracIn's score of a sample for its own loss (Pruthi et al. 2020, arXiv 2002.08484), at every step and not at a few, and
needs no validation examples. Samples of large self-influence are those the model could not learn from others: wrong labels, and
rare ones that are right.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lightning_acc.core.devices import CPU
from lightning_acc.core.optimizers import Hyperparameters
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.methods.memory import TRAINING, chunk_size
from lightning_acc.record.record import Record


class NoLearningRate(Exception):
    """An optimizer whose hyper-parameters have no ``lr``."""


def self_influence(run: Record, memory: int, device: torch.device = CPU) -> np.ndarray:
    """Self-influence (n_samples,) of every training sample on the recorded run; 0 for samples no step saw.

    A step adds ``sum_k lr_k |w_i g_i|_k^2``: ``w_i g_i`` is the gradient of the sample's loss at the recorded parameters with
    its loss weight (summed where the step sees the sample more than once), and k goes over the parameter groups, each with its
    own learning rate. What else the optimizer does, momentum or clipping, is not in it.

    Args:
        run: a recorded run; it is taken forward once.
        memory: bytes to compute with; the gradients of a step are taken in pieces that fit.
        device: where.

    Raises:
        NoLearningRate: the optimizer has none.
        RequestError: not even the gradient of one sample fits into ``memory``.
    """
    replay = Replay(run, device=device)
    size = chunk_size(replay, "self-influence", TRAINING, memory)
    found = torch.zeros(run.n_samples, dtype=torch.float64)
    state = replay.initial
    for t in range(len(replay)):
        step = replay.step(t)
        rates = _rates(replay, step.groups)
        point = step.at(state)
        for ids in torch.unique(step.sample_ids).split(size):
            removed = point.removed(Removals([(i,) for i in ids.tolist()]))
            found[ids[removed.removals]] += removed.gradients.square().matmul(rates).double().cpu()
        state = point.next()
    values: np.ndarray = found.numpy()
    return values


def _rates(replay: Replay, groups: list[Hyperparameters]) -> Tensor:
    """The learning rate of each parameter (p,), that of its group; 0 where the step leaves it as it is."""
    if any("lr" not in group for group in groups):
        raise NoLearningRate
    update = replay.update
    of_each = torch.tensor([float(h.get("lr", 0)) for h in update.given(groups)], dtype=replay.dtype)
    return replay.placed(of_each.repeat_interleave(torch.tensor(update.layout.sizes)))
