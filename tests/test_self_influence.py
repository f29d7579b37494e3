"""Self-influence against a plain loop: autograd on one sample at a time, at the recorded parameters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, Net, data, make, record
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.judge.controls import rankings
from lightning_acc.judge.self_influence import self_influence

MEMORY = 2**28


class TwoRates(Net):
    """The first layer learns by another rate than the second, and both rates fall."""

    def configure_optimizers(self) -> Any:
        groups = [{"params": self.net[0].parameters(), "lr": 0.3}, {"params": self.net[3].parameters(), "lr": 0.05}]
        optimizer = torch.optim.SGD(groups, momentum=0.5)
        return [optimizer], [torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.7)]


def by_hand(run: la.Run, module: Net) -> np.ndarray:
    """``sum over steps of lr |w g|^2``, a sample and a parameter at a time."""
    module = module.double().train()
    found = np.zeros(run.n_samples)
    for t, step in enumerate(run.steps):
        torch.nn.utils.vector_to_parameters(run.parameters(t).double(), module.parameters())
        parts = run.batches(t)
        x, y = (torch.cat([leaves[name] for leaves in parts]) for name in ("0", "1"))
        for sample in set(step.sample_ids.tolist()):
            rows = torch.nonzero(step.sample_ids == sample)[:, 0]
            loss = (step.weights[rows].double() * module.per_sample_loss((x[rows].double(), y[rows]))).sum()
            gradients = torch.autograd.grad(loss, list(module.parameters()))
            for k, gradient in enumerate(gradients):
                group = step.groups[run.manifest["optimizer"]["group_of"][k]]
                found[sample] += group["lr"] * float((gradient**2).sum())
    return found


@pytest.mark.parametrize("accumulate", [1, 3])
@pytest.mark.parametrize("kind", [Net, TwoRates])
def test_it_is_the_sum_over_the_steps_of_the_squared_gradients(tmp_path: Path, kind: type[Net], accumulate: int) -> None:
    torch.manual_seed(0)
    module = kind(hidden=4, decay_lr=0.8).double()
    run = record(tmp_path / "run", module, max_epochs=4, batch_size=5, accumulate_grad_batches=accumulate)
    expected = by_hand(run, module)
    assert expected.min() > 0
    np.testing.assert_allclose(self_influence(run, MEMORY), expected, rtol=1e-9)
    assert rankings(run, ["self-influence"], MEMORY)["self-influence"].tolist() == np.argsort(-expected, kind="stable").tolist()


def test_of_little_memory_it_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.judge import self_influence as module

    run = record(tmp_path / "run", make(hidden=4))
    whole = self_influence(run, MEMORY)
    monkeypatch.setattr(module, "chunk_size", lambda *_: 2)
    np.testing.assert_allclose(self_influence(run, MEMORY), whole, rtol=1e-12)


def test_what_no_step_saw_has_none_and_what_a_step_saw_twice_counts_together(tmp_path: Path) -> None:
    loader = DataLoader(data(), 6, sampler=[0, 0, 1, 2, 3, 4] * 2)
    module = make(hidden=4)
    run = record(tmp_path / "run", module, loader)
    found = self_influence(run, MEMORY)
    assert (found[5:] == 0).all()
    assert len(found) == N
    np.testing.assert_allclose(found, by_hand(run, module), rtol=1e-9)


def test_of_two_modes_that_are_evaluated_one_by_one(tmp_path: Path) -> None:
    """Dropout: the gradients are those of the recorded masks, so that they add up to the step's own."""
    run = record(tmp_path / "run", make(hidden=4, dropout=0.3), max_epochs=1, batch_size=1)
    found = self_influence(run, MEMORY)
    moved = np.zeros(N)
    for t, step in enumerate(run.steps):  # batches of one: the step is lr times the gradient
        shift = (run.parameters(t + 1) - run.parameters(t)).numpy()
        moved[step.sample_ids.item()] = (shift**2).sum() / step.hyperparameters["lr"]
    np.testing.assert_allclose(found, moved, rtol=1e-8)
