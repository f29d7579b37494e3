"""Estimates take derivatives of the loss: they are right for what modules are made of, or refused where there are none."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, FEATURES, Net, record, weighing
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.utils import parametrizations

import lightning_acc as la
from lightning_acc.core.losses.tracing import Multiplications, traceable
from lightning_acc.core.modules.twice import make_twice_differentiable, weight_norm
from lightning_acc.core.replay import Replay
from lightning_acc.methods import registry

pytestmark = pytest.mark.filterwarnings("ignore:The run's module .* cannot be imported here")
ESTIMATES = [name for name in registry.METHODS if not registry.is_truth(name)]


class Made(Net):
    """A network whose layers ``layers`` makes."""

    layers: Callable[[], nn.Module]

    def __init__(self) -> None:
        super().__init__(optimizer={"momentum": 0.9, "lr": 0.1})
        torch.manual_seed(0)
        self.net = type(self).layers()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self.per_sample_loss(batch).mean()

    def validation_step(self, batch: Any, batch_idx: int) -> None:
        """Lightning validates without gradients, of which some of these losses are made."""


def made(make: Callable[[], nn.Module], losses: Callable[[Any, Any], Tensor] | None = None) -> Made:
    body = {"layers": staticmethod(make), **({"per_sample_loss": losses} if losses else {})}
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", ".*weight_norm. is deprecated", FutureWarning)
        module: Made = type("Making", (Made,), body)().double()
    return module


def network(*middle: nn.Module) -> nn.Sequential:
    return nn.Sequential(nn.Linear(FEATURES, 6), *middle, nn.Tanh(), nn.Linear(6, CLASSES))


class Filter(nn.Module):
    """Multiplies frequencies by complex numbers, kept as pairs."""

    def __init__(self) -> None:
        super().__init__()
        self.odd, self.pairs = nn.Parameter(torch.ones(3)), nn.Parameter(torch.randn(4, 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.odd.mean() * torch.fft.irfft(torch.fft.rfft(x) * torch.view_as_complex(self.pairs), n=6)


def slope(module: Any, batch: Any) -> Tensor:
    """How far the first output's slope is from the label, as where a differential equation is solved."""
    x = batch[0].detach().clone().requires_grad_()
    (slopes,) = torch.autograd.grad(module.net(x)[:, 0].sum(), x, create_graph=True)
    return (slopes[:, 0] - batch[1]).square()


def penalised(module: Any, batch: Any) -> Tensor:
    """The slope of each sample's loss in its features is penalised."""
    x = batch[0].clone().requires_grad_()
    losses = functional.cross_entropy(module.net(x), batch[1], reduction="none")
    (slopes,) = torch.autograd.grad(losses.sum(), x, create_graph=True)
    return losses + 0.1 * slopes.square().sum(1)


MODULES: dict[str, Callable[[], Made]] = {
    "weight norm": lambda: made(lambda: network(parametrizations.weight_norm(nn.Linear(6, 6)))),
    "weight norm, all numbers together": lambda: made(lambda: network(parametrizations.weight_norm(nn.Linear(6, 6), dim=None))),
    "weight norm, by column": lambda: made(lambda: network(parametrizations.weight_norm(nn.Linear(6, 6), dim=1))),
    "weight norm by a hook": lambda: made(lambda: network(nn.utils.weight_norm(nn.Linear(6, 6)))),
    "weight norm of a convolution": lambda: made(
        lambda: network(
            nn.Unflatten(1, (1, 6)), parametrizations.weight_norm(nn.Conv1d(1, 1, 3, padding=1), dim=2), nn.Flatten()
        )
    ),
    "orthogonal": lambda: made(lambda: network(parametrizations.orthogonal(nn.Linear(6, 6)))),
    "complex filters": lambda: made(lambda: network(Filter())),
    "a slope": lambda: made(network, slope),
    "a penalty on slopes": lambda: made(network, penalised),
}


