"""Does it clean? Wrong labels and noisy features looked for, dropped, and trained without, beside rankings that cost less.

    python scripts/study_cleaning.py                      # every cell; goes on where it was stopped
    python scripts/study_cleaning.py --cells mnist-1000-uniform-20 adult-1000-class-20 --seeds 5
    python scripts/study_cleaning.py --tables             # the tables and the picture, from what has been run

A cell is a data set, its size, a kind of noise, and whether the validation labels are wrong in the same way. In each, four
trainings from different seeds are recorded on the same data; samples are ranked by influence, read at the end of one run or
along it, of one run or of four (the mean of their scores), and by controls. A ranking is judged by how many of the samples it
puts first are corrupted, and by what dropping these gains over dropping nothing, in trainings from seeds that no ranking has
seen. Needs MNIST, Adult and 20 Newsgroups, from the Hub or by LIGHTNING_ACC_DATA. On one core a cell of 1000 samples takes some
minutes and as many again for each ranking by acc-low-rank, one of all of MNIST half an hour.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytorch_lightning as pl
import torch
from sklearn.metrics import roc_auc_score

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.judge import controls
from lightning_acc.judge.cleaning_table import ADDED, interval
from lightning_acc.judge.fresh_training import Retraining, retrain
from lightning_acc.judge.validation import with_validation
from lightning_acc.progress import Progress
from lightning_acc.studies.data import AdultDataModule, DigitsDataModule, MNISTDataModule, NewsgroupsDataModule
from lightning_acc.studies.data.base import StudyDataModule
from lightning_acc.studies.models import Classifier

GROUPS = (
    *("alt.atheism", "comp.graphics", "comp.os.ms-windows.misc", "comp.sys.ibm.pc.hardware", "comp.sys.mac.hardware"),
    *("comp.windows.x", "misc.forsale", "rec.autos", "rec.motorcycles", "rec.sport.baseball", "rec.sport.hockey", "sci.crypt"),
    *("sci.electronics", "sci.med", "sci.space", "soc.religion.christian", "talk.politics.guns", "talk.politics.mideast"),
    *("talk.politics.misc", "talk.religion.misc"),
)
RECIPES: dict[str, dict[str, Any]] = {
    "100": {"epochs": 10, "batch_size": 20, "hidden": [16], "lr": 0.05, "momentum": 0.9},
    "1000": {"epochs": 25, "batch_size": 100, "hidden": [128], "lr": 0.01, "momentum": 0.9},
    "all": {"epochs": 5, "batch_size": 128, "hidden": [128], "lr": 0.05, "momentum": 0.9},
}
"""How cells of a size are trained, all alike: a GELU network, by SGD.

