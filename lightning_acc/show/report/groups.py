"""The groups of the page: samples that were removed together, by name and size."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning_acc.core.removals import Removal
from lightning_acc.scoring.scores import Scores
from lightning_acc.show.report.samples import shortened

MEMBERS = 1000
"""Samples of a group that are embedded."""


def of(table: Scores, known: Mapping[Removal, str]) -> list[dict[str, Any]]:
    """The removals of several samples in a table of scores, the most harmful first.

    Args:
        table: the scores.
        known: what groups that the table does not name may be called.
    """
    columns = ("score", "source", "estimate")
    rows = zip(table.removals, *(table.table[column].to_pylist() for column in columns), strict=True)
    names = table.names
    found = [
        {
            "name": names.get(removal) or known.get(removal),
            "samples": len(removal),
            "ids": list(removal[:MEMBERS]),
            "score": shortened(score),
            "source": source,
            "estimate": shortened(estimate),
        }
        for removal, score, source, estimate in rows
        if len(removal) > 1
    ]
    found.sort(key=lambda group: (group["score"] is None, group["score"]))
    return found


def by_word(columns: list[dict[str, Any]], ids: Sequence[int]) -> dict[Removal, str]:
    """The samples ``ids`` that have one word of a column in common, and what they may be called by it."""
    found: dict[Removal, str] = {}
    for column in columns:
        members: dict[int, list[int]] = {}
        for sample, code in zip(ids, column.get("codes", ()), strict=False):
            members.setdefault(code, []).append(sample)
        for code, samples in members.items():
            if code >= 0 and len(samples) > 1:
                found.setdefault(tuple(samples), f"{column['name']} {column['levels'][code]}")
    return found
