"""acc-low-rank with state="outputs": ACC-SGD-IE on linear models, on others better than SGD-IE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import CLASSES, FEATURES, N, Net, StepOnly, data, make, record
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.judge.agreement import kendall, rmse
from lightning_acc.methods.low_rank import sweep
from lightning_acc.methods.low_rank.protocol import split_for

ROUND_OFF = 1e-12
MEMORY = 2**30
EVERYONE = [(i,) for i in range(N)]
MOMENTUM = {"momentum": 0.9, "weight_decay": 0.1, "nesterov": True, "lr": 0.05}


class Forward(Net):
    """The same with a ``forward``, from which everything is derived."""

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x)


class Own(Net):
    """Says what its outputs are, and their loss: one that is not usual."""

    def outputs(self, batch: Any) -> Tensor:
        return self.net(batch[0])

    def output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        losses: Tensor = nn.functional.cross_entropy(outputs, batch[1], reduction="none", label_smoothing=0.1)
        return losses + 0.01 * outputs.square().sum(1)

    def per_sample_loss(self, batch: Any) -> Tensor:
        return self.output_loss(self.outputs(batch), batch)


class Wrong(Own):
    def output_loss(self, outputs: Tensor, batch: Any) -> Tensor:
        return super().output_loss(outputs, batch) * (2 if outputs.requires_grad else 1)

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net(batch[0]), batch[1], reduction="none")


class Silent(Forward):
    """Has a forward, but a loss of it that is not usual."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss(batch) ** 2


class Image(Forward):
    """Its first layer is no linear one."""

    def __init__(self, dropout: float = 0.0) -> None:
        super().__init__()
        self.net = nn.Sequential(nn.Unflatten(1, (1, FEATURES)), nn.Conv1d(1, 2, 3), nn.GELU(), nn.Flatten())
        self.net.extend([nn.Dropout(dropout), nn.Linear(2 * (FEATURES - 2), CLASSES)])


def build(kind: Any, **arguments: Any) -> Any:
    torch.manual_seed(0)
    return kind(**arguments).double()


def outputs(run: la.Run, rank: int | None = None, **options: Any) -> la.Scores:
    rank = run.n_parameters if rank is None else rank
    return la.score(run, "acc-low-rank", rank=rank, state="outputs", ray_address=None, save=False, **options)


def exact(run: la.Run, method: str = "acc-sgd-ie", **options: Any) -> la.Scores:
    return la.score(run, method, ray_address=None, save=False, **options)


