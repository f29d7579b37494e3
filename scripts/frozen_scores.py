"""Scores of a fixed set of runs to the last bit: store them before a change that must not move any, compare after it.

    python scripts/frozen_scores.py store before.json
    python scripts/frozen_scores.py compare before.json

Recorded anew each time: digits under SGD with momentum, the same by two processes (DDP), a transformer under AdamW with
clipping and dropout; scored by every method with each readout, in float64 and as recorded.
"""

from __future__ import annotations

import json
import sys
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la


class Digits(pl.LightningModule):
    def __init__(self, activation: str = "gelu", lr: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(64, 16), {"gelu": nn.GELU, "relu": nn.ReLU}[activation](), nn.Linear(16, 10))
        self.lr = lr

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        self.log("val", self.per_sample_loss(batch).mean())

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9, weight_decay=1e-3)


class Words(Digits):
    """A transformer that reads an image as eight words of eight numbers."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.1, activation="gelu", batch_first=True)
        self.net = nn.Sequential(nn.Unflatten(1, (8, 8)), nn.TransformerEncoder(layer, 1), nn.Flatten(), nn.Linear(64, 10))

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=3e-3)


RUNS: dict[str, tuple[type[Digits], dict[str, Any], dict[str, Any]]] = {
    "digits": (Digits, {}, {"max_epochs": 3}),
    "ddp": (Digits, {"activation": "relu"}, {"max_epochs": 2, "strategy": "ddp_fork", "devices": 2}),
    "transformer": (Words, {}, {"max_epochs": 3, "gradient_clip_val": 0.5}),
}
"""Module, its arguments and the trainer's."""


def record(name: str, directory: Path) -> la.Run:
    """Train and record one of the runs."""
    kind, arguments, options = RUNS[name]
    images, labels = (torch.from_numpy(part) for part in load_digits(return_X_y=True))
    images = images.float() / 16
    pl.seed_everything(0, verbose=False)
    module = kind(**arguments)
    trainer = pl.Trainer(
        callbacks=[la.TrajectoryRecorder(directory / name)],
        **{"devices": 1, **options},
        **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
        accelerator="cpu",
        num_sanity_val_steps=0,
    )
    train = DataLoader(TensorDataset(images[:120], labels[:120]), 32, shuffle=True)
    trainer.fit(module, train, DataLoader(TensorDataset(images[120:320], labels[120:320]), 128))
    return la.Run(directory / name, trust=True)


def questions(run: la.Run) -> dict[str, dict[str, Any]]:
    """Arguments of ``score`` by a name of each."""
    asked: dict[str, dict[str, Any]] = {}
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        for readout in ("exact", "linear"):
            for dtype in ("float32", "float64"):
                asked[f"{method} {readout} {dtype}"] = {"method": method, "readout": readout, "dtype": dtype}
    groups = [[i, i + 1, i + 50] for i in range(0, 40, 2)]
    asked["acc groups"] = {"method": "acc-sgd-ie", "removals": groups}
    if run.manifest["optimizer"]["name"] == "SGD":
        for readout in ("exact", "linear"):
            asked[f"acc-low-rank {readout}"] = {"method": "acc-low-rank", "readout": readout, "dtype": "float64"}
            asked[f"acc-low-rank in 8 {readout}"] = {**asked[f"acc-low-rank {readout}"], **DIRECTIONS}
            asked[f"acc-low-rank screened {readout}"] = {**asked[f"acc-low-rank {readout}"], **FOLLOWED}
    return asked


DIRECTIONS: dict[str, Any] = {"directions": 8}
FOLLOWED: dict[str, Any] = {"followed": 10}


def scores(names: list[str]) -> dict[str, list[str]]:
    """Every score of these runs, in hexadecimal, by run and question."""
    found = {}
    with tempfile.TemporaryDirectory() as directory:
        for name in names:
            run = record(name, Path(directory))
            for asked, arguments in questions(run).items():
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore")
                    values = la.score(run, ray_address=None, save=False, progress=False, **arguments, check=0).values
                found[f"{name}: {asked}"] = [value.hex() for value in values.tolist()]
    return found


def main() -> None:
    verb, file = sys.argv[1:]
    torch.set_num_threads(1)
    now = scores(list(RUNS))
    if verb == "store":
        Path(file).write_text(json.dumps(now))
        print(f"{len(now)} tables stored")
        return
    before = json.loads(Path(file).read_text())
    changed = [name for name in {**before, **now} if before.get(name) != now.get(name)]
    print(f"{len(now)} tables, {len(changed)} changed" + "".join(f"\n  {name}" for name in changed))
    sys.exit(bool(changed))


if __name__ == "__main__":
    main()