Of 1000: of the learning rates .002, .005, .01, .02, .05, .1 and batches of 50 and 100 those with the lowest validation loss
after 25 epochs on MNIST (mean of uniform-20 and class-20), by which time the network fits. Of all: that of
configs/mnist-full.yaml.
"""
RATES = {"news": 0.5}
"""Learning rates of data on another scale (word weights are small), chosen in the same way among .002 to 2."""
DATA: dict[str, dict[str, tuple[type[StudyDataModule], dict[str, Any]]]] = {
    "digits": {"100": (DigitsDataModule, {"n_train": 100, "n_val": 100})},
    "mnist": {
        "1000": (MNISTDataModule, {"n_train": 1000, "n_val": 500, "n_test": None}),
        "all": (MNISTDataModule, {"n_train": None, "n_val": 5000, "n_test": 5000, "val_from": "test"}),
    },
    "adult": {
        "1000": (AdultDataModule, {"n_train": 1000, "n_val": 500, "n_test": None}),
        "all": (AdultDataModule, {"n_train": None, "n_val": 2000, "n_test": None}),
    },
    "news": {
        "1000": (NewsgroupsDataModule, {"groups": GROUPS, "n_train": 1000, "n_val": 500, "n_test": None}),
        "all": (NewsgroupsDataModule, {"groups": GROUPS, "n_train": None, "n_val": 1000, "n_test": None}),
    },
}
NOISE: dict[str, dict[str, Any]] = {
    "uniform-10": {"label_noise": 0.1},
    "uniform-20": {"label_noise": 0.2},
    "class-20": {"label_noise": 0.2, "class_dependent": True},
    "class-10": {"label_noise": 0.1, "class_dependent": True},
    "feature-20": {"feature_noise": 0.2},
}
RUNS = 4
DENSE = "along:200"
"""Of 2345 steps, every dozenth, as ``along`` reads the 250 steps of the trainings on 1000 samples."""
BY_INFLUENCE = {
    f"{method} {at}" + (f" of {count} runs" if count > 1 else ""): (method, at, count)
    for method, at, count in itertools.product(("sgd-ie", "acc-low-rank"), ("end", "along", DENSE), (1, RUNS))
}
"""Method, moment and number of runs of the rankings by influence."""
LOSS_OF_RUNS = f"loss of {RUNS} runs"
CONTROLS = ("loss", LOSS_OF_RUNS, "self-influence", "cleanlab", "validation", "oracle")
RANKINGS = [*BY_INFLUENCE, *CONTROLS]
AT_ONCE = 8
"""Trainings that are batched together."""
FIRST_SEED = 1000
"""Of the trainings that test a ranking: far from those of the recorded runs and of the controls."""


@dataclass(frozen=True)
class Cell:
    """One question: data, size, noise, and whether the validation labels are wrong in the same way."""

    data: str
    size: str
    noise: str
    val_wrong: bool = False

    @property
    def name(self) -> str:
        return f"{self.data}-{self.size}-{self.noise}" + ("-val-wrong" if self.val_wrong else "")

    @property
    def rate(self) -> float:
        return float(max(NOISE[self.noise].get(key, 0) for key in ("label_noise", "feature_noise")))

    @property
    def fractions(self) -> tuple[float, ...]:
        """Shares that are dropped: of all the data only as many as are corrupted, as a training takes long."""
        return (self.rate,) if self.size == "all" else (0.1, 0.2, 0.3)

    def module(self) -> StudyDataModule:
        """Its data, always the same."""
        kind, options = DATA[self.data][self.size]
        data = kind(
            **options, **NOISE[self.noise], batch_size=RECIPES[self.size]["batch_size"], seed=0, val_label_noise=self.val_wrong
        )
        data.setup()
        return data


def cells() -> dict[str, Cell]:
    """Every cell by its name, those first that are told of first."""
    noises = [noise for noise in NOISE if noise != "class-10"]
    every = [
        Cell(data, size, noise, val_wrong)
        for size, data, val_wrong, noise in itertools.product(RECIPES, DATA, (False, True), noises)
        if size in DATA[data] and not (val_wrong and NOISE[noise].get("feature_noise"))  # which leaves the labels as they are
    ]
    return {cell.name: cell for cell in every}


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/study-cleaning"))
    parser.add_argument("--cells", nargs="*", metavar="CELL", help=f"which of {', '.join(cells())}; all but those of digits")
    parser.add_argument("--seeds", type=int, default=5, help="trainings that test each ranking; 0: none")
    parser.add_argument("--at-rate", action="store_true", help="drop as many as are corrupted only, not 10, 20 and 30 %%")
    usual = [name for name in RANKINGS if DENSE not in name]
    words_of = f"by which, of {', '.join(RANKINGS)}; all but those {DENSE}"
    parser.add_argument("--rankings", nargs="*", default=usual, choices=RANKINGS, metavar="RANKING", help=words_of)
    parser.add_argument("--memory-gb", type=float, default=4.0)
    parser.add_argument("--tables", action="store_true", help="write what scripts/study shows, and run nothing")
    options = parser.parse_args(words)
    if options.tables:
        import study_cleaning_tables

        study_cleaning_tables.write(options.out)
        return
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    wanted = [name for name, cell in cells().items() if cell.data != "digits"] if options.cells is None else options.cells
    if unknown := set(wanted) - set(cells()):
        parser.error(f"there are no cells {sorted(unknown)}; there are {', '.join(cells())}")
    for i, name in enumerate(wanted):
        started = time.perf_counter()
        print(f"[{i + 1} of {len(wanted)}] {name}", flush=True)
        cell = cells()[name]
        shares = (cell.rate,) if options.at_rate else cell.fractions
        figures = run_cell(cell, options.out, options.seeds, options.rankings, shares, int(options.memory_gb * 2**30))
        for ranking, row in figures["rankings"].items():
            gains = ", ".join(f"{share} {gain['accuracy'][0]:+.2f}" for share, gain in row["gains"].items()) or "not tried"
            found = "" if row["auc"] is None else f"precision {row['precision']:.3f}, AUC {row['auc']:.3f}"
            print(f"    {ranking:28} {found:27} points gained: {gains}", flush=True)
        print(f"    {time.perf_counter() - started:.0f} s", flush=True)


def run_cell(
    cell: Cell, out: Path, seeds: int, rankings: Sequence[str], shares: Sequence[float], memory: int
) -> dict[str, Any]:
    """The figures of a cell, which are also stored as ``<out>/<cell>.json``; what was done before is taken from ``out``.

    Rankings that were had before are shown too.
    """
    folder = out / cell.name
    data = cell.module()
    runs = recorded(cell, data, folder)
    orders = ranked(runs, folder, rankings, memory)
    results = tested(runs[0], data, orders, shares, folder, seeds, memory)
    figures = {
        "cell": cell.name,
        "n": runs[0].n_samples,
        "n_val": runs[0].query("val").n_examples,
        "n_test": len(data.splits["test"].labels),
        "rate": cell.rate,
        "steps": runs[0].n_steps,
        "parameters": runs[0].n_parameters,
        "seeds": seeds,
        "accuracy": 100 * float(np.mean([results["none", 0.0, seed][1] for seed in range(seeds)])) if seeds else None,
        "rankings": rows(orders, results, data.corrupted, cell.rate, shares, seeds),
    }
    write_json(out / f"{cell.name}.json", figures)
    return figures


def recorded(cell: Cell, data: StudyDataModule, folder: Path) -> list[la.Run]:
    """The cell's recorded trainings: the same data, different seeds."""
    recipe = RECIPES[cell.size]
    runs = []
    for seed in range(RUNS):
        path = folder / f"run-{seed}"
        try:
            runs.append(la.Run(path))
            continue
        except la.RunError:
            started = time.perf_counter()
        pl.seed_everything(seed, verbose=False)
        rate, sizes = RATES.get(cell.data, recipe["lr"]), (data.n_features, len(data.class_names))
        model = Classifier(*sizes, recipe["hidden"], "gelu", rate, recipe["momentum"])
        pl.Trainer(
            max_epochs=recipe["epochs"],
            callbacks=[la.TrajectoryRecorder(path, overwrite=True)],
            **dict.fromkeys(["logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary"], False),
            accelerator="cpu",
            devices=1,
            num_sanity_val_steps=0,
        ).fit(model, datamodule=data)
        runs.append(la.Run(path))
        print(f"    recorded from seed {seed} in {time.perf_counter() - started:.0f} s", flush=True)
    return runs


