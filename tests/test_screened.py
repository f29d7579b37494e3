"""acc-low-rank, screened: those that are followed score as ACC-SGD-IE does, to round-off; the others are modelled on them."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, Net, data, make, record

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import budget, entry, screened
from lightning_acc.methods.low_rank.entry import LowRank
from lightning_acc.methods.low_rank.prices import Prices
from lightning_acc.scoring.trust.figures import rmse, spearman

ROUND_OFF = 1e-12


def found(run: la.Run, followed: int | None = None, removals: list[Any] | None = None, **options: Any) -> la.Scores:
    followed = N if followed is None else followed
    options = {"ray_address": None, "save": False, **options}
    return la.score(run, "acc-low-rank", removals, followed=followed, **options, check=0)


def exact(run: la.Run, method: str = "acc-sgd-ie", removals: list[Any] | None = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, ray_address=None, save=False, **options, check=0)


@pytest.mark.parametrize("readout", ["exact", "linear"])
@pytest.mark.parametrize(
    "optimizer",
    [
        {},
        {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "lr": 0.05},
        {"momentum": 0.5, "dampening": 0.3, "lr": 0.1},
    ],
)
def test_whoever_is_followed_scores_as_acc_sgd_ie_does(tmp_path: Path, optimizer: dict[str, Any], readout: str) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer, decay_lr=0.7), accumulate_grad_batches=2)
    truth, first = exact(run, readout=readout).values, exact(run, "sgd-ie").values
    everyone = found(run, N, readout=readout)
    np.testing.assert_allclose(everyone.values, truth, rtol=0, atol=ROUND_OFF)
    assert (everyone.conditions["followed_exactly"], everyone.conditions["modelled"]) == (N, 0)

    some = found(run, 10, readout=readout)
    influential = np.argsort(-np.abs(first), kind="stable")[:10]
    np.testing.assert_allclose(some.values[influential], truth[influential], rtol=0, atol=ROUND_OFF)
    assert some.conditions["followed_exactly"] == 10

    none = found(run, 0, readout=readout)
    np.testing.assert_allclose(none.values, first, rtol=0, atol=ROUND_OFF)
    assert np.abs(truth - first).max() > 1e-3 * np.abs(first).max()  # there is something to correct


class Grouped(Net):
    """Weights and biases, the last layer and the others have settings of their own."""

    def configure_optimizers(self) -> Any:
        first, last = (list(layer.parameters()) for layer in (self.net[0], self.net[3]))
        groups = [
            {"params": first[:1], "weight_decay": 0.1},
            {"params": first[1:], "momentum": 0.0, "lr": 0.1},
            {"params": last, "lr": 0.02, "nesterov": True},
        ]
        optimizer = torch.optim.SGD(groups, lr=0.05, momentum=0.9)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


class InTurn(Grouped):
    """The first layer rests in every other epoch."""

    def on_train_epoch_start(self) -> None:
        self.net[0].requires_grad_(self.current_epoch % 2 == 1)

    def on_train_epoch_end(self) -> None:
        self.requires_grad_(True)


@pytest.mark.parametrize("readout", ["exact", "linear"])
@pytest.mark.parametrize("kind", [Grouped, InTurn])
def test_parameters_with_settings_of_their_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: type[Net], readout: str
) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", kind(hidden=4).double(), recorder={"frozen": "trained-later"}, max_epochs=4)
    truth, first = exact(run, readout=readout).values, exact(run, "sgd-ie").values
    everyone = found(run, N, readout=readout)
    np.testing.assert_allclose(everyone.values, truth, rtol=0, atol=ROUND_OFF)
    assert np.abs(truth - first).max() > 1e-3 * np.abs(first).max()

    some = found(run, 10, readout=readout)
    influential = np.argsort(-np.abs(first), kind="stable")[:10]
    np.testing.assert_allclose(some.values[influential], truth[influential], rtol=0, atol=ROUND_OFF)
    assert (some.conditions["followed_exactly"], some.conditions["modelled"]) == (10, 0)

    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0, "readout": readout}
    assert la.score(run, "acc-low-rank", **options).conditions["form"] == "retrained"
    monkeypatch.setattr(Prices, "retrained", lambda self, n: 1e9)
    chosen = la.score(run, "acc-low-rank", **options)
    assert chosen.conditions["form"] == "screened"
    assert int(chosen.conditions["followed_exactly"]) > 0
    assert np.abs(chosen.values - truth).mean() < np.abs(first - truth).mean()


@pytest.mark.parametrize("module", [lambda: Net(hidden=4, dropout=0.3), lambda: Net(hidden=4)], ids=["dropout", "plain"])
def test_any_module_and_groups_are_followed(tmp_path: Path, module: Any) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", module().double(), data(n=30), max_epochs=2, limit_train_batches=2)
    seen = set(torch.cat([step.sample_ids for step in run.steps]).tolist())
    unseen = next(i for i in range(30) if i not in seen)
    removals = [[], [unseen], [0, 1, 2, 3], sorted(seen)[:2], [sorted(seen)[-1]]]
    some = found(run, removals=removals)
    assert some.values[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(some.values, exact(run, removals=removals).values, rtol=0, atol=ROUND_OFF)


def test_where_every_sample_is_seen_once_the_model_is_exact(tmp_path: Path) -> None:
    # No shift meets its own Hessian again, so that all that SGD-IE misses is the query's curvature along the last visit.
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9, "lr": 0.05}), max_epochs=1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(screened, "FRESH_SHARE", N)
        some = found(run, 8)
    assert some.conditions["modelled"] == N - 8
    assert some.conditions["model_error"] < 1e-9
    np.testing.assert_allclose(some.values, exact(run).values, rtol=0, atol=1e-11)


def test_the_model_takes_most_of_the_error(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=16, activation="gelu"), data(n=120), batch_size=10, max_epochs=5)
    first = exact(run, "sgd-ie").values
    others = np.argsort(-np.abs(first), kind="stable")[24:]
    for readout, share in (("linear", 0.4), ("exact", 0.95)):
        truth = exact(run, readout=readout).values
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screened, "FRESH_SHARE", 120)
            some = found(run, 24, readout=readout)
        assert some.conditions["modelled"] == 96
        assert rmse(some.values[others], truth[others]) < share * rmse(first[others], truth[others])
        # What the model says of its own error, relative to the second order, holds of those that it was not fitted to.
        relative = np.linalg.norm((some.values - truth)[others]) / np.linalg.norm((truth - first)[others])
        assert relative / 3 < some.conditions["model_error"] < 3 * relative
    assert spearman(some.table["uncertainty"].to_numpy(), np.abs(some.values - exact(run, "loo").values)) > 0.3


def test_the_regression_predicts_those_it_leaves_out() -> None:
    figures = torch.randn(12, 2, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    target = figures @ torch.tensor([0.5, -2.0], dtype=torch.float64)
    coefficients, error = screened._regressed(figures, target)
    torch.testing.assert_close(coefficients, torch.tensor([0.5, -2.0], dtype=torch.float64))
    assert error < 1e-12
    target = target + torch.randn(12, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    left_out = []
    for i in range(12):
        kept = torch.arange(12) != i
        solution = torch.linalg.lstsq(figures[kept], target[kept, None]).solution[:, 0]
        left_out.append(float(target[i] - figures[i] @ solution))
    assert screened._regressed(figures, target)[1] == pytest.approx(np.linalg.norm(left_out) / float(target.norm()))
    assert screened._regressed(figures, torch.full((12,), torch.inf))[1] is None
    assert screened._regressed(torch.zeros(12, 2), torch.ones(12)) == (pytest.approx([0.0, 0.0]), pytest.approx(1.0))


def test_a_model_that_does_not_hold_is_not_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    monkeypatch.setattr(screened, "TRUSTED", 0.0)
    monkeypatch.setattr(screened, "TRUSTED_CURVES", 0.0)
    some = found(run, 9)
    assert some.conditions["curve_error"] > 0
    assert some.conditions["modelled"] == 0
    first = exact(run, "sgd-ie").values
    others = np.argsort(-np.abs(first), kind="stable")[9:]
    np.testing.assert_allclose(some.values[others], first[others], rtol=0, atol=ROUND_OFF)


def test_where_nothing_is_modelled_no_basis_is_searched(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It would cost more than all the rest."""
    run = record(tmp_path / "run", make(hidden=4))
    monkeypatch.setattr(screened.bases, "find", None)
    assert found(run, N).conditions["modelled"] == found(run, 0).conditions["modelled"] == 0


