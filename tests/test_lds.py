"""LDS, QLD, and the random groups they are measured on."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from problems import N, make, record
from scipy import stats

import lightning_acc as la
from lightning_acc.judge import lds
from lightning_acc.judge.agreement import as_text
from lightning_acc.scoring.selection import select

SGD = {"momentum": 0.9, "lr": 0.05}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("lds") / "run", make(hidden=4, optimizer=SGD))


def scored(run: la.Run, method: str, removals: Any = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, **{"ray_address": None, "check": 0, **options})


def test_random_groups_are_the_same_every_time_and_differ(run: la.Run) -> None:
    groups = select(run, "random-groups:40x12.5%")
    assert isinstance(groups, dict)
    assert len(groups) == 40
    assert len(set(groups.values())) > 35
    assert all(len(set(group)) == 3 for group in groups.values())
    assert groups == select(run, "random-groups:40x12.5%")
    counts = np.bincount([i for group in groups.values() for i in group], minlength=N)
    assert counts.min() > 0
    for words in ("random-groups:40x0.1%", "random-groups:40x100%"):
        with pytest.raises(la.RequestError, match="of the 24 samples"):
            select(run, words)


def test_lds_is_the_rank_correlation_of_sums_with_the_truth(run: la.Run) -> None:
    groups = select(run, "random-groups:40x12.5%")
    truth, scores = scored(run, "loo", groups), scored(run, "sgd-ie")
    found = lds.of_scores(scores.by_removal(), truth)
    assert found is not None
    sums = [sum(scores.values[i] for i in group) for group in truth.removals]
    assert found.value == pytest.approx(stats.spearmanr(sums, truth.values).statistic, abs=1e-12)
    assert found.n == len(set(truth.removals))
    assert 0 < found.low < found.value < found.high < 1
    assert found.value > 0.9  # a smooth network: the sums are nearly right
    noise = dict(zip(scores.removals, np.random.default_rng(0).normal(size=N), strict=True))
    wrong = lds.of_scores(noise, truth)
    assert wrong is not None
    assert wrong.high < found.low


def test_lds_of_each_example(run: la.Run) -> None:
    groups = list(select(run, "random-groups:40x12.5%").values())
    matrices = [la.score_matrix(run, m, removals=r, ray_address=None, check=0) for m, r in (("sgd-ie", None), ("loo", groups))]
    found = lds.of_matrix(*matrices)
    assert found is not None
    estimate, truth = matrices
    sums = np.array([estimate.values[list(group)].sum(0) for group in truth.removals])
    each = [stats.spearmanr(a, b).statistic for a, b in zip(sums.T, truth.values.T, strict=True)]
    assert found.value == pytest.approx(np.mean(each), abs=1e-3)
    assert found.low <= found.value <= found.high


def test_too_few_groups_or_those_of_a_column_say_nothing(run: la.Run) -> None:
    scores = scored(run, "sgd-ie").by_removal()
    assert lds.of_scores(scores, scored(run, "loo", select(run, "random-groups:19x12.5%"), save=False)) is None
    classes = {f"label {k}": [k, k + 1, k + 2] for k in range(0, 22)}
    assert lds.of_scores(scores, scored(run, "loo", classes, save=False)) is None
    assert lds.of_scores(scores, scored(run, "loo", list(classes.values()), save=False)) is not None


def test_dropping_what_a_ranking_calls_helpful(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    scores = scored(run, "sgd-ie")
    best = select(run, "top-group:12.5%@sgd-ie")
    assert isinstance(best, dict)
    ((name, members),) = best.items()
    assert set(members) == set(np.argsort(-scores.values)[:3].tolist())
    truth = scored(run, "loo", {**select(run, "random-groups:30x12.5%"), name: members})  # type: ignore[dict-item]
    found = lds.dropped(truth, "sgd-ie")
    assert found is not None
    value, mean, deviation = found
    random = [truth.by_removal()[group] for group in lds.random_groups(truth)]
    assert value == truth.by_removal()[members]
    assert (mean, deviation) == (pytest.approx(np.mean(random)), pytest.approx(np.std(random, ddof=1)))
    assert value > mean + 2 * deviation
    assert lds.dropped(truth, "loo") is None


def test_evaluate_tells_lds_of_the_mean_and_of_each_example(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD))
    scores = scored(run, "sgd-ie", at=[5, 12])
    truth = scored(run, "loo", select(run, "random-groups:40x12.5%"), at=[5, 12])
    (row,) = la.evaluate(run).to_pylist()[-1:]
    expected = lds.of_scores(scores.by_removal(), truth)
    assert expected is not None
    assert (row["method"], row["removals"], row["n"]) == ("sgd-ie", "samples", 0)
    assert (row["lds"], row["lds_low"], row["lds_high"], row["lds_n"]) == (*vars(expected).values(),)
    assert row["lds_each"] is None
    matrix = la.score_matrix(run, examples=[3, 9, 1], at=[5, 12], ray_address=None, check=0)
    assert not lds.NOTHING["lds"]
    whole = la.score_matrix(run, at=[5, 12], ray_address=None, check=0)
    assert np.array_equal(whole.values[:, [3, 9, 1]], matrix.values)

    def trained(*_: Any) -> None:
        raise AssertionError("something is trained")

    from lightning_acc.scoring.matrices import compute

    monkeypatch.setattr(compute, "compute", trained)
    row = la.evaluate(run).to_pylist()[-1]
    groups = list(dict.fromkeys(truth.removals))
    truths = la.score_matrix(run, "loo", removals=groups, at=[5, 12], ray_address=None)
    each = lds.of_matrix(whole, truths)
    assert each is not None
    assert row["lds_each"] == pytest.approx(each.value, abs=1e-6)
    assert row["lds_each"] > 0.8
    assert "lds_each" in as_text(la.evaluate(run))
