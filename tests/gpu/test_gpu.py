"""The same facts for trainings on GPUs, replayed on the CPU; skipped where there is none."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import N, Weighted, data, fit
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

pytestmark = [
    pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU"),
    pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data"),
]
GPU: dict[str, Any] = {"accelerator": "gpu"}
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "lr": 0.05},
    "adamw": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1},
}


def train(optimizer: str, *callbacks: Any, without: int | None = None, dropout: float = 0.0, **options: Any) -> Tensor:
    torch.manual_seed(0)
    module = Weighted(hidden=5, activation="gelu", dropout=dropout, optimizer=OPTIMIZERS[optimizer]).double()
    kept = torch.ones(N, dtype=torch.float64)
    if without is not None:
        kept[without] = 0
    loader = DataLoader(TensorDataset(*data().tensors, kept), 5, shuffle=True)
    return fit(module, loader, *callbacks, validation=False, **{**GPU, **options}).cpu()


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("options", [{}, {"gradient_clip_val": 0.3, "accumulate_grad_batches": 2}], ids=["plain", "clipped"])
def test_a_gpu_training_is_recorded_and_replayed(tmp_path: Path, optimizer: str, options: dict[str, Any]) -> None:
    base = train(optimizer, la.TrajectoryRecorder(tmp_path / "run"), **options)
    assert torch.equal(base, train(optimizer, **options))
    run = la.Run(tmp_path / "run")
    assert run.audit().ok
    held_out = la.Query("held-out", [data(n=8, seed=5).tensors])
    shifts = la.score(run, "loo", (0, 11, 23), held_out, keep_shifts=True, ray_address=None).shifts
    assert shifts is not None
    for sample, shift in zip((0, 11, 23), shifts, strict=True):
        change = train(optimizer, without=sample, **options) - base
        assert float((shift - change).norm() / change.norm()) < 1e-6


def test_random_numbers_drawn_on_the_gpu_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingRefused, match="random numbers from Python, NumPy or the GPU"):
        train("sgd", la.TrajectoryRecorder(tmp_path / "run"), dropout=0.3)


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two GPUs")
def test_two_gpus_over_nccl(tmp_path: Path) -> None:
    train("adamw", la.TrajectoryRecorder(tmp_path / "run"), strategy="ddp_spawn", devices=2)
    run = la.Run(tmp_path / "run")
    assert run.manifest["world_size"] == 2
    assert run.audit().ok
