"""LDS: do the scores of samples, added up, tell what removing random groups of them does? (arXiv 2303.14186, definition 2.3)

Spearman's rank correlation over the groups between the sum of the members' scores and the truth, with a bootstrap interval.
The truth is the recorded run without the group, so that no noise of other seeds is in it. And QLD: what removing the samples
that a ranking calls most helpful really does, beside what random groups of that size do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_acc.core.removals import Removal
from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.selection import RANDOM_GROUP
from lightning_acc.scoring.trust.figures import FEWEST_CORRELATED
from lightning_acc.scoring.trust.verdict import interval_each


@dataclass(frozen=True)
class Lds:
    """A rank correlation over ``n`` groups and its 95 % interval."""

    value: float
    low: float
    high: float
    n: int


def random_groups(truth: Scores) -> list[Removal]:
    """The groups of a table that were not chosen for what their samples have in common: those of a column have its name."""
    names = truth.names
    return [
        removal
        for removal in truth.removals
        if len(removal) > 1 and (removal not in names or names[removal].startswith(RANDOM_GROUP))
    ]


def of_scores(estimates: Mapping[Removal, float], truth: Scores) -> Lds | None:
    """LDS of scores of single samples, given the truth of groups; None where fewer than 20 groups can be told."""
    single = {removal[0]: score for removal, score in estimates.items() if len(removal) == 1}
    groups = [group for group in random_groups(truth) if all(i in single for i in group)]
    true = truth.by_removal()
    predicted = np.array([[sum(single[i] for i in group) for group in groups]])
    return _correlated(predicted, np.array([[true[group] for group in groups]]))


def of_matrix(estimates: ScoreMatrix, truths: ScoreMatrix) -> Lds | None:
    """The mean over examples of the LDS for each, given the truth of groups for the same examples."""
    rows = {removal[0]: i for i, removal in enumerate(estimates.removals) if len(removal) == 1}
    groups = [i for i, group in enumerate(truths.removals) if all(sample in rows for sample in group)]
    values = estimates.values
    sums = [values[[rows[sample] for sample in truths.removals[i]]].sum(0, dtype=np.float64) for i in groups]
    if not sums:
        return None
    place = {example: i for i, example in enumerate(truths.examples)}
    columns = [place[example] for example in estimates.examples]
    return _correlated(np.array(sums).T, truths.values[groups][:, columns].T.astype(np.float64))


def _correlated(predicted: np.ndarray, true: np.ndarray) -> Lds | None:
    """Of (examples, groups) each."""
    finite = np.isfinite(predicted).all(0) & np.isfinite(true).all(0)
    predicted, true = predicted[:, finite], true[:, finite]
    if true.shape[1] < FEWEST_CORRELATED or not (np.ptp(true, axis=1) > 0).any():
        return None
    return Lds(*interval_each(predicted, true), true.shape[1])


def dropped(truth: Scores, ranking: str) -> tuple[float, float, float] | None:
    """QLD: the true score of the group that a ranking calls most helpful, and mean and standard deviation of those of random
    groups of its size; None where they were not retrained without.

    Args:
        truth: with groups.
        ranking: the name of the stored scores that the group was chosen by (``top-group:1%@NAME``).
    """
    true = truth.by_removal()
    best = [removal for removal, name in truth.names.items() if name.endswith(f"that help most by {ranking}")]
    if not best:
        return None
    random = [true[group] for group in random_groups(truth) if len(group) == len(best[0])]
    if len(random) < 2:
        return None
    return true[best[0]], float(np.mean(random)), float(np.std(random, ddof=1))
