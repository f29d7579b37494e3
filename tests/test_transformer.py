"""A small transformer: embedding, attention, LayerNorm, dropout, AdamW, clipping, warm-up and cosine."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import flat, trainer
from torch import Tensor
from torch.utils.data import DataLoader, Dataset

import lightning_acc as la
from lightning_acc.core.replay import Replay

sys.path.insert(0, str(Path(__file__).parent.parent / "scripts"))
import text_classifier
from text_classifier import TextClassifier, agreement

WORDS, LENGTH, N = 40, 10, 64


class Sentences(Dataset[Any]):
    """Sequences of word numbers with a mask, as a dict; the class is which of two sets of words is the more frequent one."""

    def __init__(self, n: int = N, seed: int = 0) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.labels = torch.randint(0, 2, (n,), generator=generator)
        pull = torch.rand(n, LENGTH, generator=generator) < 0.35
        random = torch.randint(1, WORDS, (n, LENGTH), generator=generator)
        typical = 1 + 10 * self.labels[:, None] + torch.randint(0, 10, (n, LENGTH), generator=generator)
        self.lengths = torch.randint(4, LENGTH + 1, (n,), generator=generator)
        self.words = torch.where(pull, typical, random) * (torch.arange(LENGTH) < self.lengths[:, None])
        flipped = torch.rand(n, generator=generator) < 0.1
        self.labels = torch.where(flipped, 1 - self.labels, self.labels)

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> Any:
        return {"text": {"ids": self.words[i], "mask": self.words[i] > 0}, "label": self.labels[i]}


def fit(path: Path | None = None) -> Tensor:
    pl.seed_everything(1)
    module = TextClassifier(steps=12, words=WORDS, length=LENGTH)
    callbacks = [la.TrajectoryRecorder(path)] if path else []
    loaders = DataLoader(Sentences(), 16, shuffle=True), DataLoader(Sentences(100, seed=1), 50)
    trainer(*callbacks, precision="32-true", max_epochs=3, gradient_clip_val=1.0).fit(module, *loaders)
    return flat(module)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors")
def test_attention_adamw_clipping_dropout_and_warm_up(tmp_path: Path) -> None:
    without = fit()
    assert torch.equal(without, fit(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error == 0
    replay = Replay(run)  # several parameter vectors draw the masks that one draws
    step, theta = replay.step(0), replay.initial[0]
    several = step.gradients(theta.expand(3, -1), step.weights.expand(3, -1))
    torch.testing.assert_close(several, step.gradient(theta).expand(3, -1), rtol=1e-4, atol=1e-6)
    rates = [step.hyperparameters["lr"] for step in run.steps]
    assert rates[0] < rates[4] > rates[-1] > 0
    found = agreement(run, list(range(0, N, 2)), ray_address=None)
    assert found["acc-sgd-ie"] >= 0.95
    assert found["acc-sgd-ie"] > found["sgd-ie"] > found["sgd-ie, optimizer ignored"]


@pytest.mark.skipif("LIGHTNING_ACC_DATA" not in os.environ, reason="needs LIGHTNING_ACC_DATA")
@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors")
def test_real_text(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_DATASETS_CACHE", str(tmp_path / "cache"))
    path = os.environ["LIGHTNING_ACC_DATA"] + "/SetFit/20_newsgroups"
    run = text_classifier.train(
        str(tmp_path / "run"), text_classifier.Posts(path, "train", 128), text_classifier.Posts(path, "test", 100), epochs=2
    )
    assert run.audit().max_abs_error == 0
    found = agreement(run, list(range(40)), ray_address=None)
    assert found["acc-sgd-ie"] >= 0.95
    assert found["acc-sgd-ie"] > found["sgd-ie, optimizer ignored"]
