"""``Verdict``: how far scores can be trusted, from some removals that were retrained without.

Of the removals that are checked two thirds are drawn at random: how well the estimates rank is read off these alone, as
extremes, whose ranks are easy, would flatter it. The other third are the most extreme estimates: what people act on.
"""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, replace

import numpy as np

from lightning_acc.core.removals import Removal
from lightning_acc.record import seal
from lightning_acc.scoring.trust.figures import kendall, rmse, spearman

FAITHFUL, ROUGH, UNRELIABLE, UNCHECKED = "faithful", "rough", "unreliable", "unchecked"
SURE, DOUBTFUL, BAD = 0.8, 0.7, 0.5
"""Spearman correlations: the interval's lower end from which scores are faithful; its upper end below which, or the middle
below which, they are unreliable."""
FEWEST = 12
"""With fewer random removals retrained without, nothing is said."""
SHARE_OF_RANDOM = 0.9
"""A checked extreme is confirmed where its truth lies beyond this share of the random ones, on the side that was said."""
DRAWS, LEVEL = 2000, 0.95
FEW_DRAWS, FEW_EXAMPLES = 400, 200
"""Of the bootstrap of a matrix, whose correlations are means over examples."""
_FIGURES = ("spearman", "spearman_low", "spearman_high", "kendall", "rmse_sd")
"""All are there, or none."""


