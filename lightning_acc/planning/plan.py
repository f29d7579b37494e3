"""``plan``: what each method would cost on a run, before it runs.

A few recorded steps are timed (``planning.calibration``), memory follows from ``methods.memory``, disk from the table itself.
"""

from __future__ import annotations

import io
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lightning_acc import arguments
from lightning_acc.core import devices, queries
from lightning_acc.core import removals as removal_sets
from lightning_acc.core.process import as_scored, resident_bytes
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.queries.moments import At
from lightning_acc.core.removals import Removal
from lightning_acc.errors import RequestError
from lightning_acc.methods.registry import METHODS, TRUTH, is_ranking, is_truth, least_bytes, place
from lightning_acc.planning.calibration import Calibration, Cost
from lightning_acc.planning.forecasts import forecast
from lightning_acc.progress import Progress, duration, two_digits
from lightning_acc.record.record import Record, opened

if TYPE_CHECKING:
    import pandas

SCHEMA = pa.schema(
    [
        ("method", pa.string()),
        ("readout", pa.string()),
        ("n", pa.int64()),
        ("seconds", pa.float64()),
        ("work_seconds", pa.float64()),
        ("peak_memory_gb", pa.float64()),
        ("disk_gb", pa.float64()),
        ("chunks", pa.int64()),
        ("check_seconds", pa.float64()),
    ]
)
CHECKED = 48
"""Removals that are retrained without to check a table, where that is affordable."""
AFFORDABLE = 600.0
"""Seconds of retraining that are worth waiting for rather than being estimated."""
# Measured on two cores: starting and stopping Ray; then its workers start and import torch and Lightning.
RAY_SECONDS, WORKER_SECONDS = 6.5, 7.0
WORKER_BYTES = 0.5 * 2**30
"""Size of a worker with torch and Lightning, before it has read anything."""


@dataclass(frozen=True, repr=False)
class Plan:
    """What each method would cost.

    Attributes:
        table: one row per method: ``method``, ``readout``, ``n`` (removals), ``seconds`` (of waiting, with the workers and
            threads there are), ``work_seconds`` (of one thread), ``peak_memory_gb`` (of one process), ``disk_gb`` (the stored
            table and temporary files), ``chunks`` and ``check_seconds`` (what it takes besides to retrain without 48 removals,
            by which a table is checked; 0 for the truth). The numbers of a method that cannot be used on this run are null; the
            recommendation says why.
        recommendation: what to do, in a sentence or two.
    """

    table: pa.Table
    recommendation: str

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame

    def __str__(self) -> str:
        lines = [("method", "readout", "removals", "chunks", "time", "check", "work", "peak memory", "disk")]
        for row in self.table.to_pylist():
            numbers: tuple[str, ...] = ("-",) * 6
            if row["seconds"] is not None:
                check = "-" if row["check_seconds"] is None else duration(row["check_seconds"])
                times = [duration(row["seconds"]), check, duration(row["work_seconds"])]
                numbers = (str(row["chunks"]), *times, amount(row["peak_memory_gb"]), amount(row["disk_gb"]))
            lines.append((row["method"], row["readout"], str(row["n"]), *numbers))
        widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
        rows = ["  ".join(f"{cell:{'<' if i < 2 else '>'}{widths[i]}}" for i, cell in enumerate(line)) for line in lines]
        return "\n".join([*rows, "", self.recommendation])

    __repr__ = __str__


