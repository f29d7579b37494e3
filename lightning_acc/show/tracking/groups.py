"""Groups of samples in W&B: what a ranking says of each value of what was described, such as a label or a source."""

from __future__ import annotations

from typing import Any

import numpy as np

from lightning_acc.judge.agreement import truth_for
from lightning_acc.record.record import Record
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.selection import groups as by_value

FEWEST, MOST = 2, 50
"""Values of a column that makes groups: with more, as of a text or a measured number, it names single samples."""
TENTH = 0.1
"""Of a ranking: its most harmful part, in which a group has its share."""


def groups(run: Record, tables: dict[str, Scores], name: str) -> Any | None:
    """The table of the groups that described columns make, in one ranking; None where none is described, or it ranks none.

    Of each value of each column: how many of its samples are ranked, the mean and the sum of their scores, which share of them
    is among the most harmful tenth of all (a tenth, by chance), and what removing the whole group does, as the table itself
    and as retraining say, where it was asked (``--removals group:COLUMN``). A sum is no such removal: of large groups it is
    far off.
    """
    table = tables[name]
    scores, info = table.by_sample(), run.sample_info()
    if info is None or not scores:
        return None
    order = sorted(scores, key=lambda sample: scores[sample])
    harmful = set(order[: max(1, round(TENTH * len(order)))])
    whole, truth = table.by_removal(), truth_for(tables, table)
    expected = {**(truth.by_removal() if truth is not None else {}), **table.truths}
    data = []
    for column in info.column_names:
        if not FEWEST <= _distinct(info, column) <= MOST:
            continue
        for value, samples in by_value(run, column).items():
            ranked = [sample for sample in samples if sample in scores]
            if ranked:
                values = np.array([scores[sample] for sample in ranked])
                share = len(harmful.intersection(ranked)) / len(ranked)
                data.append([column, value, len(ranked), float(values.mean()), float(values.sum()), share])
                data[-1] += [whole.get(samples), expected.get(samples)] if len(samples) > 1 else [None, None]
    if not data:
        return None
    import wandb

    columns: list[str | int] = [
        "column",
        "value",
        "samples",
        "mean score",
        "sum of scores",
        "share among the most harmful tenth",
    ]
    return wandb.Table(columns=[*columns, "removed as a whole", "loo"], data=data)


def _distinct(info: Any, column: str) -> int:
    """How many values a column has; 0 of pictures, and of what cannot be counted."""
    values = info[column].to_pylist()
    return 0 if any(isinstance(value, (bytes, list, dict)) for value in values) else len(set(values))
