"""Figures of agreement between two vectors of scores."""

from __future__ import annotations

import numpy as np

EXTREMES = (10, 30, 50, 70)
FEWEST_CORRELATED = 20
"""A correlation over fewer removals says nothing without its interval, and is left out."""


def rmse(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Root mean squared error of scores (n,), in the unit of the query."""
    return float(np.sqrt(np.mean((estimate - truth) ** 2)))


def kendall(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Kendall's tau-b of two score vectors (n,)."""
    from scipy import stats

    return float(stats.kendalltau(estimate, truth).statistic)


def spearman(estimate: np.ndarray, truth: np.ndarray) -> float:
    """Spearman's rank correlation of two score vectors (n,)."""
    from scipy import stats

    return float(stats.spearmanr(estimate, truth).statistic)


def jaccard(estimate: np.ndarray, truth: np.ndarray, percent: float) -> float:
    """Jaccard index of the two sets of extreme samples: ``percent`` % of n, half of them from each end of the ranking."""
    count = max(1, round(len(truth) * percent / 200))

    def extremes(values: np.ndarray) -> np.ndarray:
        # Of equal values at the border all belong to the extremes: which of them came first means nothing.
        ordered = np.sort(values)
        return np.asarray((values <= ordered[count - 1]) | (values >= ordered[-count]))

    ours, theirs = extremes(estimate), extremes(truth)
    return float((ours & theirs).sum() / (ours | theirs).sum())


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


def shown(estimate: np.ndarray, truth: np.ndarray) -> dict[str, float]:
    """The figures that may be shown by themselves: of finite pairs, without correlations where these are few.

    ``n`` tells how many they are, ``n_diverged`` how many are not finite.
    """
    finite = np.isfinite(estimate) & np.isfinite(truth)
    n = int(finite.sum())
    figures = agreement(estimate[finite], truth[finite]) if n else {}
    if n < FEWEST_CORRELATED:
        figures.update(kendall=float("nan"), spearman=float("nan"))
    names = ("rmse", "rmse_sd", "kendall", "spearman", *(f"jaccard_{percent}" for percent in EXTREMES))
    return {**{name: figures.get(name, float("nan")) for name in names}, "n": n, "n_diverged": len(finite) - n}
