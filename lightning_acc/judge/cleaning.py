"""What cleaning gains: drop the most harmful samples, train anew over several seeds, and test.

Beside every ranking stand controls: nothing removed, random samples, those of highest loss, cleanlab's ranking by
out-of-sample predicted probabilities, the truth (``loo``) where it is known, and the oracle that knows the corrupted samples.
"""

from __future__ import annotations

import importlib.metadata
import io
import json
import os
import warnings
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
from scipy import stats

from lightning_acc.core import queries, rebuild
from lightning_acc.core.process import threads
from lightning_acc.core.queries import Query
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError, RunError
from lightning_acc.judge.controls import NotAClassifier, correct, rankings
from lightning_acc.judge.fresh_training import Retraining, retrain, visited_samples
from lightning_acc.methods import registry
from lightning_acc.progress import Progress
from lightning_acc.record import batches, tables
from lightning_acc.record.record import Record, opened
from lightning_acc.record.store import digest
from lightning_acc.scoring import cluster, shards
from lightning_acc.scoring.score import DEFAULT_MEMORY_GB, score

NAME = "cleaning.parquet"
TRAININGS_AT_ONCE = 8
"""Batched together: enough to be fast, few enough that the workers end together."""
CONTROLS = ("none", "random", "loss", "cleanlab", "loo", "oracle")


@dataclass(frozen=True)
class _Job:
    run: Record
    test: Query
    memory: int

    @property
    def kind(self) -> str:
        """What trainings of the same kind have in common: the run, the test and the code."""
        same = [self.run.hash, self.test.fingerprint, importlib.metadata.version("lightning-acc")]
        return f"cleaning-{digest(json.dumps(same).encode())[:16]}"


def clean(
    run: Record | str | os.PathLike[str],
    method: str | Sequence[str] = "acc-sgd-ie",
    fractions: Sequence[float] = (0.05, 0.1, 0.2),
    seeds: int = 5,
    test: str | Query | None = None,
    ray_address: str | None = "local",
    *,
    controls: Sequence[str] = CONTROLS,
    memory_gb: float = DEFAULT_MEMORY_GB,
    save: bool = True,
    progress: bool | None = None,
) -> pa.Table:
    """Drop the most harmful samples, train anew, test: does the ranking clean the data?

    Args:
        run: a recorded run, or its path.
        method: whose ranking to use, or several; computed now for all samples where it is not stored.
        fractions: of the training samples to drop.
        seeds: how many trainings, each from new initial parameters and in a new order (``lightning_acc.judge.fresh_training``).
        test: a query recorded with the run, or a Query, to test on; None takes ``test`` where it is recorded, else ``val``,
            which the rankings have seen.
        ray_address: where to compute, as for ``score``.
        controls: which of none, random, loss, cleanlab, loo and oracle to show beside. cleanlab needs that package and a
            classifier; loo its stored scores; oracle the column ``corrupted`` of ``describe_samples``. Where that is
            missing, the control is left out.
        memory_gb: budget of each process.
        save: store the table as ``cleaning.parquet`` in the run directory, and every training as it is done: a command that
            was stopped, or is repeated with more fractions or seeds, trains what is missing.
        progress: show a progress bar; None shows one in a terminal, and elsewhere a line now and then.

    Returns:
        One row per method and fraction: n_removed, seeds, means and 95 % intervals over the seeds of the test accuracy and
        loss (``accuracy``, ``accuracy_low``, ``accuracy_high``, ``loss``, ...) and of the gain in accuracy over the
        training with nothing removed from the same seed (``gain``, ...); a module without an accuracy gains in loss. The
        single values are in ``accuracies`` and ``losses``.

    Raises:
        RequestError: a fraction, method or query cannot be used.
        RunError: the run cannot be read, or its module not be built anew.
    """
    run = opened(run)
    methods = [method] if isinstance(method, str) else list(method)
    for name in methods:
        registry.find(name)
    for name in controls:
        if name not in CONTROLS:
            raise RequestError(f"There is no control {name!r}; choose from {', '.join(CONTROLS)}.")
    for fraction in fractions:
        if not 0 < fraction < 1:
            raise RequestError(f"The fraction {fraction} cannot be removed: choose between 0 and 1.")
    if seeds < 2:
        raise RequestError(f"seeds={seeds} gives no interval: choose at least 2.")
    job = _Job(rebuild.portable(run), _test_query(run, test), int(memory_gb * 2**30))
    orders = {name: _ranking(run, name, ray_address, memory_gb, progress) for name in methods}
    missing: dict[str, str] = {}
    orders.update(rankings(run, [name for name in controls if name not in ("none", "random", *methods)], job.memory, missing))
    # What the training never saw can neither be dropped nor kept.
    visited = visited_samples(run).numpy()
    orders = {name: order[np.isin(order, visited)] for name, order in orders.items()}
    counts = {fraction: max(1, round(fraction * len(visited))) for fraction in sorted(fractions)}
    plans = [_plan(visited, seed, orders, counts, random="random" in controls) for seed in range(seeds)]
    keys = list(plans[0])
    trained = _train_all(job, [[plan[key] for key in keys] for plan in plans], ray_address, save, progress)
    losses, accuracies = np.moveaxis(trained, -1, 0)
    shown = {key: i for i, key in enumerate(keys) if key[0] != "none" or "none" in controls}
    rows = [
        _row(key, len(plans[0][key]), losses[i], accuracies[i], losses[0], accuracies[0], job.test.name)
        for key, i in shown.items()
    ]
    for row in rows:
        row["against"] = [_difference(row, other) for other in rows if _comparable(row, other)]
    about = {"manifest_hash": run.hash, "test": job.test.name, "missing": json.dumps(missing), "intervals": INTERVALS}
    table = pa.Table.from_pylist(rows, schema=SCHEMA).replace_schema_metadata(about)
    if save:
        write(run, table)
    return table


