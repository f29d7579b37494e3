"""How true acc-low-rank is where the optimizer is no SGD, beside SGD-IE and exact ACC-SGD-IE, and what each costs.

    python scripts/bench_defect.py                        # all of them: an hour of one core
    python scripts/bench_defect.py "20 News logistic"

Trains with AdamW in double precision, retrains without each sample, and prints a table: agreement with ``loo`` over all samples
or 500 random ones (Kendall's tau, and the RMSE in standard deviations of the true scores), how many samples follow the update
and for how many steps after a visit, and processor time in bare replays of the training.
"""

from __future__ import annotations

import argparse
import logging
import random
import tempfile
import time
import warnings
from collections.abc import Callable
from typing import Any, NamedTuple

import pytorch_lightning as pl
import torch
from bare_replay import bare_replay

import lightning_acc as la
from lightning_acc.scoring.trust.figures import kendall, rmse
from lightning_acc.studies import data
from lightning_acc.studies.models import Classifier


class Cell(NamedTuple):
    """A training: the data, the network, and how it is trained."""

    module: Callable[..., Any]
    n: int
    hidden: tuple[int, ...]
    batch_size: int
    epochs: int
    lr: float
    clip: float | None = None
    checked: int | None = None
    """How many samples are retrained without; None: each."""


CELLS = {
    "20 News logistic": Cell(data.NewsgroupsDataModule, 200, (), 25, 10, 1e-2),
    "Adult GELU-16": Cell(data.AdultDataModule, 400, (16,), 100, 10, 3e-3),
    "Adult GELU-16, clipped at 0.5": Cell(data.AdultDataModule, 400, (16,), 100, 10, 3e-3, 0.5),
    "MNIST GELU-32": Cell(data.MNISTDataModule, 250, (32,), 32, 5, 1e-3),
    "MNIST GELU-32, n = 1000": Cell(data.MNISTDataModule, 1000, (32,), 32, 5, 1e-3),
    "MNIST GELU-32, n = 2000": Cell(data.MNISTDataModule, 2000, (32,), 32, 5, 1e-3, checked=500),
    "MNIST GELU-32, n = 10000": Cell(data.MNISTDataModule, 10_000, (32,), 32, 5, 1e-3, checked=500),
}
METHODS: dict[str, dict[str, Any]] = {
    "sgd-ie": {"method": "sgd-ie"},
    "acc-low-rank": {"method": "acc-low-rank"},
    "acc-low-rank, exact": {"method": "acc-low-rank", "readout": "exact"},
    "acc-low-rank, all followed": {"method": "acc-low-rank", "followed": 10**6},
    "acc-low-rank, all followed, exact": {"method": "acc-low-rank", "followed": 10**6, "readout": "exact"},
    "acc-sgd-ie, linear": {"method": "acc-sgd-ie", "readout": "linear"},
    "acc-sgd-ie": {"method": "acc-sgd-ie"},
    "loo": {"method": "loo"},
}
FOR_ALL = ("sgd-ie", "acc-low-rank", "acc-low-rank, exact")
"""Of those, what ranks all samples of a large training."""


class WithAdamW(Classifier):
    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.sgd["lr"])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("cells", nargs="*", help=f"some of: {', '.join(CELLS)}")
    chosen = parser.parse_args().cells or list(CELLS)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    torch.set_num_threads(1)
    print(
        "| training | method | followed | window | tau | RMSE/sd | bare replays |\n| --- | --- | --- | --- | --- | --- | --- |"
    )
    for name in chosen:
        for row in compared(CELLS[name]):
            print("|", " | ".join([name, *row]), "|", flush=True)


def compared(cell: Cell) -> list[list[str]]:
    """A row for each method."""
    with tempfile.TemporaryDirectory() as directory:
        run = trained(cell, directory)
        options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0, "progress": False}
        found = {}
        ids = sorted(random.Random(0).sample(range(cell.n), cell.checked or cell.n))
        for name, asked in METHODS.items():
            if cell.checked and name not in (*FOR_ALL, "loo"):
                continue
            before = bare_replay(run)
            started = time.process_time()
            scores = la.score(run, removals=ids if name == "loo" else None, **asked, **options)
            found[name] = scores, (time.process_time() - started) / min(before, bare_replay(run))
        truth = found["loo"][0].values
        rows = []
        for name, (scores, cost) in found.items():
            values = scores.values if name == "loo" else scores.values[ids]
            told = (str(scores.conditions.get(key, "")) for key in ("followed_by_the_update", "window"))
            figures = (f"{kendall(values, truth):.3f}", f"{rmse(values, truth) / truth.std():.3f}", f"{cost:.0f}")
            rows.append([name, *told, *figures])
        return rows


def trained(cell: Cell, directory: str) -> la.Run:
    """The training, recorded."""
    pl.seed_everything(0, verbose=False)
    samples = cell.module(n_train=cell.n, batch_size=cell.batch_size)
    samples.setup("fit")
    module = WithAdamW(samples.n_features, len(samples.class_names), cell.hidden, lr=cell.lr)
    pl.Trainer(
        max_epochs=cell.epochs,
        gradient_clip_val=cell.clip,
        precision="64-true",
        callbacks=[la.TrajectoryRecorder(directory)],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        num_sanity_val_steps=0,
    ).fit(module, datamodule=samples)
    return la.Run(directory)


if __name__ == "__main__":
    main()
