"""Asked at the end of a run or along it, of the mean or of each example, of another seed: what are the answers worth?

    python scripts/study_questions.py                    # about 40 minutes on two cores; goes on where it was stopped
    python scripts/study_questions.py --only lds         # or agreement
    python scripts/study_questions.py --record           # only train what is asked about

Agreement: rank correlation of estimates with leave-one-out retraining over 64 random samples, read at the end of the run and
along it. LDS: of the sums of samples' scores with the truth of 100 random groups of 5 %, for the mean over the validation
examples and, on average, for each of 100 of them; what a new query costs once the groups were retrained without; and how well
the scores of one run tell what happens to a run of another seed. The tables go into scripts/study/README.md.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import re
import time
import warnings
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import pytorch_lightning as pl
import torch
from study_figures import into_readme
from text_classifier import Posts, TextClassifier
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.judge import lds
from lightning_acc.scoring.selection import select
from lightning_acc.scoring.trust.figures import kendall, spearman
from lightning_acc.scoring.trust.verdict import interval
from lightning_acc.studies.data import MNISTDataModule
from lightning_acc.studies.data.base import DATA_VARIABLE
from lightning_acc.studies.models import Classifier

QUIET = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False, "enable_model_summary": False}
MOMENTS = ("end", "along")
EXAMPLES = 100
NAMES = {"gelu": "GELU", "relu": "ReLU"}


class ByAdamW(Classifier):
    """The studies' network under AdamW."""

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.AdamW(self.parameters(), lr=self.sgd["lr"], weight_decay=0.01)


def digits(directory: Path, n: int, optimizer: str, activation: str, lr: float, seed: int = 0, batch_size: int = 64) -> la.Run:
    """MNIST, a network of 128 hidden units, 5 epochs."""
    kind = Classifier if optimizer == "SGD" else ByAdamW
    pl.seed_everything(seed, verbose=False)
    module = kind(784, 10, (128,), activation, lr=lr, momentum=0.9 if optimizer == "SGD" else 0.0)  # type: ignore[arg-type]
    data = MNISTDataModule(n_train=n, n_val=500, n_test=1000, batch_size=batch_size)
    return recorded(directory, module, 5, lambda trainer: trainer.fit(module, datamodule=data))


