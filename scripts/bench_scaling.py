"""How the methods scale: time and memory against the number of samples n and of parameters p, with fitted exponents.

    python scripts/bench_scaling.py [--quick]

A GELU network with one hidden layer on MNIST (synthetic images where LIGHTNING_ACC_DATA is not set), trained by SGD with
momentum for 2 epochs of batch 128; every sample is removed once. Seconds are processor time of one thread. Memory is what
scoring adds to a fresh process at its peak; for methods that work in chunks it follows the budget, 2 GB. acc-low-rank tracks
in as many directions throughout, or follows 13 samples where it screens, as what it would choose depends on what can be
afforded. "~" was not measured but planned: la.plan predicts that it takes longer than the limit. An exponent is the slope of
a straight line through the logarithms.
"""

from __future__ import annotations

import argparse
import logging
import multiprocessing
import os
import resource
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

FEATURES, CLASSES, BATCH, EPOCHS = 784, 10, 128, 2
PRELOADED = [
    "pandas",
    *(f"lightning_acc.{part}" for part in ("studies.models", "studies.data", "recorder", "scoring.score", "planning.plan")),
]
METHODS: dict[str, dict[str, Any]] = {
    "tracin": {"method": "tracin"},
    "sgd-ie": {"method": "sgd-ie"},
    "acc-low-rank, tracked": {"method": "acc-low-rank", "readout": "linear"},
    "acc-low-rank, screened": {"method": "acc-low-rank", "followed": 13},
    "acc-sgd-ie": {"method": "acc-sgd-ie"},
    "loo": {"method": "loo"},
}
Measured = tuple[float, float, bool]
"""Seconds, GB, and whether they were measured."""


@dataclass(frozen=True)
class Sizes:
    """What is measured: each n with the first width, each width with the first n.

    Attributes:
        n: numbers of samples.
        widths: of the hidden layer, which make p; the first is that of the series against n.
        directions: of acc-low-rank, tracked.
        limit: seconds up to which loo and acc-sgd-ie are measured and not planned.
    """

    n: tuple[int, ...]
    widths: tuple[int, ...]
    directions: int
    limit: float


FULL = Sizes((1000, 4000, 16000, 60000), (128, 8, 32, 512), 32, 300.0)
QUICK = Sizes((64, 256), (8, 2), 4, 1.0)


def parameters(width: int) -> int:
    """Number of parameters with a hidden layer so wide."""
    return (FEATURES + 1) * width + (width + 1) * CLASSES


