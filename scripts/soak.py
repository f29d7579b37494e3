"""Random kills of trainings, workers and drivers: what is left must be whole, and end as if nothing had been.

    scripts/soak 5 --recordings 20 --drivers 20

First trainings are killed while they are recorded: the steps that are there must pass their audit, and be those of all but
the last seconds. Then, for some minutes and until so many drivers were killed, a run is scored round after round, by turns on
a Ray cluster and on a Ray of the driver's own. All the while workers are killed at random, and now and then the driver, which
is started again until it is done. Scores are compared to the last bit, and nothing may be missing or there twice.
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
from unittest import mock

import numpy as np
import pytorch_lightning as pl
import torch

import lightning_acc as la
from lightning_acc.methods import memory
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring import scores, work
from lightning_acc.scoring.cluster import farm
from lightning_acc.studies.data import DigitsDataModule
from lightning_acc.studies.models import Classifier

N, CHUNK = 300, 12
WORKERS = "LIGHTNING_ACC_SOAK"
"""Environment variable: a folder with a file for every worker at work, named by its process id."""
SECONDS_BETWEEN_KILLS, DRIVERS = (0.3, 3.0), 0.3
"""How long a worker is left in peace, and how often it is the driver that is killed."""
STRIKES = 1000
"""After so many a round is left to end."""
SECONDS_OF_RECORDING = (1.0, 9.0)
"""How long a training is recorded before it is killed."""


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
    farm.TRIES = 100  # a piece may be unlucky very often here
    scoring.compute = noted
    la.score(path, "loo", ray_address=address, progress=False, check=0)


def record(path: Path, *callbacks: pl.Callback, max_epochs: int = 3) -> la.Run:
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    pl.seed_everything(0, verbose=False)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
    trainer = pl.Trainer(max_epochs=max_epochs, accelerator="cpu", callbacks=[la.TrajectoryRecorder(path), *callbacks], **quiet)
    trainer.fit(Classifier(64, 10, (8,)), datamodule=DigitsDataModule(n_train=N, batch_size=50))
    return la.Run(path)


class Slowly(pl.Callback):
    """Writes down, by the clock, how many steps were taken."""

    def __init__(self, note: Path) -> None:
        self.note = note

    def on_train_batch_end(self, trainer: pl.Trainer, *_: Any) -> None:
        with self.note.open("a") as file:
            file.write(f"{trainer.global_step} {time.time()}\n")
        time.sleep(0.002)


def train_on(path: Path) -> None:
    """Trains and is recorded until it is killed."""
    record(path / "run", Slowly(path / "steps"), max_epochs=100_000)


def kill_recordings(times: int) -> None:
    """Kill so many trainings at random moments, and hold what is left of each against what it had done."""
    lost = []
    for turn in range(times):
        with tempfile.TemporaryDirectory() as directory:
            path = Path(directory)
            training = subprocess.Popen([sys.executable, __file__, "--train", directory], stderr=subprocess.DEVNULL)
            while not (path / "steps").exists():
                time.sleep(0.05)
            time.sleep(random.uniform(*SECONDS_OF_RECORDING))
            training.kill()
            killed = time.time()
            training.wait()
            taken = [line.split() for line in (path / "steps").read_text().splitlines() if line.count(" ") == 1]
            run = la.Run(path / "run", partial=True)
            if not run.audit().ok:
                raise SystemExit(f"killed training {turn}: {run.audit()}")
            lost.append(killed - next(float(when) for step, when in taken if int(step) == run.n_steps))
            print(
                f"training killed after {len(taken)} steps: {run.n_steps} are there, up to {lost[-1]:.1f} s before", flush=True
            )
    if lost:
        print(f"{times} trainings killed: all records pass their audit, at most {max(lost):.1f} s are lost")


def a_round(run: la.Run, address: str, workers: Path, killed: Counter[str]) -> dict[tuple[int, ...], float]:
    """Score anew, disturbed; returns what was stored."""
    run.store.remove("scores", "shards")
    log = workers.parent / "errors"
    before = sum(killed.values())
    while True:
        with open(log, "w") as errors:  # Ray tells of every worker it lost
            driver = subprocess.Popen([sys.executable, __file__, "--drive", run.path, address], stdout=errors, stderr=errors)
            try:
                while driver.poll() is None:
                    time.sleep(random.uniform(*SECONDS_BETWEEN_KILLS))
                    if sum(killed.values()) >= before + STRIKES:
                        continue
                    while not any(workers.iterdir()) and driver.poll() is None:
                        time.sleep(0.02)
                    if sum(killed.values()) > before:  # one strike is certain
                        time.sleep(random.uniform(0, 1))  # in the midst of its work, or some would never get any done
                    victims = [int(note.name) for note in workers.iterdir()]
                    if victims and random.random() < DRIVERS:
                        driver.kill()
                        killed["driver"] += 1
                        killed["driver of its own Ray"] += address == "local"
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


def main(minutes: float, recordings: int = 0, drivers: int = 0) -> None:
    torch.set_num_threads(1)
    kill_recordings(recordings)
    ends = time.monotonic() + 60 * minutes
    with tempfile.TemporaryDirectory() as directory:
        os.environ[WORKERS] = f"{directory}/workers"
        workers = Path(os.environ[WORKERS])
        workers.mkdir()
        run = record(Path(directory) / "run")
        with mock.patch.object(memory, "LARGEST_CHUNK", CHUNK):  # as the drivers, which are other processes
            expected = la.score(run, "loo", ray_address=None, save=False, progress=False, check=0)
        import ray

        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
        killed: Counter[str] = Counter()
        rounds = 0
        try:
            cluster_address = ray.get_runtime_context().gcs_address
            while not rounds or time.monotonic() < ends or killed["driver"] < drivers:
                found = a_round(run, "local" if rounds % 2 else cluster_address, workers, killed)
                if sorted(found) != sorted(expected.removals):
                    raise SystemExit(f"round {rounds}: removals are missing: {len(found)} of {N}")
                if not np.array_equal([found[removal] for removal in expected.removals], expected.values):
                    raise SystemExit(f"round {rounds}: the scores are others than those of the undisturbed run")
                rounds += 1
                print(
                    f"round {rounds}: {killed['worker']} workers and {killed['driver']} drivers killed so far, "
                    f"{killed['driver of its own Ray']} of these with a Ray of their own",
                    flush=True,
                )
        finally:
            ray.shutdown()
    print(f"all {rounds} rounds equal to the undisturbed run")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("minutes", nargs="?", type=float, default=5.0)
    parser.add_argument("--recordings", type=int, default=20, help="how many trainings to kill")
    parser.add_argument("--drivers", type=int, default=0, help="how many drivers to kill at least")
    parser.add_argument("--drive", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--train", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.drive:
        drive(*options.drive)
    elif options.train:
        train_on(options.train)
    else:
        main(options.minutes, options.recordings, options.drivers)