@dataclass(frozen=True)
class Verdict:
    """How far a table of estimates can be trusted.

    Attributes:
        word: ``faithful`` (the interval lies above 0.8), ``unreliable`` (it lies below 0.7, or the correlation below 0.5),
            ``rough`` (between), or ``unchecked``.
        n: random removals that were retrained without, which the correlations and the error are over.
        spearman: rank correlation of estimates and truths; None where unchecked.
        spearman_low: lower end of its 95 % interval.
        spearman_high: upper end.
        kendall: Kendall's tau-b.
        rmse_sd: root mean squared error, in standard deviations of the truth.
        top_confirmed: of the most extreme estimates, the share whose truth has the same sign and lies beyond nine tenths of
            the random ones; None where no extremes were checked.
        n_extreme: how many these were.
        n_diverged: estimates that left the region where a linearisation can be true; they are none of the above.
        reason: why it is unchecked; else what would help where the word is not ``faithful``.
        random: the random removals that were retrained without.
        extremes: the extreme ones.
    """

    word: str
    n: int = 0
    spearman: float | None = None
    spearman_low: float | None = None
    spearman_high: float | None = None
    kendall: float | None = None
    rmse_sd: float | None = None
    top_confirmed: float | None = None
    n_extreme: int = 0
    n_diverged: int = 0
    reason: str = ""
    random: list[Removal] = field(default_factory=list, repr=False)
    extremes: list[Removal] = field(default_factory=list, repr=False)

    def __str__(self) -> str:
        if self.spearman is None:
            return f"{self.word}: {self.reason}" if self.reason else self.word
        figures = (
            f"Spearman {self.spearman:.2f} ({self.spearman_low:.2f} to {self.spearman_high:.2f}) over {self.n} random "
            f"removals retrained without, error {self.rmse_sd:.2g} sd"
        )
        if self.top_confirmed is not None:
            figures += f", {self.top_confirmed:.0%} of {self.n_extreme} extremes confirmed"
        if self.n_diverged:
            figures += f", {self.n_diverged} diverged"
        return f"{self.word}: {figures}" + (f". {self.reason}" if self.reason else "")

    def because(self, reason: str) -> Verdict:
        """The same with a reason, or with what would help."""
        return replace(self, reason=reason)

    def to_json(self) -> str:
        """As text, for the conditions of a table."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> Verdict:
        """What ``to_json`` wrote.

        Raises:
            ValueError: it is something else.
        """
        try:
            values = seal.parsed(text)
            for name in ("random", "extremes"):
                values[name] = [tuple(removal) for removal in values[name]]
            verdict = cls(**values)
            figures = [getattr(verdict, name) for name in _FIGURES]
            if not (
                verdict.word in (FAITHFUL, ROUGH, UNRELIABLE, UNCHECKED)
                and isinstance(verdict.reason, str)
                and all(type(count) is int and count >= 0 for count in (verdict.n, verdict.n_extreme, verdict.n_diverged))
                and all(type(i) is int for removal in (*verdict.random, *verdict.extremes) for i in removal)
                and (all(type(figure) is float for figure in figures) or figures == [None] * len(figures))
                and isinstance(verdict.top_confirmed, (float, type(None)))
            ):
                raise ValueError("its figures are others")
        except (TypeError, KeyError, AttributeError) as error:
            raise ValueError(f"no verdict: {error}") from error
        return verdict


def unchecked(reason: str) -> Verdict:
    """That nothing was checked, and why."""
    return Verdict(UNCHECKED, reason=reason)


def judge(
    estimates: dict[Removal, float],
    truths: dict[Removal, float],
    random: Sequence[Removal],
    extremes: Sequence[Removal],
    seed: int = 0,
) -> Verdict:
    """The verdict on estimates, given the truths of some removals.

    Args:
        estimates: by removal.
        truths: by removal; at least of those that follow.
        random: removals drawn at random.
        extremes: removals of the most extreme estimates; some may be among the random ones.
        seed: of the bootstrap.
    """
    finite = [r for r in random if math.isfinite(estimates[r]) and math.isfinite(truths[r])]
    diverged = sum(not math.isfinite(value) for value in estimates.values())
    if len(finite) < FEWEST:
        return replace(
            unchecked(f"{len(finite)} random removals with finite scores are too few: {FEWEST} are needed"), n_diverged=diverged
        )
    estimate, truth = (np.array([values[r] for r in finite]) for values in (estimates, truths))
    if np.ptp(truth) == 0 or np.ptp(estimate) == 0:
        return replace(unchecked(f"all {len(finite)} random removals have one and the same score"), n_diverged=diverged)
    rho = spearman(estimate, truth)
    low, high = interval(estimate, truth, seed)
    # A removal whose estimate is no number is the worst of errors: were it drawn, the ranking of the rest would not excuse it.
    lost = 1 - len(finite) / len(random)
    if low >= SURE and lost <= 0.05:
        word = FAITHFUL
    elif high < DOUBTFUL or rho < BAD:
        word = UNRELIABLE
    else:
        word = ROUGH
    return Verdict(
        word,
        len(finite),
        rho,
        low,
        high,
        kendall(estimate, truth),
        rmse(estimate, truth) / float(np.std(truth)),
        confirmed(estimates, truths, extremes, truth),
        len(extremes),
        diverged,
        random=list(random),
        extremes=list(extremes),
    )


def judge_each(estimates: np.ndarray, truths: np.ndarray, random: Sequence[Removal], seed: int = 0) -> Verdict:
    """The verdict on estimates for many examples: the mean over these of the rank correlations over ``random`` removals.

    Args:
        estimates: (m, examples).
        truths: (m, examples).
        random: the m removals.
        seed: of the bootstrap, which draws the removals anew for all examples together.
    """
    finite = np.isfinite(estimates).all(1) & np.isfinite(truths).all(1)
    diverged = int((~finite).sum())
    estimates, truths = (values[finite].T.astype(np.float64) for values in (estimates, truths))
    spread = (np.ptp(truths, axis=1) > 0) & (np.ptp(estimates, axis=1) > 0) if finite.sum() >= FEWEST else np.zeros(0, bool)
    if not spread.any():
        few = f"{int(finite.sum())} random removals with finite scores, of which none move an example, are too few"
        return replace(unchecked(f"{few}: {FEWEST} are needed"), n_diverged=diverged)
    estimates, truths = estimates[spread], truths[spread]
    rho, low, high = interval_each(estimates, truths, seed)
    word = FAITHFUL if low >= SURE and diverged <= 0.05 * len(random) else ROUGH
    if high < DOUBTFUL or rho < BAD:
        word = UNRELIABLE
    taus = [kendall(a, b) for a, b in zip(estimates[:FEW_EXAMPLES], truths[:FEW_EXAMPLES], strict=True)]
    error = float(np.mean(np.sqrt(((estimates - truths) ** 2).mean(1)) / truths.std(1)))
    n = truths.shape[1]
    return Verdict(word, n, rho, low, high, float(np.mean(taus)), error, None, 0, diverged, random=list(random))


def interval_each(estimates: np.ndarray, truths: np.ndarray, seed: int = 0) -> tuple[float, float, float]:
    """The mean over examples of Spearman's correlation over m removals, (examples, m) each, and its 95 % interval.

    By a bootstrap that draws the removals anew for all examples together; of many examples a part is taken for it.
    """
    rho = float(_correlations(estimates, truths).mean())
    draw, n = np.random.default_rng(seed), truths.shape[1]
    some = draw.permutation(len(truths))[:FEW_EXAMPLES]
    drawn = [draw.integers(0, n, n) for _ in range(FEW_DRAWS)]
    means = [_correlations(estimates[some][:, rows], truths[some][:, rows]).mean() for rows in drawn]
    low, high = np.quantile(means, [(1 - LEVEL) / 2, (1 + LEVEL) / 2]).tolist()
    return rho, min(low, rho), max(high, rho)


def interval(estimate: np.ndarray, truth: np.ndarray, seed: int = 0) -> tuple[float, float]:
    """A 95 % interval of the Spearman correlation over all removals, from a random sample of them, (n,) each.

    The percentiles of a bootstrap (Efron 1979), and the interval by Fisher's transformation with the standard error of Bonett
    and Wright (2000, doi 10.1007/BF02294183); of the two the outer ends, as the bootstrap alone is too narrow for few.

    A few removals may be misjudged altogether, and a sample hold none of them, which no bootstrap of it can tell. So in each
    draw a share of the estimates is exchanged for others: what Jeffreys' prior says of misjudged ones of whom none was seen.
    """
    from scipy import stats

    n, random = len(truth), np.random.default_rng(seed)
    draws = random.integers(0, n, (DRAWS, n))
    misjudged = random.random((DRAWS, n)) < random.beta(0.5, n + 0.5, (DRAWS, 1))
    exchanged = np.where(misjudged, estimate[random.integers(0, n, (DRAWS, n))], estimate[draws])
    tail = (1 - LEVEL) / 2
    low = np.quantile(_correlations(exchanged, truth[draws]), tail)
    high = np.quantile(_correlations(estimate[draws], truth[draws]), 1 - tail)
    rho = min(max(spearman(estimate, truth), -1 + 1e-9), 1 - 1e-9)
    reach = stats.norm.ppf(1 - tail) * math.sqrt((1 + rho**2 / 2) / max(1, n - 3))
    z = math.atanh(rho)
    return float(min(low, math.tanh(z - reach))), float(max(high, math.tanh(z + reach)))


def _correlations(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Spearman's correlation of each row of a and b (m, n); 0 where all values of a row are equal."""
    from scipy import stats

    a, b = (stats.rankdata(values, axis=1) for values in (a, b))
    a, b = (ranks - ranks.mean(1, keepdims=True) for ranks in (a, b))
    scale = np.sqrt((a * a).sum(1) * (b * b).sum(1))
    return np.asarray((a * b).sum(1) / np.where(scale > 0, scale, 1))


def confirmed(
    estimates: dict[Removal, float], truths: dict[Removal, float], extremes: Sequence[Removal], random: np.ndarray
) -> float | None:
    """The share of the extremes whose truth has the estimate's sign and lies beyond nine tenths of the ``random`` ones (m,)."""
    if not extremes:
        return None
    low, high = np.quantile(random, [1 - SHARE_OF_RANDOM, SHARE_OF_RANDOM])
    right = 0
    for removal in extremes:
        estimate, truth = estimates[removal], truths[removal]
        right += bool(truth > 0 and truth >= high) if estimate > 0 else bool(estimate < 0 and truth < 0 and truth <= low)
    return right / len(extremes)
