"""Batch normalisation: in evaluation mode a layer like others; in training mode what ``keep-batch-statistics`` means.

A removed sample leaves the loss, but stays in the batches, and so in the statistics its batches are normalised with.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import FEATURES, N, Normalised, Weighted, data, fit, flat, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import Replay

KEEP: Any = {"batch_norm": "keep-batch-statistics"}


class FrozenNorm(Normalised):
    def on_train_epoch_start(self) -> None:
        self.net[0].eval()

    def on_train_start(self) -> None:
        self.net[0].eval()


def test_batch_norm_in_evaluation_mode_is_a_layer_like_others(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = FrozenNorm().double()
    module.net[0].running_mean.normal_()
    run = record(tmp_path / "run", module)
    assert run.manifest["evaluation_modules"] == ["net.0"]
    assert run.audit().max_abs_error == 0
    assert la.score(run, "acc-sgd-ie", [1, 2], ray_address=None, check=0).values.all()


class DeeplyNormalised(Weighted):
    def __init__(self) -> None:
        super().__init__(hidden=4, activation="gelu", dropout=0.2, optimizer={"class": "AdamW", "lr": 0.02})
        self.net.insert(1, nn.BatchNorm1d(4))
        self.net.insert(0, nn.BatchNorm1d(FEATURES, momentum=0.3))


def train(kept: Tensor, *callbacks: Any, **options: Any) -> Tensor:
    torch.manual_seed(0)
    module = DeeplyNormalised().double()
    fit(module, DataLoader(TensorDataset(*data().tensors, kept), 6, shuffle=True), *callbacks, validation=False, **options)
    return torch.cat([flat(module), *(b.double().reshape(-1) for b in module.buffers())])


@pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data")
@pytest.mark.parametrize("accumulate", [1, 2])
def test_keeping_batch_statistics_is_retraining_with_a_loss_weight_of_zero(tmp_path: Path, accumulate: int) -> None:
    everything = torch.ones(N, dtype=torch.float64)
    without = train(everything, accumulate_grad_batches=accumulate)
    base = train(everything, la.TrajectoryRecorder(tmp_path / "run", **KEEP), accumulate_grad_batches=accumulate)
    assert torch.equal(base, without)  # the running statistics too
    run = la.Run(tmp_path / "run")
    assert run.manifest["loss"]["batch_norm"] == "keep-batch-statistics"
    assert run.audit().ok
    if accumulate == 1:
        assert run.audit().max_abs_error == 0
    held_out = la.Query("held-out", [(*data(n=8, seed=5).tensors, torch.ones(8, dtype=torch.float64))])
    p = run.n_parameters
    for method, tolerance in (("loo", 1e-6), ("acc-sgd-ie", 0.5)):
        found = la.score(run, method, (0, 11, 23), held_out, keep_shifts=True, ray_address=None, check=0).shifts
        assert found is not None
        for sample, shift in zip((0, 11, 23), found, strict=True):
            kept = everything.clone()
            kept[sample] = 0
            change = (train(kept, accumulate_grad_batches=accumulate) - base)[:p]
            assert float((shift - change).norm() / change.norm()) < tolerance


def test_queries_read_the_final_running_statistics(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = Normalised().double()
    run = record(tmp_path / "run", module, recorder=KEEP)
    assert run.query("val").n_examples == 16
    module.eval()
    x, y = data(n=16, seed=9).tensors
    with torch.no_grad():
        expected = module.per_sample_loss((x, y)).mean()
    assert run.frozen_tensors()["net.0.running_mean"].abs().sum() > 0
    replay = Replay(run)
    assert float(run.query("val").value(replay.objective, run.parameters(run.n_steps))) == pytest.approx(float(expected))
