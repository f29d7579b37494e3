"""No number leaves unchecked: which removals are retrained without, what is said of the scores, and where they stand."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, data, make, record
from scipy import stats

import lightning_acc as la
from lightning_acc.methods import swept
from lightning_acc.scoring import scores as tables
from lightning_acc.scoring.selection import select
from lightning_acc.scoring.trust import check as checks
from lightning_acc.scoring.trust.figures import jaccard, shown
from lightning_acc.scoring.trust.verdict import Verdict, interval, judge

MANY = 120


def score(run: la.Run, method: str = "sgd-ie", removals: Any = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, **{"ray_address": None, "progress": False, **options})


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("verdict") / "run", make(hidden=6), data(n=MANY), batch_size=12, max_epochs=4)


@pytest.fixture(scope="module")
def truth(recorded: la.Run) -> dict[tuple[int, ...], float]:
    return score(recorded, "loo", save=False).by_removal()


def pairs(n: int, noise: float, seed: int = 0) -> tuple[dict[Any, float], dict[Any, float]]:
    random = np.random.default_rng(seed)
    true = random.standard_t(3, n)
    said = true + noise * random.normal(size=n)
    return {(i,): float(v) for i, v in enumerate(said)}, {(i,): float(v) for i, v in enumerate(true)}


@pytest.mark.parametrize(("noise", "word"), [(0.01, "faithful"), (0.9, "rough"), (30.0, "unreliable")])
def test_words_follow_from_the_correlation_over_the_random_ones(noise: float, word: str) -> None:
    said, true = pairs(48, noise)
    random, extremes = list(said)[:32], list(said)[32:]
    verdict = judge(said, true, random, extremes)
    a, b = (np.array([values[r] for r in random]) for values in (said, true))
    assert verdict.word == word
    assert verdict.n == 32
    assert verdict.spearman == pytest.approx(stats.spearmanr(a, b).statistic)
    assert verdict.kendall == pytest.approx(stats.kendalltau(a, b).statistic)
    assert verdict.rmse_sd == pytest.approx(np.linalg.norm(a - b) / np.linalg.norm(b - b.mean()))
    assert verdict.spearman_low < verdict.spearman < verdict.spearman_high  # type: ignore[operator]
    assert str(verdict).startswith(f"{word}: Spearman {verdict.spearman:.2f} (")
    assert Verdict.from_json(verdict.to_json()) == verdict


def test_extremes_would_flatter_and_do_not(recorded: la.Run) -> None:
    said, true = pairs(48, 3.0, seed=4)
    extremes = [(100 + i,) for i in range(16)]
    said.update({r: 50.0 * (-1) ** r[0] for r in extremes})
    true.update({r: 50.0 * (-1) ** r[0] for r in extremes})
    random = [(i,) for i in range(32)]
    assert judge(said, true, random, extremes).spearman == judge(said, true, random, []).spearman
    assert judge(said, true, random, extremes).top_confirmed == 1.0
    wrong = {**true, **{r: -true[r] for r in extremes[:4]}}
    assert judge(said, wrong, random, extremes).top_confirmed == 0.75
    assert judge(said, {**true, extremes[0]: 1e-9}, random, extremes).top_confirmed == 15 / 16  # the sign alone is not enough


@pytest.mark.parametrize("noise", [0.1, 0.5, 2.0])
def test_the_interval_holds_the_correlation_over_all(noise: float) -> None:
    said, true = (np.array(list(values.values())) for values in pairs(400, noise, seed=7))
    over_all = stats.spearmanr(said, true).statistic
    held = 0
    for seed in range(60):
        some = np.random.default_rng(seed).permutation(400)[:32]
        low, high = interval(said[some], true[some], seed)
        held += low <= over_all <= high
    assert held >= 54


def test_a_few_that_are_misjudged_altogether_are_reckoned_with() -> None:
    random = np.random.default_rng(5)
    true = random.normal(size=400)
    said = true + 0.02 * random.normal(size=400)
    said[:12] = -5 * true[:12]  # 3 % of them: many a sample of 32 holds none
    over_all = stats.spearmanr(said, true).statistic
    assert 0.85 < over_all < 0.97
    held = 0
    for seed in range(60):
        some = np.random.default_rng(seed).permutation(400)[:32]
        low, high = interval(said[some], true[some], seed)
        held += low <= over_all <= high
    assert held >= 54


def test_too_few_and_equal_scores_have_no_verdict() -> None:
    said, true = pairs(11, 0.1)
    assert judge(said, true, list(said), []).word == "unchecked"
    same = dict.fromkeys(pairs(30, 0.1)[0], 1.0)
    assert "one and the same score" in judge(same, same, list(same), []).reason


def test_what_is_no_number_is_not_faithful() -> None:
    said, true = pairs(40, 0.01)
    assert judge(said, true, list(said)[:32], []).word == "faithful"
    said[(3,)] = said[(4,)] = said[(5,)] = float("nan")
    assert judge(said, true, list(said)[:32], []).word == "rough"


@pytest.mark.parametrize("method", ["acc-sgd-ie", "sgd-ie", "tracin", "acc-low-rank"])
def test_a_third_extremes_two_thirds_at_random_stand_with_their_truths(
    recorded: la.Run, truth: dict[tuple[int, ...], float], method: str
) -> None:
    scores = score(recorded, method, save=False)
    estimates = score(recorded, method, save=False, check=0)
    assert estimates.verdict.word == "unchecked"
    assert "check=0" in estimates.verdict.reason
    assert set(estimates.table["source"].to_pylist()) == {"estimate"}
    np.testing.assert_array_equal(scores.estimates, estimates.values)
    verdict = scores.verdict
    assert (len(verdict.random), len(verdict.extremes)) == (32, 16)
    assert not set(verdict.random) & set(verdict.extremes)
    checked = {*verdict.random, *verdict.extremes}
    for row in scores.to_pandas().itertuples():
        removal = tuple(row.removal)
        assert row.source == ("loo" if removal in checked else "estimate")
        assert row.score == pytest.approx(truth[removal] if removal in checked else row.estimate, rel=1e-9, abs=1e-14)
    ranks = scores.table["rank"].to_numpy()
    np.testing.assert_array_equal(ranks, np.argsort(np.argsort(scores.values, kind="stable")) + 1)
    order = [scores.removals[i] for i in np.argsort(scores.estimates) if scores.removals[i] not in verdict.random]
    assert set(verdict.extremes) == {*order[:8], *order[-8:]}
    assert verdict.word in repr(scores)


def test_how_many_are_checked_is_as_asked(recorded: la.Run) -> None:
    for asked, counts in ((12, (12, 0)), (15, (12, 3)), (18, (12, 6)), (60, (40, 20)), (10_000, (MANY, 0))):
        verdict = score(recorded, save=False, check=asked).verdict
        assert verdict.word != "unchecked"
        assert (len(verdict.random), len(verdict.extremes), verdict.n_extreme) == (*counts, counts[1])
        assert (verdict.top_confirmed is None) == (not counts[1])
    assert score(recorded, save=False, check=11).verdict.reason.startswith("11 random removals with finite scores are too few")
    assert score(recorded, save=False, removals=[1, 2, 3]).verdict.reason.startswith("3 removals are too few")
    assert score(recorded, save=False, removals=[1, 2, 3], check=2).verdict.reason.startswith("3 removals are too few")
    all_of_them = score(recorded, save=False, removals=[1, 2, 3], check=18)
    assert (all_of_them.verdict.word, all_of_them.verdict.reason) == (
        "faithful",
        "all 3 removals were retrained without: these are true scores",
    )
    assert all_of_them.table["source"].to_pylist() == ["loo"] * 3
    for bad in (-1, 1.5, True, "all"):
        with pytest.raises(la.RequestError, match="check="):
            score(recorded, check=bad)


def test_without_the_time_nothing_is_said(recorded: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(checks, "LEAST_SECONDS", 0.0)
    monkeypatch.setattr(checks, "price", lambda *_: checks.Price(300.0, 70.0, 10))
    verdict = score(recorded, save=False).verdict
    assert verdict.word == "unchecked"
    assert "ask for it with check=18" in verdict.reason


def test_what_was_scored_is_not_lost_to_a_check_that_fails(recorded: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = score(recorded, save=False, check=0)
    short = score(recorded, save=False, memory_gb=1e-7)
    assert short.verdict.reason.startswith("nothing can be retrained without here (One removal of loo needs")
    np.testing.assert_array_equal(short.values, plain.values)

    def fails(*_: Any) -> Any:
        raise la.RunError("No node is left.")

    from lightning_acc.methods import sweeps

    monkeypatch.setattr(sweeps, "forward", fails)
    scores = score(recorded, save=False)
    assert scores.verdict.reason == "retraining without some failed (No node is left)"
    np.testing.assert_array_equal(scores.values, plain.values)


def test_the_truth_needs_no_check(recorded: la.Run) -> None:
    scores = score(recorded, "loo", [4, 5], save=False)
    assert scores.verdict.word == "faithful"
    assert scores.table["source"].to_pylist() == ["loo", "loo"]


def test_what_is_stored_is_checked_and_stays_so(recorded: la.Run, tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4), data(n=60))
    checked = score(run)
    stored = tables.read(run.store, "sgd-ie")
    assert stored.verdict == checked.verdict
    assert stored.by_removal() == checked.by_removal()
    score(run, removals=[1, 2], check=0)
    assert tables.read(run.store, "sgd-ie").verdict == checked.verdict  # not lost to a table of two
    assert score(run).conditions["reused"] == 60
    assert tables.read(run.store, "sgd-ie").conditions["seconds"] == stored.conditions["seconds"] > 0  # not of looking it up
    partial = tables.read(run.store, "loo")
    assert len(partial) == 48
    (row,) = [row for row in la.evaluate(run).to_pylist() if row["method"] == "sgd-ie"]
    assert row["n"] == 48 - len(set(checked.verdict.extremes))  # picked ones would flatter
    assert row["verdict"] == checked.verdict.word


def test_few_removals_have_no_correlation(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    for method in ("loo", "sgd-ie"):
        score(run, method, [0, 1], check=0)
    rows = {row["method"]: row for row in la.evaluate(run).to_pylist()}
    assert np.isnan(rows["sgd-ie"]["spearman"])
    assert rows["sgd-ie"]["rmse"] > 0
    assert json.loads((tmp_path / "run/evaluation.json").read_text())["rows"][1]["spearman"] is None


def test_one_nan_blanks_nothing_else() -> None:
    truth = np.arange(30.0)
    figures = shown(np.r_[np.nan, truth[1:]], np.r_[truth[:-1], np.inf])
    assert (figures["n"], figures["n_diverged"], figures["spearman"]) == (28, 2, pytest.approx(1.0))


def test_jaccard_of_ties_does_not_hang_on_their_order() -> None:
    truth = np.r_[np.zeros(30), np.arange(1, 11.0)]
    estimate = np.r_[np.arange(-10.0, 0), np.zeros(30)]
    order = np.random.default_rng(0).permutation(40)
    assert jaccard(estimate, truth, 10) == jaccard(estimate[order], truth[order], 10)


class TestGroups:
    """Groups too large for a line are retrained without; they carry their names."""

    def described(self, tmp_path: Path) -> la.Run:
        import pyarrow as pa

        run = record(tmp_path / "run", make(hidden=6), data(n=MANY), batch_size=12, max_epochs=3)
        labels = data(n=MANY).tensors[1].tolist()
        run.sample_info = lambda: pa.table({"label": labels})  # type: ignore[method-assign]
        return run

    def test_classes_are_retrained_without_and_named(self, tmp_path: Path) -> None:
        run = self.described(tmp_path)
        groups = select(run, "group:label")
        scores = score(run, "acc-sgd-ie", groups)
        truth = score(run, "loo", groups, save=False)
        assert scores.table["source"].to_pylist() == ["loo"] * 3
        np.testing.assert_allclose(scores.values, truth.values, rtol=1e-9)
        assert scores.labels == ["label 0", "label 1", "label 2"]
        assert tables.read(run.store, "acc-sgd-ie").names == dict(zip(scores.removals, scores.labels, strict=True))
        lines = tmp_path / "ranking.csv"
        from lightning_acc.judge.exports import write_ranking_csv

        write_ranking_csv(run, scores, lines)
        first, head, *rows = lines.read_text().splitlines()
        assert first.startswith("# acc-sgd-ie, faithful")
        assert head.split(",")[:3] == ["rank", "sample", "name"]
        assert {row.split(",")[2] for row in rows} == {"label 0", "label 1", "label 2"}

    def test_where_that_takes_too_long_the_price_is_named(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        run = self.described(tmp_path)
        monkeypatch.setattr(checks, "PATIENCE", 0.0)
        with pytest.raises(la.RequestError, match=r"3 of the 3 removals .* takes about .* method='loo'.* check=0"):
            score(run, "acc-sgd-ie", select(run, "group:label"))
        assert score(run, "acc-sgd-ie", select(run, "group:label"), check=0).verdict.word == "unchecked"

    def test_small_groups_are_estimated(self, recorded: la.Run) -> None:
        groups = [[i, i + 1] for i in range(0, MANY, 2)]
        scores = score(recorded, "acc-sgd-ie", groups, save=False)
        assert set(scores.table["source"].to_pylist()) == {"estimate", "loo"}
        assert scores.verdict.n == 32


def test_estimates_beyond_where_a_line_holds_are_marked_and_retrained(
    recorded: la.Run, truth: dict[tuple[int, ...], float], monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = score(recorded, "acc-sgd-ie", save=False, check=0)
    assert not plain.table["diverged"].to_numpy(zero_copy_only=False).any()
    monkeypatch.setattr(swept, "FURTHEST", 0.03)
    scores = score(recorded, "acc-sgd-ie", save=False)
    diverged = [r for r, one in zip(scores.removals, scores.table["diverged"].to_pylist(), strict=True) if one]
    assert 0 < len(diverged) < MANY
    assert scores.verdict.n_diverged == len(diverged)
    sources = scores.by_removal("source")
    assert {sources[r] for r in diverged} == {"loo"}
    assert f"{len(diverged)} diverged" in str(scores)


def test_relu_and_what_would_help_are_named(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=16, activation="relu"), data(n=80), batch_size=8, max_epochs=12)
    verdict = score(run, "tracin", save=False).verdict
    assert verdict.word in ("rough", "unreliable")
    assert "method='loo' for all 80 removals" in verdict.reason
    assert "in place of ReLU" in verdict.reason


class TestQueries:
    """A query is its data and its function: code, and what it holds."""

    def asked(self, function: Any) -> la.Query:
        return la.Query("mine", [data(n=8, seed=5).tensors], function)

    def test_two_functions_of_one_name_are_two_questions(self, tmp_path: Path) -> None:
        run = record(tmp_path / "run", make(hidden=4))
        prints, found = set(), []
        for factor in (1.0, 3.0):
            query = self.asked(lambda module, batch, by=factor: by * module.per_sample_loss(batch))
            prints.add(query.fingerprint)
            found.append(score(run, query=query, check=0).values)
            assert tables.read(run.store, "sgd-ie-mine").values == pytest.approx(found[-1])  # not those of before
        assert len(prints) == 2
        np.testing.assert_allclose(found[1], 3 * found[0], rtol=1e-9)

    def test_code_closures_defaults_and_globals_count(self) -> None:
        def held(by: Any) -> Any:
            return lambda module, batch: by * module.per_sample_loss(batch)

        one, other = (
            (lambda module, batch: module.per_sample_loss(batch)),
            (lambda module, batch: -module.per_sample_loss(batch)),
        )
        assert self.asked(one).fingerprint == self.asked(one).fingerprint != self.asked(other).fingerprint
        assert self.asked(held(2.0)).fingerprint == self.asked(held(2.0)).fingerprint != self.asked(held(3.0)).fingerprint
        weights = [torch.ones(3), torch.ones(3), torch.zeros(3)]
        same, again, different = (self.asked(held(w)).fingerprint for w in weights)
        assert same == again != different

    @pytest.mark.parametrize(
        "function",
        [
            lambda module, batch: module.net(batch[0]),
            lambda module, batch: module.per_sample_loss(batch)[1:],
            lambda module, batch: 1.0,
            lambda module, batch: None,
            lambda module, batch: batch[1],
        ],
        ids=["(B, 3)", "(B-1,)", "float", "None", "int64"],
    )
    @pytest.mark.parametrize("method", ["loo", "sgd-ie"])
    def test_what_is_no_value_an_example_is_refused(self, recorded: la.Run, function: Any, method: str) -> None:
        with pytest.raises(la.RequestError, match=r"returned .* for a batch of 8 examples: it must return a"):
            score(recorded, method, [1], query=self.asked(function), save=False)

    def test_a_query_without_examples_is_refused(self) -> None:
        x, y = data(n=4).tensors
        with pytest.raises(la.RequestError, match="has no data: its loader gave no example"):
            la.Query("empty", [(x[:0], y[:0])])


def test_screened_scores_of_other_sets_are_not_mixed(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    every = score(run, "acc-low-rank", followed=6, check=0)
    some = score(run, "acc-low-rank", list(range(12)), followed=6, check=0)
    assert (every.conditions["reused"], some.conditions["reused"]) == (0, 0)
    assert score(run, "acc-low-rank", list(range(12)), followed=6, check=0).conditions["reused"] == 12
    assert len(tables.read(run.store, "acc-low-rank.6-followed")) == 12 < N


def test_the_truth_of_another_name_is_another_answer(tmp_path: Path) -> None:
    from lightning_acc.judge.agreement import truth_for

    run = record(tmp_path / "run", make(hidden=4))
    same = [data(n=8, seed=5).tensors]
    truth = score(run, "loo", query=la.Query("one", same), save=False)
    estimate = score(run, "sgd-ie", query=la.Query("two", same), save=False, check=0)
    assert truth.conditions["query_fingerprint"] == estimate.conditions["query_fingerprint"]
    assert truth_for({"loo-one": truth}, estimate) is None


def test_the_page_shows_the_fullest_ranking_its_verdict_and_what_was_retrained(tmp_path: Path) -> None:
    from lightning_acc.show.report import collect

    run = record(tmp_path / "run", make(hidden=4), data(n=60))
    scores = score(run, "sgd-ie")
    score(run, "sgd-ie", {"the first ten": range(10)})
    content = collect(run)
    assert [method["name"] for method in content["methods"]] == ["sgd-ie", "loo"]  # that of the 48 checked ones is no ranking
    shown = content["methods"][0]
    assert shown["verdict"]["word"] == scores.verdict.word
    assert shown["verdict"]["text"] in str(scores.verdict)
    checked = {i for (i,) in (*scores.verdict.random, *scores.verdict.extremes)}
    assert set(shown["ranking"]["retrained"]) == checked
    assert shown["n_compared"] == 48 - 16
    (groups,) = content["groups"][:1]
    assert (groups["rows"][0]["name"], groups["rows"][0]["samples"]) == ("the first ten", 10)
    assert groups["rows"][0]["source"] == "loo"


def test_wandb_is_told_the_verdict(tmp_path: Path) -> None:
    from lightning_acc.show.tracking import panels

    run = record(tmp_path / "run", make(hidden=4), data(n=60))
    scores = score(run, "sgd-ie")
    told = panels.verdict("sgd-ie", scores)
    assert told["verdict/sgd-ie/word"] == scores.verdict.word
    assert told["verdict/sgd-ie/spearman"] == scores.verdict.spearman
    assert told["verdict/sgd-ie/sentence"] == str(scores.verdict)


def test_the_top_passes_over_what_is_no_number(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    scores = score(run, check=0)
    holed = scores.values.copy()
    holed[::3] = np.nan
    tables.write(run.store, "sgd-ie", la.Scores.build(scores.removals, holed, scores.conditions))
    order = [scores.removals[i] for i in np.argsort(scores.values) if np.isfinite(holed[i])]
    assert select(run, "top:10@sgd-ie") == order[:10]
