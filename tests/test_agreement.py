"""Agreement figures against SciPy and against definitions written out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from problems import data, make, record
from scipy import stats

import lightning_acc as la
from lightning_acc.judge.agreement import as_json, as_text, read, stored_scores, truth_for
from lightning_acc.judge.samples import detection_precision
from lightning_acc.scoring.trust import figures as agreement


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


def test_figures_worked_out_by_hand() -> None:
    """Ten samples of true score 1 to 10: the estimate exchanges the first two, and the fifth with the ninth."""
    truth = np.arange(1.0, 11.0)
    estimate = np.array([2.0, 1.0, 3.0, 4.0, 9.0, 6.0, 7.0, 8.0, 5.0, 10.0])
    figures = agreement.agreement(estimate, truth)
    assert figures == pytest.approx(
        {
            "rmse": 1.8439088914585775,  # the root of (1 + 1 + 16 + 16) / 10
            "rmse_sd": 0.6419666752419569,  # the root of 3.4 / 8.25, the variance of 1 to 10 over all ten
            "kendall": 29 / 45,  # 8 of the 45 pairs are the other way round
            "spearman": 1 - 6 * 34 / (10 * 99),
            "jaccard_10": 1 / 3,  # {1, 9} and {0, 9}, counted from 0
            "jaccard_30": 3 / 5,  # {0, 1, 4, 9} and {0, 1, 8, 9}
            "jaccard_50": 3 / 5,  # two of each end again
            "jaccard_70": 7 / 9,  # {0, 1, 2, 3, 4, 6, 7, 9} and {0, 1, 2, 3, 6, 7, 8, 9}
        },
        rel=1e-14,
    )


def test_figures_of_equal_truths_worked_out_by_hand() -> None:
    """Two of three truths are equal: tau-b counts their pair on one side alone, and their ranks are 1.5 each."""
    figures = agreement.agreement(np.array([1.0, 2.0, 3.0]), np.array([1.0, 1.0, 2.0]))
    assert figures["kendall"] == pytest.approx(2 / 6**0.5, rel=1e-14)
    assert figures["spearman"] == pytest.approx(3**0.5 / 2, rel=1e-14)
    assert figures["rmse"] == pytest.approx((2 / 3) ** 0.5, rel=1e-14)
    assert figures["rmse_sd"] == pytest.approx(3**0.5, rel=1e-14)  # the truths' variance is 2/9


def test_correlations_of_ranks_see_ranks_alone() -> None:
    """The last two of four are exchanged, and the estimate of the last is far off."""
    figures = agreement.agreement(np.array([1.0, 2.0, 3.0, 1000.0]), np.array([-1.0, 2.0, 30.0, 4.0]))
    assert figures["kendall"] == pytest.approx(4 / 6, rel=1e-14)
    assert figures["spearman"] == pytest.approx(1 - 6 * 2 / (4 * 15), rel=1e-14)


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
    run = record(tmp_path / "run", make(hidden=4), data(n=40))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    with pytest.raises(la.RequestError, match=r"no leave-one-out truth.*method='loo'"):
        la.evaluate(run)
    truth = la.score(run, "loo", range(4, 34), ray_address=None, check=0)
    la.score(run, "acc-sgd-ie", range(10, 40), ray_address=None, check=0)
    rows = {row["method"]: row for row in la.evaluate(run).to_pylist()}
    assert {name: row["n"] for name, row in rows.items()} == {"loo": 30, "sgd-ie": 30, "acc-sgd-ie": 24}
    assert rows["loo"]["rmse"] == 0
    assert rows["loo"]["kendall"] == pytest.approx(1)
    estimate = la.score(run, "sgd-ie", range(4, 34), ray_address=None, save=False, check=0)
    assert rows["sgd-ie"]["kendall"] == pytest.approx(stats.kendalltau(estimate.values, truth.values).statistic)
    assert 0 < rows["acc-sgd-ie"]["rmse"] < rows["sgd-ie"]["rmse"]
    assert all(row["seconds"] > 0 for row in rows.values())
    assert (tmp_path / "run/evaluation.json").exists()


def test_each_query_is_held_against_its_own_truth(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    queries = [run.query("val"), la.Query("other", [data(n=9, seed=5).tensors])]
    truths = {query.name: la.score(run, "loo", query=query, ray_address=None, check=0) for query in queries}
    estimates = {query.name: la.score(run, "sgd-ie", query=query, ray_address=None, check=0) for query in queries}
    stored = stored_scores(run)
    assert len(stored) == 4
    for order in (stored, dict(reversed(stored.items()))):
        for name, estimate in estimates.items():
            truth = truth_for(order, estimate)
            assert truth is not None
            assert truth.conditions["query"] == name
            assert np.array_equal(truth.values, truths[name].values)
    rows = {(row["method"], row["query"]): row for row in la.evaluate(run).to_pylist()}
    assert set(rows) == {(method, name) for method in ("loo", "sgd-ie") for name in truths}
    for name, estimate in estimates.items():
        assert rows["loo", name]["rmse"] == 0
        assert rows["sgd-ie", name]["rmse"] == pytest.approx(agreement.rmse(estimate.values, truths[name].values), rel=1e-12)
        assert rows["sgd-ie", name]["kendall"] == pytest.approx(agreement.kendall(estimate.values, truths[name].values))
    assert not np.allclose(truths["val"].values, truths["other"].values, rtol=0.1)


def test_a_query_of_the_same_name_and_other_data_is_another_question(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    truth = la.score(run, "loo", query=la.Query("other", [data(n=9, seed=5).tensors]), ray_address=None, check=0)
    estimate = la.score(run, "sgd-ie", query=la.Query("other", [data(n=9, seed=6).tensors]), ray_address=None, check=0)
    assert truth_for({"loo-other": truth}, estimate) is None
    assert la.evaluate(run)["method"].to_pylist() == ["loo"]


def test_scores_of_an_older_record_are_left_out(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "loo", [1, 2], ray_address=None, check=0)
    import shutil

    record(tmp_path / "other", make(seed=3, hidden=4))
    shutil.copytree(tmp_path / "run/scores", tmp_path / "other/scores")
    with pytest.raises(la.RequestError, match="no scores yet"):
        la.evaluate(tmp_path / "other")


def test_the_truth_is_that_of_the_same_steps(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    options: dict[str, Any] = {"ray_address": None, "check": 0}
    for at in ("end", "along", 4):
        la.score(run, "sgd-ie", at=at, **options)
    for at in ("end", 4):
        la.score(run, "loo", at=at, **options)
    tables = stored_scores(run)
    assert truth_for(tables, tables["sgd-ie"]) is tables["loo"]
    assert truth_for(tables, tables["sgd-ie.step-4"]) is tables["loo.step-4"]
    assert truth_for(tables, tables["sgd-ie.along"]) is None
    rows = la.evaluate(run)
    assert [(row["method"], row["at"], row["runs"]) for row in rows.to_pylist()] == [
        (method, at, 1) for method in ("loo", "sgd-ie") for at in ("end", "4")
    ]
    for at, row in (("end", 2), (4, 3)):
        values, true = (la.score(run, method, at=at, **options).values for method in ("sgd-ie", "loo"))
        assert rows["rmse"][row].as_py() == pytest.approx(np.sqrt(np.mean((values - true) ** 2)))
    assert " at " in as_text(rows).splitlines()[0]
    assert "runs" not in as_text(rows)
    assert read(run) is not None
    without = [{key: value for key, value in row.items() if key != "at"} for row in rows.to_pylist()]
    run.store.write("evaluation.json", as_json(run, without))
    with pytest.raises(la.RunError, match="delete it and evaluate again"):
        read(run)


def test_a_terminal_of_100_columns_holds_the_widest_table_with_the_verdict_in_front() -> None:
    figures = dict.fromkeys(("rmse", "rmse_sd", "kendall", "spearman", "lds", "lds_each", "qld", "seconds"), -0.000123456)
    words = {"method": "acc-low-rank", "at": "along:20", "readout": "linear", "removals": "samples", "verdict": "unreliable"}
    lines = as_text(pa.Table.from_pylist([{**words, **figures, "runs": 4, "n": 60000}] * 3)).splitlines()
    assert max(map(len, lines)) <= 100
    assert len(lines) > 4  # in blocks
    assert lines[1].split()[:6] == ["acc-low-rank", "along:20", "4", "linear", "samples", "unreliable"]
    assert "seconds" in " ".join(lines)
