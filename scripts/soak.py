"""Random kills of workers and drivers for some minutes: every round must end with the scores of an undisturbed run.

    scripts/soak 5

A round scores a run anew on a local Ray cluster. All the while workers are killed at random, and now and then the driver,
which is started again until it is done. Then scores are compared to the last bit, and nothing may be missing or there twice.
"""

from __future__ import annotations

import argparse
import logging
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch

import lightning_acc as la
from lightning_acc.methods import memory
from lightning_acc.scoring import cluster, scores, work
from lightning_acc.scoring import score as scoring
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

N, CHUNK = 300, 12
WORKERS = "LIGHTNING_ACC_SOAK"
"""Environment variable: a folder with a file for every worker at work, named by its process id."""
SECONDS_BETWEEN_KILLS, DRIVERS = (0.3, 3.0), 0.1
"""How long a worker is left in peace, and how often it is the driver that is killed."""


def noted(job: Any, removals: Any, progress: Callable[[float], None], replay: Any = None) -> work.Result:
    """``compute``, slowly, in a worker that can be found."""
    note = Path(os.environ[WORKERS]) / str(os.getpid())
    note.touch()
    try:
        progress(0.1)
        time.sleep(random.uniform(0, 1))
        return work.compute(job, removals, progress, replay)
    finally:
        note.unlink(missing_ok=True)


def drive(path: str, address: str) -> None:
    """The driver: scores, and says what is wrong with a status."""
    memory.LARGEST_CHUNK = CHUNK
    cluster.TRIES = 100  # a piece may be unlucky very often here
    scoring.compute = noted
    la.score(path, "loo", ray_address=address, progress=False, check=0)


def record(path: Path) -> la.Run:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=3, accelerator="cpu", callbacks=[la.TrajectoryRecorder(path)], **quiet)
    trainer.fit(Classifier(64, 10, (8,)), datamodule=DigitsDataModule(n_train=N, batch_size=50))
    return la.Run(path)


def a_round(run: la.Run, address: str, workers: Path, killed: Counter[str]) -> dict[tuple[int, ...], float]:
    """Score anew, disturbed; returns what was stored."""
    run.store.remove("scores", "shards")
    log = workers.parent / "errors"
    while True:
        with open(log, "w") as errors:  # Ray tells of every worker it lost
            driver = subprocess.Popen([sys.executable, __file__, "--drive", run.path, address], stdout=errors, stderr=errors)
            try:
                while driver.poll() is None:
                    time.sleep(random.uniform(*SECONDS_BETWEEN_KILLS))
                    while not (victims := [int(note.name) for note in workers.iterdir()]) and driver.poll() is None:
                        time.sleep(0.02)
                    if victims and random.random() < DRIVERS:
                        driver.kill()
                        killed["driver"] += 1
                    elif victims:
                        kill(random.choice(victims), workers, killed)
            finally:
                driver.kill()
        if driver.wait() == 0:
            return scores.read(run.store, "loo").by_removal()
        if driver.returncode != -signal.SIGKILL:
            raise SystemExit(f"the driver ended with {driver.returncode}:\n{log.read_text()}")


def kill(worker: int, workers: Path, killed: Counter[str]) -> None:
    (workers / str(worker)).unlink(missing_ok=True)
    try:
        # A process that ended may have left its id to another one: only Ray's own workers are struck.
        if b"ray::" not in Path(f"/proc/{worker}/cmdline").read_bytes():
            return
        os.kill(worker, signal.SIGKILL)
    except (ProcessLookupError, FileNotFoundError):
        return
    killed["worker"] += 1


def main(minutes: float) -> None:
    torch.set_num_threads(1)
    memory.LARGEST_CHUNK = CHUNK
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as directory:
        os.environ[WORKERS] = f"{directory}/workers"
        workers = Path(os.environ[WORKERS])
        workers.mkdir()
        run = record(Path(directory) / "run")
        expected = la.score(run, "loo", ray_address=None, save=False, progress=False, check=0)
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
        killed: Counter[str] = Counter()
        rounds = 0
        try:
            while not rounds or time.monotonic() < ends:
                found = a_round(run, ray.get_runtime_context().gcs_address, workers, killed)
                if sorted(found) != sorted(expected.removals):
                    raise SystemExit(f"round {rounds}: removals are missing: {len(found)} of {N}")
                if not np.array_equal([found[removal] for removal in expected.removals], expected.values):
                    raise SystemExit(f"round {rounds}: the scores are others than those of the undisturbed run")
                rounds += 1
                print(f"round {rounds}: {killed['worker']} workers and {killed['driver']} drivers killed so far", flush=True)
        finally:
            ray.shutdown()
    print(f"all {rounds} rounds equal to the undisturbed run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", nargs="?", type=float, default=5.0)
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(*options.drive)
    else:
        main(options.minutes)
