"""Which classes are helped and harmed by samples of which labels: a matrix of scores, summed up."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.show.report.samples import shortened

MOST = 30
"""Labels and classes beyond which a table of them says nothing."""


def effects(asked: ScoreMatrix, labels: Sequence[str | None], class_of: Mapping[int, str | None]) -> dict[str, Any] | None:
    """The mean score of a sample of each label for an example of each class, over the removals of single samples.

    Args:
        asked: the matrix.
        labels: of the training samples.
        class_of: the labels of the examples.

    Returns:
        ``labels``, ``classes``, and ``means``, (labels, classes); None where there are no labels, or too many.
    """
    rows = [row for row, removal in enumerate(asked.removals) if len(removal) == 1 and labels[removal[0]] is not None]
    of_rows = [str(labels[asked.removals[row][0]]) for row in rows]
    of_examples = [class_of[example] for example in asked.examples]
    own, others = sorted(set(of_rows)), sorted({name for name in of_examples if name is not None})
    if not (0 < len(own) <= MOST and 0 < len(others) <= MOST):
        return None
    sums, counts = np.zeros((len(own), len(others))), np.zeros((len(own), len(others)))
    place = np.array([own.index(name) for name in of_rows])
    for example, name in zip(asked.examples, of_examples, strict=True):
        if name is not None:
            values = np.asarray(asked.of(example), dtype=np.float64)[rows]
            finite = np.isfinite(values)
            sums[:, others.index(name)] += np.bincount(place[finite], values[finite], len(own))
            counts[:, others.index(name)] += np.bincount(place[finite], minlength=len(own))
    means = np.divide(sums, counts, out=np.full_like(sums, np.nan), where=counts > 0)
    return {"labels": own, "classes": others, "means": [[shortened(value) for value in row] for row in means.tolist()]}
