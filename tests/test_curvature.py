"""The curvature of a query by random directions, held against the Hessian of linear models, which Gauss-Newton's is there."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, N, data, make, record
from torch import Tensor
from torch.nn import functional as F

import lightning_acc as la
from lightning_acc.core.queries import curvature
from lightning_acc.core.replay import Replay
from lightning_acc.methods.low_rank import budget, screened

K = 4000
WITHIN = 5 * (2 / K) ** 0.5
"""Five standard deviations of the relative error of a mean of K squares."""
WEIGHTS = torch.tensor([0.3, 1.0, 2.5], dtype=torch.float64)


def tokens(z: Tensor) -> Tensor:
    """As logits (B, classes, 2), of two words a sample."""
    return torch.stack([z, 0.5 * z], 2)


LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross entropy": lambda z, y: F.cross_entropy(z, y, reduction="none"),
    "its mean": F.cross_entropy,
    "its sum": lambda z, y: F.cross_entropy(z, y, reduction="sum") / len(y),
    "weighted, smoothed": lambda z, y: F.cross_entropy(z, y, WEIGHTS, label_smoothing=0.2),
    "weighted, ignored": lambda z, y: F.cross_entropy(z, y, WEIGHTS, ignore_index=1, label_smoothing=0.1),
    "of probabilities": lambda z, y: F.cross_entropy(z, F.one_hot(y, CLASSES) * 0.8 + 0.1, WEIGHTS, label_smoothing=0.1),
    "of words": lambda z, y: F.cross_entropy(tokens(z), torch.stack([y, y.flip(0)], 1), reduction="none").mean(1),
    "of log-probabilities": lambda z, y: F.nll_loss(z.log_softmax(1), y, reduction="none"),
    "squares": lambda z, y: F.mse_loss(z, F.one_hot(y, CLASSES).to(z), reduction="none").sum(1),
    "of each class": lambda z, y: F.binary_cross_entropy_with_logits(z, F.one_hot(y, CLASSES).to(z), pos_weight=2 * WEIGHTS),
    "of counts": lambda z, y: F.poisson_nll_loss(z, y[:, None].expand_as(z).to(z)),
    "a mixture": lambda z, y: 3 * F.cross_entropy(z, y, reduction="none") + F.mse_loss(z[:, 0], y.to(z), reduction="none"),
    "a part of them": lambda z, y: F.cross_entropy(z, y, reduction="none") * (y > 0),
}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("linear") / "run", make())


def seen(run: la.Run, function: Any, number: int = K) -> tuple[Tensor | None, Tensor]:
    """Directions, and the Hessian, of a query of two batches."""
    replay = Replay(run)
    theta = replay.placed(run.snapshot(run.n_steps))
    some, others = (data(n=size, seed=7).tensors for size in (9, 5))
    query = la.Query("other", [some, others], lambda module, batch: function(module.net(batch[0]), batch[1]))
    batches = query.batches

    def value(theta: Tensor) -> Tensor:
        sums = [query.batch_sum(replay.objective, theta, leaves, structure) for leaves, structure in batches]
        total: Tensor = sum(sums[1:], sums[0]) / query.n_examples
        return total

    return curvature.directions(query, replay.objective, theta, number, seed=3), torch.autograd.functional.hessian(value, theta)


@pytest.mark.parametrize("loss", LOSSES)
def test_squares_tell_the_curvature_along_any_shift(run: la.Run, loss: str) -> None:
    found, hessian = seen(run, LOSSES[loss])
    assert found is not None
    shifts = torch.randn(6, len(hessian), dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    truth = ((shifts @ hessian) * shifts).sum(1)
    assert truth.min() > 0
    told = ((found @ shifts.T) ** 2).mean(0)
    assert float((told / truth - 1).abs().max()) < WITHIN


@pytest.mark.filterwarnings("ignore:Using a target size")
@pytest.mark.parametrize(
    "function",
    [
        lambda z, y: z.softmax(1).amax(1),
        lambda z, y: F.cross_entropy(z, y, reduction="none") - F.mse_loss(z[:, 0], y.to(z), reduction="none"),
        lambda z, y: z.sum(1) + F.cross_entropy(z.detach(), y),
        lambda z, y: F.mse_loss(z[:, 0], y[:, None].to(z), reduction="none").sum(1),
    ],
    ids=["no loss", "a difference", "a constant", "of several targets"],
)
def test_what_has_no_curvature_that_is_known_has_no_directions(run: la.Run, function: Any) -> None:
    assert seen(run, function, 2)[0] is None


def test_large_outputs_go_back_in_parts(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, _ = seen(run, LOSSES["a mixture"], 7)
    monkeypatch.setattr(curvature, "AT_ONCE_NUMBERS", 2 * 9 * (CLASSES + 1))
    parts, _ = seen(run, LOSSES["a mixture"], 7)
    torch.testing.assert_close(parts, whole, rtol=1e-12, atol=1e-15)


def error(run: la.Run, followed: int, **options: Any) -> tuple[float, la.Scores]:
    """Of those that are not followed: how far they are from ACC-SGD-IE, in what SGD-IE lacks."""
    ask: dict[str, Any] = {"ray_address": None, "check": 0, "save": False, **options}
    first, truth = (la.score(run, method, **ask).values for method in ("sgd-ie", "acc-sgd-ie"))
    some = la.score(run, "acc-low-rank", followed=followed, **ask)
    others = np.argsort(-np.abs(first), kind="stable")[followed:]
    lacking = np.linalg.norm((truth - first)[others])
    return float(np.linalg.norm((truth - some.values)[others]) / lacking), some


@pytest.mark.parametrize("at", ["end", [1, 3, 4]])
def test_those_that_are_not_followed_are_read_by_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, at: Any) -> None:
    """Where every sample is seen once, all that SGD-IE misses is the query's curvature."""
    run = record(tmp_path / "run", make(optimizer={"lr": 0.02, "momentum": 0.9}), max_epochs=1)
    monkeypatch.setattr(budget, "models", lambda *_: False)
    monkeypatch.setattr(screened, "counts", lambda replay, n, memory, followed: (followed, 0))
    assert error(run, 4, at=at)[0] > 0.9
    monkeypatch.setattr(budget, "curves", lambda *_: K)
    off, some = error(run, 8, at=at)
    assert off < WITHIN
    assert some.conditions["curve_error"] < WITHIN
    assert error(run, N - 1, at=at, readout="linear")[1].conditions.get("curve_error") is None


def test_no_more_directions_than_are_affordable(run: la.Run) -> None:
    replay = Replay(run)
    assert budget.curves(replay, 2**30, 25) == budget.MOST_CURVES
    assert budget.curves(replay, 2**30, 1e-3) == budget.curves(replay, 1, 25) == 0