def record(path: str, n: int, width: int, synthetic: bool) -> None:
    """Record a training on n samples."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset, random_split

    import lightning_acc as la
    from lightning_acc.studies.data import MNISTDataModule
    from lightning_acc.studies.models import Classifier

    _quiet()
    torch.manual_seed(0)
    source: dict[str, Any]
    if synthetic:
        prototypes, y = torch.rand(CLASSES, FEATURES), torch.randint(0, CLASSES, (n + 500,))
        images = (prototypes[y] + 0.5 * torch.randn(n + 500, FEATURES)).clamp(0, 1)
        train, held_out = random_split(TensorDataset(images, y), [n, 500])
        source = {"train_dataloaders": DataLoader(train, BATCH, shuffle=True), "val_dataloaders": DataLoader(held_out, 500)}
    else:
        source = {"datamodule": MNISTDataModule(n_train=n, n_val=500, n_test=500, batch_size=BATCH, val_from="test")}
    trainer = pl.Trainer(
        max_epochs=EPOCHS,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[la.TrajectoryRecorder(path)],
    )
    trainer.fit(Classifier(FEATURES, CLASSES, (width,), lr=0.05, momentum=0.9), **source)


def planned(path: str) -> dict[str, tuple[float, float]]:
    """By method, the seconds it is expected to take and the GB it is expected to add."""
    import lightning_acc as la

    _quiet()
    run, base = la.Run(path), _peak()
    rows = la.plan(run, ray_address=None).table.to_pylist()
    return {row["method"]: (row["work_seconds"], max(0.0, row["peak_memory_gb"] - base)) for row in rows}


def measured(path: str, small: str, options: dict[str, Any]) -> tuple[float, float]:
    """The seconds a method takes, and the GB it adds."""
    import lightning_acc as la

    _quiet()
    # What any method brings along is there before: the module, Lightning, the machinery of autograd.
    la.score(la.Run(small), ray_address=None, save=False, progress=False, **options, check=0)
    run, base, started = la.Run(path), _peak(), time.process_time()
    la.score(run, ray_address=None, save=False, progress=False, **options, check=0)
    return time.process_time() - started, _peak() - base


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def _peak() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20


def measure(sizes: Sizes, synthetic: bool, folder: Path) -> dict[tuple[int, int, str], Measured]:
    """Everything, by n, width and name of the method. Each figure is from a process of its own."""
    # Forked from one that has done nothing but import: fresh, and quick to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    started = time.monotonic()

    def tell(what: str) -> None:
        print(f"[{time.monotonic() - started:5.0f} s] {what}", file=sys.stderr, flush=True)

    found: dict[tuple[int, int, str], Measured] = {}
    expected: dict[tuple[int, int, str], float] = {}
    problems = dict.fromkeys([*((n, sizes.widths[0]) for n in sizes.n), *((sizes.n[0], width) for width in sizes.widths)])
    small = str(folder / "small")
    with context.Pool(1, maxtasksperchild=1) as fresh:
        fresh.apply(record, (small, 2, 2, True))
        for n, width in problems:
            tell(f"n = {n}, p = {parameters(width)}: recording and planning")
            path = str(folder / f"{n}-{width}")
            fresh.apply(record, (path, n, width, synthetic))
            plans = fresh.apply(planned, (path,))
            for name, options in METHODS.items():
                seconds, gigabytes = plans[options["method"]]
                found[n, width, name] = (seconds, gigabytes, False)
                if seconds <= sizes.limit or options["method"] not in ("loo", "acc-sgd-ie"):
                    expected[n, width, name] = seconds
        for (n, width, name), seconds in list(expected.items()):
            left = sum(expected.values())
            tell(f"n = {n}, p = {parameters(width)}: {name}, {seconds:.0f} s or so of the {left:.0f} s or so that are left")
            options = ({"directions": sizes.directions} if name.endswith("tracked") else {}) | METHODS[name]
            found[n, width, name] = (*fresh.apply(measured, (str(folder / f"{n}-{width}"), small, options)), True)
            del expected[n, width, name]
        fresh.close()
        fresh.join()
    return found


def table(title: str, sizes: list[int], rows: dict[str, list[tuple[float, bool]]]) -> None:
    """Print values by method and size, each with whether it was measured, and their exponents."""
    print(f"\n{title:<26}" + "".join(f"{size:>11,}" for size in sizes) + f"{'exponent':>11}")
    for method, row in rows.items():
        cells = [("" if actual else "~") + (f"{value:,.0f}" if value >= 100 else f"{value:.3g}") for value, actual in row]
        values = np.log([max(value, 1e-4) for value, _ in row])
        slope = np.polyfit(np.log(sizes), values, 1)[0]
        print(f"{method:<26}" + "".join(f"{cell:>11}" for cell in cells) + f"{slope:>11.2f}")


def main(sizes: Sizes, synthetic: bool) -> None:
    """Measure and print the four tables."""
    with tempfile.TemporaryDirectory() as folder:
        found = measure(sizes, synthetic, Path(folder))
    data = "synthetic images" if synthetic else "MNIST"
    print(f"{data}, {EPOCHS} epochs of batch {BATCH}, {sizes.directions} directions, one thread; ~ planned, not measured")
    against_n = [(n, sizes.widths[0]) for n in sizes.n]
    against_p = [(sizes.n[0], width) for width in sorted(sizes.widths)]
    for place, unit in enumerate(("seconds", "GB added")):
        for title, pairs, numbers in (
            (f"against n, p = {parameters(sizes.widths[0]):,}", against_n, list(sizes.n)),
            (f"against p, n = {sizes.n[0]:,}", against_p, [parameters(width) for _, width in against_p]),
        ):
            rows = {name: [(found[(*pair, name)][place], found[(*pair, name)][2]) for pair in pairs] for name in METHODS}
            table(f"{unit} {title}", numbers, rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--n", type=int, nargs="+", default=list(FULL.n), help="numbers of samples")
    parser.add_argument("--limit", type=float, default=FULL.limit, help="seconds up to which loo and acc-sgd-ie are measured")
    arguments = parser.parse_args()
    if arguments.quick:
        main(QUICK, synthetic=True)
    else:
        chosen = Sizes(tuple(arguments.n), FULL.widths, FULL.directions, arguments.limit)
        main(chosen, synthetic="LIGHTNING_ACC_DATA" not in os.environ)
