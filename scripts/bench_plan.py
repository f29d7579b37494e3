"""How well ``plan`` predicts: seconds and peak memory, before, against what scoring then takes.

    python scripts/bench_plan.py

Every figure comes from a process of its own. Runs whose data cannot be found are passed over. To reach: ratios between
1/1.5 and 1.5. "work" is processor time, which other processes disturb least; "time" is that of a clock on the wall.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.methods.registry import METHODS
from lightning_acc.studies.data import DigitsDataModule, NewsgroupsDataModule
from lightning_acc.studies.models import Classifier

EPOCHS = {"digits": 15, "mlp": 4, "20news": 10, "adamw": 6, "unequal": 6, "local": 30}


class AdamWClassifier(Classifier):
    """The same trained by AdamW, which keeps two more vectors."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=0.003)


def module(problem: str) -> pl.LightningModule:
    if problem == "20news":
        return Classifier(2000, 2, lr=0.5)
    if problem == "mlp":
        return Classifier(784, 10, (64,))
    if problem == "adamw":
        return AdamWClassifier(100, 10, (32,))
    return Classifier(64, 10, (16,), lr=0.3)


def random_data(n: int, features: int) -> TensorDataset:
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(n, features, generator=generator), torch.randint(0, 10, (n,), generator=generator))


def data(problem: str) -> dict[str, Any]:
    if problem in ("digits", "local"):
        return {"datamodule": DigitsDataModule(n_train=600, batch_size=50)}
    if problem == "20news":
        return {"datamodule": NewsgroupsDataModule(n_train=400, batch_size=100)}
    if problem == "unequal":
        edges = [0, 5, 20, 40, 100, 110, 190, 200, 300]
        sampler = [list(range(a, b)) for a, b in itertools.pairwise(edges)]
        loader: Any = DataLoader(random_data(300, 64), batch_sampler=sampler)
    else:
        n, features = (400, 784) if problem == "mlp" else (300, 100)
        loader = DataLoader(random_data(n, features), 50, shuffle=True)
    features = loader.dataset.tensors[0].shape[1]
    return {"train_dataloaders": loader, "val_dataloaders": DataLoader(random_data(200, features), 100)}


def record(problem: str, directory: Path) -> None:
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore")
    torch.manual_seed(0)
    trainer = pl.Trainer(
        max_epochs=EPOCHS[problem],
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[la.TrajectoryRecorder(directory, overwrite=True)],
    )
    trainer.fit(module(problem), **data(problem))


def measure(problem: str, path: str, what: str) -> dict[str, Any]:
    """In a fresh process: record the run, plan, or tell what the method ``what`` takes."""
    if what == "record":
        try:
            record(problem, Path(path))
        except (la.InfluenceError, OSError) as error:
            return {"missing": str(error).splitlines()[0]}
        return {}
    run = la.Run(path, module=module(problem))
    address = "local" if problem == "local" else None
    if what == "plan":
        started = time.perf_counter()
        rows = {row["method"]: row for row in la.plan(run, ray_address=address).table.to_pylist()}
        return {**rows, "took": time.perf_counter() - started}
    # What any method brings along is there before: the module, Lightning, the machinery of autograd.
    la.score(run, "sgd-ie", [0], ray_address=None, save=False, check=0)
    la.score(run, "acc-sgd-ie", [0], ray_address=None, save=False, check=0)
    wall, work = time.perf_counter(), time.process_time()
    scores = la.score(run, what, ray_address=address, save=False, check=0)
    wall, work = time.perf_counter() - wall, time.process_time() - work
    return {
        "seconds": wall,
        "work_seconds": work,
        "peak_memory_gb": scores.conditions["peak_memory_gb"],
        "here": address is None or METHODS[what].readout == "linear",
    }


def compare(problem: str, ask: Callable[[str], dict[str, Any]]) -> None:
    """Print predicted / actual of every method."""
    predicted = ask("plan")
    print(f"\n{problem}: planned in {predicted['took']:.1f} s   (predicted / actual = ratio)", flush=True)
    for method in METHODS:
        actual, expected = ask(method), predicted[method]
        columns = [("time", "seconds"), ("work", "work_seconds"), ("GB", "peak_memory_gb")]
        if not actual["here"]:
            del columns[1]  # the workers' processor time is not known
        parts = [
            f"{label} {expected[key]:6.2f} / {actual[key]:6.2f} = {expected[key] / actual[key]:4.2f}" for label, key in columns
        ]
        print(f"{method:>12s}  " + "   ".join(parts), flush=True)


def main(problems: list[str]) -> None:
    for problem in problems:
        with tempfile.TemporaryDirectory() as directory:
            path = f"{directory}/run"

            def ask(what: str, problem: str = problem, path: str = path) -> dict[str, Any]:
                command = [sys.executable, __file__, "--measure", problem, path, what]
                lines = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout.splitlines()
                return dict(json.loads(lines[-1]))

            # Even the training runs in another process: the peak a process reports begins with the size of its parent.
            missing = ask("record").get("missing")
            if missing:
                print(f"\n{problem}: passed over ({missing})")
            else:
                compare(problem, ask)


if __name__ == "__main__":
    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--measure", nargs=3, metavar=("PROBLEM", "RUN", "WHAT"), help=argparse.SUPPRESS)
    parser.add_argument("problems", nargs="*", help=f"some of {', '.join(EPOCHS)}; all by default")
    options = parser.parse_args()
    if options.measure:
        print(json.dumps(measure(*options.measure)))
    else:
        main(options.problems or list(EPOCHS))
