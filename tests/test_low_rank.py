"""acc-low-rank: with a whole basis it is ACC-SGD-IE, without its correction SGD-IE; between them it is close at a low rank."""

from __future__ import annotations

import mmap
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import FEATURES, N, Net, StepOnly, asked, data, make, record
from torch import nn

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import back, basis, prices
from lightning_acc.methods.low_rank.back import sweep_back
from lightning_acc.methods.low_rank.tracked import tracked
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring import work
from lightning_acc.scoring.trust.figures import rmse, spearman

ROUND_OFF = 1e-12
EVERYONE = [(i,) for i in range(N)]
SGD: list[dict[str, Any]] = [
    {},
    {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "lr": 0.05},
    {"momentum": 0.5, "dampening": 0.3, "lr": 0.1},
]


def whole(run: la.Run, directions: int | None = None, removals: list[Any] | None = None, **options: Any) -> la.Scores:
    directions = run.n_parameters if directions is None else directions
    return la.score(run, "acc-low-rank", removals, directions=directions, ray_address=None, save=False, **options, check=0)


def exact(run: la.Run, method: str = "acc-sgd-ie", removals: list[Any] | None = None, **options: Any) -> la.Scores:
    return la.score(run, method, removals, ray_address=None, save=False, **options, check=0)


@pytest.mark.parametrize("optimizer", SGD)
@pytest.mark.parametrize(("loss", "hidden"), [("squared", 0), ("cross-entropy", 0), ("cross-entropy", 4)])
def test_a_whole_basis_is_acc_sgd_ie_and_no_correction_is_sgd_ie(
    tmp_path: Path, loss: str, hidden: int, optimizer: dict[str, Any]
) -> None:
    run = record(tmp_path / "run", make(hidden=hidden, loss=loss, optimizer=optimizer, decay_lr=0.7), data(loss))
    found = whole(run, keep_shifts=True)
    truth = exact(run, keep_shifts=True)
    assert found.shifts is not None
    assert truth.shifts is not None
    torch.testing.assert_close(found.shifts, truth.shifts, rtol=0, atol=ROUND_OFF)
    np.testing.assert_allclose(found.values, truth.values, rtol=0, atol=ROUND_OFF)
    linear = whole(run, readout="linear").values
    np.testing.assert_allclose(linear, exact(run, readout="linear").values, rtol=0, atol=ROUND_OFF)

    first = exact(run, "sgd-ie").values
    for directions in (0, 3, run.n_parameters):
        replay, question = Replay(run), asked(run)
        with sweep_back(replay, question, lambda _: None) as back:
            passed = tracked(replay, back, basis.find(back.places, directions), EVERYONE, question, exactly=0)
        np.testing.assert_allclose(passed.first.numpy(), first, rtol=0, atol=ROUND_OFF)
        assert np.abs(passed.scores.numpy() - first).max() > 1e-3 * np.abs(first).max()  # there is a correction