def mean_scores(runs: Sequence[la.Run], method: str, at: str, memory: int) -> np.ndarray:
    """Scores (n_samples,) of all samples, the mean over runs on the same data; those of a run are computed once and stored."""
    each = [la.score(run, method, at=at, ray_address=None, check=0, memory_gb=memory / 2**30) for run in runs]
    mean: np.ndarray = np.mean([scores.estimates for scores in each], axis=0)
    return mean


def ranked(runs: Sequence[la.Run], folder: Path, rankings: Sequence[str], memory: int) -> dict[str, np.ndarray]:
    """The samples in the order that each ranking would drop them; those that were had before, and those of ``rankings``."""
    path = folder / "orders.npz"
    orders = dict(np.load(path)) if path.exists() else {}
    for name in rankings:
        if name in orders:
            continue
        started = time.perf_counter()
        if name in BY_INFLUENCE:
            method, at, count = BY_INFLUENCE[name]
            orders[name] = np.argsort(mean_scores(runs[:count], method, at, memory), kind="stable")
        elif name == LOSS_OF_RUNS:
            places = [np.argsort(controls.rankings(run, ["loss"], memory)["loss"]) for run in runs]
            orders[name] = np.argsort(np.mean(places, axis=0), kind="stable")
        else:
            orders |= controls.rankings(runs[0], [name], memory)
        np.savez(folder / "part.npz", **orders)
        (folder / "part.npz").replace(path)
        print(f"    ranked by {name} in {time.perf_counter() - started:.0f} s", flush=True)
    return {name: orders[name] for name in RANKINGS if name in orders}


Results = dict[tuple[str, float, int], tuple[float, float]]
"""Test loss and accuracy by ranking, share dropped and seed."""