DIFFERENCE = ("difference", "difference_low", "difference_high")
INTERVALS = (
    "95 %, by Student's t over the seeds of new initial parameters and orders, the same ones for all methods; another draw of "
    "the data is not in them"
)
SCHEMA = pa.schema(
    [("method", pa.string()), ("fraction", pa.float64()), ("n_removed", pa.int64()), ("seeds", pa.int64())]
    + [(f"{what}{end}", pa.float64()) for what in ("accuracy", "loss", "gain") for end in ("", "_low", "_high")]
    + [("accuracies", pa.list_(pa.float64())), ("losses", pa.list_(pa.float64())), ("test", pa.string())]
    + [("against", pa.list_(pa.struct([("method", pa.string()), *((end, pa.float64()) for end in DIFFERENCE)])))]
)


def write(run: Record, table: pa.Table) -> None:
    """Store a table of ``clean`` in the run directory."""
    import pyarrow.parquet

    if b"manifest_hash" not in (table.schema.metadata or {}):
        table = table.replace_schema_metadata({"manifest_hash": run.hash})
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(table, buffer)
    run.store.write(NAME, buffer.getvalue())


def read(run: Record) -> pa.Table | None:
    """The table of ``clean`` stored with the run; None where there is none that belongs to its present content."""
    if not run.store.exists(NAME):
        return None
    table = tables.read(run.store.read(NAME))
    return table if (table.schema.metadata or {}).get(b"manifest_hash") == run.hash.encode() else None


