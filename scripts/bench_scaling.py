"""How the methods scale: cost in plain trainings, and memory, against the numbers of samples n and of parameters p.

    LIGHTNING_ACC_DATA=... python scripts/bench_scaling.py     # about three hours of one core; n and p can be chosen
    python scripts/bench_scaling.py --quick                    # small, of synthetic images

GELU networks with one hidden layer on MNIST, trained by SGD with momentum for 2 epochs of batch 128; and MiniLM (22.7 million
parameters) fine-tuned on posts by AdamW with dropout (scripts/bench_minilm.py). A plain training is the recorded one, taken
once more; all is processor time of one thread. Of ``loo`` and ``acc-sgd-ie`` 8 removals are measured, together, and the cost is
that of each; the others score all samples at once. Memory is what scoring adds to a fresh process at its peak: for methods that
work in chunks it follows the budget, 2 GB.

On one core, the other at work too (trainings, and GB that it adds):

    model          n           p  training      tracin      sgd-ie  acc-low-rank  acc-sgd-ie         loo
    MLP-128      500     101,770     0.1 s   3.2  0.01   3.6  0.02    14.5  0.07  0.77  0.04  0.60  0.04
    MLP-128    4,000     101,770     0.4 s   3.6  0.09   3.4  0.09    15.2  0.19  0.57  0.07  0.48  0.07
    MLP-128   16,000     101,770     1.5 s   3.7  0.25   3.4  0.25    14.4  0.40  0.58  0.10  0.67  0.10
    MLP-128   60,000     101,770     4.1 s   4.4  0.91   4.2  0.94    18.6  1.59  0.66  0.35  0.72  0.36
    MLP-13       500      10,345    0.04 s   3.5  0.00   2.3  0.00    12.7  0.02  0.39  0.01  0.31  0.01
    MLP-1258     500   1,000,120     0.2 s   3.3  0.14   4.1  0.14    15.8  0.62  1.29  0.22  1.20  0.12
    MLP-12579    500  10,000,315     2.7 s   2.7  1.19   2.8  1.14     6.7  3.33  1.05  1.71  0.76  0.99
    MiniLM        64  22,713,986      16 s   3.5  2.65   4.1  2.69    16.8  3.76  2.81  3.92  1.02  2.54

acc-low-rank and tracin are of later runs by themselves (--methods acc-low-rank tracin).
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
from functools import partial
from multiprocessing.pool import Pool
from pathlib import Path
from typing import Any, NamedTuple

FEATURES, CLASSES, BATCH, EPOCHS, SOME = 784, 10, 128, 2, 8
PRELOADED = [
    "pandas",
    *(f"lightning_acc.{part}" for part in ("studies.models", "studies.data", "recorder", "scoring.score", "judge.agreement")),
]
METHODS = ("tracin", "sgd-ie", "acc-low-rank", "acc-sgd-ie", "loo")
EACH = ("acc-sgd-ie", "loo")
"""Methods that are paid for removal by removal."""


class Problem(NamedTuple):
    """A training: of a network with a hidden layer so wide, or of MiniLM, on n samples."""

    n: int
    width: int | None

    @property
    def name(self) -> str:
        """For the heads of the table."""
        return "MiniLM" if self.width is None else f"MLP-{self.width}"


N, WIDTHS, POSTS = (500, 4000, 16000, 60000), (13, 128, 1258, 12579), 64
"""Each n with the second width, each width with the first n: p from 10 000 to 10 million."""


def record(path: str, problem: Problem, synthetic: bool) -> None:
    """Record a training."""
    import pytorch_lightning as pl
    import torch
    from torch.utils.data import DataLoader, TensorDataset, random_split

    import lightning_acc as la
    from lightning_acc.studies.data import MNISTDataModule
    from lightning_acc.studies.models import Classifier

    _quiet()
    n, width = problem
    if width is None:
        import bench_minilm

        bench_minilm.record(Path(path), lora=False, n=n, epochs=EPOCHS, length=64)
        return
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


def opened(path: str, problem: Problem) -> Any:
    """The run."""
    import lightning_acc as la

    _quiet()
    if problem.width is not None:
        return la.Run(path)
    import bench_minilm

    return la.Run(path, module=bench_minilm.FineTuned(steps=1))


def training(path: str, problem: Problem) -> tuple[float, int]:
    """Seconds of the training, and p."""
    from bare_replay import bare_replay

    run = opened(path, problem)
    return bare_replay(run), run.n_parameters


def measured(path: str, small: str, problem: Problem, method: str) -> tuple[float, float]:
    """The seconds a method takes, each removal where it is paid for so, and the GB it adds."""
    import lightning_acc as la

    options: dict[str, Any] = {"ray_address": None, "save": False, "progress": False, "check": 0}
    run = opened(path, problem)
    # What any method brings along is there before: the module, Lightning, the machinery of autograd.
    la.score(la.Run(small), method, **options)
    removals = [i * run.n_samples // SOME for i in range(SOME)] if method in EACH else None
    base, started = _peak(), time.process_time()
    la.score(run, method, removals, **options)
    seconds = time.process_time() - started
    return seconds / (1 if removals is None else SOME), _peak() - base


def _quiet() -> None:
    import torch

    torch.set_num_threads(1)
    logging.disable(logging.WARNING)
    warnings.filterwarnings("ignore")


def _peak() -> float:
    size = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return size / 2**30 if sys.platform == "darwin" else size / 2**20


def row(fresh: Pool, folder: Path, problem: Problem, methods: list[str], synthetic: bool) -> list[str]:
    """A line of the table: every figure from a process of its own."""
    path, small = str(folder / f"{problem.n}-{problem.width}"), str(folder / "small")
    fresh.apply(record, (path, problem, synthetic))
    plain, p = fresh.apply(training, (path, problem))
    cells = [f"{problem.name:<10} {problem.n:>7,} {p:>11,} {plain:>8.1f} s"]
    for method in methods:
        seconds, gigabytes = fresh.apply(measured, (path, small, problem, method))
        cells.append(f"{seconds / plain:>7.2f} {gigabytes:>6.2f}")
    return cells


def main(problems: list[Problem], methods: list[str], synthetic: bool) -> None:
    """Measure, and print line by line."""
    # Forked from one that has done nothing but import: fresh, and quick to start.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(PRELOADED)
    print(f"{'synthetic images' if synthetic else 'MNIST'}; of each method plain trainings ({SOME} removals of")
    print(f"{' and '.join(EACH)}: each), and GB that it adds")
    print(f"{'model':<10} {'n':>7} {'p':>11} {'training':>10}" + "".join(f" {method:>15}" for method in methods), flush=True)
    with tempfile.TemporaryDirectory() as folder, context.Pool(1, maxtasksperchild=1) as fresh:
        fresh.apply(record, (str(Path(folder) / "small"), Problem(2 * SOME, 2), True))
        show = partial(row, fresh, Path(folder), methods=methods, synthetic=synthetic)
        for problem in problems:
            print("  ".join(show(problem)), flush=True)
        fresh.close()
        fresh.join()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="small sizes, to see that it works")
    parser.add_argument("--n", type=int, nargs="*", default=list(N), help="numbers of samples")
    parser.add_argument("--widths", type=int, nargs="*", default=list(WIDTHS), help="of the hidden layer, which make p")
    parser.add_argument("--posts", type=int, default=POSTS, help="that MiniLM is fine-tuned on; 0: not at all")
    parser.add_argument("--methods", choices=METHODS, nargs="+", default=list(METHODS), help="some of them")
    given = parser.parse_args()
    if given.quick:
        main([Problem(64, 8), Problem(256, 8), Problem(64, 2)], given.methods, synthetic=True)
    else:
        of_n = [Problem(n, WIDTHS[1]) for n in given.n]
        of_p = [Problem(N[0], width) for width in given.widths]
        posts = [Problem(given.posts, None)] if given.posts else []
        main(list(dict.fromkeys([*of_n, *of_p, *posts])), given.methods, synthetic="LIGHTNING_ACC_DATA" not in os.environ)
