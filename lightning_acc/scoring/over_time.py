"""Influence over training time: what each visit of a sample contributed to its score.

SGD-IE's score of removing sample i is a sum over the steps that saw it, ``sum_t -w_{t,i} (dF_t/dw_i)^T lambda_{t+1}``
(Hara et al. 2019, arXiv 1906.08473). One reverse sweep has every term; here the terms of chosen samples are kept apart.
"""

from __future__ import annotations

import json
from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.core import devices, queries
from lightning_acc.core.process import as_scored
from lightning_acc.core.queries import Query, moments
from lightning_acc.core.removals import parse
from lightning_acc.core.replay import Replay, parameters_at
from lightning_acc.methods import sweeps
from lightning_acc.methods.method import Question
from lightning_acc.methods.swept import refuse_other_losses, refuse_without_derivative
from lightning_acc.methods.visits import AdjointVisits
from lightning_acc.progress import Progress
from lightning_acc.record.record import Record
from lightning_acc.scoring.work import twice_differentiable

CURVE, CURVE_WORK = 24, 0.25
"""Places of the training curve at most, and what reading the query there may cost beside the training."""
SCHEMA = pa.schema([("sample", pa.int64()), ("step", pa.int64()), ("score", pa.float64()), ("cumulative", pa.float64())])


def influence_over_time(
    run: Record,
    samples: Iterable[int],
    query: str | Query = "val",
    memory_gb: arguments.Budget = "auto",
    dtype: str | None = None,
    device: str = "auto",
    progress: bool | None = None,
) -> pa.Table:
    """What each visit of ``samples`` contributed to their scores by ``sgd-ie`` with linear readout.

    The contributions of a sample add up to that score: positive where a visit helped the query, negative where it harmed.
    Costs about as much as ``sgd-ie`` itself, three trainings, for however many samples.

    Args:
        run: a recorded run.
        samples: sample ids.
        query: name of a query recorded with the run, or a ``Query``.
        memory_gb: budget for the states kept for the sweep back; ``"auto"`` as for ``score``.
        dtype: None as recorded; ``"float64"`` replays the run in double precision.
        device: as for ``score``.
        progress: as for ``score``.

    Returns:
        One row per visit, in step order: ``sample`` (int64), ``step`` (int64), ``score`` (float64, what that visit
        contributed) and ``cumulative`` (float64, the sum over the sample's visits so far). A step that saw a sample twice
        is one visit. Samples that no step saw have no row. The table's Arrow metadata tell on how many ``threads``, of which
        ``query`` (name, ``query_fingerprint``) and in which ``dtype``; and the ``curve``: JSON, pairs of a number of steps and
        the query after them, from the beginning of the training to its end.

    Raises:
        RequestError: there is no such sample, query, dtype or device, or the loss cannot be differentiated twice, or the
            optimizer's update not once.
    """
    wanted = sorted({i for (i,) in parse([[int(sample)] for sample in samples], run.n_samples)})
    query = queries.find(run, query)
    place = devices.chosen(device, run)
    memory, replay = devices.budget(memory_gb, place), Replay(run, dtype, device=place)
    refuse_without_derivative(replay, "Influence over time")
    refuse_other_losses(replay, "Influence over time")
    question = Question(query, moments.find(run, moments.END), "linear", False, memory)
    curve: dict[int, float] = {}
    places = _places(replay, query)

    def read(t: int, theta: Tensor) -> None:
        if t in places:
            curve[t] = float(query.value(replay.objective, theta))

    rule = AdjointVisits(torch.tensor(wanted, dtype=torch.int64), run.n_samples, len(replay), read)
    threads = replay.threads
    bar = Progress(f"influence over time · {len(wanted)} samples", 1, progress, len(replay), "steps")
    with bar, as_scored(threads), twice_differentiable("Influence over time"):
        sweeps.reverse(replay, rule, question, bar.of(0))
        read(len(replay), replay.placed(parameters_at(run, len(replay))))
    about = {"query": query.name, "query_fingerprint": query.fingerprint, "dtype": dtype or run.scored_in}
    about |= {"manifest_hash": run.hash, "threads": str(threads), "curve": json.dumps(sorted(curve.items()))}
    return _table(rule.visits[::-1]).replace_schema_metadata(about)


def _places(replay: Replay, query: Query) -> set[int]:
    """The numbers of steps after which the query is read: evenly spread, the first and the last among them."""
    examples = sum(len(step.sample_ids) for step in replay.records)
    affordable = int(3 * CURVE_WORK * examples / query.n_examples)  # going forward is a third of a training step
    count = min(CURVE, len(replay) + 1, max(2, affordable))
    return set(np.linspace(0, len(replay), count).round().astype(int).tolist())


def _table(visits: list[tuple[int, Tensor, Tensor]]) -> pa.Table:
    if not visits:
        return SCHEMA.empty_table()
    sample = torch.cat([seen for _, seen, _ in visits]).numpy()
    step = np.repeat([t for t, _, _ in visits], [len(seen) for _, seen, _ in visits])
    score = torch.cat([terms for _, _, terms in visits]).double().numpy()
    cumulative = np.empty_like(score)
    order = np.argsort(sample, kind="stable")  # the visits of one sample together, still in step order
    for own in np.split(order, np.flatnonzero(np.diff(sample[order])) + 1):
        cumulative[own] = np.cumsum(score[own])
    return pa.table([sample, step, score, cumulative], schema=SCHEMA)
