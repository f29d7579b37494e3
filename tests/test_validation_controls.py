"""The controls that are given the validation examples: a model of these alone, and these trained on too."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
import torch
from problems import CLASSES, FEATURES, Net, data, make, record, trainer
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.judge import cleaning, cleaning_table
from lightning_acc.judge.controls import rankings
from lightning_acc.judge.fresh_training import Retraining, own_samples
from lightning_acc.judge.validation import validation_losses, validation_pool, with_validation

MEMORY = 2**28
N, N_VAL, N_TEST = 120, 90, 60
ADDED = cleaning_table.ADDED


class Classifier(Net):
    """Gives logits when called."""

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out


def samples(n: int, seed: int, wrong: bool) -> tuple[TensorDataset, np.ndarray]:
    """Separable classes; systematically wrong, those of the first class on one side are given to the second."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(n) % CLASSES
    x = 3.0 * torch.eye(FEATURES)[labels] + 0.5 * torch.randn(n, FEATURES, generator=generator)
    mistaken = (labels == 0) & (x[:, 4] > 0)
    if wrong:
        labels[mistaken] = 1
    return TensorDataset(x.double(), labels), mistaken.numpy()


def recorded(path: Path, val_wrong: bool) -> la.Run:
    torch.manual_seed(0)
    module = Classifier(hidden=16, optimizer={"lr": 0.3, "momentum": 0.5}).double()
    train, val = samples(N, 0, wrong=True)[0], samples(N_VAL, 1, wrong=val_wrong)[0]
    loaders = DataLoader(train, 10, shuffle=True), DataLoader(val, 50)  # two batches of validation
    trainer(la.TrajectoryRecorder(path), max_epochs=15).fit(module, *loaders)
    run = la.Run(path)
    run.add_query("test", [samples(N_TEST, 2, wrong=False)[0].tensors])
    return run


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[bool, la.Run]:
    """By whether the validation labels are wrong too."""
    return {wrong: recorded(tmp_path_factory.mktemp("validation") / "run", wrong) for wrong in (False, True)}


def found(run: la.Run, name: str) -> float:
    """The share of the wrong labels among as many samples that the control drops first."""
    mistaken = samples(N, 0, wrong=True)[1]
    order = rankings(run, [name], MEMORY)[name]
    return float(mistaken[order[: mistaken.sum()]].mean())


def test_clean_validation_finds_systematic_mistakes_that_the_training_has_learnt(runs: dict[bool, la.Run]) -> None:
    assert found(runs[False], "validation") >= 0.9
    assert found(runs[False], "loss") <= 0.6
    assert found(runs[False], "self-influence") <= 0.6


def test_validation_that_is_wrong_in_the_same_way_finds_few(runs: dict[bool, la.Run]) -> None:
    assert found(runs[True], "validation") <= 0.5


def by_hand(run: la.Run, x: Tensor, y: Tensor, seed: int) -> Classifier:
    """A plain training on these samples by the recorded batch sizes and rates."""
    torch.manual_seed(seed)
    module = Classifier(hidden=16).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=0.3, momentum=0.5)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    for step in run.steps:
        while len(order) < len(step.sample_ids):
            order += torch.randperm(len(y), generator=generator).tolist()
        rows, order = order[: len(step.sample_ids)], order[len(step.sample_ids) :]
        for group in optimizer.param_groups:
            group["lr"] = step.hyperparameters["lr"]
        optimizer.zero_grad()
        torch.nn.functional.cross_entropy(module.net(x[rows]), y[rows]).backward()
        optimizer.step()
    return module


def losses(module: Classifier, dataset: TensorDataset) -> np.ndarray:
    with torch.no_grad():
        values: np.ndarray = module.eval().per_sample_loss(dataset.tensors).numpy()
    return values


def test_the_losses_are_those_of_plain_trainings_on_the_validation_examples(runs: dict[bool, la.Run]) -> None:
    run, train, val = runs[False], samples(N, 0, wrong=True)[0], samples(N_VAL, 1, wrong=False)[0]
    expected = np.mean([losses(by_hand(run, *val.tensors, seed), train) for seed in range(3)], axis=0)
    np.testing.assert_allclose(validation_losses(run, MEMORY), expected, rtol=1e-7, atol=1e-12)


def test_validation_added_is_a_plain_training_on_both(runs: dict[bool, la.Run]) -> None:
    run, train, val = runs[False], samples(N, 0, wrong=True)[0], samples(N_VAL, 1, wrong=False)[0]
    table = la.clean(run, (), [0.1], 3, ray_address=None, controls=("none", "random", ADDED), save=False)
    row = next(row for row in table.to_pylist() if row["method"] == ADDED)
    x, y = (torch.cat(parts) for parts in zip(train.tensors, val.tensors, strict=True))
    modules = [by_hand(run, x, y, seed) for seed in range(3)]
    test = samples(N_TEST, 2, wrong=False)[0]
    np.testing.assert_allclose(row["losses"], [losses(module, test).mean() for module in modules], rtol=1e-9)
    right = [float((module(test.tensors[0]).argmax(1) == test.tensors[1]).double().mean()) for module in modules]
    assert row["accuracies"] == pytest.approx(right)
    assert (row["fraction"], row["n_removed"], row["n_added"], row["against"]) == (0.0, 0, N_VAL, [])
    assert {other["n_added"] for other in table.to_pylist() if other["method"] != ADDED} == {0}