def tested(
    run: la.Run,
    data: StudyDataModule,
    orders: dict[str, np.ndarray],
    shares: Sequence[float],
    folder: Path,
    seeds: int,
    memory: int,
) -> Results:
    """Trainings anew, without what each ranking drops: from the same seeds for all, by the recipe of the recorded run."""
    path = folder / "trainings.json"
    results: Results = {(name, share, seed): (loss, hit) for name, share, seed, loss, hit in read_json(path, [])}
    test = la.Query("test", data.test_dataloader())
    losses, hits = test, la.Query("accuracy", data.test_dataloader(), controls.correct)
    pool = with_validation(run)
    replay = Replay(run)
    pieces = []
    for seed in range(seeds):
        random = np.random.default_rng(FIRST_SEED + seed).permutation(run.n_samples)
        plans: dict[tuple[str, float], frozenset[int]] = {("none", 0.0): frozenset()}
        for name, share in itertools.product([*orders, "random"], shares):
            order = random if name == "random" else orders[name]
            plans[name, share] = frozenset(order[: round(share * run.n_samples)].tolist())
        left = [key for key in plans if (*key, seed) not in results]
        pieces += [(seed, {key: plans[key] for key in part}) for part in split(left, AT_ONCE)]
        if (ADDED, 0.0, seed) not in results:
            pieces.append((seed, {(ADDED, 0.0): frozenset()}))
    amount = sum(len(plans) for _, plans in pieces)
    with Progress(f"{folder.name} · {amount} trainings", len(pieces), None, amount, "trainings") as bar:
        for i, (seed, plans) in enumerate(pieces):
            added = (ADDED, 0.0) in plans
            job = Retraining(FIRST_SEED + seed, list(plans.values()), added)
            thetas = retrain(run, job, memory, bar.of(i), pool if added else None)
            found = zip(plans, losses.values(replay.objective, thetas), hits.values(replay.objective, thetas), strict=True)
            results.update({(*key, seed): (float(loss), float(hit)) for key, loss, hit in found})
            write_json(path, [[*key, *values] for key, values in results.items()])
    return results


def split(items: list[Any], size: int) -> list[list[Any]]:
    return [items[i : i + size] for i in range(0, len(items), size)]


def rows(
    orders: dict[str, np.ndarray],
    results: Results,
    corrupted: np.ndarray,
    rate: float,
    shares: Sequence[float],
    seeds: int,
) -> dict[str, dict[str, Any]]:
    """For each ranking its precision at the noise rate, AUC, and gains by share dropped, with their intervals."""
    found: dict[str, dict[str, Any]] = {}
    shares = shares if seeds else ()
    for name, order in orders.items():
        found[name] = {"precision": precision(order, corrupted, rate), "auc": auc(order, corrupted)}
        found[name]["gains"] = {f"{100 * share:.0f} %": gain(results, name, share, seeds) for share in shares}
    # Of an order drawn anew for every seed, what is expected.
    by_share = {f"{100 * share:.0f} %": gain(results, "random", share, seeds) for share in shares}
    found["random"] = {"precision": float(corrupted.mean()), "auc": 0.5, "gains": by_share}
    if seeds:
        found[ADDED] = {"precision": None, "auc": None, "gains": {"0 %": gain(results, ADDED, 0.0, seeds)}}
    return found


def precision(order: np.ndarray, corrupted: np.ndarray, rate: float) -> float:
    """Of the samples that ``order`` puts first, as many as are corrupted by the noise rate: the share that truly are."""
    return float(corrupted[order[: round(rate * len(corrupted))]].mean())


def auc(order: np.ndarray, corrupted: np.ndarray) -> float:
    """How surely a corrupted sample stands before another; samples that are not in ``order`` (n or fewer) stand last alike."""
    place = np.full(len(corrupted), len(corrupted))
    place[order] = np.arange(len(order))
    return float(roc_auc_score(corrupted, -place))


def gain(results: Results, name: str, share: float, seeds: int) -> dict[str, tuple[float, float, float]]:
    """Gained over nothing dropped, paired by seed: points of test accuracy, and test loss, each with its 95 % interval."""
    pairs = np.array([[results[name, share, seed], results["none", 0.0, seed]] for seed in range(seeds)])  # (seeds, 2, 2)
    better = {"accuracy": 100 * (pairs[:, 0, 1] - pairs[:, 1, 1]), "loss": pairs[:, 1, 0] - pairs[:, 0, 0]}
    return {what: interval(values) for what, values in better.items()}


def read_json(path: Path, default: Any) -> Any:
    return json.loads(path.read_text()) if path.exists() else default


def write_json(path: Path, value: Any) -> None:
    """Whole or not at all."""
    part = path.with_suffix(".part")
    part.write_text(json.dumps(value))
    part.replace(path)


if __name__ == "__main__":
    main()
