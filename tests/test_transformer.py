"""A small transformer: embedding, attention, LayerNorm, dropout, AdamW, clipping, warm-up and cosine."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import flat
from scipy import stats
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

import lightning_acc as la

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


class Transformer(pl.LightningModule):
    def __init__(self, steps: int = 40, dropout: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.steps = steps
        self.embedding = nn.Embedding(WORDS, 16, padding_idx=0)
        self.position = nn.Parameter(0.1 * torch.randn(LENGTH, 16))
        layer = nn.TransformerEncoderLayer(16, 2, 32, dropout, "gelu", batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(16, 2)

    def forward(self, text: Any) -> Tensor:
        hidden = self.encoder(self.embedding(text["ids"]) + self.position, src_key_padding_mask=~text["mask"])
        kept = text["mask"][..., None].to(hidden.dtype)
        out: Tensor = self.head((hidden * kept).sum(1) / kept.sum(1))
        return out

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self(batch["text"]), batch["label"], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.AdamW(self.parameters(), lr=3e-3, weight_decay=0.05)

        def rate(step: int) -> float:
            return min(1.0, (step + 1) / 5) * 0.5 * (1 + math.cos(math.pi * step / self.steps))

        scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, rate)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


def loaders() -> dict[str, Any]:
    return {
        "train_dataloaders": DataLoader(Sentences(), 16, shuffle=True),
        "val_dataloaders": DataLoader(Sentences(100, seed=1), 50),
    }


def train(path: Path | None = None) -> tuple[Transformer, Tensor]:
    from problems import trainer

    torch.manual_seed(0)
    module = Transformer()
    pl.seed_everything(1)
    callbacks = [la.TrajectoryRecorder(path)] if path else []
    trainer(*callbacks, precision="32-true", max_epochs=10, gradient_clip_val=1.0).fit(module, **loaders())
    return module, flat(module)


@pytest.mark.filterwarnings("ignore:enable_nested_tensor", "ignore:.*nested tensors")
def test_attention_adamw_clipping_dropout_and_warm_up(tmp_path: Path) -> None:
    _, without = train()
    _, recorded = train(tmp_path / "run")
    assert torch.equal(without, recorded)
    run = la.Run(tmp_path / "run")
    assert run.audit().ok
    rates = [step.hyperparameters["lr"] for step in run.steps]
    assert rates[0] < rates[4] > rates[-1] > 0
    scores = {
        method: la.score(run, method, ray_address=None, dtype="float64").values
        for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin")
    }
    agreement = {method: stats.spearmanr(values, scores["loo"]).statistic for method, values in scores.items()}
    print(agreement)
    assert agreement["acc-sgd-ie"] >= 0.95
    assert agreement["acc-sgd-ie"] > agreement["sgd-ie"]
    assert np.abs(scores["loo"]).min() > 0
