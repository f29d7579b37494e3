"""What cleaning gains: drop the most harmful samples, train anew over several seeds, and test.

Beside every ranking stand controls: nothing removed, random samples, those of highest loss or largest self-influence,
cleanlab's ranking by out-of-sample predicted probabilities, the truth (``loo``) where it is known, and the oracle, which knows
the corrupted samples. Two more are given the validation examples, as influence is: those of highest loss under a model of these
examples alone, and nothing removed but these examples trained on too.
"""

from __future__ import annotations

import importlib.metadata
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from lightning_acc import arguments
from lightning_acc.core import devices, queries, rebuild
from lightning_acc.core.process import threads
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.queries.moments import At
from lightning_acc.core.replay import Replay, explained
from lightning_acc.errors import RequestError, RunError
from lightning_acc.judge import cleaning_table
from lightning_acc.judge.cleaning_table import ADDED
from lightning_acc.judge.controls import NotAClassifier, correct, rankings
from lightning_acc.judge.exports import harmful_first
from lightning_acc.judge.fresh_training import Retraining, retrain, visited_samples
from lightning_acc.judge.validation import QUERY, why_not_added, with_validation
from lightning_acc.methods import registry
from lightning_acc.progress import Progress
from lightning_acc.record import batches
from lightning_acc.record.record import Record, opened
from lightning_acc.record.store import digest
from lightning_acc.scoring import cluster, shards
from lightning_acc.scoring.score import score

TRAININGS_AT_ONCE = 8
"""Batched together: enough to be fast, few enough that the workers end together."""
BEST = ("sgd-ie", moments.ALONG)
"""The ranking by influence that finds most at its price, by scripts/study_cleaning.py."""
CONTROLS = ("none", "random", "loss", "self-influence", "cleanlab", "validation", ADDED, "loo", "oracle")
Training = tuple[frozenset[int], bool]
"""The samples that a training goes without, and whether it sees the validation examples too."""


@dataclass(frozen=True)
class _Job:
    run: Record
    test: Query
    memory: int
    device: torch.device
    added: str = ""
    """Fingerprint of the validation examples, where they are trained on."""

    @property
    def kind(self) -> str:
        """What trainings of the same kind have in common: the run, the test, the code and the kind of device."""
        same = [self.run.hash, self.test.fingerprint, importlib.metadata.version("lightning-acc")]
        same += [] if self.device == devices.CPU else [self.device.type]
        return f"cleaning-{digest(json.dumps(same).encode())[:16]}"


