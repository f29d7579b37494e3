"""Cleaning: what is dropped, how it is trained anew, and what the table says."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, FEATURES, Net, StepOnly, data, make, record, trainer
from scipy import stats
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.core.replay import Replay
from lightning_acc.judge import cleaning, cleaning_table, controls, exports
from lightning_acc.judge.fresh_training import Retraining, fresh_parameters, retrain


class LinearNet(Net):
    """Gives logits when called, as classifiers do."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        out: torch.Tensor = self.net(x)
        return out


def classified(n: int, seed: int = 0) -> TensorDataset:
    """Separable classes, the first eight labels wrong."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = 2.5 * torch.eye(FEATURES)[labels] + 0.5 * torch.randn(n, FEATURES, generator=generator)
    if seed == 0:
        labels[:8] = (labels[:8] + 1) % CLASSES
    return TensorDataset(x.double(), labels)


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    torch.manual_seed(0)
    module = LinearNet(hidden=6, optimizer={"momentum": 0.5, "lr": 0.1}).double()
    path = tmp_path_factory.mktemp("clean") / "run"
    loaders = DataLoader(classified(48), 8, shuffle=True), DataLoader(classified(60, seed=2), 60)
    trainer(la.TrajectoryRecorder(path), max_epochs=8).fit(module, *loaders)
    run = la.Run(path)
    run.add_query("test", [classified(90, seed=3).tensors])
    return run


def test_dropping_the_most_harmful_beats_dropping_at_random(run: la.Run) -> None:
    table = la.clean(run, ["acc-sgd-ie", "sgd-ie"], [0.05, 8 / 48], seeds=4, ray_address=None)
    rows = {(row["method"], row["n_removed"]): row for row in table.to_pylist()}
    controls = {"none", "random", "loss", "self-influence", "cleanlab", "validation", "validation added"}
    assert {method for method, _ in rows} == {*controls, "acc-sgd-ie", "sgd-ie"}
    assert rows["acc-sgd-ie", 8]["loss"] < rows["random", 8]["loss"] - 0.05
    assert rows["acc-sgd-ie", 8]["gain"] >= rows["random", 8]["gain"]
    assert {row["test"] for row in rows.values()} == {"test"}
    assert cleaning_table.read(run).equals(table)  # type: ignore[union-attr]
    assert "acc-sgd-ie" in cleaning_table.as_text(table)


def test_truth_and_oracle_are_shown_where_they_are_known(tmp_path: Path, run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    import pyarrow as pa

    info = pa.table({"corrupted": [i < 8 for i in range(48)]})
    monkeypatch.setattr(la.Run, "sample_info", lambda self: info)
    la.score(run, "loo", ray_address=None, check=0)
    table = la.clean(run, "loo", [8 / 48, 0.5], seeds=2, ray_address=None, controls=("none", "oracle"), save=False)
    rows = {(row["method"], round(row["fraction"], 2)): row for row in table.to_pylist()}
    assert list(rows) == [("none", 0.0), ("loo", 0.17), ("loo", 0.5), ("oracle", 0.17), ("oracle", 0.5)]
    assert rows["oracle", 0.5]["n_removed"] == 8  # no more than there are
    assert rows["oracle", 0.17]["losses"] == rows["oracle", 0.5]["losses"]


def test_the_samples_named_to_be_dropped_are_those_that_were_dropped(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    plans: list[Any] = []
    plan = cleaning._plan
    monkeypatch.setattr(cleaning, "_plan", lambda *words, **more: plans.append(plan(*words, **more)) or plans[-1])
    scores = la.score(run, "sgd-ie", ray_address=None, save=False)
    assert scores.truths  # which stand in the places of estimates, and are none of what ranks them
    table = la.clean(run, "sgd-ie", [0.25], seeds=2, ray_address=None, controls=("none",), save=False)
    named = exports.dropped(run, scores, table.to_pylist()[-1]["n_removed"])
    assert frozenset(named) == plans[0]["sgd-ie", 0.25][0]
    estimates = scores.by_removal("estimate")
    assert named == sorted(range(48), key=lambda i: estimates[(i,)])[:12]


def test_gains_are_paired_and_intervals_are_students(run: la.Run) -> None:
    table = la.clean(run, "sgd-ie", [0.1], seeds=3, ray_address=None, controls=("none",), save=False)
    none, cleaned = table.to_pylist()
    gains = np.array(cleaned["accuracies"]) - np.array(none["accuracies"])
    low, high = stats.t.interval(0.95, 2, loc=gains.mean(), scale=stats.sem(gains))
    assert (cleaned["gain"], cleaned["gain_low"], cleaned["gain_high"]) == pytest.approx((gains.mean(), low, high))
    assert none["gain"] == 0
    assert len(set(none["losses"])) == 3  # three seeds, three trainings


def test_retraining_is_training_on_what_is_kept(run: la.Run) -> None:
    """Against a plain loop with torch.optim over the same initial parameters and the same order."""
    dropped = frozenset({1, 5, 40})
    found = retrain(run, Retraining(3, [frozenset(), dropped]), memory=2**28)
    module = run.module()
    theta, position = fresh_parameters(run, Replay(run), 3), 0
    with torch.no_grad():
        for p in module.parameters():
            p.copy_(theta[position : position + p.numel()].view_as(p))
            position += p.numel()
    module = module.double().train()
    x, y = classified(48).tensors
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.5)
    generator = torch.Generator().manual_seed(3)
    order: list[int] = []
    while len(order) < 8 * 48:
        order += [i for i in torch.randperm(48, generator=generator).tolist() if i not in dropped]
    for t in range(48):
        rows = order[8 * t : 8 * t + 8]
        for group in optimizer.param_groups:
            group["lr"] = run.steps[t].hyperparameters["lr"]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module.net(x[rows]), y[rows]).backward()
        optimizer.step()
    expected = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    torch.testing.assert_close(found[1], expected, rtol=1e-9, atol=1e-12)
    assert not torch.allclose(found[0], found[1])


def test_workers_give_the_same_table(run: la.Run, local_ray: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cleaning, "TRAININGS_AT_ONCE", 3)  # several pieces of each seed
    here, there = (
        la.clean(
            run,
            "sgd-ie",
            [0.05, 0.1, 0.2],
            seeds=2,
            ray_address=address,
            controls=("none", "random", "validation added"),
            save=False,
        )
        for address in (None, "local")
    )
    assert here.equals(there)


def test_a_repeated_command_trains_only_what_is_missing(tmp_path: Path, run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(run.path, tmp_path / "run", ignore=shutil.ignore_patterns("shards", "cleaning.parquet"))
    trained: list[int] = []
    retrained = cleaning.retrain

    def counted(run: la.Run, piece: Retraining, *arguments: Any) -> torch.Tensor:
        if len(trained) == dies_at:
            raise KeyboardInterrupt
        trained.append(len(piece.dropped))
        return retrained(run, piece, *arguments)

    monkeypatch.setattr(cleaning, "retrain", counted)
    arguments: dict[str, Any] = {"ray_address": None, "controls": ("none", "random")}
    dies_at = 1
    with pytest.raises(KeyboardInterrupt):
        la.clean(tmp_path / "run", "sgd-ie", [0.1], seeds=2, **arguments)
    assert trained == [3]
    dies_at = -1
    first = la.clean(tmp_path / "run", "sgd-ie", [0.1], seeds=2, **arguments)
    assert trained == [3, 3]  # the seed that was done is kept
    assert la.clean(tmp_path / "run", "sgd-ie", [0.1], seeds=2, **arguments).equals(first)
    assert trained == [3, 3]
    more = la.clean(tmp_path / "run", "sgd-ie", [0.1, 0.2], seeds=3, **arguments)
    assert trained == [3, 3, 2, 2, 5]
    fresh = la.clean(tmp_path / "run", "sgd-ie", [0.1, 0.2], seeds=3, save=False, **arguments)
    np.testing.assert_allclose(np.array(more["losses"].to_pylist()), np.array(fresh["losses"].to_pylist()), rtol=1e-9)
    la.clean(tmp_path / "run", "sgd-ie", [0.1], seeds=2, test="val", **arguments)
    assert trained == [3, 3, 2, 2, 5, 5, 5, 5, 3, 3]  # another test is another question


def test_a_module_without_classes_gains_in_loss(tmp_path: Path) -> None:
    squared = record(tmp_path / "run", make(loss="squared", optimizer={"lr": 0.02}))
    with pytest.warns(UserWarning, match="tested on val, which the rankings have seen"):
        table = la.clean(squared, "sgd-ie", [0.1], seeds=2, ray_address=None)
    none, *_ = table.to_pylist()
    (cleaned,) = (row for row in table.to_pylist() if row["method"] == "sgd-ie")
    assert {row["method"] for row in table.to_pylist()} == {"none", "random", "loss", "self-influence", "validation", "sgd-ie"}
    assert none["accuracy"] is None
    assert cleaned["gain"] == pytest.approx(np.mean(np.array(none["losses"]) - np.array(cleaned["losses"])))


CALLS: dict[str, tuple[dict[str, Any], str]] = {
    "fraction": ({"fractions": [1.5]}, "fraction 1.5 cannot be removed"),
    "method": ({"method": "magic"}, "no method 'magic'"),
    "control": ({"controls": ["luck"]}, "no control 'luck'"),
    "seeds": ({"seeds": 1}, "seeds=1 gives no interval"),
    "query": ({"test": "nowhere"}, "no query 'nowhere'"),
}


@pytest.mark.parametrize("case", CALLS)
def test_clear_errors(run: la.Run, case: str) -> None:
    options, message = CALLS[case]
    with pytest.raises(la.RequestError, match=message):
        la.clean(run, ray_address=None, **options)


def test_a_module_that_cannot_be_built_anew(tmp_path: Path) -> None:
    run = record(tmp_path / "run", StepOnly().double(), data())
    run.manifest["module"]["class"] = "nowhere:Net"
    with pytest.raises(la.RunError, match="cannot be imported here"):
        la.clean(run, "sgd-ie", ray_address=None, test="val", controls=("none",))


def test_what_was_never_trained_on_is_neither_dropped_nor_trained_on(tmp_path: Path) -> None:
    loader = DataLoader(classified(48), 8, sampler=list(range(10, 42)))
    run = record(tmp_path / "run", LinearNet(hidden=4).double(), loader, max_epochs=4)
    run.add_query("test", [classified(60, seed=3).tensors])
    (theta,) = retrain(run, Retraining(0, [frozenset()]), 2**30)
    without = retrain(run, Retraining(0, [frozenset(range(10)) | frozenset(range(42, 48))]), 2**30)[0]
    assert torch.equal(theta, without)  # to drop what was never there changes nothing
    table = la.clean(run, "sgd-ie", [0.25], seeds=2, ray_address=None).to_pylist()
    whole = ("none", "validation added")
    assert {row["n_removed"] for row in table if row["method"] not in whole} == {8}  # a quarter of the 32
    with pytest.raises(la.RunError, match="all 32 samples the run was trained on are dropped"):
        retrain(run, Retraining(0, [frozenset(range(10, 42))]), 2**30)


def test_methods_are_compared_seed_by_seed(run: la.Run) -> None:
    table = la.clean(run, ["acc-sgd-ie", "sgd-ie"], [8 / 48], seeds=4, ray_address=None)
    rows = {row["method"]: row for row in table.to_pylist() if row["method"] != "none"}
    for one in rows.values():
        others = set(rows) - {one["method"]} if one["method"] != "validation added" else set()
        assert {other["method"] for other in one["against"]} == others
        for other in one["against"]:
            better = np.array(one["accuracies"]) - np.array(rows[other["method"]]["accuracies"])
            reach = stats.t.ppf(0.975, 3) * stats.sem(better)
            assert other["difference"] == pytest.approx(better.mean())
            assert other["difference_high"] - other["difference_low"] == pytest.approx(2 * reach)
    text = cleaning_table.as_text(table)
    assert "paired differences in gain:\n  acc-sgd-ie at 16.6667 % against " in text
    assert "Intervals: 95 %, by Student's t over the seeds" in text
    assert max(map(len, text.splitlines())) <= 100


def test_an_accuracy_is_between_0_and_1() -> None:
    row = cleaning_table.row(
        ("loss", 0.1), 3, np.zeros(3), np.array([1.0, 1.0, 0.9]), np.zeros(3), np.array([0.9, 1.0, 0.9]), "t"
    )
    assert 0 <= row["accuracy_low"] < row["accuracy"] < row["accuracy_high"] == 1.0
    assert row["gain_high"] > row["gain"]


def test_controls_that_are_missing_say_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    run = record(tmp_path / "run", make(loss="squared", optimizer={"lr": 0.02}))
    run.add_query("test", [data("squared", n=9, seed=4).tensors])
    text = " ".join(cleaning_table.as_text(la.clean(run, "sgd-ie", [0.1], seeds=2, ray_address=None)).split())
    assert "cleanlab is left out: it needs class probabilities, and the module has no forward." in text
    assert "oracle is left out: it is not known which samples are corrupted" in text
    assert "loo is left out: not all samples were retrained without" in text
    monkeypatch.setitem(sys.modules, "cleanlab.rank", None)
    assert "the package cleanlab is not installed" in cleaning_table.as_text(
        la.clean(run, "sgd-ie", [0.1], seeds=2, ray_address=None)
    )


def test_a_ranking_is_that_of_the_method_as_usual(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=6), data(n=60))
    odd = la.score(run, "sgd-ie", readout="exact", dtype="float64", ray_address=None, check=0)
    other = la.Query("val", [data(n=9, seed=4).tensors])
    la.score(run, "acc-sgd-ie", query=other, ray_address=None, check=0)
    for method in ("sgd-ie", "acc-sgd-ie"):
        expected = np.argsort(la.score(run, method, ray_address=None, check=0, save=False).values, kind="stable")
        assert np.array_equal(cleaning._ranking([run], method, "end", ray_address=None, progress=False)[1], expected)
    assert len(odd) == 60


def test_rankings_along_the_run_and_of_several_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    runs = [record(tmp_path / f"run-{i}", make(i, hidden=4), data(n=60), seed=i) for i in range(2)]
    for at in ("end", "along"):
        la.score(runs[0], "loo", ray_address=None, at=at)
    options: dict[str, Any] = {
        "fractions": [0.1],
        "seeds": 2,
        "ray_address": None,
        "test": "val",
        "controls": ["none", "loss", "loo"],
    }
    mean = la.score(runs, "sgd-ie", ray_address=None, check=0, at="along")
    order = np.argsort(mean.values, kind="stable")
    table = la.clean(runs, "sgd-ie", at="along", **options)
    assert [row["method"] for row in table.to_pylist()] == ["none", "sgd-ie along, 2 runs", "loss", "loo along"]
    alone = la.clean(runs[0], "sgd-ie", **options)
    assert [row["method"] for row in alone.to_pylist()] == ["none", "sgd-ie", "loss", "loo"]
    # The trainings without the same samples are the same.
    truth = controls.stored_values(runs[0], "loo", "along")
    assert truth is not None
    for name, removed in (("sgd-ie along, 2 runs", order), ("loo along", np.argsort(truth))):
        dropped = [frozenset(removed[:6].tolist())]
        theta = retrain(runs[0], Retraining(0, dropped), 2**30)
        loss = runs[0].query("val").values(Replay(runs[0]).objective, theta)
        row = next(row for row in table.to_pylist() if row["method"] == name)
        assert row["losses"][0] == pytest.approx(float(loss[0]), rel=1e-9)
    text = cleaning_table.as_text(table)
    assert "sgd-ie along, 2 runs at 10 % against loss" in " ".join(text.split())
    assert "Rankings by influence" in text
    assert len({line.index(" %") for line in text.splitlines()[2:5] if "%" in line}) == 1  # columns are aligned
    stored = la.clean(runs[0], [], at=4, fractions=[0.1], seeds=2, ray_address=None, test="val", controls=["loss", "loo"])
    assert "score with method='loo' and at='4' first" in cleaning_table.as_text(stored)
    paths = [run.path for run in runs]
    main(
        ["clean", *paths, "--method", "sgd-ie", "--fractions", "0.1", "--seeds=2", "--at=4", "--ray-address=null", "--test=val"]
    )
    assert "sgd-ie at 4, 2 runs " in capsys.readouterr().out
    with pytest.raises(la.RequestError, match="is no run"):
        la.clean([])
