"""LDS: do the scores of samples, added up, tell what removing random groups of them does? (arXiv 2303.14186, definition 2.3)

Spearman's rank correlation over the groups between the sum of the members' scores and the truth, with a bootstrap interval.
The truth is the recorded run without the group, so that no noise of other seeds is in it. And QLD: what removing the samples
that a ranking calls most helpful really does, beside what random groups of that size do.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from lightning_acc.core import devices
from lightning_acc.core.queries import moments
from lightning_acc.core.removals import Removal
from lightning_acc.methods.registry import TRUTH
from lightning_acc.record.record import Record
from lightning_acc.scoring import selection, shards
from lightning_acc.scoring.bank import Bank
from lightning_acc.scoring.matrices import ScoreMatrix, score_matrix
from lightning_acc.scoring.matrices import matrix as matrices
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


NOTHING: dict[str, float | None] = dict.fromkeys(
    ("lds", "lds_low", "lds_high", "lds_n", "lds_each", "lds_each_low", "lds_each_high", "qld", "qld_random", "qld_random_sd")
)
"""The columns of ``evaluate``, where nothing is known."""


def figures(run: Record, name: str, estimate: Scores, truth: Scores) -> dict[str, float | None]:
    """The columns of ``evaluate`` for the table stored as ``name``, given the truth of groups."""
    found = dict(NOTHING)
    whole = of_scores(estimate.by_removal("estimate"), truth)
    if whole is not None:
        found.update(lds=whole.value, lds_low=whole.low, lds_high=whole.high, lds_n=whole.n)
        each = _of_stored_matrix(run, name, estimate, random_groups(truth))
        if each is not None:
            found.update(lds_each=each.value, lds_each_low=each.low, lds_each_high=each.high)
    best = dropped(truth, name)
    if best is not None:
        found.update(zip(("qld", "qld_random", "qld_random_sd"), best, strict=True))
    return found


def _of_stored_matrix(run: Record, name: str, estimate: Scores, groups: list[Removal]) -> Lds | None:
    """LDS of each example, where a matrix of the same scores is stored and what retraining ended with is kept."""
    c = estimate.conditions
    if name not in matrices.names(run.store) or c["query"] not in run.query_names() or "run_hashes" in c:
        return None
    matrix = matrices.read(run.store, name, run.n_samples)
    if not (shards.same(matrix.conditions, c) and devices.count(shards.device_of(c))):
        return None
    at = selection.moment(c["at"])
    if not Bank(run, c, 0).holds(moments.find(run, at).steps, groups):
        return None
    where = {"dtype": c["dtype"], "device": shards.device_of(c)}
    truths = score_matrix(run, TRUTH, c["query"], matrix.examples, groups, at, **where, ray_address=None, progress=False)
    return of_matrix(matrix, truths)


def random_groups(truth: Scores) -> list[Removal]:
    """The groups of a table that were not chosen for what their samples have in common: those of a column have its name."""
    names = truth.names
    groups = {removal for removal in truth.removals if len(removal) > 1}
    return sorted(group for group in groups if group not in names or names[group].startswith(RANDOM_GROUP))


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
    groups = [
        i
        for i in sorted(range(len(truths.removals)), key=truths.removals.__getitem__)
        if all(sample in rows for sample in truths.removals[i])
    ]
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
    if true.shape[1] < FEWEST_CORRELATED:
        return None
    moved = (np.ptp(true, axis=1) > 0) & (np.ptp(predicted, axis=1) > 0)  # equal scores correlate with nothing
    return Lds(*interval_each(predicted[moved], true[moved]), true.shape[1]) if moved.any() else None


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
