"""Every one of MNIST's 60 000 training images ranked, and the ranking held against the truth.

    lightning-acc fit --config configs/mnist-full.yaml
    python scripts/mnist_full.py

Ranks all samples by acc-low-rank, SGD-IE and TracIn, beside the cost of a bare replay of the training; retrains without some
at random and some of the most harmful, in double precision (a minute of one core for 8 of them, so that 512 take an hour on
two; what is done is kept, and stopping loses nothing); and looks for the wrong labels. Writes scripts/study/mnist-full.md.
"""

from __future__ import annotations

import argparse
import time
import warnings
from pathlib import Path

import numpy as np
import torch
from sklearn.metrics import roc_auc_score

import lightning_acc as la
from lightning_acc import controls
from lightning_acc.agreement import agreement, stored_scores, truth_for
from lightning_acc.replay import Replay

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
    lines = [
        f"`python scripts/mnist_full.py`: {run.n_samples} samples, {run.n_steps} steps, {run.n_parameters} parameters.",
        "",
    ]
    lines += cost(run)
    retrain(run, options.samples, None if options.ray_address == "none" else options.ray_address)
    lines += ["", *truth(run), "", *detection(run)]
    options.out.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))


def bare_replay(run: la.Run) -> float:
    """Seconds of processor time of the recorded training, taken again on one thread."""
    torch.set_num_threads(1)
    replay = Replay(run)
    state = replay.initial
    for t in range(len(replay)):  # what is read from files is in memory after the first turn
        replay.step(t)
    started = time.process_time()
    for t in range(len(replay)):
        state = replay.step(t)(state)
    return time.process_time() - started


def cost(run: la.Run) -> list[str]:
    lines = ["| ranking of all samples | in bare replays | peak memory, GB | rank |", "| --- | --- | --- | --- |"]
    for method in RANKINGS:
        before = bare_replay(run)
        started = time.process_time()
        scores = la.score(run, method, ray_address=None)
        work = time.process_time() - started
        conditions = scores.conditions
        if not conditions["reused"]:
            ratio = work / np.mean([before, bare_replay(run)])
            lines.append(
                f"| `{method}` | {ratio:.1f} | {conditions['peak_memory_gb']:.1f} | {conditions.get('basis_rank', '')} |"
            )
            print(lines[-1], flush=True)
    return lines


def chosen(run: la.Run, count: int) -> list[int]:
    """Samples at random and as many of the most harmful by acc-low-rank, in turns."""
    order = np.argsort(values_of(run, "acc-low-rank"), kind="stable").tolist()
    some = np.random.default_rng(0).choice(run.n_samples, count // 2, replace=False).tolist()
    others = [i for i in order if i not in set(some)][: count - len(some)]
    return [i for pair in zip(some, others, strict=True) for i in pair]


def retrain(run: la.Run, count: int, address: str | None) -> None:
    from lightning_acc import cluster, planning

    ids = chosen(run, count)
    planning.LARGEST_CHUNK = AT_ONCE
    for method in ("loo", "acc-sgd-ie"):
        if address is None:
            la.score(run, method, ids, dtype="float64", ray_address=None)
        else:
            with cluster.connect(address):
                la.score(run, method, ids, dtype="float64", ray_address=address)


def values_of(run: la.Run, method: str) -> np.ndarray:
    values = controls.stored_values(run, method)
    assert values is not None, f"{method} has not scored all samples"
    return values


def truth(run: la.Run) -> list[str]:
    """Agreement with retraining, over the samples that all have."""
    tables = {name: table for name, table in stored_scores(run).items() if table.conditions["query"] == "val"}
    estimates = {name: table for name, table in tables.items() if table.conditions["method"] != "loo"}
    expected = truth_for(tables, next(iter(estimates.values())))
    assert expected is not None
    common = set(expected.removals).intersection(*(set(table.removals) for table in estimates.values()))
    ids = sorted(common)
    true = np.array([expected.by_removal()[i] for i in ids])
    lines = [
        f"Against leave-one-out retraining in float64, {len(ids)} samples, half at random, half the most harmful:",
        "",
        "| estimate | RMSE / sd of the truth | Kendall | Spearman |",
        "| --- | --- | --- | --- |",
    ]
    for name, table in estimates.items():
        found = table.by_removal()
        figures = agreement(np.array([found[i] for i in ids]), true)
        lines.append(f"| `{name}` | {figures['rmse_sd']:.4f} | {figures['kendall']:.3f} | {figures['spearman']:.3f} |")
    return lines


def detection(run: la.Run) -> list[str]:
    """Finding the wrong labels: the 10 % each ranking puts first."""
    info = run.sample_info()
    assert info is not None
    wrong = info["corrupted"].to_numpy(zero_copy_only=False).astype(bool)
    orders = {method: np.argsort(values_of(run, method), kind="stable") for method in RANKINGS}
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
