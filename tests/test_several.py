"""Scores of several runs on the same data: means and standard errors, and samples told by their content."""

from __future__ import annotations

import re
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, data, make, record
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.judge.agreement import as_text, stored_scores, truth_for
from lightning_acc.scoring.several import counterparts

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}
PERMUTATION = torch.randperm(N, generator=torch.Generator().manual_seed(3)).tolist()


def ordered(order: list[int], permutation: list[int] | None = None) -> DataLoader[Any]:
    """Three epochs' worth of the shared data in this order, and, permuted, the same samples under other ids."""
    if permutation is None:
        return DataLoader(data(), 7, sampler=order)
    return DataLoader(Subset(data(), permutation), 7, sampler=[permutation.index(i) for i in order])


def trained(path: Path, seed: int, permutation: list[int] | None = None, **options: Any) -> la.Run:
    order = torch.randperm(N, generator=torch.Generator().manual_seed(seed)).tolist()
    module = make(seed, hidden=4, activation="gelu", optimizer=SGD)
    return record(path, module, ordered(order, permutation), seed=seed, **options)


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> list[la.Run]:
    folder = tmp_path_factory.mktemp("several")
    return [trained(folder / f"seed-{seed}", seed) for seed in range(3)]


def scored(run: Any, method: str = "sgd-ie", **options: Any) -> la.Scores:
    return la.score(run, method, **{"ray_address": None, "save": False, "check": 0, **options})