def posts(directory: Path, n: int, seed: int = 0) -> la.Run:
    """Two newsgroups, a small GELU transformer with dropout, AdamW with warm-up, a cosine and clipping, 5 epochs."""
    pl.seed_everything(seed, verbose=False)
    module = TextClassifier(5 * -(-n // 32))

    def fit(trainer: pl.Trainer) -> None:
        folder = os.environ.get(DATA_VARIABLE)
        source = f"{folder}/SetFit/20_newsgroups" if folder else "SetFit/20_newsgroups"
        train, val = Posts(source, "train", n), Posts(source, "test", 300)
        assert len(train) == n
        trainer.fit(module, DataLoader(train, 32, shuffle=True), DataLoader(val, 100))

    return recorded(directory, module, 5, fit, gradient_clip_val=1.0)


def recorded(directory: Path, module: Any, epochs: int, fit: Callable[[pl.Trainer], None], **options: Any) -> la.Run:
    """The run in a directory, trained where it is not there yet."""
    if not (directory / "manifest.json").exists():
        callbacks = [la.TrajectoryRecorder(directory, parameters="every-k", budget_gb=0.002)]
        fit(pl.Trainer(max_epochs=epochs, accelerator="cpu", callbacks=callbacks, **QUIET, **options))
    return la.Run(directory, module=module)


def scored(run: la.Run, method: str, removals: Any = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, **{"ray_address": None, "check": 0, "bank_gb": 8, "memory_gb": 4, **options})


def agreement_runs(place: Path) -> dict[str, Callable[[], list[la.Run]]]:
    """By name, what trains the run of a cell."""
    return {
        f"{NAMES[activation]}, {optimizer}": partial(
            lambda *options: [digits(place / f"agreement-{options[1]}-{options[2]}", *options)],
            1000, optimizer, activation, lr,
        )
        for activation in ("gelu", "relu")
        for optimizer, lr in (("SGD", 0.05), ("AdamW", 1e-3))
    }  # fmt: skip


def agreement(runs: list[la.Run]) -> list[str]:
    """Rows of a cell: method, Spearman at the end and along, Kendall at the end and along."""
    (run,) = runs
    some = select(run, "random:64")
    truth = {at: scored(run, "loo", some, at=at).values for at in MOMENTS}
    lines = []
    for method in ("acc-sgd-ie", "sgd-ie", "tracin"):
        said = {at: scored(run, method, some, at=at).estimates for at in MOMENTS}
        rho = [within(said[at], truth[at]) for at in MOMENTS]
        tau = [f"{kendall(said[at], truth[at]):.2f}" for at in MOMENTS]
        lines.append(" | ".join([method, *rho, *tau]))
    return lines


def within(estimate: Any, truth: Any) -> str:
    low, high = interval(estimate, truth)
    return f"{spearman(estimate, truth):.2f} ({low:.2f} to {high:.2f})"


def lds_runs(place: Path) -> dict[str, Callable[[], list[la.Run]]]:
    """By name, what trains the runs of a cell: two, of different seeds."""

    def both(train: Callable[[int], la.Run]) -> list[la.Run]:
        return [train(0), train(1)]

    def mnist(activation: str, lr: float) -> list[la.Run]:
        return both(lambda seed: digits(place / f"{activation}-{lr}-{seed}", 2000, "SGD", activation, lr, seed))

    return {
        "MNIST, GELU, SGD, lr 0.01": partial(mnist, "gelu", 0.01),
        "MNIST, GELU, SGD, lr 0.05": partial(mnist, "gelu", 0.05),
        "MNIST, ReLU, SGD, lr 0.01": partial(mnist, "relu", 0.01),
        "20 Newsgroups, transformer, AdamW": partial(both, lambda seed: posts(place / f"posts-{seed}", 1000, seed)),
    }


def datamodeling(runs: list[la.Run], at: str) -> list[str]:
    """Rows of a cell: method, when, LDS of the mean, of each example, in a run of another seed; then what a query costs."""
    run = runs[0]
    groups = select(run, "random-groups:100x5%")
    truth, elsewhere = (scored(one, "loo", groups, at=at) for one in runs)
    each = matrix(run, "loo", at, list(truth.removals))
    lines = []
    for method in ("sgd-ie", "tracin"):
        scores = scored(run, method, at=at).by_removal()
        found = (lds.of_scores(scores, truth), lds.of_matrix(matrix(run, method, at), each), lds.of_scores(scores, elsewhere))
        lines.append(" | ".join([method, at, *(f"{one.value:.3f} ({one.low:.2f} to {one.high:.2f})" for one in found if one)]))
    # Only where training is quick is it done again to be timed.
    return [*lines, f"{cost(run, groups, at) if run.manifest['optimizer']['name'] == 'SGD' else 0.0}"]


def matrix(run: la.Run, method: str, at: str, removals: Any = None) -> la.ScoreMatrix:
    return la.score_matrix(
        run, method, examples=range(EXAMPLES), removals=removals, at=at, ray_address=None, check=0, bank_gb=8
    )


def cost(run: la.Run, groups: Any, at: str) -> float:
    """Seconds of a new query on the groups' shifts, over those of retraining without them."""
    started = time.perf_counter()
    scored(run, "loo", groups, at=at, save=False)
    retraining = time.perf_counter() - started
    val = run.query("val")
    started = time.perf_counter()
    found = scored(run, "loo", groups, at=at, query=la.Query("half", batches(val.picked(range(val.n_examples // 2)))))
    asking = time.perf_counter() - started
    assert found.conditions["seconds"] == 0
    return asking / retraining


def batches(query: la.Query) -> list[Any]:
    from lightning_acc.record.batches import unflatten

    return [unflatten(structure, leaves) for leaves, structure in query.batches]


def file(place: Path, cell: str) -> Path:
    """Where the figures of a cell are kept."""
    return place / (re.sub(r"[^a-z0-9.]+", "-", cell.lower()) + ".json")


def tables(place: Path, cells: list[str]) -> None:
    """Put what was found into the README beside the figures."""
    found = {cell: json.loads(file(place, cell).read_text()) for cell in cells if file(place, cell).exists()}
    head = table("network and optimizer", "method", "Spearman at the end", "along", "Kendall at the end", "along")
    mine = {cell: lines for cell, lines in found.items() if cell.startswith("agreement")}
    into_readme(
        "agreement", [*head, *(f"| {cell.split(' · ')[1]} | {line} |" for cell, lines in mine.items() for line in lines)]
    )
    head = table("run", "method", "at", "LDS of the mean", "LDS of each example", "of the mean, another seed")
    mine = {cell: lines for cell, lines in found.items() if cell.startswith("lds")}
    rows = [f"| {cell.split(' · ')[1]} | {line} |" for cell, lines in mine.items() for line in lines[:-1]]
    most = {at: max((float(lines[-1]) for cell, lines in mine.items() if cell.endswith(at)), default=0.0) for at in MOMENTS}
    cost = (
        f"A new query of 250 examples on 100 groups that were retrained without costs at most {most['end']:.1%} of retraining "
        f"at the end, and {most['along']:.0%} along the run, where each shift is read 20 times."
    )
    into_readme("lds", [*head, *rows, "", cost])


def table(*columns: str) -> list[str]:
    return [f"| {' | '.join(columns)} |", "|" + "---|" * len(columns)]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", default="", help="cells whose name contains this")
    parser.add_argument("--directory", default="runs/study-questions", help="where the runs and the cells' figures are kept")
    parser.add_argument("--record", action="store_true", help="train, and no more")
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    place = Path(options.directory)
    place.mkdir(parents=True, exist_ok=True)
    cells: dict[str, Callable[[], list[str]]] = {}
    for name, train in agreement_runs(place).items():
        cells[f"agreement · {name}"] = lambda train=train: agreement(train())  # type: ignore[misc]
    for name, train in lds_runs(place).items():
        for at in reversed(MOMENTS):  # what is retrained along the run is known at its end, too
            cells[f"lds · {name} · {at}"] = lambda train=train, at=at: datamodeling(train(), at)  # type: ignore[misc]
    if options.record:
        for train in [*agreement_runs(place).values(), *lds_runs(place).values()]:
            train()
        return
    for cell, work in cells.items():
        if options.only in cell and not file(place, cell).exists():
            lines = work()
            file(place, cell).write_text(json.dumps(lines))
            print(cell, *lines, sep="\n  ", flush=True)
    tables(place, list(cells))


if __name__ == "__main__":
    main()
