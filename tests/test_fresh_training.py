"""``clean`` trains anew by the recorded recipe, also where steps are of several batches and where losses are summed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Net, data, record
from torch import Tensor

import lightning_acc as la

N, RATE, EPOCHS, SEEDS = 20, 0.05, 3, (0, 1)
TEST = la.Query("held-out", [data(n=30, seed=5).tensors])


class Summed(Net):
    """Trains on the sum of its losses."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).sum()


# Batches of 6, 6, 6 and 2 samples. For every step of an epoch: how many samples it sees, and what their mean loss is weighed
# with; Lightning divides by the number of accumulated batches, also in a last step that has fewer.
RECIPES: dict[str, tuple[type[Net], int, list[tuple[int, float]]]] = {
    "a mean": (Net, 1, [(6, 1.0), (6, 1.0), (6, 1.0), (2, 1.0)]),
    "a sum": (Summed, 1, [(6, 6.0), (6, 6.0), (6, 6.0), (2, 2.0)]),
    "means of two batches": (Net, 2, [(12, 1.0), (8, 1.0)]),
    "means of three batches": (Net, 3, [(18, 1.0), (2, 1 / 3)]),
    "sums of two batches": (Summed, 2, [(12, 6.0), (8, 4.0)]),
    "sums of three batches": (Summed, 3, [(18, 6.0), (2, 2 / 3)]),
}


def trained_by_hand(kind: type[Net], steps: list[tuple[int, float]], seed: int, dropped: frozenset[int]) -> float:
    """Test loss after a plain training in a new order without those samples."""
    torch.manual_seed(seed)
    module = kind(hidden=4, optimizer={"lr": RATE}).double()
    optimizer = torch.optim.SGD(module.parameters(), lr=RATE)
    generator = torch.Generator().manual_seed(seed)
    order: list[int] = []
    while len(order) < EPOCHS * N:
        order += [i for i in torch.randperm(N, generator=generator).tolist() if i not in dropped]
    x, y = data(n=N).tensors
    for size, weight in steps * EPOCHS:
        rows, order = order[:size], order[size:]
        optimizer.zero_grad()
        (weight * torch.nn.functional.cross_entropy(module.net(x[rows]), y[rows])).backward()
        optimizer.step()
    with torch.no_grad():
        return float(module.per_sample_loss(data(n=30, seed=5).tensors).mean())


@pytest.mark.parametrize("recipe", RECIPES)
def test_fresh_trainings_are_those_of_a_plain_loop(tmp_path: Path, recipe: str) -> None:
    kind, accumulate, steps = RECIPES[recipe]
    torch.manual_seed(0)
    module = kind(hidden=4, optimizer={"lr": RATE}).double()
    options: dict[str, Any] = {"batch_size": 6, "max_epochs": EPOCHS, "accumulate_grad_batches": accumulate}
    run = record(tmp_path / "run", module, data(n=N), **options)
    assert run.n_steps == EPOCHS * len(steps)
    worst = la.score(run, "sgd-ie", ray_address=None, check=0).most_harmful(5)
    sets = [frozenset(), frozenset(sample for (sample,) in worst)]
    table = la.clean(run, "sgd-ie", [0.25], len(SEEDS), TEST, None, controls=("none",), save=False)
    assert table["n_removed"].to_pylist() == [0, 5]
    expected = [[trained_by_hand(kind, steps, seed, dropped) for seed in SEEDS] for dropped in sets]
    np.testing.assert_allclose(table["losses"].to_pylist(), expected, rtol=1e-9)
    assert np.abs(np.subtract(*expected)).min() > 1e-4  # dropping five samples is seen