def as_text(table: pa.Table) -> str:
    """The table of ``clean`` for a terminal: gains in percentage points, or in loss."""
    lines = [f"{'method':12} {'dropped':>8} {'accuracy':>9} {'loss':>8}   gain with 95 % interval"]
    for row in table.to_pylist():
        accuracy = "" if row["accuracy"] is None else f"{100 * row['accuracy']:.2f} %"
        scale, unit = (1, "") if row["accuracy"] is None else (100, " points")
        gain = f"{scale * row['gain']:+.2f} ({scale * row['gain_low']:+.2f} to {scale * row['gain_high']:+.2f}){unit}"
        lines.append(f"{row['method']:12} {100 * row['fraction']:6.1f} % {accuracy:>9} {row['loss']:8.4f}   {gain}")
    about = {key.decode(): value.decode() for key, value in (table.schema.metadata or {}).items()}
    lines += _differences(table)
    lines += [f"{name} is left out: {why}." for name, why in json.loads(about.get("missing", "{}")).items()]
    return "\n".join([*lines, f"Intervals: {about['intervals']}."] if "intervals" in about else lines)


def _differences(table: pa.Table) -> list[str]:
    """Each estimate's ranking against each control's and estimate's, at the same share dropped: points gained more."""
    lines = []
    for row in table.to_pylist():
        scale = 1 if row["accuracy"] is None else 100
        parts = [
            f"{other['method']} {scale * other['difference']:+.2f} ({scale * other['difference_low']:+.2f} to "
            f"{scale * other['difference_high']:+.2f})"
            for other in row["against"] or ()
        ]
        if parts and row["method"] in registry.METHODS:
            lines.append(f"  {row['method']} at {100 * row['fraction']:g} % against " + ", ".join(parts))
    return ["paired differences in gain:", *lines] if lines else []


def interval(values: np.ndarray) -> tuple[float, float, float]:
    """Mean of values (n,) and the ends of its 95 % confidence interval (Student's t)."""
    mean, spread = float(np.mean(values)), float(stats.sem(values))
    reach = float(stats.t.ppf(0.975, len(values) - 1)) * spread
    return mean, mean - reach, mean + reach


def _row(
    key: tuple[str, float],
    removed: int,
    losses: np.ndarray,
    accuracies: np.ndarray,
    losses_before: np.ndarray,
    accuracies_before: np.ndarray,
    test: str,
) -> dict[str, Any]:
    known = not np.isnan(accuracies).any()
    row: dict[str, Any] = {"method": key[0], "fraction": key[1], "n_removed": removed, "seeds": len(losses), "test": test}
    gains = accuracies - accuracies_before if known else losses_before - losses
    for what, values in (("accuracy", accuracies if known else None), ("loss", losses), ("gain", gains)):
        if values is not None:
            ends = interval(values)
            if what == "accuracy":
                ends = (ends[0], max(0.0, ends[1]), min(1.0, ends[2]))
            row.update(zip((what, f"{what}_low", f"{what}_high"), ends, strict=True))
    return {**row, "accuracies": accuracies.tolist() if known else None, "losses": losses.tolist()}


def _comparable(row: dict[str, Any], other: dict[str, Any]) -> bool:
    """Whether two rows answer the same question by other methods."""
    return row["method"] not in ("none", other["method"]) and row["fraction"] == other["fraction"]


def _difference(row: dict[str, Any], other: dict[str, Any]) -> dict[str, Any]:
    """By how much a method gains more than another, paired over the seeds: both trained from the same ones."""
    known = row["accuracies"] is not None and other["accuracies"] is not None
    ours, theirs = (np.array(one["accuracies"] if known else one["losses"]) for one in (row, other))
    better = ours - theirs if known else theirs - ours
    return {"method": other["method"], **dict(zip(DIFFERENCE, interval(better), strict=True))}


def _test_query(run: Record, test: str | Query | None) -> Query:
    if isinstance(test, Query):
        return test
    if test is None:
        test = "test" if "test" in run.query_names() else "val"
        if test == "val":
            warnings.warn(
                "Cleaning is tested on val, which the rankings have seen: add other data with run.add_query('test', loader).",
                UserWarning,
                stacklevel=3,
            )
    return queries.find(run, test)


