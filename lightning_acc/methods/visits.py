"""Influence over training time: what each visit of a sample contributed to its score.

SGD-IE's score of removing sample i is a sum over the steps that saw it, ``sum_t -w_{t,i} (dF_t/dw_i)^T lambda_{t+1}``
(Hara et al. 2019, arXiv 1906.08473). One reverse sweep has every term; here the terms of chosen samples are kept apart.
"""

from __future__ import annotations

from collections.abc import Iterable

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from lightning_acc.core.optimizers import State
from lightning_acc.core.queries import Query
from lightning_acc.core.removals import parse
from lightning_acc.core.replay import Replay
from lightning_acc.core.step import Point
from lightning_acc.errors import RequestError
from lightning_acc.methods import sweeps as sweep
from lightning_acc.methods.rules import AdjointSgdIe
from lightning_acc.record.record import Run

SCHEMA = pa.schema([("sample", pa.int64()), ("step", pa.int64()), ("score", pa.float64()), ("cumulative", pa.float64())])


class AdjointVisits(AdjointSgdIe):
    """SGD-IE's reverse sweep, which also keeps what each step contributed to the scores of ``samples``.

    Attributes:
        visits: one entry per step that saw any of the samples, the last step first: the step, the samples and their terms.
    """

    def __init__(self, samples: Tensor, n_steps: int) -> None:
        self.samples = samples
        self.visits: list[tuple[int, Tensor, Tensor]] = []
        self._step = n_steps

    def advance(self, point: Point, carry: tuple[State, Tensor]) -> tuple[State, Tensor]:
        """One step back; ``carry`` is the adjoint and the scores (n_samples,) collected so far."""
        adjoint, scores = carry
        # From zero, as a difference of sums would have lost the last digits of the term.
        adjoint, terms = super().advance(point, (adjoint, torch.zeros_like(scores)))
        self._step -= 1
        seen = self.samples[torch.isin(self.samples, point.step.sample_ids)]
        if len(seen):
            self.visits.append((self._step, seen, terms[seen]))
        return adjoint, scores + terms


def influence_over_time(
    run: Run, samples: Iterable[int], query: str | Query = "val", memory_gb: float = 2.0, dtype: str | None = None
) -> pa.Table:
    """What each visit of ``samples`` contributed to their scores by ``sgd-ie`` with linear readout.

    The contributions of a sample add up to that score: positive where a visit helped the query, negative where it harmed.
    Costs about as much as ``sgd-ie`` itself, three trainings, for however many samples.

    Args:
        run: a recorded run.
        samples: sample ids.
        query: name of a query recorded with the run, or a ``Query``.
        memory_gb: budget for the states kept for the sweep back.
        dtype: None as recorded; ``"float64"`` replays the run in double precision.

    Returns:
        One row per visit, in step order: ``sample`` (int64), ``step`` (int64), ``score`` (float64, what that visit
        contributed) and ``cumulative`` (float64, the sum over the sample's visits so far). A step that saw a sample twice
        is one visit. Samples that no step saw have no row.

    Raises:
        RequestError: there is no such sample, query or dtype, or the loss cannot be differentiated twice.
    """
    wanted = sorted({i for (i,) in parse([[int(sample)] for sample in samples], run.n_samples)})
    if isinstance(query, str):
        query = run.query(query)
    replay = Replay(run, dtype)
    method = AdjointVisits(torch.tensor(wanted, dtype=torch.int64), len(replay))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as every score is computed, so that the sums agree in their last digits
    try:
        with torch.enable_grad():
            sweep.reverse(replay, method, query, int(memory_gb * 2**30))
    except NotImplementedError as error:
        raise RequestError(
            f"Influence over time differentiates the loss twice, which an operation of this module does not allow ({error}): "
            "use another operation (nn.Embedding and a mean for nn.EmbeddingBag)."
        ) from error
    finally:
        torch.set_num_threads(threads)
    return _table(method.visits[::-1])


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