@pytest.mark.parametrize("method", ["sgd-ie", "acc-sgd-ie", "loo"])
@pytest.mark.parametrize("removals", [None, [[5], [], [1, 2, 3], [0]]])
@pytest.mark.parametrize("at", ["end", "along"])
def test_mean_and_standard_error_are_those_worked_out_by_hand(runs: list[la.Run], method: str, removals: Any, at: str) -> None:
    alone = np.array([scored(run, method, removals=removals, at=at).values for run in runs])
    mean = alone.sum(0) / 3
    error = np.sqrt(((alone - mean) ** 2).sum(0) / 2 / 3)
    assert error.max() > 1e-4
    table = scored(runs, method, removals=removals, at=at)
    np.testing.assert_allclose(table.values, mean, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(table.estimates, mean, rtol=1e-12, atol=1e-16)
    np.testing.assert_allclose(table.table["uncertainty"].to_numpy(), error, rtol=1e-9, atol=1e-16)
    assert table.table["rank"].to_pylist() == (np.argsort(np.argsort(mean, kind="stable")) + 1).tolist()
    assert set(table.table["source"].to_pylist()) == {"loo" if method == "loo" else "estimate"}
    assert table.removals == scored(runs[0], method, removals=removals).removals
    assert table.conditions["runs"] == 3
    assert table.conditions["run_hashes"].split()[0] == table.conditions["manifest_hash"] == runs[0].hash
    assert set(table.conditions["run_hashes"].split()) == {run.hash for run in runs}
    assert table.conditions["at"] == at
    assert ", mean of 3 runs)" in str(table)


def test_runs_may_be_paths_and_of_different_lengths(runs: list[la.Run], tmp_path: Path) -> None:
    longer = trained(tmp_path / "longer", 5, max_epochs=5)
    for at in ("end", "along", 4):
        table = scored((runs[0].path, Path(longer.path)), at=at)
        alone = [scored(run, at=at).values for run in (runs[0], longer)]
        np.testing.assert_allclose(table.values, np.mean(alone, 0), rtol=1e-12, atol=1e-16)
    assert scored([runs[0], longer], at=12).conditions["at"] == "12"  # the end of the one alone
    assert np.array_equal(scored([longer]).values, scored(longer).values)
    assert "runs" not in scored([longer]).conditions


@pytest.mark.parametrize("removals", [None, [[5], [1, 2, 3], [0]]])
def test_samples_are_told_by_their_content(runs: list[la.Run], tmp_path: Path, removals: Any) -> None:
    """Another run's data in another order, trained on in the same one, gives the same."""
    permuted = trained(tmp_path / "permuted", 1, PERMUTATION)
    assert torch.equal(permuted.parameters(permuted.n_steps), runs[1].parameters(runs[1].n_steps))
    known = counterparts(runs[0].content_digests(), permuted.content_digests(), N, N)
    assert known == {i: PERMUTATION.index(i) for i in range(N)}
    assert np.abs(scored(permuted, removals=removals).values - scored(runs[1], removals=removals).values).max() > 1e-4
    plain, other = (scored([runs[0], second, runs[2]], removals=removals, at="along") for second in (runs[1], permuted))
    np.testing.assert_allclose(other.values, plain.values, rtol=1e-12, atol=1e-16)
    assert other.removals == plain.removals


def test_samples_of_the_same_content_are_matched_in_the_order_of_their_ids(tmp_path: Path) -> None:
    x, y = data().tensors
    twice = [0, 1, 2, 1, 1, 3]
    permutation = [3, 4, 1, 0, 5, 2]
    first = record(tmp_path / "a", make(optimizer=SGD), TensorDataset(x[twice], y[twice]))
    ids = [twice[i] for i in permutation]
    second = record(tmp_path / "b", make(optimizer=SGD), TensorDataset(x[ids], y[ids]), seed=2)
    known = counterparts(first.content_digests(), second.content_digests(), 6, 6)
    assert known == {0: 3, 1: 0, 2: 5, 3: 1, 4: 2, 5: 4}
    alone = [scored(first).values, scored(second).values[[known[i] for i in range(6)]]]
    np.testing.assert_allclose(scored([first, second]).values, np.mean(alone, 0), rtol=1e-12, atol=1e-16)


def test_counterparts_worked_out_by_hand() -> None:
    seen = {0: "a", 1: "b", 2: "a"}
    assert counterparts(seen, {0: "a", 1: "b"}, 4, 4) == {0: 0, 1: 1, 2: 2, 3: 3}  # ids mean the same, never seen or not
    assert counterparts(seen, {0: "a", 1: "b"}, 4, 5) == {0: 0, 1: 1}
    assert counterparts(seen, {0: "a", 1: "a", 2: "b"}, 4, 4) == {0: 0, 1: 2, 2: 1}
    assert counterparts(seen, {0: "c", 1: "a", 2: "b"}, 3, 3) == {0: 1, 1: 2}  # the second a has none
    assert counterparts({0: "a"}, {1: "b"}, 2, 2) == {}  # nothing was seen by both, so nothing tells that the ids agree


def test_samples_that_a_run_never_saw(runs: list[la.Run], tmp_path: Path) -> None:
    """Where all others agree they are the same ones, and their score is 0 there."""
    some = record(tmp_path / "some", make(7, hidden=4, activation="gelu", optimizer=SGD), ordered(list(range(21))))
    table = scored([runs[0], some])
    np.testing.assert_allclose(table.values[21:], scored(runs[0]).values[21:] / 2, rtol=1e-12)
    few = record(tmp_path / "few", make(7, hidden=4, activation="gelu", optimizer=SGD), ordered(list(range(21)), PERMUTATION))
    with pytest.raises(la.RequestError, match=r"3 of the 24 removals \(21, 22, 23\) hold samples .* shares 21 samples"):
        scored([runs[0], few])
    assert len(scored([runs[0], few], removals=list(range(21)))) == 21


def test_other_data_is_refused(runs: list[la.Run], tmp_path: Path) -> None:
    other = record(tmp_path / "other", make(optimizer=SGD), data(seed=4))
    with pytest.raises(la.RequestError, match=r"24 of the 24 removals.*shares 0 samples.*give runs on the same data"):
        scored([runs[0], other])


def test_what_cannot_be_averaged_is_refused(runs: list[la.Run], tmp_path: Path) -> None:
    with pytest.raises(la.RequestError, match="one and the same run"):
        scored([runs[0], runs[1], runs[0].path])
    with pytest.raises(la.RequestError, match="is no run"):
        scored([])
    with pytest.raises(la.RequestError, match="each of 3 runs has its own"):
        scored(runs, keep_shifts=True)
    added = trained(tmp_path / "a", 8), trained(tmp_path / "b", 9)
    for i, run in enumerate(added):
        run.add_query("more", DataLoader(data(n=5, seed=i), 5))
    with pytest.raises(la.RequestError, match=r"query 'more' of .*b has other examples.*pass one Query"):
        scored(added, query="more")
    query = la.Query("more", DataLoader(data(n=5, seed=3), 5))
    alone = [scored(run, query=query).values for run in added]
    np.testing.assert_allclose(scored(added, query=query).values, np.mean(alone, 0), rtol=1e-12, atol=1e-16)


@pytest.fixture
def copies(tmp_path: Path) -> list[la.Run]:
    return [trained(tmp_path / f"seed-{seed}", seed) for seed in range(2)]


def test_the_verdict_is_on_the_mean(copies: list[la.Run]) -> None:
    table = scored(copies, "acc-sgd-ie", check=24, save=True)
    alone = [scored(run, "acc-sgd-ie", check=24, save=True) for run in copies]
    truth = np.mean([scored(run, "loo", save=True).values for run in copies], 0)
    assert table.verdict.n == 16
    assert table.verdict.random == alone[0].verdict.random == alone[1].verdict.random
    assert set(table.verdict.extremes) == set(alone[0].verdict.extremes) & set(alone[1].verdict.extremes)
    assert table.truths.keys() == alone[0].truths.keys() & alone[1].truths.keys()
    assert all(score == pytest.approx(truth[removal[0]], rel=1e-9) for removal, score in table.truths.items())
    said = table.by_removal("estimate")
    pairs = np.array([(said[r], truth[r[0]]) for r in table.verdict.random])
    assert table.verdict.rmse_sd == pytest.approx(np.sqrt(np.mean((pairs[:, 0] - pairs[:, 1]) ** 2)) / pairs[:, 1].std())
    assert scored(copies, "sgd-ie").verdict.reason == "nothing was retrained without, as check=0"
    assert scored(copies, "sgd-ie", removals=[0, 1, 2], check="auto").verdict.reason.startswith("3 removals are too few")
    groups = [(0, 1, 2, 3), (4, 5, 6, 7)]  # which are too large for an estimate
    table = scored(copies, "sgd-ie", removals=groups, check="auto")
    assert table.verdict.word == "faithful"
    both = np.mean([scored(run, "loo", removals=groups).values for run in copies], 0)
    assert table.truths == {removal: pytest.approx(value) for removal, value in zip(groups, both, strict=True)}


def test_the_most_harmful_of_the_mean_are_confirmed(copies: list[la.Run]) -> None:
    table = scored(copies, confirm=3)
    ranked = scored(copies)
    truth = np.mean([scored(run, "loo").values for run in copies], 0)
    assert table.truths == {r: pytest.approx(truth[r[0]], rel=1e-9) for r in ranked.most_harmful(3)}


def test_the_mean_is_stored_and_never_taken_for_a_run(copies: list[la.Run]) -> None:
    for method in ("sgd-ie", "loo"):
        mean = scored(copies, method, save=True, at="along")
        again = scored(copies, method, save=True, at="along")
        assert again.conditions["reused"] == N
        assert np.array_equal(again.values, mean.values)
        stored = stored_scores(copies[0])[f"{method}.along.mean-of-2-runs"]
        assert np.array_equal(stored.values, mean.values)
        assert np.array_equal(stored.table["uncertainty"].to_numpy(), mean.table["uncertainty"].to_numpy())
        alone = scored(copies[0], method, save=True, at="along")
        assert alone.conditions["reused"] == N
        assert np.abs(alone.values - mean.values).max() > 1e-5
    assert not [name for name in stored_scores(copies[1]) if "mean" in name]
    tables = stored_scores(copies[0])
    for name, table in tables.items():
        truth = truth_for(tables, table)
        assert truth is tables[name.replace("sgd-ie", "loo")]
    rows = la.evaluate(copies[0])
    assert sorted((row["method"], row["runs"], row["at"]) for row in rows.to_pylist()) == [
        (method, runs, "along") for method in ("loo", "sgd-ie") for runs in (1, 2)
    ]
    assert " runs " in as_text(rows).splitlines()[0]
    scored(copies, removals=[[1, 2]], save=True, at="along")
    assert len(stored_scores(copies[0])["sgd-ie.along.mean-of-2-runs"]) == N + 1
    mean = scored(copies[::-1], save=True, at="along")  # the same two, in the other's directory
    np.testing.assert_allclose(mean.values, scored(copies, at="along").values, rtol=1e-12, atol=1e-16)


def test_the_command_takes_several_runs(copies: list[la.Run], capsys: pytest.CaptureFixture[str]) -> None:
    paths = [run.path for run in copies]
    words = ["--method", "sgd-ie", "--ray-address=null", "--check", "0", "--top=2"]
    main(["score", *paths, *words, "--at", "along"])
    out = capsys.readouterr().out
    assert "Scores(sgd-ie: 24 removals, query val at along, linear readout, float64, mean of 2 runs)" in out
    first = scored(copies, at="along").most_harmful(1)[0][0]
    assert re.search(rf"^ +1  [-+]\S+  {first}$", out, re.MULTILINE)
    for at, said in (("along:3", "along:3"), ("4", "4"), ("3,5", "3,5"), ("end", None)):
        main(["score", *words, f"--at={at}", paths[0]])  # one run, wherever it stands
        out = capsys.readouterr().out
        assert ("query val at" in out) == (said is not None)
        assert said is None or f"query val at {said}, " in out
        assert "mean of" not in out
    main(["retrain", *paths, "--removals=random:3", "--ray-address", "null", "--at=5"])
    assert "Scores(loo: 3 removals, query val at 5, exact readout, float64, mean of 2 runs)" in capsys.readouterr().out
    with pytest.raises(SystemExit):
        main(["score", *words])
    with pytest.raises(SystemExit):
        main(["score", paths[0], "--at=never", *words])
    assert "at='never' is no moment of a run" in capsys.readouterr().err


class Best(la.Run):
    checkpoints = property(lambda self: {"best": 4, "last": self.n_steps})


def test_the_best_checkpoint_is_told_of_once(tmp_path: Path) -> None:
    run = Best(trained(tmp_path / "run", 0).path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(run, at=run.n_steps)
        best = scored(run, at="best")
    with pytest.warns(UserWarning, match=r'after step 4 of 12: at="best" asks about it') as told:
        scored(run)
    assert Path(told[0].filename).name == Path(__file__).name
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        scored(run)
    assert np.array_equal(best.values, scored(run, at=4).values)