@pytest.mark.parametrize("name", MODULES)
def test_sgd_ie_is_the_derivative_of_what_was_trained(tmp_path: Path, name: str) -> None:
    module = MODULES[name]()
    record(tmp_path / "run", module)
    run = la.Run(tmp_path / "run", module=module)
    assert run.audit().max_abs_error == 0
    query = la.Query("first", [torch.zeros(1)], lambda module, _: next(iter(module.parameters())).sum())
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0}
    samples = [2, 11, 19]
    scores = la.score(run, "sgd-ie", samples, query, keep_shifts=True, **options)
    replay = Replay(run)
    assert scores.shifts is not None
    for sample, shift in zip(samples, scores.shifts, strict=True):
        eps = 1e-5
        expected = (weighing(replay, sample, 1 - eps) - weighing(replay, sample, 1 + eps)) / (2 * eps)
        assert float((shift - expected).norm() / expected.norm()) < 1e-6
    for method in ("acc-sgd-ie", "acc-low-rank"):
        assert np.isfinite(la.score(run, method, samples, query, **options).values).all()


class Once(torch.autograd.Function):
    """A tanh whose backward pass cannot be differentiated."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return slope * (1 - x.tanh() ** 2)


class Applied(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = Once.apply(x)
        return found


def margins(module: Any, batch: Any) -> Tensor:
    return functional.multi_margin_loss(module.net(batch[0]), batch[1], reduction="none")


@pytest.mark.parametrize("method", ESTIMATES)
@pytest.mark.parametrize("case", ["once", "margins"])
def test_a_loss_without_a_second_derivative_is_refused_in_a_sentence(tmp_path: Path, case: str, method: str) -> None:
    module = made(lambda: network(Applied())) if case == "once" else made(network, margins)
    record(tmp_path / "run", module)
    run = la.Run(tmp_path / "run", module=module)
    message = {"once": r"marked with once_differentiable: use method='loo'", "margins": r"multi_margin_loss.*use method='loo'"}
    with pytest.raises(la.RequestError, match=rf"^{method} differentiates the loss twice.*{message[case]}"):
        la.score(run, method, ray_address=None, save=False, check=0)
    assert la.score(run, "loo", [0], ray_address=None, save=False, check=0).values.any()


def test_multiplications_are_counted() -> None:
    with Multiplications() as counted:
        torch.ones(3, 4) @ torch.ones(4, 5)
        functional.conv1d(torch.ones(2, 3, 8), torch.ones(4, 3, 3))
    assert counted.total == 3 * 4 * 5 + 2 * 4 * 6 * 3 * 3


BAGS = [{"mode": mode, "padding_idx": padding} for mode in ("sum", "mean", "max") for padding in (None, 3)]


@pytest.mark.parametrize("options", BAGS, ids=str)
def test_a_bag_of_words_is_torchs_and_can_be_differentiated_twice(options: dict[str, Any]) -> None:
    bag = nn.EmbeddingBag(10, 4, **options).double()
    words = torch.randint(0, 10, (6, 5), generator=torch.Generator().manual_seed(0))
    words[2] = 3
    given = {"per_sample_weights": torch.rand(6, 5, dtype=torch.float64)} if options["mode"] == "sum" else {}
    expected = bag(words, **given)
    make_twice_differentiable(bag)
    assert torch.equal(bag(words, **given), expected), "as in training"

    def of(weight: Tensor) -> Tensor:
        with traceable():
            found: Tensor = torch.func.functional_call(bag, {"weight": weight}, (words,), given)
            return found

    weight = bag.weight.detach().clone().requires_grad_()
    assert torch.allclose(of(weight), expected, rtol=1e-12)
    assert torch.autograd.gradgradcheck(of, weight)


def test_weight_normalisation_is_torchs_but_for_its_second_derivative() -> None:
    """Where this fails one day, torch has mended its own, and ``twice`` needs none."""
    v, g = torch.randn(4, 3, dtype=torch.float64, requires_grad=True), torch.rand(4, 1, dtype=torch.float64, requires_grad=True)
    with traceable():
        assert torch.allclose(weight_norm(v, g, 0), torch._weight_norm(v, g, 0), rtol=1e-14)
        assert torch.autograd.gradgradcheck(lambda v, g: weight_norm(v, g, 0), (v, g))
    assert not torch.autograd.gradgradcheck(lambda v, g: torch._weight_norm(v, g, 0), (v, g), raise_exception=False)