class _Twice(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(FEATURES, FEATURES)
        self.out = nn.Linear(FEATURES, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.out(torch.tanh(self.layer(torch.tanh(self.layer(x)))))


class Twice(Net):
    """Calls its layer twice, so that its gradient is no single outer product."""

    def __init__(self) -> None:
        super().__init__()
        self.net = _Twice()  # type: ignore[assignment]


class Frozen(Net):
    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.net[0].requires_grad_(False)


class WithLayerNorm(Net):
    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.net.insert(1, nn.LayerNorm(4))


class StepAlone(StepOnly):
    def __init__(self) -> None:
        super().__init__()


@pytest.mark.parametrize(
    "module", [Twice, Frozen, WithLayerNorm, StepAlone, lambda: Net(hidden=4, dropout=0.3)], ids=lambda module: module.__name__
)
def test_any_module_is_followed(tmp_path: Path, module: Any) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", module().double())
    np.testing.assert_allclose(whole(run).values, exact(run).values, rtol=0, atol=ROUND_OFF)


def test_groups_the_empty_removal_and_samples_no_step_saw(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4), data(n=30), max_epochs=1, limit_train_batches=3)
    seen = set(torch.cat([step.sample_ids for step in run.steps]).tolist())
    unseen = next(i for i in range(30) if i not in seen)
    removals = [[], [unseen], [0, 1, 2, 3, 4, 5], sorted(seen)[:2]]
    found = whole(run, removals=removals)
    assert found.values[:2].tolist() == [0.0, 0.0]
    np.testing.assert_allclose(found.values, exact(run, removals=removals).values, rtol=0, atol=ROUND_OFF)
    assert whole(run, removals=[[unseen]], directions=2).values.tolist() == [0.0]


def test_a_sample_that_is_seen_twice_in_a_batch(tmp_path: Path) -> None:
    sampler = [0, 0, 1, 2, 3, 3, 3, 4, 0, 5, 6, 7]
    loader = torch.utils.data.DataLoader(data(n=8), 4, sampler=sampler)
    run = record(tmp_path / "run", make(hidden=4), loader)
    np.testing.assert_allclose(whole(run).values, exact(run).values, rtol=0, atol=ROUND_OFF)


def test_a_low_rank_is_close_and_says_how_far(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=16, activation="gelu"), data(n=60), batch_size=10, max_epochs=6)
    truth, reference = exact(run, "loo").values, exact(run).values
    errors = {directions: rmse(whole(run, directions).values, reference) for directions in (20, 60)}
    assert errors[60] < errors[20] < 0.5 * rmse(exact(run, "sgd-ie").values, truth)
    chosen = la.score(run, "acc-low-rank", ray_address=None, save=False, check=0)
    assert rmse(chosen.values, truth) < 1.3 * rmse(reference, truth)
    told = [whole(run, directions).conditions["shift_error"] for directions in (20, 60)]
    assert told[1] < told[0]


def test_shifts_that_are_too_rough_are_not_used(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=8), data(n=40), batch_size=4, max_epochs=8)
    for readout in ("exact", "linear"):
        with pytest.warns(UserWarning, match=r"In 0 directions .* too rough \(relative error .*its scores are those of sgd-ie"):
            rough = whole(run, 0, readout=readout)
        assert rough.conditions["fallback"] == "sgd-ie"
        assert rough.conditions["shift_error"] > 1
        np.testing.assert_allclose(rough.values, exact(run, "sgd-ie").values, rtol=0, atol=ROUND_OFF)
    assert "fallback" not in whole(run).conditions


