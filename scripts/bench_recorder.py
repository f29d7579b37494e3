"""What recording costs: time of a training step with and without the callback, in pairs within one run, and bytes on disk.

    python scripts/bench_recorder.py

Batches of 128 samples of 784 features; networks of about 10^4, 10^6 and 10^7 parameters. To reach: at most 3 % added where a
step takes 20 ms or more.
"""

from __future__ import annotations

import logging
import statistics
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_acc import TrajectoryRecorder
from lightning_acc.studies.models import Classifier

HIDDEN: dict[str, tuple[int, ...]] = {"10^4": (12,), "10^6": (800, 400), "10^7": (3000, 2400)}
STEPS = {"10^4": 300, "10^6": 120, "10^7": 24}
BATCH, FEATURES, PAIRS = 128, 784, 5


class Clock(pl.Callback):
    """Time from the end of one batch to the end of the next, the first ones left out."""

    def __init__(self) -> None:
        self.times: list[float] = []

    def on_train_batch_end(self, *_: Any) -> None:
        """Note the time."""
        self.times.append(time.perf_counter())

    @property
    def step(self) -> float:
        """Mean seconds of a step after the first six, in which the recorder compares itself with the training."""
        return (self.times[-1] - self.times[6]) / (len(self.times) - 7)


def step_seconds(hidden: tuple[int, ...], steps: int, *callbacks: pl.Callback) -> float:
    """Mean seconds of one step of a training."""
    torch.manual_seed(0)
    data = TensorDataset(torch.randn(10 * BATCH, FEATURES), torch.randint(0, 10, (10 * BATCH,)))
    clock = Clock()
    trainer = pl.Trainer(
        max_steps=steps,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        limit_val_batches=1,
        num_sanity_val_steps=0,
        val_check_interval=10**6,
        check_val_every_n_epoch=None,
        callbacks=[*callbacks, clock],
    )
    model = Classifier(FEATURES, 10, hidden, "relu", lr=0.01, momentum=0.9)
    trainer.fit(model, DataLoader(data, BATCH, shuffle=True), DataLoader(data, BATCH))
    return clock.step


def main() -> None:
    """Print the table."""
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    print(f"batch {BATCH}, torch {torch.__version__}, {torch.get_num_threads()} threads, {PAIRS} pairs")
    print(f"{'parameters':>10s} {'step':>10s} {'recorded':>10s} {'added':>8s} {'bytes/step':>12s}")
    for name, hidden in HIDDEN.items():
        plain, recorded, sizes = [], [], []
        for _ in range(PAIRS):
            plain.append(step_seconds(hidden, STEPS[name]))
            with tempfile.TemporaryDirectory() as directory:
                recorded.append(step_seconds(hidden, STEPS[name], TrajectoryRecorder(Path(directory) / "run")))
                files = (path for folder in ("steps", "parameters") for path in (Path(directory) / "run" / folder).iterdir())
                sizes.append(sum(path.stat().st_size for path in files) / STEPS[name])
        added = statistics.median(b / a - 1 for a, b in zip(plain, recorded, strict=True))
        a, b = statistics.median(plain), statistics.median(recorded)
        print(f"{name:>10s} {1e3 * a:7.2f} ms {1e3 * b:7.2f} ms {100 * added:6.1f} % {statistics.median(sizes):12,.0f}")


if __name__ == "__main__":
    main()