def test_it_is_compared_with_every_share_and_its_gain_is_paired(runs: dict[bool, la.Run]) -> None:
    table = la.clean(runs[False], "sgd-ie", [0.1, 0.2], 3, ray_address=None, controls=("none", ADDED), save=False)
    rows = table.to_pylist()
    none, added = rows[0], next(row for row in rows if row["method"] == ADDED)
    assert added["gain"] == pytest.approx(np.mean(np.subtract(added["accuracies"], none["accuracies"])))
    for row in rows:
        if row["method"] == "sgd-ie":
            (other,) = row["against"]
            assert other["method"] == ADDED
            assert other["difference"] == pytest.approx(np.mean(np.subtract(row["accuracies"], added["accuracies"])))
    text = cleaning_table.as_text(table)
    assert f"{ADDED:16} {f'+{N_VAL}':>8}" in text
    assert max(map(len, text.splitlines())) <= 100
    words = " ".join(text.split())
    assert f"nothing is dropped, and the {N_VAL} examples of val are trained on too" in words
    assert "wrong in the same way as the training's, they find much less." in words


def test_a_repeated_command_adds_the_validation_examples_once(
    runs: dict[bool, la.Run], monkeypatch: pytest.MonkeyPatch
) -> None:
    trained: list[bool] = []
    retrained = cleaning.retrain

    def counted(run: la.Run, piece: Retraining, *arguments: Any) -> Tensor:
        trained.append(piece.validation_added)
        return retrained(run, piece, *arguments)

    monkeypatch.setattr(cleaning, "retrain", counted)
    options: dict[str, Any] = {"ray_address": None, "controls": ("none", "random", ADDED)}
    first = la.clean(runs[True], (), [0.1], 2, **options)
    assert trained == [False, True] * 2
    assert la.clean(runs[True], (), [0.1], 2, **options).equals(first)
    assert len(trained) == 4


def missing(run: la.Run, *controls: str, **options: Any) -> dict[str, str]:
    options = {"test": "test", **options}
    table = la.clean(run, (), [0.2], 2, ray_address=None, controls=("random", *controls), save=False, **options)
    assert not {row["method"] for row in table.to_pylist()} & set(controls)
    told: dict[str, str] = json.loads(table.schema.metadata[b"missing"])
    return told


def test_they_are_left_out_where_the_validation_batches_are_of_another_kind(tmp_path: Path) -> None:
    x, y = data(n=9, seed=5).tensors
    with pytest.warns(UserWarning, match="no validation data"):
        run = record(tmp_path / "none", make(), validation=False)
    run.add_query("test", [(x, y)])
    reason = "the run has no query val, as training had no validation data"
    assert missing(run, "validation", ADDED) == {"validation": reason, ADDED: reason}
    other = [x, {"x": x, "y": y}, (x, y, torch.ones(9).double()), (x.float(), y.double())]
    for batch in other:
        run.add_query("val", [batch])
        told = missing(run, "validation", ADDED)
        assert set(told) == {"validation", ADDED}
        assert set(told.values()) == {"the batches of val are not of the tensors and shapes that training batches are of"}
    run.add_query("val", [(x.float(), y)])  # of another width, and a tuple: trained on as the run's own
    assert validation_pool(run, own_samples(run)).leaves["0"].dtype == torch.float64


def test_what_is_trained_on_is_not_tested_on(runs: dict[bool, la.Run]) -> None:
    reason = "it would be tested on val, the very examples it is trained on"
    assert missing(runs[False], ADDED, test="val") == {ADDED: reason}


def test_samples_that_training_never_saw_stay_out(tmp_path: Path) -> None:
    loader = DataLoader(data(), 6, sampler=list(range(4, 20)))
    pool = with_validation(record(tmp_path / "run", make(), loader))
    assert pool.usable.tolist() == [*range(4, 20), *range(24, 40)]
    assert torch.equal(pool.leaves["0"][24:], data(n=16, seed=9).tensors[0])


def test_a_table_from_before_anything_was_added_is_read(runs: dict[bool, la.Run]) -> None:
    run = runs[False]
    table = la.clean(run, (), [0.1], 2, ray_address=None, controls=("none", "random"))
    cleaning_table.write(run, table.drop_columns(["n_added"]))
    assert cleaning_table.read(run).equals(table)  # type: ignore[union-attr]
    cleaning_table.write(run, table.drop_columns(["n_removed"]))
    with pytest.raises(la.RunError, match="damaged"):
        cleaning_table.read(run)
    assert table.schema.field("n_added").type == pa.int64()
