"""What Ray gives and takes: removals a second with 1 and 2 workers, its share of a minute's work, resuming a finished job.

    python scripts/bench_cluster.py           # some minutes, on a machine with two idle cores
    python scripts/bench_cluster.py --quick   # seconds: that it runs, not how fast

To reach: 2 workers do 1.8 times as much a second as 1; Ray adds at most 10 % to a job of 60 s; a finished job is resumed in
under 5 s, without starting workers; two processes take one sweep back 1.7 times as fast as one, where the steps of a small
convolutional network take 200 ms.

What Ray adds does not grow with the job: its start, what a first question costs workers beyond a second one (they start, and
import torch and Lightning, which imports transformers, scipy and matplotlib where these are installed), and its end. A call
that asks several questions pays it once (``scoring.cluster.kept``).
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from torch import nn
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

N, EPOCHS, SECONDS, BATCH = 1200, 50, 60.0, 1536
JOB = 60.0
"""Seconds of the work that Ray's price is a share of."""
LOO: dict[str, Any] = {"method": "loo", "save": False, "progress": False, "memory_gb": 0.1}


def record(path: Path) -> la.Run:
    pl.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[la.TrajectoryRecorder(path)], **quiet)
    trainer.fit(Classifier(64, 10, (32,)), datamodule=DigitsDataModule(n_train=N, n_val=90, batch_size=50))
    return la.Run(path)


class Convolutions(Classifier):
    """Few parameters, and much to do for each image."""

    def __init__(self, width: int = 24) -> None:
        super().__init__(64, 10, lr=0.05, momentum=0.9)
        layers = [part for pair in pairwise([1, *[width] * 3]) for part in (nn.Conv2d(*pair, 3, padding=1), nn.GELU())]
        self.net = nn.Sequential(nn.Unflatten(1, (1, 8, 8)), *layers, nn.Flatten(), nn.Linear(width * 64, 10))


def together(folder: Path) -> None:
    """One sweep back, in one process and in two."""
    pl.seed_everything(0, verbose=False)
    data = TensorDataset(torch.rand(4 * BATCH, 64), torch.randint(0, 10, (4 * BATCH,)))
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=EPOCHS // 5 + 1, accelerator="cpu", callbacks=[la.TrajectoryRecorder(folder)], **quiet)
    trainer.fit(Convolutions(), DataLoader(data, BATCH, shuffle=True), DataLoader(Subset(data, range(64)), 32))
    run = la.Run(folder, module=Convolutions())
    options: dict[str, Any] = {"method": "sgd-ie", "check": 0, "save": False, "progress": False}
    alone = la.score(run, ray_address=None, **options)
    two = la.score(run, ray_address="local", processes=2, **options)
    one, both = (float(scores.conditions["seconds"]) for scores in (alone, two))
    apart = np.abs(alone.values - two.values).max() / np.abs(alone.values).max()
    print(
        f"a sweep back           {one:8.1f} s     {run.n_steps} steps, of {1000 * Replay(run).seconds_on(1):.0f} ms as trained"
    )
    print(f"2 processes / 1        {one / both:8.2f}     (to reach: 1.7); the same to {apart:.0e}")


def seconds(run: la.Run, address: str | None, n: int, **options: Any) -> float:
    started = time.perf_counter()
    la.score(run, removals=range(n), ray_address=address, **{**LOO, **options}, check=0)
    return time.perf_counter() - started


def enough(run: la.Run) -> tuple[int, float]:
    """How many removals take this process about ``SECONDS`` (at most all), and how long a repetition of them takes."""
    few = min(N, 128)
    seconds(run, None, few)
    n = min(N, max(few, int(few * SECONDS / seconds(run, None, few))))
    return n, seconds(run, None, n)


@contextmanager
def workers(count: int, took: dict[str, float]) -> Iterator[None]:
    """In here Ray runs on this machine, with so many; ``took`` is told the seconds of its start and of its end."""
    import ray

    started = time.perf_counter()
    ray.init(address="local", num_cpus=count, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    took["start"] = time.perf_counter() - started
    try:
        yield
    finally:
        ended = time.perf_counter()
        ray.shutdown()
        took["end"] = time.perf_counter() - ended


def first(run: la.Run, took: dict[str, float]) -> None:
    """A question to workers that have just been started, and the same again; ``took`` is told what the first costs beyond."""
    question = [seconds(run, "local", min(N, 128)) for _ in range(2)]
    took["workers"] = question[0] - question[1]


def rate(run: la.Run, n: int) -> float:
    """Removals a second of workers that have started."""
    return n / seconds(run, "local", n)


def main() -> None:
    import ray  # noqa: F401 - not counted

    torch.set_num_threads(1)
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    with tempfile.TemporaryDirectory() as directory:
        run = record(Path(directory) / "run")
        n, alone = enough(run)
        print(f"{n} removals of loo, {run.n_steps} steps, {run.n_parameters} parameters")
        print(f"in this process        {n / alone:8.1f} removals/s")
        one_took: dict[str, float] = {}
        with workers(1, one_took):
            first(run, one_took)
            one = rate(run, n)
        print(f"1 worker               {one:8.1f} removals/s")
        two_took: dict[str, float] = {}
        with workers(2, two_took):
            first(run, two_took)
            two = rate(run, n)
            print(f"2 workers              {two:8.1f} removals/s")
            print(f"2 workers / 1          {two / one:8.2f}     (to reach: 1.8)")
            together(Path(directory) / "together")
        for who, took in {"1 worker ": one_took, "2 workers": two_took}.items():
            parts = ", ".join(f"{part} {took[part]:.1f}" for part in ("start", "workers", "end"))
            added = 100 * sum(took.values()) / JOB
            print(f"Ray adds, {who}    {added:8.1f} %   to a job of {JOB:.0f} s (to reach: 10 %); in seconds: {parts}")
        stored = {"save": True, "memory_gb": 0.1}
        seconds(run, None, n, **stored)
        print(f"resuming a finished job{seconds(run, 'ray://nowhere:1', n, **stored):8.2f} s     (to reach: 5 s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    if parser.parse_args().quick:
        N, EPOCHS, SECONDS, BATCH = 130, 2, 0.5, 16
    main()
