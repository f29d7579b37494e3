"""Training set-ups: each is recorded without changing it, audited, and its ``loo`` is real Lightning retraining."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from problems import N, Net, Weighted, data, fit, make, record, weighing
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la

pytestmark = pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data")
SAMPLES = (0, 11, 23)

OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {},
    "sgd-nesterov": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "lr": 0.05},
    "sgd-dampened": {"momentum": 0.8, "dampening": 0.5, "lr": 0.1},
    "adam": {"class": "Adam", "lr": 0.02, "weight_decay": 0.01},
    "adamw": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1},
    "adamw-amsgrad": {"class": "AdamW", "lr": 0.02, "amsgrad": True, "betas": (0.8, 0.9)},
}
CLIPPING: dict[str, dict[str, Any]] = {
    "": {},
    "clip-norm": {"gradient_clip_val": 0.3},
    "clip-value": {"gradient_clip_val": 0.05, "gradient_clip_algorithm": "value"},
}
SCHEDULES: dict[str, Any] = {
    "exponential": None,
    "warm-up-cosine": lambda optimizer: torch.optim.lr_scheduler.SequentialLR(
        optimizer,
        [
            torch.optim.lr_scheduler.LinearLR(optimizer, 0.1, total_iters=4),
            torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 11),
        ],
        milestones=[4],
    ),
    "one-cycle": lambda optimizer: torch.optim.lr_scheduler.OneCycleLR(optimizer, 0.1, total_steps=15),
}
"""By the epoch, or by the step; OneCycleLR moves the momentum too."""
SETUPS = [
    (optimizer, accumulate, clipping, schedule, dropout, workers)
    for optimizer in OPTIMIZERS
    for accumulate, clipping, schedule, dropout, workers in (
        (1, "", "exponential", 0.0, 0),
        (1, "clip-norm", "warm-up-cosine", 0.3, 2),
        (2, "clip-value", "one-cycle", 0.0, 0),
        (3, "clip-norm", "exponential", 0.3, 0),
    )
]


class Scheduled(Weighted):
    schedule = "exponential"

    def configure_optimizers(self) -> Any:
        if SCHEDULES[self.schedule] is None:
            return super().configure_optimizers()
        optimizer = self.optimizer_class(self.parameters(), **self.options)
        return [optimizer], [{"scheduler": SCHEDULES[self.schedule](optimizer), "interval": "step"}]


def train(
    kept: Tensor, optimizer: str, accumulate: int, clipping: str, schedule: str, dropout: float, workers: int, *callbacks: Any
) -> Tensor:
    torch.manual_seed(0)
    module = Scheduled(hidden=5, activation="gelu", dropout=dropout, optimizer=OPTIMIZERS[optimizer], decay_lr=0.8).double()
    module.schedule = schedule
    samples = TensorDataset(*data().tensors, kept)
    loader = DataLoader(samples, 5, shuffle=True, num_workers=workers, persistent_workers=workers > 0)
    options = {"accumulate_grad_batches": accumulate, **CLIPPING[clipping]}
    return fit(module, loader, *callbacks, validation=False, **options)


@pytest.mark.parametrize("setup", SETUPS, ids=lambda setup: "-".join(map(str, setup)))
def test_audit_and_loo_are_exact(tmp_path: Path, setup: tuple[Any, ...]) -> None:
    accumulate = setup[1]
    everything = torch.ones(N, dtype=torch.float64)
    without_callback = train(everything, *setup)
    base = train(everything, *setup, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(base, without_callback)
    run = la.Run(tmp_path / "run")
    assert run.n_steps == 3 * -(-5 // accumulate)
    assert [len(step.sizes) for step in run.steps][:2] == [accumulate, min(accumulate, 5 - accumulate)]
    report = run.audit()
    assert report.ok
    if accumulate == 1:
        assert report.max_abs_error == 0
    held_out = la.Query("held-out", [(*data(n=8, seed=5).tensors, torch.ones(8, dtype=torch.float64))])
    scores = la.score(run, "loo", SAMPLES, held_out, keep_shifts=True, ray_address=None, check=0)
    assert scores.shifts is not None
    for sample, shift in zip(SAMPLES, scores.shifts, strict=True):
        kept = everything.clone()
        kept[sample] = 0
        change = train(kept, *setup) - base
        assert float((shift - change).norm() / change.norm()) < 1e-6


def shifts(run: la.Run, method: str, removals: Any = None) -> Tensor:
    found = la.score(run, method, removals, ray_address=None, keep_shifts=True, save=False, check=0).shifts
    assert found is not None
    return found


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipping", CLIPPING)
def test_acc_is_exact_for_squared_loss_and_a_linear_model_under_any_update(
    tmp_path: Path, optimizer: str, clipping: str
) -> None:
    module = make(loss="squared", optimizer=OPTIMIZERS[optimizer])
    run = record(tmp_path / "run", module, accumulate_grad_batches=2, **CLIPPING[clipping])
    truth = shifts(run, "loo")
    assert float((shifts(run, "acc-sgd-ie") - truth).norm() / truth.norm()) < 1e-8
    assert float((shifts(run, "sgd-ie") - truth).norm() / truth.norm()) > 1e-3


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("clipping", ["", "clip-norm"])
def test_sgd_ie_is_the_derivative_in_the_weight_and_forward_equals_reverse(
    tmp_path: Path, optimizer: str, clipping: str
) -> None:
    from lightning_acc.core.replay import Replay

    module = make(hidden=5, activation="gelu", dropout=0.3, optimizer=OPTIMIZERS[optimizer])
    run = record(tmp_path / "run", module, accumulate_grad_batches=2, **CLIPPING[clipping])
    replay = Replay(run)

    found = shifts(run, "sgd-ie", [4, 9])
    for sample, shift in zip((4, 9), found, strict=True):
        eps = 1e-5
        difference = (weighing(replay, sample, 1 - eps) - weighing(replay, sample, 1 + eps)) / (2 * eps)
        assert float((shift - difference).norm() / difference.norm()) < 1e-6
    forward = la.score(run, "sgd-ie", readout="linear", keep_shifts=True, ray_address=None, save=False, check=0).values
    reverse = la.score(run, "sgd-ie", ray_address=None, save=False, check=0).values
    torch.testing.assert_close(torch.tensor(forward), torch.tensor(reverse), rtol=1e-8, atol=1e-13)


class TwoKinds(Weighted):
    """Parameter groups of which only one keeps a buffer, or the largest second moment."""

    kind = "SGD"

    def configure_optimizers(self) -> Any:
        weights, biases = ([p for p in self.parameters() if (p.ndim > 1) == matrix] for matrix in (True, False))
        if self.kind == "SGD":
            return torch.optim.SGD([{"params": weights, "momentum": 0.9}, {"params": biases, "dampening": 0.5}], lr=0.05)
        groups = [{"params": weights, "amsgrad": True, "weight_decay": 0.1}, {"params": biases, "amsgrad": False}]
        return torch.optim.AdamW(groups, lr=0.05, betas=(0.8, 0.9))


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_groups_keep_their_own_slots(tmp_path: Path, kind: str) -> None:
    torch.manual_seed(0)
    module = TwoKinds(hidden=4, activation="gelu").double()
    module.kind = kind
    assert record(tmp_path / "run", module).audit().max_abs_error == 0


@pytest.mark.parametrize("kind", ["SGD", "AdamW"])
def test_groups_are_clipped_together_to_the_last_bit(tmp_path: Path, kind: str) -> None:
    """The norm is summed up in the order of the groups, which is not that of the parameters."""
    for seed in range(6):
        torch.manual_seed(seed)
        module = TwoKinds(hidden=9, activation="gelu").double()
        module.kind = kind
        assert record(tmp_path / str(seed), module, gradient_clip_val=0.2).audit().max_abs_error == 0


def test_tangents_are_finite_where_adams_second_moment_is_zero(tmp_path: Path) -> None:
    tensors = data().tensors
    tensors[0][:, 0] = 0  # an input that is never there: its weights have no gradient, ever
    for kind in ("Adam", "AdamW"):
        run = record(
            tmp_path / kind, make(hidden=4, activation="relu", optimizer={"class": kind, "lr": 0.02}), TensorDataset(*tensors)
        )
        for method in ("sgd-ie", "acc-sgd-ie", "loo", "tracin"):
            assert bool(torch.isfinite(shifts(run, method)).all()), (kind, method)
            values = la.score(run, method, ray_address=None, save=False, check=0).values
            assert bool(torch.isfinite(torch.tensor(values)).all())


class Softsign(torch.optim.Optimizer):
    """A foreign optimizer: nearly the sign of an average."""

    def __init__(self, parameters: Any, lr: float = 0.01, beta: float = 0.9) -> None:
        super().__init__(parameters, {"lr": lr, "beta": beta})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in group["params"]:
                mean = self.state[p].setdefault("mean", torch.zeros_like(p))
                mean.lerp_(p.grad, 1 - group["beta"])
                p.add_(mean.tanh(), alpha=-group["lr"])
        return loss


class WithSoftsign(Net):
    def configure_optimizers(self) -> Any:
        return Softsign(self.parameters())


def softsign(state: tuple[Tensor, ...], gradient: Tensor, h: dict[str, Any]) -> tuple[Tensor, ...]:
    theta, mean = state
    mean = mean.lerp(gradient, 1 - h["beta"])
    return theta.add(mean.tanh(), alpha=-h["lr"]), mean


def test_an_optimizer_can_be_registered_and_a_wrong_rule_is_found_out(tmp_path: Path) -> None:
    from lightning_acc.core import optimizers
    from lightning_acc.recorder import RecordingRefused

    with pytest.raises(RecordingRefused, match="Softsign is not known"):
        record(tmp_path / "unknown", WithSoftsign(hidden=4).double())
    try:
        la.register_optimizer(Softsign, la.OptimizerRule(softsign, lambda h: ("mean",), ("lr", "beta")))
        run = record(tmp_path / "run", WithSoftsign(hidden=4).double())
        assert run.audit().max_abs_error == 0
        assert la.score(run, "acc-sgd-ie", [1, 2], ray_address=None, check=0).values.all()
        wrong = la.OptimizerRule(lambda s, g, h: (s[0] - h["lr"] * g, s[1]), lambda h: ("mean",), ("lr", "beta"))
        la.register_optimizer(Softsign, wrong)
        with pytest.raises(RecordingRefused, match="Step 0 moved the parameters otherwise"):
            record(tmp_path / "wrong", WithSoftsign(hidden=4).double())
    finally:
        optimizers.RULES.pop("Softsign", None)


def test_mixed_precision(tmp_path: Path) -> None:
    """The audit is bit-exact; the truth is retraining up to what bfloat16 rounds away of an effect."""
    samples = data(dtype=torch.float32).tensors

    def train(kept: Tensor, *callbacks: Any) -> Tensor:
        torch.manual_seed(0)
        module = Weighted(hidden=8, activation="gelu", dropout=0.2, optimizer=OPTIMIZERS["adamw"])
        loader = DataLoader(TensorDataset(*samples, kept), 6, shuffle=True)
        return fit(module, loader, *callbacks, validation=False, precision="bf16-mixed", gradient_clip_val=0.5)

    everything = torch.ones(N)
    base = train(everything, la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(base, train(everything))
    run = la.Run(tmp_path / "run")
    assert (run.manifest["precision"], run.dtype) == ("bf16-mixed", "float32")
    assert run.audit().max_abs_error == 0
    held_out = la.Query("held-out", [data(n=8, seed=5, dtype=torch.float32).tensors])
    for method, dtype in (("loo", None), ("loo", "float64"), ("acc-sgd-ie", None)):
        found = la.score(
            run, method, SAMPLES, held_out, keep_shifts=True, ray_address=None, save=False, dtype=dtype, check=0
        ).shifts
        assert found is not None
        for sample, shift in zip(SAMPLES, found, strict=True):
            kept = everything.clone()
            kept[sample] = 0
            change = train(kept) - base
            assert float((shift - change).norm() / change.norm()) < (0.05 if method == "loo" else 0.1)