def test_late_visits_are_modelled_and_no_more_than_is_affordable() -> None:
    first, last = torch.tensor([1.0, -9.0, 3.0, -5.0, 7.0, 0.0]), torch.tensor([9, 0, 9, 5, -1, 8])
    # The followed one was last seen 9 steps before the end, the others in their order 4, 0, 0 and 1.
    for share, chosen in ((1.2, [1]), (1.35, [1, 3, 2, 0]), (1.4, [1, 3, 2, 0, 5])):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(screened, "FRESH_SHARE", share)
            found, followed = screened._chosen(first, last, 10, 1, 4)
        assert (found.tolist(), followed) == (chosen, 1)
    assert screened._chosen(first, last, 10, 9, 0)[0].tolist() == [1, 3, 2, 0, 5]


def test_a_large_run_is_screened(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    assert LowRank().settled(Replay(run), keep_shifts=False).form == "tracked"
    monkeypatch.setattr(budget, "TRAININGS", 1)
    monkeypatch.setattr(Prices, "retrained", lambda self, n: 1e9)
    assert LowRank().settled(Replay(run), keep_shifts=False).form == "screened"
    scores = la.score(run, "acc-low-rank", ray_address=None, check=0)
    assert scores.conditions["form"] == "screened"
    assert scores.conditions["readout"] == "exact"
    assert scores.conditions["followed_exactly"] == budget.FEWEST_FOLLOWED
    assert la.score(run, "acc-low-rank", ray_address=None, keep_shifts=True, check=0).conditions["form"] == "tracked"
    assert la.score(run, "acc-low-rank", ray_address=None, directions=3, check=0).conditions["form"] == "tracked"
    with pytest.raises(la.RequestError, match="the shifts of a few removals alone"):
        found(run, keep_shifts=True)
    names = {path.name for path in (tmp_path / "run/scores").iterdir()}
    assert names == {"acc-low-rank.parquet", "acc-low-rank.tracked.parquet", "acc-low-rank.3-directions.parquet"}
    row = {row["method"]: row for row in la.plan(run).table.to_pylist()}["acc-low-rank"]
    assert row["seconds"] > 0


def test_where_training_contracts_in_more_directions_than_are_affordable_it_screens(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "run", make(hidden=8), data(n=40), batch_size=4, max_epochs=8)
    monkeypatch.setattr(budget, "most_directions", lambda replay, trainings: 3)
    monkeypatch.setattr(budget, "most_followed", lambda replay, trainings, query, times: 3)
    monkeypatch.setattr(Prices, "retrained", lambda self, n: 1e9)
    monkeypatch.setattr(entry, "tracked", None)  # nothing is tracked to be thrown away
    some = la.score(run, "acc-low-rank", ray_address=None, save=False, check=0)
    told = [some.conditions[name] for name in ("form", "fallback", "directions_used", "followed_exactly")]
    assert told == ["tracked", "screened", 3, 3]
    monkeypatch.undo()
    with pytest.warns(UserWarning, match="In 3 directions .* those of sgd-ie"):
        assert (
            la.score(run, "acc-low-rank", ray_address=None, directions=3, save=False, check=0).conditions["fallback"]
            == "sgd-ie"
        )
    influential = np.argsort(-np.abs(exact(run, "sgd-ie").values), kind="stable")[:3]
    np.testing.assert_allclose(some.values[influential], exact(run).values[influential], rtol=0, atol=ROUND_OFF)


def test_little_memory_follows_fewer(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9, "lr": 0.05}))
    replay, state = Replay(run), 2 * 8 * run.n_parameters
    assert screened.counts(replay, N, 8 * 9 * state, N) == (9, 15)
    assert screened.counts(replay, N, 8 * 9 * state, 10) == (9, 15)
    assert screened.counts(replay, N, 4 * 9 * state, N) == (4, 0)
    assert screened.counts(replay, 5, 2**30, 9) == (5, 0)
    assert found(run, N, memory_gb=state / 2**30).conditions["followed_exactly"] == 1
