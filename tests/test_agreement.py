"""Agreement figures against SciPy and against definitions written out."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from problems import N, make, record
from scipy import stats

import lightning_acc as la
from lightning_acc.judge import agreement
from lightning_acc.judge.samples import detection_precision


@pytest.mark.parametrize("seed", range(5))
def test_figures_are_those_of_scipy(seed: int) -> None:
    random = np.random.default_rng(seed)
    truth = random.normal(size=40).round(1)  # with ties
    estimate = truth + random.normal(size=40)
    figures = agreement.agreement(estimate, truth)
    assert figures["kendall"] == pytest.approx(stats.kendalltau(estimate, truth).statistic)
    assert figures["spearman"] == pytest.approx(stats.spearmanr(estimate, truth).statistic)
    assert figures["rmse"] == pytest.approx(np.linalg.norm(estimate - truth) / np.sqrt(40))
    assert figures["rmse_sd"] == pytest.approx(figures["rmse"] / truth.std())


@pytest.mark.parametrize(("percent", "each_end"), [(10, 2), (30, 6), (50, 10), (70, 14)])
def test_jaccard_compares_the_extremes_of_both_ends(percent: int, each_end: int) -> None:
    random = np.random.default_rng(percent)
    truth, estimate = random.normal(size=40), random.normal(size=40)
    ranks_of = [stats.rankdata(values) for values in (estimate, truth)]
    ours, theirs = ({i for i in range(40) if r[i] <= each_end or r[i] > 40 - each_end} for r in ranks_of)
    assert agreement.jaccard(estimate, truth, percent) == pytest.approx(len(ours & theirs) / len(ours | theirs))
    assert agreement.jaccard(truth, truth, percent) == 1
    assert agreement.jaccard(-truth, truth, percent) == 1  # the extremes are the same samples


def test_equal_scores_correlate_with_nothing() -> None:
    figures = agreement.agreement(np.zeros(5), np.arange(5.0))
    assert np.isnan(figures["kendall"])
    assert np.isnan(figures["spearman"])


def test_precision_along_the_ranking() -> None:
    scores, corrupted = np.array([0.3, -2.0, 1.0, -1.0]), np.array([False, True, False, True])
    assert detection_precision(scores, corrupted).tolist() == [1.0, 1.0, pytest.approx(2 / 3), 0.5]
    assert detection_precision(-scores, corrupted)[0] == 0


def test_evaluate_compares_on_common_removals_and_same_questions(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None)
    with pytest.raises(la.RequestError, match=r"no leave-one-out truth.*method='loo'"):
        la.evaluate(run)
    truth = la.score(run, "loo", range(4, 16), ray_address=None)
    la.score(run, "acc-sgd-ie", range(8, N), ray_address=None)
    rows = {row["method"]: row for row in la.evaluate(run).to_pylist()}
    assert {name: row["n"] for name, row in rows.items()} == {"loo": 12, "sgd-ie": 12, "acc-sgd-ie": 8}
    assert rows["loo"]["rmse"] == 0
    assert rows["loo"]["kendall"] == pytest.approx(1)
    estimate = la.score(run, "sgd-ie", range(4, 16), ray_address=None, save=False)
    assert rows["sgd-ie"]["kendall"] == pytest.approx(stats.kendalltau(estimate.values, truth.values).statistic)
    assert 0 < rows["acc-sgd-ie"]["rmse"] < rows["sgd-ie"]["rmse"]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert (tmp_path / "run/evaluation.json").exists()


def test_scores_of_an_older_record_are_left_out(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "loo", [1, 2], ray_address=None)
    import shutil

    record(tmp_path / "other", make(seed=3, hidden=4))
    shutil.copytree(tmp_path / "run/scores", tmp_path / "other/scores")
    with pytest.raises(la.RequestError, match="no scores yet"):
        la.evaluate(tmp_path / "other")