@dataclass(frozen=True)
class Resources:
    """What there is to compute with.

    Attributes:
        ray_address: as for ``score``.
        workers: that compute at the same time.
        started: whether Ray is connected already.
        busy: seconds that go by for each second of a thread, as other processes take their share.
        threads: that a chunk is computed on, where the others leave it so many.
        serial: what of the work threads do not share, from 0 to 1.
    """

    ray_address: str | None
    workers: int
    started: bool
    busy: float
    threads: int = 1
    serial: float = 0.0

    def farmed_out(self, chunks: int) -> bool:
        """Whether ``score`` gives the chunks to workers of Ray."""
        return self.ray_address is not None and (chunks > 1 or self.ray_address != "local")

    def seconds(self, cost: Cost, n: int) -> float:
        """Seconds of waiting for n removals."""
        sizes = cost.chunks(n)
        if not self.farmed_out(len(sizes)):
            return self.busy * self._waited(self.threads) * cost.work_seconds(n)
        waited = self._waited(max(1, min(self.threads, self.workers // max(1, len(sizes)))))
        ends = [0.0] * self.workers
        for size in sizes:  # each chunk goes to the worker that is free first, and opens the run anew
            free = ends.index(min(ends))
            ends[free] += cost.load + waited * (cost.per_chunk + cost.per_removal * size)
        start = (0.0 if self.started or self.ray_address != "local" else RAY_SECONDS) + WORKER_SECONDS
        return self.busy * (cost.load + start + max(ends))

    def _waited(self, threads: int) -> float:
        """Seconds of waiting for a second of work, which so many threads share (Amdahl's law)."""
        return self.serial + (1 - self.serial) / threads


def plan(
    run: Record | str | os.PathLike[str],
    removals: removal_sets.Wanted = None,
    query: str | Query = "val",
    dtype: str | None = None,
    ray_address: str | None = "local",
    *,
    device: str = "auto",
    at: At = moments.END,
    workers: int | None = None,
    memory_gb: arguments.Budget = "auto",
    progress: bool | None = None,
) -> Plan:
    """What would ``score`` cost by each method: time, memory and disk, from a few timed steps, before it runs.

    Takes about 5 seconds and 2 % of what it predicts, at most.

    Args:
        run: a recorded run, or its path.
        removals: as for ``score``.
        query: as for ``score``.
        dtype: as for ``score``.
        ray_address: as for ``score``.
        device: as for ``score``.
        at: as for ``score``: the run is taken no further than to the last of these steps, and the query is read at each.
        workers: how many compute at the same time; None: as many as Ray starts here, one for each core, or one without Ray.
        memory_gb: as for ``score``.
        progress: show a progress bar; None shows one in a terminal.

    Raises:
        RunError: the run directory cannot be read.
        RequestError: there is no such query, sample, dtype or device, or not as many workers or as much memory.
    """
    if workers is not None:
        workers = arguments.whole("workers", workers, "cannot compute anything", least=1)
    ray_address = arguments.ray_address(ray_address)
    if ray_address not in (None, "local") and workers is None:
        raise RequestError(f"How many workers compute at {ray_address!r} is not known before it is reached: give workers=.")
    run = opened(run)
    distinct = list(dict.fromkeys(removal_sets.named(removals, run)[0]))
    query, when, place = queries.find(run, query), moments.find(run, at), devices.chosen(device, run)
    n = len(distinct)
    costs: dict[str, Cost] = {}
    peaks: dict[str, int] = {}
    scratch: dict[str, int] = {}
    reasons: list[str] = []
    with as_scored(), Progress("plan", 1 + len(METHODS), progress) as bar:
        calibration = Calibration(run, query, dtype, devices.budget(memory_gb, place), distinct, when, place)
        for i, method in enumerate(METHODS.values()):
            bar.update(i, 1.0)
            try:
                method.check(calibration.replay)
                settled = method.settled(calibration.replay, keep_shifts=False)
                least = least_bytes(settled, calibration.replay)
                calibration.memory = devices.budget(memory_gb, place, least)
                expected = forecast(method, calibration)
                cost = expected.cost()
                peaks[method.name] = expected.bytes(max(cost.chunks(n), default=0))
                costs[method.name] = cost
                scratch[method.name] = settled.scratch_bytes(calibration.replay, calibration.memory)
            except (RequestError, NotImplementedError) as error:
                reasons.append(f"{method.name} cannot be computed on this run ({str(error).splitlines()[0]}).")
    ray, threads = sys.modules.get("ray"), calibration.replay.threads
    resources = Resources(
        ray_address,
        (1 if ray_address is None else os.cpu_count() or 1) if workers is None else workers,
        ray is not None and bool(ray.is_initialized()),
        calibration.busy,
        threads,
        calibration.serial(threads),
    )
    resident, disk = resident_bytes(), _table_bytes(distinct)
    rows = []
    for name, method in METHODS.items():
        settled = method.settled(calibration.replay, keep_shifts=False)
        readout = settled.default_readout(keep_shifts=False)
        row: dict[str, Any] = {"method": name, "readout": readout, "n": n, "disk_gb": disk / 2**30}
        if name in costs:
            row["disk_gb"] += scratch[name] / 2**30
            cost = costs[name]
            count = len(cost.chunks(n))
            base = min(resident, WORKER_BYTES + _run_bytes(run)) if resources.farmed_out(count) else resident
            row["seconds"], row["work_seconds"] = resources.seconds(cost, n), cost.work_seconds(n)
            row["peak_memory_gb"], row["chunks"] = (base + peaks[name]) / 2**30, count
            if TRUTH in costs:
                row["check_seconds"] = 0.0 if method.is_truth else resources.seconds(costs[TRUTH], min(n, CHECKED))
        rows.append(row)
    advice = recommend({name: partial(resources.seconds, cost) for name, cost in costs.items()}, n)
    return Plan(pa.Table.from_pylist(rows, SCHEMA), " ".join([advice, *reasons]))


def recommend(seconds: Mapping[str, Callable[[int], float]], n: int) -> str:
    """What to do about n removals, given the seconds of waiting each method takes for any number of them.

    The truth where it can be waited for; otherwise the most faithful estimate that can be, or the cheapest, and the truth
    for the top of its ranking.
    """
    if not n:
        return "Nothing is to be removed: there is nothing to compute."
    estimates = {name: of(n) for name, of in seconds.items() if not is_truth(name)}
    estimates = {name: cost for name, cost in estimates.items() if is_ranking(name)} or estimates
    affordable = sorted((name for name in estimates if estimates[name] <= AFFORDABLE), key=place)
    screen = affordable[0] if affordable else min(estimates, key=lambda name: estimates[name], default=None)
    if TRUTH not in seconds:
        return "No method can be computed." if screen is None else f"{screen} takes {duration(seconds[screen](n))}: use it."
    truth = seconds[TRUTH]
    what = f"all {n} removals" if n > 1 else "the removal"
    if screen is None or truth(n) <= max(AFFORDABLE, estimates.get(screen, 0.0)):
        return f"{TRUTH} for {what} takes {duration(truth(n))} here: use it."
    fit = [k for k in (5000, 2000, 1000, 500, 200, 100, 50, 20) if k <= n // 2 and truth(k) <= AFFORDABLE]
    top = max(fit, default=min(10, n))
    return (
        f"{TRUTH} for {what} would take {duration(truth(n))}; {screen} takes {duration(seconds[screen](n))}: screen with it, "
        f"then confirm the top {top} with {TRUTH} ({duration(truth(top))})."
    )


def amount(gigabytes: float) -> str:
    """A size in GB, MB or kB, to two digits."""
    for scale, unit in ((2**20, "kB"), (2**10, "MB")):
        if gigabytes * scale < 999.5:
            return f"{two_digits(gigabytes * scale)} {unit}"
    return f"{two_digits(gigabytes)} GB"


def _table_bytes(removals: Sequence[Removal]) -> float:
    """Size of the stored table of scores, from one with random scores for the first few of the removals."""
    few = list(removals[:20000])
    buffer = io.BytesIO()
    scores, ranks = np.random.default_rng(0).normal(size=len(few)), np.arange(len(few))
    table = pa.table({"removal": pa.array(few, pa.list_(pa.int64())), "score": scores, "rank": ranks})
    pyarrow.parquet.write_table(table, buffer)
    return len(buffer.getvalue()) * len(removals) / max(1, len(few)) + 1000  # its conditions


def _run_bytes(run: Record) -> int:
    """Bytes of the run's files that a process keeps, once read."""
    files = [(name, facts["bytes"]) for name, facts in run.manifest["files"].items() if name.endswith(".safetensors")]
    newest = max((size for name, size in files if name.startswith("parameters/")), default=0)
    return int(newest + sum(size for name, size in files if not name.startswith("parameters/")))
