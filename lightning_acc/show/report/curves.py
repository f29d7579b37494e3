"""What the page draws as lines: removal curves, and influence over training."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_acc.methods import registry
from lightning_acc.record.record import Record
from lightning_acc.show.over_time import stored
from lightning_acc.show.report.samples import shortened

CONTROLS = ("none", "random", "loss", "self-influence", "cleanlab", "validation", "validation added", "oracle")
"""Ways to choose what to remove that the removal curves of the estimates are held against."""


def cleaning(run: Record) -> dict[str, Any] | None:
    """Removal curves of the methods, each point with mean and 95 % interval of each figure; None where there are none."""
    from lightning_acc.judge import cleaning_table

    table = cleaning_table.read(run)
    if table is None:
        return None
    curves: dict[str, list[dict[str, Any]]] = {}
    for row in table.to_pylist():
        point = {key: row[key] for key in ("fraction", "n_removed", "seeds")}
        for figure in ("accuracy", "gain", "loss"):
            point[figure] = [finite(row[key]) for key in (figure, f"{figure}_low", f"{figure}_high")]
        curves.setdefault(row["method"], []).append(point)
    methods = [
        {"name": name, "control": name in CONTROLS, "points": sorted(points, key=lambda point: float(point["fraction"]))}
        for name, points in sorted(curves.items(), key=lambda curve: _curve_order(curve[0]))
    ]
    tested = sorted(set(table["test"].to_pylist())) if "test" in table.column_names else []
    notes = " ".join(f"{note}." for note in cleaning_table.notes(table))
    return {"methods": methods, "tested": ", ".join(map(str, tested)) or "test", "notes": notes}


def over_time(run: Record) -> dict[str, Any] | None:
    """The samples that were followed over training, and the query meanwhile; None where none were."""
    followed = stored(run)
    if followed is None:
        return None
    grid, lines = followed.lines(run.n_steps)
    return {
        "query": followed.query,
        "steps": grid,
        "curve": [[t, finite(value)] for t, value in followed.curve],
        "lines": [
            {"sample": sample, "harmful": sample in followed.harmful, "gathered": [shortened(value) for value in lines[sample]]}
            for sample in followed.samples
        ],
    }


def _curve_order(name: str) -> tuple[int, str]:
    from lightning_acc.judge import cleaning_table

    order = [*registry.METHODS, *CONTROLS]
    known = name if name in CONTROLS else cleaning_table.method_of(name)
    return order.index(known) if known in order else len(registry.METHODS), name


def finite(value: float | None) -> float | None:
    """A number; None where it is none, which JSON has no word for."""
    return None if value is None or not np.isfinite(value) else float(value)
