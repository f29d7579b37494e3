"""A query is the mean over its examples, whatever batches they come in."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import Net, data, make, record
from torch import Tensor

import lightning_acc as la
from lightning_acc.core.replay import Replay

EXACT = {"rtol": 1e-12, "atol": 1e-14}  # what is equal up to round-off
X, Y = data(n=16, seed=9).tensors
SIZES = (5, 1, 10)


def squared_logits(module: Any, batch: Any) -> Tensor:
    squares: Tensor = module.net(batch[0]).square().sum(1)
    return squares


def their_mean(module: Any, batch: Any) -> Tensor:
    """One value for a batch, which counts for each of its examples."""
    return squared_logits(module, batch).mean()


FUNCTIONS: dict[str, tuple[Any, Any]] = {
    "the loss": (None, Net.per_sample_loss),
    "a function of each example": (squared_logits, squared_logits),
    "a function of each batch": (their_mean, squared_logits),
}


def in_batches(name: str, function: Any = None) -> la.Query:
    """The examples in batches of 5, 1 and 10: means of means would count the one in the middle five times and more."""
    return la.Query(name, list(zip(X.split(SIZES), Y.split(SIZES), strict=True)), function)


@pytest.fixture(scope="module")
def module() -> Net:
    return make(hidden=4)


@pytest.fixture(scope="module")
def run(module: Net, tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("queries") / "run", module)


def by_hand(module: Net, function: Any, theta: Tensor) -> tuple[Tensor, Tensor]:
    """The mean over all 16 examples at once, and its gradient."""
    torch.nn.utils.vector_to_parameters(theta, module.parameters())
    value: Tensor = function(module, (X, Y)).mean()
    gradient = torch.autograd.grad(value, list(module.parameters()))
    return value.detach(), torch.cat([part.reshape(-1) for part in gradient])


@pytest.mark.parametrize("case", FUNCTIONS)
def test_several_batches_of_unequal_size_are_read_as_one(run: la.Run, module: Net, case: str) -> None:
    given, plain = FUNCTIONS[case]
    query, objective = in_batches("uneven", given), Replay(run).objective
    assert query.n_examples == 16
    thetas = torch.stack([run.parameters(t) for t in (0, 5, run.n_steps)])
    expected = [by_hand(module, plain, theta) for theta in thetas]
    values, gradients = torch.stack([value for value, _ in expected]), torch.stack([gradient for _, gradient in expected])
    torch.testing.assert_close(query.values(objective, thetas), values, **EXACT)
    torch.testing.assert_close(query.value(objective, thetas[1]), values[1], **EXACT)
    for theta, gradient in zip(thetas, gradients, strict=True):
        torch.testing.assert_close(query.gradient(objective, theta), gradient, **EXACT)
    changes = query.changes(objective, thetas[0], thetas[1:] - thetas[0], rows=1)
    torch.testing.assert_close(changes, values[1:] - values[0], **EXACT)


def test_scores_are_those_of_one_batch_read_exactly_or_linearly(run: la.Run) -> None:
    whole, parts = la.Query("whole", [(X, Y)]), in_batches("parts")
    for method, readout in (("loo", "exact"), ("loo", "linear"), ("sgd-ie", "linear"), ("acc-low-rank", "exact")):
        one, several = (
            la.score(run, method, None, query, readout, ray_address=None, save=False, check=0).values
            for query in (whole, parts)
        )
        np.testing.assert_allclose(several, one, rtol=1e-9, atol=1e-14)
        assert np.abs(one).min() > 0


def test_a_validation_loader_of_several_batches_is_the_query_val(tmp_path: Path, module: Net) -> None:
    from torch.utils.data import DataLoader

    with pytest.warns(UserWarning, match="no validation data"):
        run = record(tmp_path / "run", make(hidden=4), validation=False)
    run.add_query("val", DataLoader(data(n=16, seed=9), 7))
    query = la.Run(tmp_path / "run").query("val")
    assert [len(leaves["0"]) for leaves, _ in query.batches] == [7, 7, 2]
    value, gradient = by_hand(module, Net.per_sample_loss, run.parameters(run.n_steps))
    objective = Replay(run).objective
    torch.testing.assert_close(query.value(objective, run.parameters(run.n_steps)), value, **EXACT)
    torch.testing.assert_close(query.gradient(objective, run.parameters(run.n_steps)), gradient, **EXACT)
