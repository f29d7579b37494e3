"""Figures of agreement between two vectors of scores."""

from __future__ import annotations

import numpy as np
from scipy import stats

EXTREMES = (10, 30, 50, 70)


def rmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Root mean squared error of scores (n,), in the unit of the query."""
    return float(np.sqrt(np.mean((estimate - truth) ** 2)))


def kendall(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Kendall's tau-b of two score vectors (n,)."""
    return float(stats.kendalltau(estimate, truth).statistic)


def spearman(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation of two score vectors (n,)."""
    return float(stats.spearmanr(estimate, truth).statistic)


def jaccard(estimate: np.ndarray, truth: np.ndarray, percent: float) -> float:
    """Jaccard index of the two sets of extreme samples: ``percent`` % of n, half of them from each end of the ranking."""
    count = max(1, round(len(truth) * percent / 200))

    def extremes(values: np.ndarray) -> set[int]:
        order = np.argsort(values, kind="stable")
        return {*order[:count].tolist(), *order[-count:].tolist()}

    ours, theirs = extremes(estimate), extremes(truth)
    return len(ours & theirs) / len(ours | theirs)


def agreement(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """All figures for one estimate: rmse (and in standard deviations of the truth), kendall, spearman, jaccard_10 to _70."""
    if len(truth) < 2 or np.ptp(truth) == 0 or np.ptp(estimate) == 0:
        ranks = {"kendall": float("nan"), "spearman": float("nan")}  # the ranks of equal scores correlate with nothing
    else:
        ranks = {"kendall": kendall(estimate, truth), "spearman": spearman(estimate, truth)}
    spread = float(np.std(truth))
    error = rmse(estimate, truth)
    return {
        "rmse": error,
        "rmse_sd": error / spread if spread else float("nan"),
        **ranks,
        **{f"jaccard_{percent}": jaccard(estimate, truth, percent) for percent in EXTREMES},
    }
