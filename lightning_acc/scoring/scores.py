"""``Scores``: one table of scores with the conditions it was computed under."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa

from lightning_acc.core.queries.moments import END
from lightning_acc.core.removals import Removal
from lightning_acc.methods.registry import METHODS, TRUTH
from lightning_acc.record import seal, tables
from lightning_acc.record.store import Store
from lightning_acc.scoring.trust.verdict import FAITHFUL, Verdict, unchecked

if TYPE_CHECKING:
    import pandas
    from torch import Tensor

SIGN = "query(without) - query(with): positive helps, negative harms; rank 1 is the most harmful"
COLUMNS = ("removal", "score", "rank", "source", "estimate")
_NUMBERS = ("n", "seconds", "wall_seconds", "peak_memory_gb")
"""Conditions that are numbers; all others are strings."""
_NEEDED = ("query", "query_fingerprint", "at", "readout", "dtype", "convention", "manifest_hash")
"""Conditions that every stored table has, beside its method."""
_TYPES = (pa.list_(pa.int64()), pa.float64(), pa.int64(), pa.string(), pa.float64())
_FURTHER = {"name": lambda kind: pa.types.is_string(kind) or pa.types.is_null(kind), "diverged": pa.types.is_boolean}
"""Types of the columns after these; all others are numbers."""
REMEDY = "delete it and score again"


@dataclass(frozen=True)
class Scores:
    """The scores of one method on one run.

    Attributes:
        table: columns ``removal`` (list of sample ids), ``score`` (float64; positive: the removal would raise the query,
            the samples help), ``rank`` (1 is the most harmful), ``source`` (``"estimate"``, or ``"loo"`` where the removal was
            retrained without and the score is the truth) and ``estimate`` (float64, what the method said), in the order of
            the removals asked for. Methods may add ``uncertainty`` (float64), a figure for how far the estimate may be off,
            and ``diverged`` (bool), where it left the region in which a linearisation can be true; groups have ``name``. Of
            a mean over several runs ``uncertainty`` is its standard error over them.
        conditions: method, query, readout, dtype, convention, manifest hash, version, seconds, peak memory and so on;
            also in the table's Arrow metadata.
        shifts: parameter shifts (n_removals, p) at the last step asked about, where they were asked for.
    """

    table: pa.Table
    conditions: dict[str, Any]
    shifts: Tensor | None = None

    @classmethod
    def build(
        cls,
        removals: list[Removal],
        estimates: np.ndarray,
        conditions: dict[str, Any],
        shifts: Tensor | None = None,
        more: Mapping[str, np.ndarray] | None = None,
        truths: Mapping[Removal, float] | None = None,
    ) -> Scores:
        """Rank the scores and join them with ``more`` columns and their conditions.

        Args:
            removals: n removals.
            estimates: what the method says of each, (n,).
            conditions: of the table.
            shifts: (n, p).
            more: further columns, (n,) each.
            truths: scores by retraining, of some of the removals; they stand in the estimates' places.
        """
        estimates = np.asarray(estimates, dtype=np.float64)
        truths = truths or {}
        scores = np.array([truths.get(r, e) for r, e in zip(removals, estimates.tolist(), strict=True)], dtype=np.float64)
        retrained = [conditions.get("method") == TRUTH or removal in truths for removal in removals]
        ranks = np.empty(len(scores), dtype=np.int64)
        ranks[np.argsort(scores, kind="stable")] = np.arange(1, len(scores) + 1)
        conditions = {**conditions, "sign": SIGN}
        table = pa.table(
            {
                "removal": pa.array(removals, pa.list_(pa.int64())),
                "score": scores,
                "rank": ranks,
                "source": pa.array([TRUTH if one else "estimate" for one in retrained], pa.string()),
                "estimate": estimates,
                **{name: pa.array(column) for name, column in (more or {}).items()},
            },
            metadata={key: str(value) for key, value in conditions.items()},
        )
        return cls(table, conditions, shifts)

    def __repr__(self) -> str:
        c = self.conditions
        query = c["query"] if c["at"] == END else f"{c['query']} at {c['at']}"
        runs = f", mean of {c['runs']} runs" if "runs" in c else ""
        what = f"Scores({c['method']}: {len(self)} removals, query {query}, {c['readout']} readout, {c['dtype']}{runs})"
        return what if c["method"] == TRUTH else f"{what}\n{self.verdict}"

    def __len__(self) -> int:
        return len(self.table)

    def to_pandas(self) -> pandas.DataFrame:
        """The table as a DataFrame."""
        frame: pandas.DataFrame = self.table.to_pandas()
        return frame

    @property
    def verdict(self) -> Verdict:
        """How far these scores can be trusted."""
        if self.conditions["method"] == TRUTH:
            return Verdict(FAITHFUL, reason="these are true scores: each removal was retrained without")
        text = self.conditions.get("verdict")
        return unchecked("nothing was retrained without: check was 0") if text is None else Verdict.from_json(text)

    @property
    def values(self) -> np.ndarray:
        """The scores, shape (n_removals,), float64."""
        return np.asarray(self.table["score"].to_numpy())

    @property
    def estimates(self) -> np.ndarray:
        """What the method said of each removal, those that were retrained without among them; (n_removals,), float64."""
        return np.asarray(self.table["estimate"].to_numpy())

    @property
    def removals(self) -> list[Removal]:
        """The removals, in the order of the table."""
        return list(self._removals)

    @cached_property
    def _removals(self) -> tuple[Removal, ...]:
        """Made once: everything else asks for them, and of 60 000 samples they take a while."""
        return tuple(tuple(ids) for ids in self.table["removal"].to_pylist())

    @property
    def more(self) -> dict[str, np.ndarray]:
        """The columns beside removal, score, rank, source and estimate, each (n_removals,)."""
        return {name: self.table[name].to_numpy() for name in self.table.column_names[len(COLUMNS) :]}

    @property
    def truths(self) -> dict[Removal, float]:
        """True scores, of the removals that were retrained without."""
        rows = zip(self.removals, self.table["source"].to_pylist(), self.values.tolist(), strict=True)
        return {removal: score for removal, source, score in rows if source == TRUTH}

    def by_removal(self, column: str = "score") -> dict[Removal, Any]:
        """Score of each removal, or what else is in a column."""
        return dict(zip(self.removals, self.table[column].to_pylist(), strict=True))

    def by_sample(self) -> dict[int, float]:
        """Score of each sample that is removed by itself."""
        return {removal[0]: score for removal, score in self.by_removal().items() if len(removal) == 1}

    def picked(self, removals: list[Removal], conditions: dict[str, Any], shifts: Tensor | None = None) -> Scores:
        """The scores of some of the removals, in another order, under other conditions, with their ``shifts`` (n, p)."""
        row = {removal: i for i, removal in enumerate(self.removals)}
        rows = np.array([row[removal] for removal in removals], dtype=np.int64)
        more = {name: column[rows] for name, column in self.more.items()}
        return Scores.build(removals, self.estimates[rows], conditions, shifts, more, self.truths)

    def most_harmful(self, count: int) -> list[Removal]:
        """The removals with the lowest scores, the most harmful first; those without a finite score are none of them."""
        removals, values = self.removals, self.values
        return [removals[i] for i in np.argsort(values, kind="stable")[:count] if np.isfinite(values[i])]

    def most_helpful(self, count: int) -> list[Removal]:
        """The removals with the highest scores, the most helpful first."""
        removals, values = self.removals, self.values
        return [removals[i] for i in np.argsort(-values, kind="stable")[:count] if np.isfinite(values[i])]

    def checked(self, truths: Mapping[Removal, float], verdict: Verdict) -> Scores:
        """These scores with true ones in the places of some, and with a verdict."""
        conditions = {**self.conditions, "verdict": verdict.to_json()}
        return Scores.build(self.removals, self.estimates, conditions, self.shifts, self.more, {**self.truths, **truths})

    def named(self, names: Mapping[Removal, str]) -> Scores:
        """These scores with a column ``name``, where any of the removals has one."""
        mine = [names.get(removal) for removal in self.removals]
        if not any(mine):
            return self
        more = {**self.more, "name": np.array(mine, dtype=object)}
        return Scores.build(self.removals, self.estimates, self.conditions, self.shifts, more, self.truths)

    @property
    def names(self) -> dict[Removal, str]:
        """The names of those removals that have one."""
        named = zip(self.removals, self.more.get("name", [None] * len(self)), strict=True)
        return {removal: name for removal, name in named if name}

    @property
    def labels(self) -> list[str]:
        """The removals for a reader: their name (of one sample beside its id), else their ids; of many the number."""
        return [
            (f"{removal[0]} {name}" if len(removal) == 1 else name) if name else in_words(removal)
            for name, removal in zip(self.more.get("name", [None] * len(self)), self.removals, strict=True)
        ]

    def merged(self, older: Scores) -> Scores:
        """These scores with those of ``older`` for removals that are not in here; the seconds add up, no verdict is left."""
        ours, theirs = self.removals, older.removals  # once: each is made of the whole table
        mine = set(ours)
        rest = [i for i, removal in enumerate(theirs) if removal not in mine]
        share = len(rest) / max(1, len(older))
        seconds = self.conditions["seconds"] + share * older.conditions["seconds"]
        conditions = {**self.conditions, "seconds": seconds, "n": len(mine) + len(rest)}
        conditions["threads"] = threads(*(table.conditions for table, rows in ((self, ours), (older, rest)) if rows))
        conditions.pop("verdict", None)
        names = dict.fromkeys([*self.more, *older.more])
        columns = {"estimate": (self.estimates, older.estimates)}
        columns |= {name: (_column(self, name, older), _column(older, name, self)) for name in names}
        both = {name: np.concatenate([own, other[rest]]) for name, (own, other) in columns.items()}
        removals = [*ours, *(theirs[i] for i in rest)]
        return Scores.build(removals, both.pop("estimate"), conditions, None, both, {**older.truths, **self.truths})


def threads(*conditions: Mapping[str, Any]) -> str:
    """On how many threads scores under these conditions were computed, "1", or "1 8"; on one where that is not told.

    Raises:
        ValueError: one tells no numbers.
    """
    return " ".join(map(str, sorted({int(n) for one in conditions for n in str(one.get("threads", 1)).split()} or {1})))


def _column(scores: Scores, name: str, other: Scores) -> np.ndarray:
    """A further column, filled up where only the other table has it."""
    if name in scores.more:
        return scores.more[name]
    kind = other.more[name].dtype
    return np.zeros(len(scores), dtype=bool) if kind.kind == "b" else np.full(len(scores), np.nan if kind.kind == "f" else None)


def in_words(removal: Removal) -> str:
    """The ids of a removal; of many the first and their number."""
    few = " ".join(map(str, removal[:10]))
    return few if len(removal) <= 10 else f"{few} ... ({len(removal)} samples)"


def write(store: Store, name: str, scores: Scores, folder: str = "scores") -> None:
    """Store a table in a run directory, as ``scores/<name>.parquet`` or in another folder."""
    file = f"{folder}/{name}.parquet"
    store.write(file, tables.sealed(scores.table, file))


def read(store: Store, name: str, folder: str = "scores", n_samples: int | None = None) -> Scores:
    """The table stored as ``scores/<name>.parquet``, or in another folder, of a run with ``n_samples`` where that is known.

    Raises:
        DamagedResult: it is not what was written there.
        RunError: it cannot be read.
    """
    file = f"{folder}/{name}.parquet"
    table = tables.opened(store, file, REMEDY)
    try:
        conditions = {key.decode(): value.decode() for key, value in table.schema.metadata.items()}
        numbers = {key: float(conditions[key]) for key in _NUMBERS}
        _check(table, conditions, list(numbers.values()), math.inf if n_samples is None else n_samples)
    except (KeyError, ValueError) as error:
        raise seal.damaged(store, file, REMEDY) from error
    return Scores(table, {**conditions, **numbers})


def _check(table: pa.Table, conditions: Mapping[str, str], numbers: list[float], n_samples: float) -> None:
    """See that a table with a seal is one of scores.

    Raises:
        ValueError, KeyError: it is not.
    """
    further = [field for field in table.schema if field.name not in COLUMNS]
    if table.column_names != [*COLUMNS, *dict.fromkeys(field.name for field in further)]:
        raise ValueError("its columns are others")
    if table.select(COLUMNS).schema.types != list(_TYPES) or any(table[name].null_count for name in COLUMNS):
        raise ValueError("its columns are of other types")
    if not all(_FURTHER.get(field.name, _is_number)(field.type) for field in further):
        raise ValueError("its further columns are of other types")
    removals = table["removal"].to_pylist()
    if any(i is None or not 0 <= i < n_samples for removal in removals for i in removal):
        raise ValueError("its removals are none of this run")
    if len({*map(tuple, removals)}) < len(removals):
        raise ValueError("a removal is in it twice")
    if set(table["source"].to_pylist()) - {TRUTH, "estimate"}:
        raise ValueError("its scores are of other sources")
    if conditions["method"] not in METHODS or not all(conditions[name] for name in _NEEDED):
        raise ValueError("its conditions are others")
    if not all(math.isfinite(number) and number >= 0 for number in numbers):
        raise ValueError("its costs are none")
    threads(conditions)
    if "verdict" in conditions:
        Verdict.from_json(conditions["verdict"])


def _is_number(kind: pa.DataType) -> bool:
    return bool(pa.types.is_floating(kind) or pa.types.is_integer(kind))


def names(store: Store) -> list[str]:
    """Names of the stored tables."""
    files = [name.split("/")[1] for name in store.names("scores")]
    return sorted(file.removesuffix(".parquet") for file in files if file.endswith(".parquet"))
