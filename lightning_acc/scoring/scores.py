"""``Scores``: one table of scores with the conditions it was computed under."""

from __future__ import annotations

import io
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet

from lightning_acc.core.removals import Removal
from lightning_acc.errors import RunError
from lightning_acc.record import tables
from lightning_acc.record.store import Store

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

SIGN = "query(without) - query(with): positive helps, negative harms; rank 1 is the most harmful"
_NUMBERS = ("n", "seconds", "wall_seconds", "peak_memory_gb")
"""Conditions that are numbers; all others are strings."""


@dataclass(frozen=True)
class Scores:
    """The scores of one method on one run.

    Attributes:
        table: columns ``removal`` (list of sample ids), ``score`` (float64; positive: the removal would raise the query,
            the samples help) and ``rank`` (1 is the most harmful), in the order of the removals asked for. ``acc-low-rank``
            adds ``uncertainty`` (float64), a figure for how far the score may be off; confirmed scores add ``loo``, the truth
            where it was computed, else NaN.
        conditions: method, query, readout, dtype, convention, manifest hash, version, seconds, peak memory and so on;
            also in the table's Arrow metadata.
        shifts: final parameter shifts (n_removals, p), where they were asked for.
    """

    table: pa.Table
    conditions: dict[str, Any]
    shifts: Tensor | None = None

    @classmethod
    def build(
        cls,
        removals: list[Removal],
        scores: np.ndarray,
        conditions: dict[str, Any],
        shifts: Tensor | None = None,
        more: Mapping[str, np.ndarray] | None = None,
    ) -> Scores:
        """Rank the scores and join them with ``more`` columns and their conditions."""
        scores = np.asarray(scores, dtype=np.float64)
        ranks = np.empty(len(scores), dtype=np.int64)
        ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
        conditions = {**conditions, "sign": SIGN}
        table = pa.table(
            {"removal": pa.array(removals, pa.list_(pa.int64())), "score": scores, "rank": ranks, **(more or {})},
            metadata={key: str(value) for key, value in conditions.items()},
        )
        return cls(table, conditions, shifts)

    def __repr__(self) -> str:
        c = self.conditions
        return f"Scores({c['method']}: {len(self)} removals, query {c['query']}, {c['readout']} readout, {c['dtype']})"

    def __len__(self) -> int:
        return len(self.table)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame

    @property
    def values(self) -> np.ndarray:
        """The scores, shape (n_removals,), float64."""
        return np.asarray(self.table["score"].to_numpy())

    @property
    def removals(self) -> list[Removal]:
        """The removals, in the order of the table."""
        return [tuple(ids) for ids in self.table["removal"].to_pylist()]

    @property
    def more(self) -> dict[str, np.ndarray]:
        """The columns beside removal, score and rank, each (n_removals,)."""
        return {name: self.table[name].to_numpy() for name in self.table.column_names[3:]}

    def by_removal(self, column: str = "score") -> dict[Removal, float]:
        """Score of each removal, or another figure."""
        return dict(zip(self.removals, self.table[column].to_pylist(), strict=True))

    def picked(self, removals: list[Removal], conditions: dict[str, Any], shifts: Tensor | None = None) -> Scores:
        """The scores of some of the removals, in another order, under other conditions."""
        row = {removal: i for i, removal in enumerate(self.removals)}
        rows = np.array([row[removal] for removal in removals], dtype=np.int64)
        more = {name: values[rows] for name, values in self.more.items()}
        return Scores.build(removals, self.values[rows], conditions, shifts, more)

    def most_harmful(self, count: int) -> list[Removal]:
        """The removals with the lowest scores, the most harmful first."""
        removals = self.removals
        return [removals[i] for i in np.argsort(self.values, kind="stable")[:count]]

    def confirmed_by(self, truth: Scores) -> Scores:
        """These scores with a column ``loo``: those of ``truth``, NaN for removals it does not have."""
        known = truth.by_removal()
        column = np.array([known.get(removal, np.nan) for removal in self.removals])
        return Scores.build(self.removals, self.values, self.conditions, self.shifts, {**self.more, "loo": column})

    def merged(self, older: Scores) -> Scores:
        """These scores with those of ``older`` for removals that are not in here; the seconds add up."""
        mine = set(self.removals)
        rest = [i for i, removal in enumerate(older.removals) if removal not in mine]
        share = len(rest) / max(1, len(older))
        seconds = self.conditions["seconds"] + share * older.conditions["seconds"]
        conditions = {**self.conditions, "seconds": seconds, "n": len(mine) + len(rest)}
        names = dict.fromkeys([*self.more, *older.more])
        columns = {"score": (self.values, older.values)}
        columns |= {name: (_column(self, name), _column(older, name)) for name in names}
        both = {name: np.concatenate([ours, theirs[rest]]) for name, (ours, theirs) in columns.items()}
        removals = [*self.removals, *(older.removals[i] for i in rest)]
        return Scores.build(removals, both.pop("score"), conditions, None, both)


def _column(scores: Scores, name: str) -> np.ndarray:
    return scores.more.get(name, np.full(len(scores), np.nan))


def write(store: Store, name: str, scores: Scores, folder: str = "scores") -> None:
    """Store a table in a run directory, as ``scores/<name>.parquet`` or in another folder."""
    buffer = io.BytesIO()
    pyarrow.parquet.write_table(scores.table, buffer)
    store.write(f"{folder}/{name}.parquet", buffer.getvalue())


def read(store: Store, name: str, folder: str = "scores") -> Scores:
    """The table stored as ``scores/<name>.parquet``, or in another folder.

    Raises:
        RunError: it is missing or damaged.
    """
    file = f"{folder}/{name}.parquet"
    try:
        table = tables.read(store.read(file))
        conditions = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        numbers = {key: float(conditions[key]) for key in _NUMBERS}
    except (pa.ArrowException, AttributeError, KeyError, ValueError) as error:
        raise RunError(f"{store.locate(file)} is damaged: delete it and score again.") from error
    return Scores(table, {**conditions, **numbers})


def names(store: Store) -> list[str]:
    """Names of the stored tables."""
    files = [name.split("/")[1] for name in store.names("scores")]
    return sorted(file.removesuffix(".parquet") for file in files if file.endswith(".parquet"))