@cluster.kept()
@explained
def clean(
    run: Record | str | os.PathLike[str] | list[Any] | tuple[Any, ...],
    method: str | Sequence[str] | None = None,
    fractions: Sequence[float] = (0.05, 0.1, 0.2),
    seeds: int = 5,
    test: str | Query | None = None,
    ray_address: str | None = "local",
    *,
    device: str = "auto",
    at: At | None = None,
    controls: Sequence[str] = CONTROLS,
    memory_gb: arguments.Budget = "auto",
    save: bool = True,
    progress: bool | None = None,
) -> pa.Table:
    """Drop the most harmful samples, train anew, test: does the ranking clean the data?

    Args:
        run: a recorded run, or its path; or a list of runs on the same data: the data of the first is cleaned, by the mean of
            the rankings' scores over all of them. The controls, the truth among them, are of the first.
        method: whose ranking to use, or several; computed now for all samples where it is not stored. None for what finds most
            at its price (scripts/study): ``sgd-ie``, read along the run.
        fractions: of the training samples to drop.
        seeds: how many trainings, each from new initial parameters and in a new order (``lightning_acc.judge.fresh_training``).
        test: a query recorded with the run, or a Query, to test on; None takes ``test`` where it is recorded, else ``val``,
            which the rankings have seen.
        ray_address: where to compute, as for ``score``.
        device: on what, as for ``score``.
        at: when the rankings read their query, as for ``score``; ``loo`` reads it then too. None for along the run where no
            method is named, else for its end.
        controls: which of none, random, loss, self-influence, cleanlab, validation, validation added, loo and oracle to show
            beside. cleanlab needs that package and a classifier; the two of validation a query ``val`` whose batches are like
            the training's; loo its stored scores; oracle the column ``corrupted`` of ``describe_samples``. Where that is
            missing, the control is left out. Influence and the two of validation rest on the validation set, which may itself
            be wrong: where its labels are wrong in the same way as the training's, they find much less.
        memory_gb: as for ``score``.
        save: store the table as ``cleaning.parquet`` in the run directory, and every training as it is done: a command that
            was stopped, or is repeated with more fractions or seeds, trains what is missing.
        progress: show a progress bar; None shows one in a terminal, and elsewhere a line now and then.

    Returns:
        One row per method (with ``at`` where that is not the end, and the number of runs: ``sgd-ie along, 4 runs``) and
        fraction: n_removed, n_added (0 but for ``validation added``, whose one row has the fraction 0
        and is compared with every other), seeds, means and 95 % intervals over the seeds of the test accuracy and
        loss (``accuracy``, ``accuracy_low``, ``accuracy_high``, ``loss``, ...) and of the gain in accuracy over the
        training with nothing removed from the same seed (``gain``, ...); a module without an accuracy gains in loss. The
        single values are in ``accuracies`` and ``losses``.

    Raises:
        RequestError: a fraction, method or query cannot be used.
        RunError: the run cannot be read, or its module not be built anew.
    """
    runs = [opened(one) for one in run] if isinstance(run, (list, tuple)) else [opened(run)]
    if not runs:
        raise RequestError("run=[] is no run: give a recorded run, or a list of runs on the same data.")
    run = runs[0]
    if method is None:
        method, at = BEST[0], BEST[1] if at is None else at
    at = moments.END if at is None else at
    methods = [method] if isinstance(method, str) else arguments.listed("method", method, "names of methods")
    for name in methods:
        registry.find(name)
    controls = [arguments.choice("control", name, CONTROLS) for name in arguments.listed("controls", controls, "names")]
    shares = [_share(fraction) for fraction in arguments.listed("fractions", fractions, "shares of the samples")]
    if not (methods or set(controls) - {"none"}) or not shares:
        raise RequestError(
            f"method={methods}, controls={controls} and fractions={shares} ask for nothing: name a ranking and a share to drop."
        )
    seeds = arguments.whole("seeds", seeds, "gives no interval", least=2)
    ray_address, place = arguments.ray_address(ray_address), devices.chosen(device, run)
    memory = devices.budget(memory_gb, place)
    job = _Job(rebuild.portable(run), _test_query(run, test), memory, place)
    at = list(at) if np.iterable(at) and not isinstance(at, str) else at
    when = moments.find(run, at).name
    shared = {"device": device, "ray_address": ray_address, "memory_gb": memory_gb, "progress": progress}
    orders = dict(_ranking(runs, name, at, **shared) for name in methods)
    missing: dict[str, str] = {}
    ranked = [name for name in controls if name not in ("none", "random", ADDED, *methods)]
    beside = rankings(run, ranked, job.memory, missing, when, job.device)
    orders.update({cleaning_table.label(name, when) if registry.is_truth(name) else name: beside[name] for name in beside})
    if ADDED in controls and (why := why_not_added(run, job.test)) is not None:
        missing[ADDED] = why
    added = queries.find(run, QUERY) if ADDED in controls and ADDED not in missing else None
    if added is not None:
        job = replace(job, added=added.fingerprint)
    # What the training never saw can neither be dropped nor kept.
    visited = visited_samples(run).numpy()
    orders = {name: order[np.isin(order, visited)] for name, order in orders.items()}
    counts = {fraction: max(1, round(fraction * len(visited))) for fraction in sorted(shares)}
    plans = [
        _plan(visited, seed, orders, counts, random="random" in controls, added=added is not None) for seed in range(seeds)
    ]
    keys = list(plans[0])
    trained = _train_all(job, [list(plan.values()) for plan in plans], ray_address, save, progress)
    losses, accuracies = np.moveaxis(trained, -1, 0)
    shown = {key: i for i, key in enumerate(keys) if key[0] != "none" or "none" in controls}
    rows = [
        cleaning_table.row(
            key,
            len(plans[0][key][0]),
            losses[i],
            accuracies[i],
            losses[0],
            accuracies[0],
            job.test.name,
            added=added.n_examples if added is not None and key[0] == ADDED else 0,
        )
        for key, i in shown.items()
    ]
    table = cleaning_table.build(rows, {"manifest_hash": run.hash, "test": job.test.name, "missing": json.dumps(missing)})
    if save:
        cleaning_table.write(run, table)
    return table


def _share(fraction: object) -> float:
    share = arguments.real(fraction)
    if share is None or not 0 < share < 1:
        raise RequestError(f"The fraction {arguments.shown(fraction)} cannot be removed: choose between 0 and 1.")
    return share


def _test_query(run: Record, test: str | Query | None) -> Query:
    if isinstance(test, Query):
        return test
    if test is None:
        test = "test" if "test" in run.query_names() else "val"
        if test == "val":
            warnings.warn(
                "Cleaning is tested on val, which the rankings have seen: add other data with run.add_query('test', loader).",
                UserWarning,
                stacklevel=5,
            )
    return queries.find(run, test)


