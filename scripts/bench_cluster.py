"""What Ray gives and takes: removals a second with 1 and 2 workers, its share of a minute's work, resuming a finished job.

    python scripts/bench_cluster.py           # some minutes, on a machine with two idle cores
    python scripts/bench_cluster.py --quick   # seconds: that it runs, not how fast

To reach: 2 workers do 1.8 times as much a second as 1; Ray adds at most 10 % to a job of 60 s; a finished job is resumed in
under 5 s, without starting workers. Imports are left out, and Ray's start is in the
60 s alone.
"""

from __future__ import annotations

import argparse
import logging
import tempfile
import time
import warnings
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch

import lightning_acc as la
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

N, EPOCHS, SECONDS = 1200, 50, 60.0
LOO: dict[str, Any] = {"method": "loo", "save": False, "progress": False, "memory_gb": 0.1}


def record(path: Path) -> la.Run:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    pl.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=EPOCHS, accelerator="cpu", callbacks=[la.TrajectoryRecorder(path)], **quiet)
    trainer.fit(Classifier(64, 10, (32,)), datamodule=DigitsDataModule(n_train=N, n_val=90, batch_size=50))
    return la.Run(path)


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


def speed(run: la.Run, workers: int, first: int, n: int) -> tuple[float, float]:
    """Seconds from nothing to the end of ``first`` removals on a local Ray, and then removals a second.

    The seconds count Ray's start and end, and that the workers start; the removals a second, ``n`` of them, do not.
    """
    import ray

    started = time.perf_counter()
    ray.init(address="local", num_cpus=workers, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    try:
        seconds(run, "local", first)
        begun = time.perf_counter() - started
        rate = n / seconds(run, "local", n)
    finally:
        started = time.perf_counter()
        ray.shutdown()
    return begun + time.perf_counter() - started, rate


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as directory:
        run = record(Path(directory) / "run")
        n, alone = enough(run)
        print(f"{n} removals of loo, {run.n_steps} steps, {run.n_parameters} parameters")
        print(f"in this process        {n / alone:8.1f} removals/s")
        (from_nothing, one), (_, two) = speed(run, 1, n, n), speed(run, 2, min(n, 128), n)
        print(f"1 worker               {one:8.1f} removals/s")
        print(f"2 workers              {two:8.1f} removals/s")
        print(f"2 workers / 1          {two / one:8.2f}     (to reach: 1.8)")
        added = 100 * (from_nothing / alone - 1)
        print(f"Ray adds               {added:8.1f} %   to {alone:.1f} s, its start included (to reach: 10 %)")
        stored = {"save": True, "memory_gb": 0.1}
        seconds(run, None, n, **stored)
        print(f"resuming a finished job{seconds(run, 'ray://nowhere:1', n, **stored):8.2f} s     (to reach: 5 s)")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="a small run, to see that it works")
    if parser.parse_args().quick:
        N, EPOCHS, SECONDS = 130, 2, 0.5
    main()