def test_the_basis_holds_the_top_eigenvectors_of_the_averaged_hessian(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(basis, "ITERATIONS", 40)
    run = record(tmp_path / "run", make(hidden=4))
    replay, state, places = Replay(run), Replay(run).initial, []
    for t in range(len(replay)):
        places.append((replay.step(t), state))
        state = replay.step(t)(state)
    identity = torch.eye(run.n_parameters, dtype=torch.float64)
    hessian = sum(step.at(state).hessian_product(identity) for step, state in places) / len(places)
    values, vectors = torch.linalg.eigh(hessian)  # type: ignore[arg-type]
    order = values.abs().argsort(descending=True)
    found = basis.find(places, 3)
    torch.testing.assert_close(found.values, values[order[:3]], rtol=1e-3, atol=1e-6)
    overlap = (found.vectors.T @ vectors[:, order[:3]]).abs()
    torch.testing.assert_close(overlap, torch.eye(3, dtype=torch.float64), rtol=0, atol=0.05)
    assert found.left == pytest.approx(float(values.abs()[order[3]]), rel=0.05)
    enough = float(values.abs()[order[1]] * 0.99)
    assert basis.find(places, 3, enough).directions == 2


def test_pieces_are_the_whole(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    each, at_a_step = prices.bytes_needed(Replay(run))
    passes = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring, "compute", lambda job, part, *rest: passes.append(len(part)) or work.compute(job, part, *rest))
        found = whole(run, 5, memory_gb=(at_a_step + 10 * each) / 2**30)
    assert passes == [8, 8, 8]
    np.testing.assert_allclose(found.values, whole(run, 5).values, rtol=1e-9, atol=1e-13)
    with pytest.raises(la.RequestError, match=r"needs about .* GB for a single removal .* give memory_gb="):
        whole(run, 5, memory_gb=at_a_step / 2**30)


def test_stored_scores_in_other_directions_are_not_taken(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    for directions in (None, 4, 9):
        for reused in (0, N):
            found = la.score(run, "acc-low-rank", directions=directions, readout="linear", ray_address=None, check=0)
            assert found.conditions["reused"] == reused
            assert found.conditions["directions"] == ("chosen" if directions is None else str(directions))
            assert int(found.conditions["directions_used"]) <= (directions or run.n_parameters)
    names = {path.name for path in (tmp_path / "run/scores").iterdir()}
    assert names == {
        "acc-low-rank.linear.parquet",
        "acc-low-rank.4-directions.linear.parquet",
        "acc-low-rank.9-directions.linear.parquet",
    }


class Grouped(Net):
    def configure_optimizers(self) -> Any:
        weights, biases = ([p for p in self.parameters() if (p.ndim > 1) is matrix] for matrix in (True, False))
        return torch.optim.SGD([{"params": weights, "weight_decay": 0.1}, {"params": biases}], lr=0.1)


def test_parameter_groups_of_different_settings_are_not_tracked(tmp_path: Path) -> None:
    run = record(tmp_path / "run", Grouped().double())
    for options in ({"directions": 3}, {"keep_shifts": True}):
        (given,) = (f"{name}={value}" for name, value in options.items())
        with pytest.raises(la.RequestError, match=f"{given} of .*parameter groups have different hyper-parameters. Leave it"):
            la.score(run, "acc-low-rank", ray_address=None, save=False, check=0, **options)


@pytest.mark.parametrize(
    "bad",
    [
        {"directions": -1},
        {"directions": True},
        {"followed": 2.5},
        {"directions": 3, "method": "sgd-ie"},
        {"directions": 3, "followed": 3},
    ],
)
def test_options_that_are_none(tmp_path: Path, bad: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make())
    with pytest.raises(la.RequestError, match=r"give a whole one, 0 or more|is no option of sgd-ie|give one of them"):
        la.score(run, **{"method": "acc-low-rank", **bad}, ray_address=None, check=0)


def test_the_most_harmful_are_confirmed_by_retraining(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    found = la.score(run, "acc-low-rank", ray_address=None, confirm=3, save=False, check=0)
    truth = exact(run, "loo").by_removal()
    order = [found.removals[i] for i in np.argsort(found.estimates)]
    for removal, score, source in zip(found.removals, found.values.tolist(), found.table["source"].to_pylist(), strict=True):
        assert source == ("loo" if removal in order[:3] else "estimate")
        assert source == "estimate" or score == pytest.approx(truth[removal], rel=1e-9)
    with pytest.raises(la.RequestError, match="confirm=-1 is no number of removals"):
        la.score(run, confirm=-1, ray_address=None, check=0)


def test_uncertainty_follows_the_true_error(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=8, activation="gelu"), data(n=60), batch_size=10, max_epochs=8)
    found = la.score(run, "acc-low-rank", ray_address=None, check=0)
    error = np.abs(found.values - exact(run, "loo").values)
    uncertainty = found.table["uncertainty"].to_numpy()
    assert spearman(uncertainty, error) > 0.3
    assert np.mean(error <= uncertainty) > 0.8
    again = la.score(run, "acc-low-rank", [5, 3], ray_address=None, check=0)  # as stored
    assert again.table["uncertainty"].to_pylist() == uncertainty[[5, 3]].tolist()


def test_what_is_kept_in_a_file_is_no_memory_of_the_process(monkeypatch: pytest.MonkeyPatch) -> None:
    def resident() -> int:
        return int(Path("/proc/self/statm").read_text().split()[1]) * mmap.PAGESIZE

    monkeypatch.setattr(back, "HELD", 2**22)
    like = torch.zeros(2**17, dtype=torch.float64)
    with tempfile.TemporaryFile() as file:
        rows = back.Scratch(file, 100, like)
        before = resident()
        for i in range(100):
            rows[i] = torch.full_like(like, i)
            rows[i].add_(0.5)
        assert [float(rows[i].mean()) for i in range(100)] == [i + 0.5 for i in range(100)]
        assert resident() - before < 3 * 2**24  # of 100 MiB
    assert len(rows) == 100
