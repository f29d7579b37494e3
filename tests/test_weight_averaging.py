"""Averages of the parameters that callbacks keep (EMA, SWA): the training is recorded, and queries can be read at them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import N, Net, Weighted, data, fit, flat, make, record
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.methods.registry import METHODS

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}


class Late(WeightAveraging):
    """Averages equally what is there after the second and after each later epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None and epoch_idx >= 1


def warmed_up(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
    decay = min(0.9, (1 + int(n)) / (10 + int(n)))
    return decay * average + (1 - decay) * now


def ema(**options: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(**{"decay": 0.8, **options})


CALLBACKS: dict[str, tuple[Any, str, list[int]]] = {
    "ema": (ema, "ema", list(range(1, 13))),
    "every third, late": (lambda: ema(update_every_n_steps=3, update_starting_at_step=2), "ema", [4, 7, 10]),
    "by epoch": (lambda: ema(update_every_n_steps=0, update_starting_at_epoch=1), "ema", [8, 12]),
    "twice at a step": (lambda: ema(update_starting_at_epoch=0), "ema", list(range(1, 13))),
    "ema by hand": (lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.7)), "ema", list(range(1, 13))),
    "ema of several": (lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)), "ema", list(range(1, 13))),
    "warmed up": (lambda: WeightAveraging(avg_fn=warmed_up), "average", list(range(1, 13))),
    "equal": (WeightAveraging, "average", list(range(1, 13))),
    "equal, of several": (lambda: WeightAveraging(multi_avg_fn=get_swa_multi_avg_fn()), "average", list(range(1, 13))),
    "equal, late": (Late, "average", [8, 12]),
    "swa": (lambda: StochasticWeightAveraging(0.02, 2, annealing_epochs=2), "swa", [4, 8]),
    "swa from the start": (lambda: StochasticWeightAveraging(0.02, 1, annealing_epochs=2), "swa", [0, 4, 8]),
}


def averaged(callback: Any) -> Tensor:
    """The callback's own averaged parameters."""
    model = callback._average_model
    return flat(model.module if isinstance(callback, WeightAveraging) else model)


def trained(module: pl.LightningModule, *callbacks: Any, **options: Any) -> Tensor:
    """The parameters after the last step of a training: before any callback has put others in their place."""
    kept: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kept.append(flat(pl_module).clone())

    fit(module, options.pop("train", None), Keep(), *callbacks, **options)
    return kept[-1]


@pytest.mark.parametrize("first", [True, False], ids=["recorder first", "recorder last"])
@pytest.mark.parametrize("case", CALLBACKS)
def test_the_training_is_recorded_and_its_average(tmp_path: Path, case: str, first: bool) -> None:
    build, name, steps = CALLBACKS[case]
    plain, mine = build(), build()
    module, other = (make(hidden=4, optimizer=SGD, decay_lr=0.9) for _ in range(2))
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    last = trained(other, plain)
    fit(module, None, *((recorder, mine) if first else (mine, recorder)))
    assert torch.equal(flat(module), flat(other))
    assert torch.equal(averaged(mine), averaged(plain))
    run = la.Run(tmp_path / "run")
    assert torch.equal(run.parameters(run.n_steps), last)
    assert run.n_steps in run.snapshots
    assert run.audit().max_abs_error == 0
    assert list(run.averages) == [name]
    average = run.averages[name]
    assert average["steps"].tolist() == steps
    assert torch.equal(average["theta"], averaged(mine))
    assert not torch.equal(average["theta"], last)
    theta = sum(weight * run.parameters(t) for t, weight in zip(steps, average["weights"].tolist(), strict=True))
    assert (theta - average["theta"]).abs().max() < 1e-12
