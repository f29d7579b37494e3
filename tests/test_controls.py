"""The controls beside a ranking: which samples each would drop, in which order."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from problems import CLASSES, FEATURES, Net, data, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.judge import cleaning
from lightning_acc.judge.controls import rankings
from lightning_acc.judge.fresh_training import Retraining, retrain

N = 30
WRONG = (3, 7, 12, 21, 28)
MEMORY = 2**28


class Classifier(Net):
    """Gives logits when called, and drops out some of what it sees while it trains."""

    def __init__(self) -> None:
        super().__init__(hidden=6, dropout=0.2, optimizer={"lr": 0.3})

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def labelled() -> TensorDataset:
    """Separable classes, five labels wrong."""
    generator = torch.Generator().manual_seed(4)
    labels = torch.arange(N) % CLASSES
    x = 3.0 * torch.eye(FEATURES)[labels] + 0.3 * torch.randn(N, FEATURES, generator=generator)
    labels[list(WRONG)] = (labels[list(WRONG)] + 1) % CLASSES
    return TensorDataset(x.double(), labels)


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    torch.manual_seed(0)
    path = tmp_path_factory.mktemp("controls") / "run"
    loaders = DataLoader(labelled(), 10, shuffle=True), DataLoader(data(n=20, seed=9), 20)
    trainer(la.TrajectoryRecorder(path), max_epochs=10).fit(Classifier().double(), *loaders)
    return la.Run(path)


@pytest.fixture
def run(recorded: la.Run, tmp_path: Path) -> la.Run:
    shutil.copytree(recorded.path, tmp_path / "run")
    return la.Run(tmp_path / "run")


@pytest.fixture
def dropped(monkeypatch: pytest.MonkeyPatch) -> list[Retraining]:
    """Every set of samples that ``clean`` trains without, as it does."""
    trained: list[Retraining] = []
    retrained = cleaning.retrain

    def noted(run: la.Run, piece: Retraining, *arguments: Any) -> Tensor:
        trained.append(piece)
        return retrained(run, piece, *arguments)

    monkeypatch.setattr(cleaning, "retrain", noted)
    return trained


def clean(run: la.Run, fractions: list[float], *controls: str, method: Any = (), seeds: int = 2) -> None:
    options: dict[str, Any] = {"ray_address": None, "test": "val", "save": False}
    la.clean(run, method, fractions, seeds, controls=("none", *controls), **options)


def probabilities(run: la.Run, theta: Tensor) -> np.ndarray:
    """Class probabilities (N, classes) of the training samples at ``theta``, in evaluation mode."""
    module = Classifier().double().eval()
    torch.nn.utils.vector_to_parameters(theta, module.parameters())
    with torch.no_grad():
        found: np.ndarray = module(labelled().tensors[0]).softmax(1).numpy()
    return found


def descending(values: np.ndarray) -> list[int]:
    order = sorted(range(len(values)), key=lambda i: values[i], reverse=True)
    assert values[order[0]] > values[order[-1]]
    return order


def test_those_of_highest_final_loss_come_first(run: la.Run, dropped: list[Retraining]) -> None:
    labels = labelled().tensors[1].numpy()
    losses = -np.log(probabilities(run, run.parameters(run.n_steps))[np.arange(N), labels])
    expected = descending(losses)
    assert rankings(run, ["loss"], MEMORY)["loss"].tolist() == expected
    clean(run, [0.1, 0.5], "loss")
    assert [piece.dropped for piece in dropped] == [[frozenset(), frozenset(expected[:3]), frozenset(expected[:15])]] * 2


def test_those_of_lowest_label_quality_come_first(run: la.Run) -> None:
    """cleanlab's adjusted margin: of the given label before the likeliest other, by a model that has not seen the sample."""
    labels = labelled().tensors[1].numpy()
    fold_of = np.random.default_rng(0).permutation(N) % 5
    predicted = np.zeros((N, CLASSES))
    for fold in range(5):
        held_out = np.flatnonzero(fold_of == fold)
        (theta,) = retrain(run, Retraining(0, [frozenset(held_out.tolist())]), MEMORY)
        predicted[held_out] = probabilities(run, theta)[held_out]
    usual = np.array([predicted[labels == label, label].mean() for label in range(CLASSES)])  # confidence of each class
    adjusted = predicted - usual + usual.max()
    adjusted /= adjusted.sum(1, keepdims=True)
    given = np.eye(CLASSES, dtype=bool)[labels]
    quality = adjusted[given] - np.where(given, -np.inf, adjusted).max(1)
    order = rankings(run, ["cleanlab"], MEMORY)["cleanlab"].tolist()
    assert order == descending(-quality)
    assert set(order[: len(WRONG)]) == set(WRONG)


def test_random_samples_are_others_for_each_seed_and_the_same_for_the_same(run: la.Run, dropped: list[Retraining]) -> None:
    clean(run, [0.2, 0.5], "random", seeds=4)
    first = list(dropped)
    assert [piece.seed for piece in first] == [0, 1, 2, 3]
    for piece in first:
        nothing, fewer, more = piece.dropped
        assert (len(nothing), len(fewer), len(more)) == (0, 6, 15)
        assert fewer < more  # one order for all fractions
    assert len({piece.dropped[1] for piece in first}) == 4
    assert len({piece.dropped[2] for piece in first}) == 4
    assert len(frozenset.union(*(piece.dropped[2] for piece in first))) > 20  # from all of the samples
    dropped.clear()
    clean(run, [0.2, 0.5], "random", seeds=4)
    assert dropped == first


def test_the_oracle_drops_those_known_to_be_corrupted_and_no_others(
    run: la.Run, dropped: list[Retraining], monkeypatch: pytest.MonkeyPatch
) -> None:
    info = pa.table({"corrupted": [i in WRONG for i in range(N)]})
    monkeypatch.setattr(la.Run, "sample_info", lambda self: info)
    assert rankings(run, ["oracle"], MEMORY)["oracle"].tolist() == list(WRONG)
    clean(run, [0.1, 0.5], "oracle")
    assert dropped[0].dropped == [frozenset(), frozenset(WRONG[:3]), frozenset(WRONG)]


def test_methods_and_the_truth_drop_those_of_lowest_score(run: la.Run, dropped: list[Retraining]) -> None:
    assert "loo" not in rankings(run, ["loo"], MEMORY)
    la.score(run, "loo", range(N - 1), ray_address=None, check=0)
    assert "loo" not in rankings(run, ["loo"], MEMORY)  # not complete
    truth = la.score(run, "loo", ray_address=None, check=0).values
    assert rankings(run, ["loo"], MEMORY)["loo"].tolist() == descending(-truth)
    estimate = descending(-la.score(run, "sgd-ie", ray_address=None, save=False, check=0).values)
    clean(run, [0.2], "loo", method="sgd-ie")
    assert set(dropped[0].dropped) == {frozenset(), frozenset(estimate[:6]), frozenset(descending(-truth)[:6])}
