"""The most harmful and the most helpful samples over training: what each had gathered by when, beside the query itself."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_acc.core import queries
from lightning_acc.core.queries.moments import END
from lightning_acc.judge.agreement import stored_scores
from lightning_acc.methods import registry
from lightning_acc.record import seal, tables
from lightning_acc.record.record import Record
from lightning_acc.scoring.over_time import SCHEMA, influence_over_time
from lightning_acc.scoring.scores import Scores

NAME = "over_time.parquet"
REMEDY = "delete it and ask for it again"
ABOUT = ("query", "query_fingerprint", "dtype")
GRID = 120
"""Numbers of steps at which a line is given, at most."""


@dataclass(frozen=True)
class OverTime:
    """What some samples contributed while the model was trained.

    Attributes:
        visits: see ``influence_over_time``.
        harmful: samples, the most harmful first.
        helpful: samples, the most helpful first.
    """

    visits: pa.Table
    harmful: list[int]
    helpful: list[int]

    @property
    def samples(self) -> list[int]:
        """All of them."""
        return [*self.harmful, *self.helpful]

    @property
    def about(self) -> dict[str, str]:
        """What was asked."""
        return {key: self._told(key) for key in ABOUT}

    @property
    def query(self) -> str:
        """Whose loss, or what else, they changed."""
        return self._told("query")

    @property
    def curve(self) -> list[tuple[int, float]]:
        """Numbers of steps, and the query after them."""
        return [(int(t), float(value)) for t, value in json.loads(self._told("curve"))]

    def lines(self, n_steps: int) -> tuple[list[int], dict[int, list[float]]]:
        """Numbers of steps, evenly spread over all ``n_steps``, and what each sample had contributed after them."""
        grid = np.unique(np.linspace(0, n_steps, min(GRID, n_steps + 1)).round().astype(int))
        sample, step, cumulative = (self.visits[name].to_numpy() for name in ("sample", "step", "cumulative"))
        lines = {}
        for one in self.samples:
            own = sample == one
            so_far = np.concatenate([[0.0], cumulative[own]])
            lines[one] = so_far[np.searchsorted(step[own], grid)].tolist()
        return grid.tolist(), lines

    def _told(self, key: str) -> str:
        return str(self.visits.schema.metadata[key.encode()].decode())


def follow(run: Record, count: int, scores: dict[str, Scores] | None = None) -> OverTime | None:
    """Follow ``count`` samples from each end of the run's ranking over training; kept in the run directory.

    Costs about as much as ``sgd-ie``, three trainings, unless the same samples have been followed before.

    Args:
        run: a recorded run.
        count: how many from each end.
        scores: its tables; None reads them.

    Returns:
        None where no table ranks samples by a query of the run.

    Raises:
        RequestError: the loss cannot be differentiated twice, or the optimizer's update not once.
    """
    found = _to_follow(run, stored_scores(run) if scores is None else scores)
    if found is None:
        return None
    of_each, conditions = found
    order = sorted(of_each, key=lambda sample: of_each[sample])
    harmful, helpful = order[:count], order[count:][::-1][:count]
    about = {key: str(conditions[key]) for key in ABOUT}
    before = stored(run)
    if before is not None and (before.harmful, before.helpful, before.about) == (harmful, helpful, about):
        return before
    dtype = None if conditions["dtype"] == run.scored_in else conditions["dtype"]
    visits = influence_over_time(run, [*harmful, *helpful], conditions["query"], dtype=dtype)
    ends = {"harmful": json.dumps(harmful), "helpful": json.dumps(helpful)}
    visits = visits.replace_schema_metadata({**visits.schema.metadata, **ends})
    run.store.write(NAME, tables.sealed(visits, NAME))
    return OverTime(visits, harmful, helpful)


def stored(run: Record) -> OverTime | None:
    """What was followed before; None where nothing was, or it was of another content of the run.

    Raises:
        DamagedResult: it is not what was written there.
        RunError: it cannot be read.
    """
    if not run.store.exists(NAME):
        return None
    visits = tables.opened(run.store, NAME, REMEDY)
    about = visits.schema.metadata
    try:
        ends = [[int(sample) for sample in json.loads(about[key])] for key in (b"harmful", b"helpful")]
        found = OverTime(visits, *ends)
        if visits.schema.remove_metadata() != SCHEMA or any(column.null_count for column in visits.columns):
            raise ValueError("its columns are others")
        if not (found.curve and all(found.about.values())):
            raise ValueError("nothing was asked")
        if about[b"manifest_hash"] != run.hash.encode():
            return None
        if not {*found.samples, *visits["sample"].to_pylist()} <= {*range(run.n_samples)}:
            raise ValueError("its samples are none of this run")
    except (KeyError, ValueError, TypeError, OverflowError) as error:
        raise seal.damaged(run.store, NAME, REMEDY) from error
    return found


def _to_follow(run: Record, scores: dict[str, Scores]) -> tuple[dict[int, float], dict[str, Any]] | None:
    """The scores that say which samples are worth following: of the most samples, at the end of this run, and the truest."""
    recorded = {name: queries.find(run, name).fingerprint for name in run.query_names()}
    asked = [t for t in scores.values() if recorded.get(t.conditions["query"]) == t.conditions["query_fingerprint"]]
    candidates = [(table.by_sample(), table.conditions) for table in asked]

    def order(candidate: tuple[dict[int, float], dict[str, Any]]) -> tuple[int, bool, bool, int]:
        of_each, c = candidate
        return -len(of_each), c["at"] != END, "runs" in c, registry.place(c["method"])

    best = min(candidates, key=order, default=None)
    return best if best and best[0] else None
