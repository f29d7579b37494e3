"""What the page says of samples taken together: same inputs, what the model says, groups, labels and classes."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, data, trainer
from test_report import Browser, started, whole_ranking  # noqa: F401 (a fixture)
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.show import report
from lightning_acc.show.predictions import stored_matrices
from lightning_acc.studies.models import Classifier

N = 24


class Twins(pl.LightningDataModule):
    """24 samples; 5 is 3 again, with another label."""

    def __init__(self) -> None:
        super().__init__()
        x, y = data(n=N).tensors
        x[5], y[5] = x[3], (y[3] + 1) % 3
        self.train, self.val = TensorDataset(x, y), data(n=16, seed=9)

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.train, 8, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(self.val, 16)

    def describe_samples(self) -> dict[str, Any]:
        return {"label": [f"class {int(y)}" for _, y in self.train], "half": [i < N // 2 for i in range(N)]}

    def describe_examples(self, query: str) -> dict[str, Any]:
        return {"label": [f"class {int(y)}" for _, y in self.val]}


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    path = tmp_path_factory.mktemp("twins") / "run"
    pl.seed_everything(1)
    trainer(la.TrajectoryRecorder(path)).fit(Classifier(FEATURES, CLASSES, hidden=(4,), lr=0.3), datamodule=Twins())
    run = la.Run(path)
    la.score(run, "sgd-ie", ray_address=None, check=0)
    la.score(run, "acc-sgd-ie", [range(N // 2), [20, 22, 23]], ray_address=None, check=0)
    la.score_matrix(run, "sgd-ie", ray_address=None, check=0)
    return run


def test_the_same_inputs_and_what_the_model_says_are_told(run: la.Run) -> None:
    content = report.collect(run)
    assert content["same"] == [[3, 5]]
    said = next(column for column in content["columns"] if column["key"] == "@said")
    module = Classifier(FEATURES, CLASSES, hidden=(4,), lr=0.3).double()
    torch.nn.utils.vector_to_parameters(run.parameters(run.n_steps).double(), module.parameters())
    with torch.no_grad():
        expected = module(Twins().train.tensors[0].double()).argmax(-1)
    assert [said["levels"][code] for code in said["codes"]] == [f"class {int(one)}" for one in expected]


def test_a_group_is_called_by_the_word_its_samples_share_and_has_its_size(run: la.Run) -> None:
    (groups,) = report.collect(run)["groups"]
    told = {(group["name"], group["samples"]): group["ids"] for group in groups["rows"]}
    assert told == {("half yes", N // 2): list(range(N // 2)), (None, 3): [20, 22, 23]}


def test_the_effects_of_labels_on_classes_are_means_over_the_matrix(run: la.Run) -> None:
    (matrix,) = stored_matrices(run).values()
    effects = report.collect(run)["predictions"]["matrices"][0]["effects"]
    labels = np.array(Twins().describe_samples()["label"])
    classes = np.array(Twins().describe_examples("val")["label"])
    rows = labels[[removal[0] for removal in matrix.removals]]
    values = matrix.values[:, np.argsort(matrix.examples)]
    for label, means in zip(effects["labels"], effects["means"], strict=True):
        for name, mean in zip(effects["classes"], means, strict=True):
            assert mean == pytest.approx(values[rows == label][:, classes == name].mean(), rel=1e-4)
    assert set(effects["labels"]) == set(labels)


def test_groups_labels_and_twins_lead_to_their_samples(run: la.Run, started: Browser) -> None:  # noqa: F811
    started.complaints.clear()
    started.open(Path(report.write_report(run)))
    started.click("#groups tbody button[aria-label='show the samples of half yes']")
    assert sorted(whole_ranking(started)) == list(range(N // 2))
    started.click("#filters [aria-label='remove the filter by half yes']")
    labels = Twins().describe_samples()["label"]
    started.click(f"#classes [aria-label='show the samples with label {labels[3]}']")
    assert sorted(whole_ranking(started)) == [i for i in range(N) if labels[i] == labels[3]]
    started.see("document.querySelector('#sheet').scrollTop = 0")
    started.type("#search", "#3")
    started.click("#rows tr[data-sample='3']")
    assert started.see("document.querySelector('#detail .same button').textContent") == f"#5 · {labels[5]}"
    started.type("#search", "")
    started.click("#filters .filter .away")
    assert started.see("document.querySelector('#effects').hidden") is False
    started.click("#predictions .to-table")
    near = "[...document.querySelectorAll('#predictions .near .sample')].length"
    assert len(whole_ranking(started)) == started.see(near)
    assert started.complaints == []