@pytest.fixture(params=["layers", "any module"])
def jacobian(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "any module":
        monkeypatch.setattr(sweep, "factors_for", lambda *_: None)


@pytest.mark.usefixtures("jacobian")
@pytest.mark.parametrize("optimizer", [{}, MOMENTUM])
@pytest.mark.parametrize(("kind", "loss"), [(Forward, "squared"), (Forward, "cross-entropy"), (Own, "cross-entropy")])
def test_on_linear_models_a_whole_basis_is_acc_sgd_ie(tmp_path: Path, kind: Any, loss: str, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", build(kind, loss=loss, optimizer=optimizer, decay_lr=0.7), data(loss))
    found, truth = outputs(run, keep_shifts=True), exact(run, keep_shifts=True)
    assert found.shifts is not None
    assert truth.shifts is not None
    torch.testing.assert_close(found.shifts, truth.shifts, rtol=0, atol=ROUND_OFF)
    np.testing.assert_allclose(found.values, truth.values, rtol=0, atol=ROUND_OFF)


@pytest.mark.usefixtures("jacobian")
@pytest.mark.parametrize("rank", [0, 4])
def test_on_linear_models_any_rank_is_that_of_the_parameters(tmp_path: Path, rank: int) -> None:
    run = record(tmp_path / "run", build(Forward, optimizer=MOMENTUM), accumulate_grad_batches=2)
    passes = [sweep.low_rank(Replay(run), EVERYONE, run.query("val"), MEMORY, rank, state=state) for state in sweep.STATES]
    torch.testing.assert_close(passes[0].scores, passes[1].scores, rtol=0, atol=ROUND_OFF)
    some = torch.tensor([3, 0, 17])
    torch.testing.assert_close(passes[0].shifts(some), passes[1].shifts(some), rtol=0, atol=ROUND_OFF)
    assert (passes[0].scores - passes[0].first).abs().max() > 1e-3 * passes[0].first.abs().max()


@pytest.mark.parametrize("activation", ["gelu", "tanh"])
def test_on_other_models_it_is_better_than_sgd_ie(tmp_path: Path, activation: str) -> None:
    module = build(Forward, hidden=16, activation=activation)
    run = record(tmp_path / "run", module, data(n=60), batch_size=10, max_epochs=6)
    truth, parameters = exact(run, "loo").values, sweep_of(run, "parameters")
    first, light = exact(run, "sgd-ie").values, outputs(run, 40)
    assert light.conditions["readout"] == "linear"
    assert rmse(outputs(run, 40, readout="exact").values, truth) < 0.6 * rmse(first, truth)
    assert kendall(light.values, parameters) > 0.9
    assert 0 < light.conditions["shift_error"] < sweep.TRUSTED


def sweep_of(run: la.Run, state: str) -> np.ndarray:
    return la.score(run, "acc-low-rank", rank=40, state=state, ray_address=None, save=False).values


@pytest.mark.parametrize("dropout", [0.0, 0.3])
def test_layers_that_are_not_linear(tmp_path: Path, dropout: float) -> None:
    run = record(tmp_path / "run", build(Image, dropout=dropout), data(n=40), max_epochs=5)
    truth = exact(run).values
    assert rmse(outputs(run, readout="exact").values, truth) < 0.7 * rmse(exact(run, "sgd-ie").values, truth)


def test_a_sample_that_is_seen_twice_in_a_batch_or_never(tmp_path: Path) -> None:
    loader = DataLoader(data(n=8), 4, sampler=[0, 0, 1, 2, 3, 3, 3, 4, 0, 5, 6])
    run = record(tmp_path / "run", build(Forward), loader)
    found = outputs(run, readout="exact")
    np.testing.assert_allclose(found.values, exact(run).values, rtol=0, atol=ROUND_OFF)
    assert found.values[7] == 0


def test_pieces_are_the_whole(tmp_path: Path) -> None:
    run = record(tmp_path / "run", build(Forward, hidden=4))
    each, at_a_step = sweep.bytes_needed(Replay(run), EVERYONE, "outputs")
    found = outputs(run, 5, memory_gb=(at_a_step + 10 * each) / 2**30)
    np.testing.assert_allclose(found.values, outputs(run, 5).values, rtol=1e-9, atol=1e-13)
    assert each < sweep.bytes_needed(Replay(run), EVERYONE, "parameters")[0]


def bce(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.binary_cross_entropy_with_logits(out, y.to(out), reduction="none")


def ce(out: Tensor, y: Tensor) -> Tensor:
    return nn.functional.cross_entropy(out, y, reduction="none")


HERE = torch.Generator().manual_seed(0)
USUAL: dict[str, tuple[Any, Tensor, int]] = {
    "classes": (ce, torch.arange(N) % 3, 3),
    "probabilities": (ce, torch.rand(N, 3, generator=HERE).double(), 3),
    "binary": (bce, torch.arange(N) % 2, 1),
    "labels": (lambda out, y: bce(out, y).sum(1), torch.randint(0, 2, (N, 3), generator=HERE), 3),
    "labels, mean": (lambda out, y: bce(out, y).mean(1), torch.randint(0, 2, (N, 3), generator=HERE), 3),
    "squared": (lambda out, y: (out - y) ** 2, torch.randn(N, generator=HERE).double(), 1),
    "squared, mean": (lambda out, y: ((out - y) ** 2).mean(1), torch.randn(N, 3, generator=HERE).double(), 3),
    "squared, half": (lambda out, y: 0.5 * ((out - y) ** 2).sum(1), torch.randn(N, 3, generator=HERE).double(), 3),
}


class Usual(Net):
    """One linear layer and a loss of ``USUAL``."""

    def __init__(self, target: str) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.target, self.net = target, nn.Sequential(nn.Linear(FEATURES, USUAL[target][2]))

    def forward(self, x: Tensor) -> Tensor:
        out: Tensor = self.net(x)
        return out[:, 0] if out.shape[1] == 1 else out

    def per_sample_loss(self, batch: Any) -> Tensor:
        losses: Tensor = USUAL[self.target][0](self(batch[0]), batch[1])
        return losses


@pytest.mark.filterwarnings("ignore:Training has no validation data")
@pytest.mark.parametrize("target", USUAL)
def test_usual_losses_of_forward_need_no_methods(tmp_path: Path, target: str) -> None:
    targets = TensorDataset(data().tensors[0], USUAL[target][1])
    run = record(tmp_path / "run", build(Usual, target=target), targets, validation=False)
    replay = Replay(run)
    split, step, theta = split_for(replay), replay.step(1), run.parameters(2)
    x = run.batches(1)[0]["0"]
    weight, bias = theta[: -USUAL[target][2]].view(-1, FEATURES), theta[-USUAL[target][2] :]
    found = split.of(step, theta)
    torch.testing.assert_close(found, x @ weight.T + bias)
    torch.testing.assert_close(split.losses(step, theta, found), step.losses(theta))
    slopes, curvatures = split.derivatives(step, theta, found)
    gradient = torch.cat([((step.weights * slopes.T) @ x).flatten(), step.weights @ slopes])
    torch.testing.assert_close(gradient, step.gradient(theta))
    hessian = torch.autograd.functional.hessian(lambda z: split.losses(step, theta, z).sum(), found)
    torch.testing.assert_close(curvatures, torch.einsum("bcbd->bcd", hessian))


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        (Silent, r"no usual loss of Silent.forward .* define outputs\(batch\), .* and output_loss\(outputs, batch\)"),
        (Net, r"no usual loss of Net.forward"),
        (StepOnly, r"no usual loss of StepOnly.forward"),
        (Wrong, r"Wrong.outputs\(batch\), .* do not give the per-sample losses and their gradient"),
    ],
)
def test_modules_whose_outputs_are_not_known_are_refused(tmp_path: Path, kind: Any, words: str) -> None:
    run = record(tmp_path / "run", build(kind))
    with pytest.raises(la.RequestError, match=words):
        outputs(run)


def test_groups_are_refused(tmp_path: Path) -> None:
    run = record(tmp_path / "run", build(Forward))
    with pytest.raises(la.RequestError, match="state='outputs' follows single samples: score groups with state='parameters'"):
        outputs(run, removals=[[0, 1], [2]])


@pytest.mark.parametrize("bad", [{"state": "rows"}, {"state": "outputs", "method": "sgd-ie"}])
def test_states_that_are_none(tmp_path: Path, bad: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make())
    with pytest.raises(la.RequestError, match="one of 'parameters', 'outputs', 'screened' goes with acc-low-rank alone"):
        la.score(run, **{"method": "acc-low-rank", **bad}, ray_address=None)


def test_scores_of_the_two_states_are_stored_apart(tmp_path: Path) -> None:
    run = record(tmp_path / "run", build(Forward, hidden=4))
    for state in (None, "parameters", "outputs"):
        found = la.score(run, "acc-low-rank", state=state, readout="linear", ray_address=None)
        assert found.conditions["state"] == (state or "parameters")
        assert found.conditions["reused"] == (N if state == "parameters" else 0)
    names = {path.name for path in (tmp_path / "run/scores").iterdir()}
    assert names == {"acc-low-rank.linear.parquet", "acc-low-rank.outputs.linear.parquet"}