def _ranking(run: Record, method: str, ray_address: str | None, memory_gb: float, progress: bool | None) -> np.ndarray:
    """All samples, the most harmful first; scored as by default, where that is not stored."""
    scores = score(run, method, ray_address=ray_address, memory_gb=memory_gb, progress=progress, check=0)
    return np.argsort(scores.estimates, kind="stable")


def _plan(
    visited: np.ndarray, seed: int, orders: dict[str, np.ndarray], counts: dict[float, int], random: bool
) -> dict[tuple[str, float], frozenset[int]]:
    """The samples to drop from one seed, by method and fraction; first of all nothing."""
    plan: dict[tuple[str, float], frozenset[int]] = {("none", 0.0): frozenset()}
    orders = dict(orders)
    if random:
        orders["random"] = np.random.default_rng(seed).permutation(visited)
    for name, order in orders.items():
        for fraction, count in counts.items():
            plan[name, fraction] = frozenset(order[:count].tolist())
    return plan


def _train_all(
    job: _Job, dropped: list[list[frozenset[int]]], ray_address: str | None, save: bool, progress: bool | None
) -> np.ndarray:
    """Test loss and accuracy of every training, (m, seeds, 2), where ``dropped[seed]`` are the m sets to go without.

    Pieces are a few trainings from one seed. What they are does not depend on the workers, so neither do the bits of the
    results; a training that was stored before is left out, and one that occurs twice is done once.
    """
    # What a function of one's own computes may change under the same name.
    keep = save and job.test.function is None
    known = shards.stored_figures(job.run, job.kind) if keep else {}
    wanted = [Retraining(seed, list(dict.fromkeys(sets))) for seed, sets in enumerate(dropped)]
    left = [
        Retraining(piece.seed, new)
        for retraining in wanted
        for piece in retraining.pieces(TRAININGS_AT_ONCE)
        if (new := [without for without in piece.dropped if _name(piece.seed, without) not in known])
    ]
    amount = sum(len(piece.dropped) for piece in left)
    failures: list[tuple[int, str]] = []
    with Progress(f"cleaning · {amount} trainings", len(left), progress, amount, "trainings") as bar:
        for piece, result in cluster.each(_test_retrained, job, left, ray_address, bar, _halves):
            if isinstance(result, cluster.Failure):
                failures.append((piece.seed, result.reason))
                continue
            done = {_name(piece.seed, without): figures for without, figures in zip(piece.dropped, result, strict=True)}
            known.update(done)
            if keep:
                shards.write_figures(job.run, job.kind, done)
    if failures:
        seeds = sorted({seed for seed, _ in failures})
        kept = "The others are stored; clean again to train what is missing" if keep else "Clean again"
        raise RunError(f"Trainings from the seeds {seeds} failed: {failures[0][1]}. {kept}.")
    by_seed = [[known[_name(seed, without)] for without in sets] for seed, sets in enumerate(dropped)]
    by_training: np.ndarray = np.array(by_seed, dtype=float).swapaxes(0, 1)
    return by_training


def _halves(piece: Retraining) -> list[Retraining]:
    return piece.pieces(-(-len(piece.dropped) // 2))


def _name(seed: int, without: frozenset[int]) -> str:
    """Names one training of a job."""
    return f"{seed}-{digest(json.dumps(sorted(without)).encode())[:16]}"


def _test_retrained(job: _Job, retraining: Retraining, progress: Callable[[float], None]) -> list[list[float]]:
    """Test loss and accuracy (NaN where there is none) of each training."""
    with threads(1):
        thetas = retrain(job.run, retraining, job.memory, progress)
        replay = Replay(job.run)
        losses = job.test.values(replay.objective, thetas).tolist()
        accuracy = Query("accuracy", (batches.unflatten(s, leaves) for leaves, s in job.test.batches), correct)
        try:
            accuracies = accuracy.values(replay.objective, thetas).tolist()
        except NotAClassifier:
            accuracies = [float("nan")] * len(thetas)
    return [list(pair) for pair in zip(losses, accuracies, strict=True)]
