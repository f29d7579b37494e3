"""``score``: from a run and a question to a table of scores."""

from __future__ import annotations

import importlib.metadata
import os
import time
import warnings
from collections.abc import Callable, Iterable
from datetime import datetime, timezone
from functools import partial, reduce
from typing import Any

import numpy as np
import torch

from lightning_acc.core import removals as removal_sets
from lightning_acc.core.queries import Query
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError, RunError
from lightning_acc.methods.low_rank import sweep as low_rank
from lightning_acc.methods.rules import LOW_RANK, METHODS, REVERSE
from lightning_acc.plan import planning
from lightning_acc.progress import Progress
from lightning_acc.record.manifest import CONVENTION
from lightning_acc.record.record import Run
from lightning_acc.scoring import cluster, shards
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.work import FACTS, Job, Result, compute

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
    rank: int | None = None,
    state: str | None = None,
    confirm: int = 0,
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
        method: ``"loo"`` (the truth), ``"acc-sgd-ie"``, ``"acc-low-rank"``, ``"sgd-ie"`` or ``"tracin"``.
        removals: None for every sample by itself; a list of sample ids; or a list of lists of ids, each removed together.
        query: name of a query recorded with the run, or a ``Query``.
        readout: ``"exact"`` evaluates the query at the shifted parameters; ``"linear"`` takes the shift's product with its
            gradient. None is exact for methods that carry shifts (``loo``, ``acc-sgd-ie``) and linear for ``sgd-ie`` and
            ``tracin``, whose one reverse sweep then answers for all samples; asked for ``"exact"`` these carry shifts too.
            For ``acc-low-rank`` None is exact, for the most influential removals where there are too many to read all so,
            and linear with ``state="outputs"``, whose shifts are rougher than its scores.
        dtype: None as recorded; ``"float64"`` replays the run in double precision.
        ray_address: ``"local"`` starts Ray on this machine for this call, ``"auto"`` or ``"ray://..."`` uses a running
            cluster, None computes in this process without Ray.
        rank: of ``acc-low-rank``: in how many directions it follows the contraction of the training, 0 in none; with
            ``state="screened"``, how many removals it follows exactly. None chooses.
        state: of ``acc-low-rank``: what it keeps. ``"parameters"`` keeps of each sample what the exact shift needs;
            ``"outputs"`` keeps rank + outputs numbers, so that more samples are followed at once, less truly where the model
            is not linear in its parameters. It takes single samples alone, and a module whose outputs and their loss can be
            told apart: see ``lightning_acc.methods.low_rank.protocol``. ``"screened"`` follows the few most influential removals
            exactly, and corrects a few hundred more by what these tell: see ``lightning_acc.methods.low_rank.screened``. None is
            ``"screened"`` where a run is too large to follow all the directions it contracts in, else ``"parameters"``.
        confirm: so many of the most harmful removals are also retrained without (``loo``); the column ``loo`` has their true
            scores. Estimates screen, the truth confirms.
        keep_shifts: also return the shifts of the final parameters, (n_removals, p).
        memory_gb: budget of each process for what it computes with, beyond the run's data itself.
        save: store the scores in the run directory, where ``evaluate`` and the report find them, piece by piece as they
            are done; removals scored before under the same conditions are taken from there.
        progress: show a progress bar; None shows one in a terminal, and elsewhere a line now and then.

    Returns:
        The scores: positive where the samples help, negative where they harm.

    Raises:
        RunError: the run directory cannot be read.
        RequestError: there is no such method, query, sample, readout or dtype.
    """
    run = run if isinstance(run, Run) else Run(run)
    _choose("method", method, METHODS)
    if isinstance(confirm, bool) or not isinstance(confirm, int) or confirm < 0:
        raise RequestError(f"confirm={confirm!r} is no number of removals to retrain without: give 0 or more.")
    if rank is not None and (method != LOW_RANK or isinstance(rank, bool) or not isinstance(rank, int) or rank < 0):
        raise RequestError(f"rank={rank!r} with method={method!r}: a rank, 0 or more, goes with {LOW_RANK} alone.")
    if state is not None and (method != LOW_RANK or state not in low_rank.STATES):
        states = ", ".join(map(repr, low_rank.STATES))
        raise RequestError(f"state={state!r} with method={method!r}: one of {states} goes with {LOW_RANK} alone.")
    if state == low_rank.SCREENED and keep_shifts:
        raise RequestError("state='screened' has the shifts of a few removals alone: keep_shifts goes with state='parameters'.")
    if state is None:
        free = method == LOW_RANK and rank is None and not keep_shifts
        state = low_rank.chosen_state(run) if free else low_rank.PARAMETERS
    wanted = removal_sets.parse(removals, run.n_samples)
    distinct = list(dict.fromkeys(wanted))
    if isinstance(query, str):
        query = run.query(query)
    if readout is None:
        linear = method in REVERSE or (method == LOW_RANK and state == low_rank.OUTPUTS)
        readout = "linear" if linear and not keep_shifts else "exact"
    _choose("readout", readout, READOUTS)
    job = Job(run, method, query, readout, dtype, keep_shifts, int(memory_gb * 2**30), rank, state)
    replay = Replay(run, dtype)  # refuses what cannot be replayed before any worker starts
    if job.reversed:
        parts = [distinct]
    elif method == LOW_RANK:
        low_rank.check(replay, distinct, state)
        parts = planning.even_pieces(distinct, low_rank.removals_at_once(replay, distinct, job.memory, state))
    else:
        parts = planning.chunks(distinct, planning.chunk_size(replay, method, job.memory)) if distinct else []

    started = time.perf_counter()
    conditions: dict[str, Any] = {
        "method": method,
        "query": query.name,
        "query_fingerprint": query.fingerprint,
        "readout": readout,
        **({"rank": "chosen" if rank is None else str(rank), "state": state} if method == LOW_RANK else {}),
        "dtype": dtype or run.dtype,
        "convention": CONVENTION,
        "manifest_hash": run.hash,
        "version": importlib.metadata.version("lightning-acc"),
        "torch": torch.__version__,
        "created": datetime.now(timezone.utc).isoformat(timespec="seconds"),
    }
    name = table_name(conditions, run)
    # What a function of one's own computes may change under the same name, so its scores are not taken from the store.
    known = shards.stored(run, conditions, name) if save and not keep_shifts and query.function is None else None
    left = shards.missing(parts, known)
    finished: list[tuple[list[Removal], Result]] = []
    failures: list[tuple[list[Removal], str]] = []
    amount = sum(map(len, left))
    with Progress(f"{method} · {amount} removals", len(left), progress, amount, "removals") as bar:
        # A single chunk gains nothing from workers that would have to be started first.
        alone = ray_address is None or (ray_address == "local" and len(left) < 2)
        work = partial(_compute_here, replay) if alone else compute
        for part, result in cluster.each(work, job, left, None if alone else ray_address, bar, _halves):
            if isinstance(result, cluster.Failure):
                failures.append((part, result.reason))
                continue
            finished.append((part, result))
            if save:
                cost = {"n": len(part), "wall_seconds": result.seconds, **result.cost}
                shards.write(run, Scores.build(part, result.scores, {**conditions, **cost}, more=result.more))
    if save and distinct:
        shards.gather(run, conditions, name)
    if failures:
        lost = [removal for part, _ in failures for removal in part]
        raise RunError(
            f"{len(lost)} of {len(distinct)} removals failed ({_few(lost)}): {failures[0][1]}. The others are "
            f"{'stored; score again to compute what is missing' if save else 'lost, as save=False'}."
        )

    tables = [Scores.build(part, result.scores, {"seconds": 0.0}, more=result.more) for part, result in finished]
    tables += [known] if known is not None else []
    together = reduce(Scores.merged, tables) if tables else Scores.build([], np.zeros(0), {})
    values = together.by_removal()
    unbounded = [removal for removal in distinct if not np.isfinite(values[removal])]
    if unbounded:
        warnings.warn(
            f"{len(unbounded)} of {len(distinct)} removals have no finite score ({_few(unbounded)}): without them the run, or "
            "its estimate, diverges. The others are not affected.",
            UserWarning,
            stacklevel=2,
        )
    conditions.update(
        n=len(distinct),
        reused=len(distinct) - sum(map(len, left)),
        seconds=sum(result.seconds for _, result in finished),
        wall_seconds=time.perf_counter() - started,
        peak_memory_gb=max((result.peak_memory_gb for _, result in finished), default=0.0),
    )
    conditions.update(finished[0][1].facts if finished else _facts(known))
    if any("fallback" in result.facts for _, result in finished):
        error = max(result.facts["shift_error"] for _, result in finished)
        instead = "its scores are those of sgd-ie. Give a higher rank, or confirm the top of the ranking with loo."
        if any(result.facts.get("fallback") == low_rank.SCREENED for _, result in finished):
            instead = "the most influential removals were followed instead, as state='screened' does at once."
        warnings.warn(
            f"At rank {conditions['basis_rank']} the shifts that {method} takes gradients at are too rough (relative error "
            f"{error:.2f}): {instead}",
            UserWarning,
            stacklevel=2,
        )
    shifts = None
    if keep_shifts:
        rows = {removal: shift for part, result in finished for removal, shift in zip(part, _rows(result), strict=True)}
        shifts = torch.stack([rows[removal] for removal in wanted]) if wanted else torch.zeros(0, run.n_parameters)
    scores = together.picked(wanted, conditions, shifts)
    if not confirm:
        return scores
    truth = score(
        run, "loo", scores.most_harmful(confirm), query, dtype=dtype, ray_address=ray_address, memory_gb=memory_gb, save=save,
        progress=progress,
    )  # fmt: skip
    return scores.confirmed_by(truth)


def _facts(known: Scores | None) -> dict[str, Any]:
    return {key: known.conditions[key] for key in FACTS if key in known.conditions} if known is not None else {}


def _compute_here(replay: Replay, job: Job, removals: list[Removal], progress: Callable[[float], None]) -> Result:
    return compute(job, removals, progress, replay)


def _halves(part: list[Removal]) -> list[list[Removal]]:
    middle = len(part) // 2
    return [part[:middle], part[middle:]] if middle else [part]


def _rows(result: Result) -> torch.Tensor:
    assert result.shifts is not None
    return result.shifts


def _few(removals: list[Removal]) -> str:
    shown = ", ".join(" ".join(map(str, removal)) for removal in removals[:5])
    return shown + (", ..." if len(removals) > 5 else "")


def table_name(conditions: dict[str, Any], run: Run) -> str:
    """File name of a table: ``<method>[-<query>]``, then what is not as usual (readout, dtype)."""
    method = conditions["method"]
    usual = "linear" if method in REVERSE else "exact"
    chosen = conditions.get("rank", "chosen") == "chosen"
    if method == LOW_RANK and conditions["state"] != (low_rank.chosen_state(run) if chosen else low_rank.PARAMETERS):
        method = f"{method}.{conditions['state']}"
    if not chosen:
        method = f"{method}.rank-{conditions['rank']}"
    name = method if conditions["query"] == "val" else f"{method}-{conditions['query']}"
    name += "" if conditions["readout"] == usual else f".{conditions['readout']}"
    return name + ("" if conditions["dtype"] == run.dtype else f".{conditions['dtype']}")


def _choose(what: str, value: str, known: Iterable[str]) -> None:
    if value not in known:
        raise RequestError(f"There is no {what} {value!r}; choose one of {', '.join(known)}.")
