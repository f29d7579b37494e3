"""Agreement of the estimates with the truth, leave-one-out retraining (``evaluate``)."""

from __future__ import annotations

import math
import os
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_acc.errors import RequestError
from lightning_acc.judge import lds
from lightning_acc.methods import registry
from lightning_acc.record import seal
from lightning_acc.record.record import Record, opened
from lightning_acc.scoring import scores
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust.figures import shown

NAME = "evaluation.json"
WIDTH = 100
"""Columns of a terminal that a table fits."""
WORDS = ("method", "query", "at", "readout", "dtype", "removals", "verdict")
"""Of a row of ``evaluate``; all else are figures."""


def stored_scores(run: Record) -> dict[str, Scores]:
    """The tables of a run that belong to its present content, by file name."""
    tables = {name: scores.read(run.store, name, n_samples=run.n_samples) for name in scores.names(run.store)}
    return {name: table for name, table in tables.items() if table.conditions["manifest_hash"] == run.hash}


def truth_for(tables: dict[str, Scores], estimate: Scores) -> Scores | None:
    """The ``loo`` table that answers the same question: same query, by name and content, at the same steps, convention, and
    runs where it is a mean; the same dtype where there is one."""
    same = ("query", "query_fingerprint", "at", "convention", "run_hashes")
    found = [
        table
        for table in tables.values()
        if registry.is_truth(table.conditions["method"])
        and table.conditions["readout"] == "exact"
        and all(table.conditions.get(key) == estimate.conditions.get(key) for key in same)
    ]
    return max(found, key=lambda table: table.conditions["dtype"] == estimate.conditions["dtype"], default=None)


def evaluate(run: Record | str | os.PathLike[str], save: bool = True) -> pa.Table:
    """Compare every stored table of scores with leave-one-out retraining, on the removals both have.

    Args:
        run: a recorded run with scores, or its path.
        save: store the table as ``evaluation.json`` in the run directory.

    Returns:
        One row per table of scores and kind of removals: method, query, at, readout, dtype, removals (``samples``: single
        ones; ``groups``), runs (1, or of how many the table is the mean), rmse, rmse_sd (in standard deviations of the truth),
        kendall, spearman (null over fewer than 20 removals), jaccard_10 to jaccard_70, n (removals compared), n_diverged (those
        whose score is not finite), seconds (of all workers together), peak_memory_gb and the word of the table's verdict. The
        truth is among them, for its cost.

        Where random groups were retrained without (``--removals random-groups:100x5%``), the row of single samples has
        ``lds``: how well sums of their scores rank what removing the groups does, with lds_low and lds_high, a 95 % interval,
        and lds_n, the number of groups. ``lds_each`` is the mean of that over the examples of a stored ``score_matrix``.
        ``qld`` is what removing the samples that help most by the ranking does (``top-group:1%@METHOD``), and qld_random and
        qld_random_sd what random groups of that size do. Null where these were not retrained without.

    Raises:
        RequestError: there are no scores, or none of ``loo`` to compare with.
    """
    run = opened(run)
    tables = stored_scores(run)
    if not tables:
        raise RequestError(f"{run.path} has no scores yet: compute some with score(run, method=...) first.")
    rows = []
    for name in sorted(tables, key=lambda name: (registry.place(tables[name].conditions["method"]), name)):
        truth = truth_for(tables, tables[name])
        if truth is not None:
            rows += _rows(run, name, tables[name], truth)
    if not rows:
        raise RequestError(
            f"{run.path} has no leave-one-out truth for its scores: compute it with score(run, method='loo'), on the same "
            "query, at the same steps (at), and some of the same removals."
        )
    if save:
        run.store.write(NAME, as_json(run, rows))
    return pa.Table.from_pylist(rows)


def _rows(run: Record, name: str, estimate: Scores, truth: Scores) -> list[dict[str, Any]]:
    """The rows of one table: one for single samples, one for groups, as far as there is something to compare."""
    expected, said = truth.by_removal(), estimate.by_removal("estimate")
    c, verdict = estimate.conditions, estimate.verdict
    # Extremes that were picked to be checked would flatter the figures where not all removals were retrained without.
    picked = set() if set(said) <= set(expected) else set(verdict.extremes) - set(verdict.random)
    rows = []
    # Groups move the query much more than single samples: together, one kind would hide the other.
    for kind, single in (("samples", True), ("groups", False)):
        common = [one for one in said if one in expected and (len(one) == 1) == single and one not in picked]
        sums = lds.figures(run, name, estimate, truth) if single else lds.NOTHING
        if common or sums["lds"] is not None:
            rows.append(
                {
                    **{key: c[key] for key in ("method", "query", "at", "readout", "dtype")},
                    "removals": kind,
                    "runs": int(c.get("runs", 1)),
                    **shown(np.array([said[r] for r in common]), np.array([expected[r] for r in common])),
                    **sums,
                    "seconds": c["seconds"],
                    "peak_memory_gb": c["peak_memory_gb"],
                    "verdict": "truth" if registry.is_truth(c["method"]) else verdict.word,
                }
            )
    return rows


def as_json(run: Record, rows: list[dict[str, Any]]) -> bytes:
    """The rows of ``evaluate`` as the run directory keeps them; null for what is no number, which JSON does not know."""

    def plain(value: Any) -> Any:
        return None if isinstance(value, float) and not math.isfinite(value) else value

    plain_rows = [{key: plain(value) for key, value in row.items()} for row in rows]
    return seal.to_json({"manifest_hash": run.hash, "rows": plain_rows}, NAME)


def read(run: Record) -> list[dict[str, Any]] | None:
    """The rows of ``evaluate`` stored with the run; None where there are none that belong to its present content.

    Raises:
        RunError: the file is damaged, or cannot be read.
    """
    if not run.store.exists(NAME):
        return None
    remedy = "delete it and evaluate again"
    content = seal.from_json(run.store, NAME, remedy)
    rows = content.get("rows")
    if not isinstance(rows, list) or not all(map(_is_row, rows)):
        raise seal.damaged(run.store, NAME, remedy)
    return rows if content.get("manifest_hash") == run.hash else None


def _is_row(row: Any) -> bool:
    return (
        isinstance(row, dict)
        and all(isinstance(row.get(key), str) for key in WORDS)
        and all(isinstance(value, (int, float, type(None))) for key, value in row.items() if key not in WORDS)
    )


def as_text(table: pa.Table) -> str:
    """The table of ``evaluate`` for a terminal."""
    several = any(runs != 1 for runs in table["runs"].to_pylist())
    lds = [column for column in ("lds", "lds_each", "qld") if any(one is not None for one in table[column].to_pylist())]
    first = ["method", "at", *(["runs"] if several else []), "readout", "removals", "verdict"]
    columns = [*first, "rmse", "rmse_sd", "kendall", "spearman", "n", *lds, "seconds"]
    frame = table.select(columns).to_pandas()
    # Wider tables are broken into blocks of columns.
    text: str = frame.to_string(index=False, float_format=lambda value: f"{value:.3g}", line_width=WIDTH)
    return text
