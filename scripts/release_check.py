"""Of ``scripts/release``: with the wheel and what it needs alone, a training is recorded, scored by all methods and shown."""

from __future__ import annotations

import sys
from importlib.util import find_spec
from pathlib import Path

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.extras import EXTRAS
from lightning_acc.methods.registry import METHODS
from lightning_acc.studies.models import Classifier


def main() -> None:
    assert Path(la.__file__).is_relative_to(sys.prefix), f"{la.__file__} is not what was installed"
    assert not any(map(find_spec, EXTRAS)), f"{[name for name in EXTRAS if find_spec(name)]} came without being asked for"
    pl.seed_everything(0)
    features = torch.randn(60, 5)
    data = TensorDataset(features, (features[:, 0] > 0).long())
    trainer = pl.Trainer(
        max_epochs=3,
        accelerator="cpu",
        callbacks=[la.TrajectoryRecorder("run")],
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
    )
    trainer.fit(Classifier(n_features=5, n_classes=2), DataLoader(data, 20, shuffle=True), DataLoader(data, 60))
    run = la.Run("run")
    assert run.audit(), run.audit()
    for method in METHODS:
        la.score(run, method, ray_address=None)
    print(la.evaluate(run).to_pandas()[["method", "kendall", "n"]].to_string())
    print(la.write_report(run))


if __name__ == "__main__":
    main()
