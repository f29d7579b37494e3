"""Every one of MNIST's 60 000 training images ranked, and the ranking held against the truth.

    lightning-acc fit --config configs/mnist-full.yaml
    python scripts/mnist_full.py

Ranks all samples by acc-low-rank, SGD-IE and TracIn, beside the cost of a bare replay of the training; retrains
without some at random and some of the most harmful, in double precision (two minutes of one core for 16 of them, and again
for exact ACC-SGD-IE, so that 512 take more than an hour on two; what is done is kept, and stopping loses nothing); and looks
for the wrong labels. Writes scripts/study/mnist-full.md and its tables into scripts/study/README.md.
"""

from __future__ import annotations

import argparse
import multiprocessing
import time
import warnings
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import numpy as np
from bare_replay import bare_replay
from sklearn.metrics import roc_auc_score
from study_figures import into_readme

import lightning_acc as la
from lightning_acc.judge import controls
from lightning_acc.judge.agreement import stored_scores, truth_for
from lightning_acc.methods import memory, registry
from lightning_acc.scoring.trust.figures import agreement

OUT = Path(__file__).parent / "study" / "mnist-full.md"
RANKINGS = ("acc-low-rank", "sgd-ie", "tracin")
AT_ONCE = 16
"""Removals retrained without together: more leave the processor's caches."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run", default="runs/mnist-full")
    parser.add_argument("--samples", type=int, default=512, help="how many to retrain without, half of them the most harmful")
    parser.add_argument("--ray-address", default="local", help="none for this process")
    parser.add_argument("--out", type=Path, default=OUT)
    options = parser.parse_args()
    warnings.simplefilter("ignore")
    run = la.Run(options.run)
    costs = cost(options.run)
    retrain(run, options.samples, None if options.ray_address == "none" else options.ray_address)
    title = f"`python scripts/mnist_full.py`: {run.n_samples} samples, {run.n_steps} steps, {run.n_parameters} parameters."
    tables = ["", *truth(run, options.samples, costs), "", *detection(run)]
    options.out.write_text("\n".join([title, *tables]) + "\n")
    if options.out == OUT:
        into_readme("mnist-full", tables[1:])
    print("\n".join([title, *tables]))


def ranked(path: str, method: str) -> dict[str, float] | None:
    """Rank all samples; what it cost: bare replays, and GB. None where the ranking was there already."""
    warnings.simplefilter("ignore")
    run = la.Run(path)
    before = bare_replay(run)
    started = time.process_time()
    scores = la.score(run, method, ray_address=None, check=0)
    work = time.process_time() - started
    if scores.conditions["reused"]:
        return None
    facts = {key: scores.conditions[key] for key in registry.find(method).details if key in scores.conditions}
    print(method, facts, flush=True)
    return {"replays": work / np.mean([before, bare_replay(run)]), "peak": scores.conditions["peak_memory_gb"]}


def cost(path: str) -> dict[str, str]:
    """What each ranking costs, in a process of its own, as cells of a table."""
    cells = {}
    for name in RANKINGS:
        with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
            found = pool.submit(ranked, path, name).result()
        cells[name] = "" if found is None else f"{found['replays']:.1f} | {found['peak']:.1f}"
        print(name, cells[name], flush=True)
    return cells


def chosen(run: la.Run, count: int) -> list[int]:
    """Samples at random and as many of the most harmful by SGD-IE, in turns."""
    order = np.argsort(values_of(run, "sgd-ie"), kind="stable").tolist()
    some = np.random.default_rng(0).choice(run.n_samples, count // 2, replace=False).tolist()
    others = [i for i in order if i not in set(some)][: count - len(some)]
    return [i for pair in zip(some, others, strict=True) for i in pair]


def retrain(run: la.Run, count: int, address: str | None) -> None:
    from lightning_acc.scoring import cluster

    ids = chosen(run, count)
    memory.LARGEST_CHUNK = AT_ONCE
    for method in ("loo", "acc-sgd-ie"):
        if address is None:
            la.score(run, method, ids, dtype="float64", ray_address=None, check=0)
        else:
            with cluster.connect(address):
                la.score(run, method, ids, dtype="float64", ray_address=address, check=0)


def values_of(run: la.Run, method: str) -> np.ndarray:
    values = controls.stored_values(run, method)
    assert values is not None, f"{method} has not scored all samples"
    return values


def truth(run: la.Run, count: int, costs: dict[str, str]) -> list[str]:
    """Agreement with retraining, on the samples that were retrained without."""
    tables = {name: table for name, table in stored_scores(run).items() if table.conditions["query"] == "val"}
    expected = truth_for(tables, tables["acc-sgd-ie.float64"])
    assert expected is not None
    ids = [(i,) for i in chosen(run, count)]
    true = np.array([expected.by_removal()[i] for i in ids])
    lines = [
        f"| estimate, {count} samples | RMSE / sd of the truth | Kendall | Spearman | cost, bare replays | peak, GB |",
        "| --- | --- | --- | --- | --- | --- |",
    ]
    for name in ("acc-sgd-ie.float64", *RANKINGS):
        found = tables[name].by_removal()
        figures = agreement(np.array([found[i] for i in ids]), true)
        cells = costs.get(name) or " | "
        label = f"`{name}`" + (", fell back to `sgd-ie`" if "fallback" in tables[name].conditions else "")
        lines.append(f"| {label} | {figures['rmse_sd']:.4f} | {figures['kendall']:.3f} | {figures['spearman']:.3f} | {cells} |")
    return lines


def detection(run: la.Run) -> list[str]:
    """Finding the wrong labels: the 10 % each ranking puts first."""
    info = run.sample_info()
    assert info is not None
    wrong = info["corrupted"].to_numpy(zero_copy_only=False).astype(bool)
    orders: dict[str, np.ndarray] = {method: np.argsort(values_of(run, method), kind="stable") for method in RANKINGS}
    orders |= controls.rankings(run, ["loss", "cleanlab"], 2 * 2**30)
    first = round(0.1 * len(wrong))
    lines = ["| wrong labels found by | precision at 10 % | recall at 10 % | AUC |", "| --- | --- | --- | --- |"]
    for name, order in orders.items():
        hits = wrong[order[:first]].sum()
        place = np.empty(len(wrong))
        place[order] = np.arange(len(wrong))
        auc = roc_auc_score(wrong, -place)
        lines.append(f"| `{name}` | {hits / first:.3f} | {hits / wrong.sum():.3f} | {auc:.3f} |")
    return lines


if __name__ == "__main__":
    main()
