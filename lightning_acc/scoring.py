"""``score``: from a run and a question to a table of scores."""

from __future__ import annotations

import importlib.metadata
import os
import time
from collections.abc import Iterable
from datetime import datetime, timezone
from typing import Any

import numpy as np
import torch

from lightning_acc import planning, scores
from lightning_acc import removals as removal_sets
from lightning_acc.errors import RequestError
from lightning_acc.methods import FORWARD, REVERSE
from lightning_acc.progress import Progress
from lightning_acc.queries import Query
from lightning_acc.replay import Replay
from lightning_acc.scores import Scores
from lightning_acc.trajectory.manifest import CONVENTION
from lightning_acc.trajectory.run import Run
from lightning_acc.work import Job, compute

METHODS = tuple(FORWARD)
READOUTS = ("exact", "linear")
DEFAULT_MEMORY_GB = 2.0


def score(
    run: Run | str | os.PathLike[str],
    method: str = "acc-sgd-ie",
    removals: Iterable[int] | Iterable[Iterable[int]] | None = None,
    query: str | Query = "val",
    readout: str | None = None,
    dtype: str | None = None,
    ray_address: str | None = "local",
    *,
    keep_shifts: bool = False,
    memory_gb: float = DEFAULT_MEMORY_GB,
    save: bool = True,
    progress: bool | None = None,
) -> Scores:
    """What would ``query`` have been at the end of this very run without each of ``removals``, minus what it was?

    The experiment that is estimated: the same initial parameters, batches, learning rates and random numbers, but the
    loss weights of the removed samples are 0 in every step, and nothing else changes. ``method="loo"`` carries it out.

    Args:
        run: a recorded run, or its path.
        method: ``"loo"`` (the truth), ``"acc-sgd-ie"``, ``"sgd-ie"`` or ``"tracin"``.
        removals: None for every sample by itself; a list of sample ids; or a list of lists of ids, each removed together.
        query: name of a query recorded with the run, or a ``Query``.
        readout: ``"exact"`` evaluates the query at the shifted parameters; ``"linear"`` takes the shift's product with its
            gradient. None is exact for methods that carry shifts (``loo``, ``acc-sgd-ie``) and linear for the others,
            whose one reverse sweep then answers for all samples; asked for ``"exact"`` these carry shifts too.
        dtype: None as recorded; ``"float64"`` replays the run in double precision.
        ray_address: ``"local"`` starts Ray on this machine for this call, ``"auto"`` or ``"ray://..."`` uses a running
            cluster, None computes in this process without Ray.
        keep_shifts: also return the shifts of the final parameters, (n_removals, p).
        memory_gb: budget of each process for what it computes with, beyond the run's data itself.
        save: store the table in the run directory, where ``evaluate`` and the report find it; removals scored before
            under the same conditions are kept.
        progress: show a progress bar; None shows one in a terminal.

    Returns:
        The scores: positive where the samples help, negative where they harm.

    Raises:
        RunError: the run directory cannot be read.
        RequestError: there is no such method, query, sample, readout or dtype.
    """
    run = run if isinstance(run, Run) else Run(run)
    _choose("method", method, METHODS)
    if readout is None:
        readout = "linear" if method in REVERSE and not keep_shifts else "exact"
    _choose("readout", readout, READOUTS)
    wanted = removal_sets.parse(removals, run.n_samples)
    if isinstance(query, str):
        query = run.query(query)
    job = Job(run, method, query, readout, dtype, keep_shifts, int(memory_gb * 2**30))
    replay = Replay(run, dtype)  # refuses what cannot be replayed before any worker starts
    distinct = list(dict.fromkeys(wanted))
    if job.reversed:
        parts = [distinct]
    else:
        parts = planning.chunks(distinct, planning.chunk_size(replay, method, job.memory)) if distinct else []

    started = time.perf_counter()
    with Progress(f"{method} · {len(distinct)} removals", len(parts), progress) as bar:
        # A single chunk gains nothing from workers that would have to be started first.
        if ray_address is None or (ray_address == "local" and len(parts) < 2):
            results = [compute(job, part, bar.of(i), replay) for i, part in enumerate(parts)]
        else:
            from lightning_acc import cluster

            results = cluster.map_pieces(compute, job, parts, ray_address, bar)

    conditions = {
        "method": method,
        "query": query.name,
        "query_fingerprint": query.fingerprint,
        "readout": readout,
        "dtype": dtype or run.dtype,
        "convention": CONVENTION,
        "manifest_hash": run.hash,
        "version": importlib.metadata.version("lightning-acc"),
        "torch": torch.__version__,
        "n": len(distinct),
        "seconds": sum(result.seconds for result in results),
        "wall_seconds": time.perf_counter() - started,
        "peak_memory_gb": max((result.peak_memory_gb for result in results), default=0.0),
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    values = np.concatenate([result.scores for result in results]) if results else np.zeros(0)
    if save and distinct:
        _save(run, Scores.build(distinct, values, conditions))
    place = {removal: i for i, removal in enumerate(distinct)}
    order = [place[removal] for removal in wanted]
    shifts = None
    if keep_shifts:
        found = [result.shifts for result in results if result.shifts is not None]
        shifts = torch.cat(found)[order] if found else torch.zeros(0, run.n_parameters)
    return Scores.build(wanted, values[order], conditions, shifts)


def table_name(conditions: dict[str, Any], run: Run) -> str:
    """File name of a table: ``<method>[-<query>]``, then what is not as usual (readout, dtype)."""
    method = conditions["method"]
    usual = "linear" if method in REVERSE else "exact"
    name = method if conditions["query"] == "val" else f"{method}-{conditions['query']}"
    name += "" if conditions["readout"] == usual else f".{conditions['readout']}"
    return name + ("" if conditions["dtype"] == run.dtype else f".{conditions['dtype']}")


def _save(run: Run, new: Scores) -> None:
    name = table_name(new.conditions, run)
    if name in scores.names(run.store):
        older = scores.read(run.store, name)
        same = ("manifest_hash", "query_fingerprint", "dtype", "readout")
        if all(older.conditions[key] == new.conditions[key] for key in same):
            new = new.merged(older)
    scores.write(run.store, name, new)


def _choose(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise RequestError(f"There is no {what} {value!r}; choose one of {', '.join(known)}.")