def _ranking(runs: list[Record], method: str, at: At, **shared: Any) -> tuple[str, np.ndarray]:
    """What the table calls the ranking, and all samples, the most harmful first; scored as by default, where not stored."""
    scores = score(runs, method, at=at, check=0, **shared)
    name = cleaning_table.label(method, scores.conditions["at"], len(runs))
    return name, harmful_first(scores)


def _plan(
    visited: np.ndarray, seed: int, orders: dict[str, np.ndarray], counts: dict[float, int], random: bool, added: bool
) -> dict[tuple[str, float], Training]:
    """The trainings from one seed, by method and fraction; first of all the one with nothing dropped."""
    plan: dict[tuple[str, float], Training] = {("none", 0.0): (frozenset(), False)}
    orders = dict(orders)
    if random:
        orders["random"] = np.random.default_rng(seed).permutation(visited)
    for name, order in orders.items():
        for fraction, count in counts.items():
            plan[name, fraction] = frozenset(order[:count].tolist()), False
    if added:
        plan[ADDED, 0.0] = frozenset(), True
    return plan


def _train_all(
    job: _Job, wanted: list[list[Training]], ray_address: str | None, save: bool, progress: bool | None
) -> np.ndarray:
    """Test loss and accuracy of every training, (m, seeds, 2), where ``wanted[seed]`` are the m trainings.

    Pieces are a few trainings from one seed. What they are does not depend on the workers, so neither do the bits of the
    results; a training that was stored before is left out, and one that occurs twice is done once.
    """
    # What a function of one's own computes may change under the same name.
    keep = save and job.test.function is None
    known = shards.stored_figures(job.run, job.kind, count=2) if keep else {}
    together = [
        Retraining(seed, [without for without, more in dict.fromkeys(trainings) if more == added], added)
        for seed, trainings in enumerate(wanted)
        for added in (False, True)
    ]
    left = [
        replace(piece, dropped=new)
        for retraining in together
        for piece in retraining.pieces(TRAININGS_AT_ONCE)
        if (new := [without for without in piece.dropped if _name(job, piece, without) not in known])
    ]
    amount = sum(len(piece.dropped) for piece in left)
    failures: list[tuple[int, str]] = []
    with Progress(f"cleaning · {amount} trainings", len(left), progress, amount, "trainings") as bar:
        gpu = devices.share(job.device, job.memory)
        job = job if ray_address is None else replace(job, device=devices.of_worker(job.device))
        for piece, result in cluster.each(_test_retrained, job, left, ray_address, bar, _halves, gpu):
            if isinstance(result, cluster.Failure):
                failures.append((piece.seed, result.reason))
                continue
            done = {_name(job, piece, without): figures for without, figures in zip(piece.dropped, result, strict=True)}
            known.update(done)
            if keep:
                shards.write_figures(job.run, job.kind, done)
    if failures:
        seeds = sorted({seed for seed, _ in failures})
        kept = "The others are stored; clean again to train what is missing" if keep else "Clean again"
        raise RunError(f"Trainings from the seeds {seeds} failed: {failures[0][1]}. {kept}.")
    by_seed = [
        [known[_name(job, Retraining(seed, [without], added), without)] for without, added in trainings]
        for seed, trainings in enumerate(wanted)
    ]
    by_training: np.ndarray = np.array(by_seed, dtype=float).swapaxes(0, 1)
    return by_training


def _halves(piece: Retraining) -> list[Retraining]:
    return piece.pieces(-(-len(piece.dropped) // 2))


def _name(job: _Job, piece: Retraining, without: frozenset[int]) -> str:
    """Names one training of a job: by all that it trains on."""
    added = f"-{job.added[:16]}" if piece.validation_added else ""
    return f"{piece.seed}-{digest(json.dumps(sorted(without)).encode())[:16]}{added}"


def _test_retrained(job: _Job, retraining: Retraining, progress: Callable[[float], None]) -> list[list[float]]:
    """Test loss and accuracy (NaN where there is none) of each training."""
    with threads(1):
        pool = with_validation(job.run) if retraining.validation_added else None
        replay = Replay(job.run, device=job.device)
        thetas = replay.placed(retrain(job.run, retraining, job.memory, progress, pool, job.device))
        losses = job.test.values(replay.objective, thetas).tolist()
        accuracy = Query("accuracy", (batches.TakenApart(leaves, s) for leaves, s in job.test.batches), correct)
        try:
            accuracies = accuracy.values(replay.objective, thetas).tolist()
        except NotAClassifier:
            accuracies = [float("nan")] * len(thetas)
    return [list(pair) for pair in zip(losses, accuracies, strict=True)]
