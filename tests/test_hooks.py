"""Callbacks and module hooks that may alter a training: harmless ones are recorded, others are found out."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import N, Net, Weighted, data, fit, flat, record, trainer
from pytorch_lightning.callbacks import BatchSizeFinder, LambdaCallback, LearningRateFinder, ModelPruning
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.recorder import RecordingRefused

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}


class Logging(Net):
    """Looks at gradients and logs them, in every hook there is."""

    def on_after_backward(self) -> None:
        self.log("norm", torch.stack([p.grad.norm() for p in self.parameters()]).norm())

    def on_before_optimizer_step(self, optimizer: Any) -> None:
        self.log("largest", max(p.grad.abs().max() for p in self.parameters()))

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        loss.backward(retain_graph=True)

    def optimizer_zero_grad(self, epoch: int, batch_idx: int, optimizer: Any) -> None:
        optimizer.zero_grad(set_to_none=False)

    def lr_scheduler_step(self, scheduler: Any, metric: Any) -> None:
        scheduler.step()


class WarmedUp(Net):
    """Raises its learning rate step by step, as Lightning's documentation shows it."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        for group in optimizer.param_groups:
            group["lr"] = 0.2 * min(1.0, (self.trainer.global_step + 1) / 8)
        optimizer.step(closure=optimizer_closure)


class LoweredAfter(Net):
    """Steps, then lowers the learning rate of the next step."""

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        super().optimizer_step(*args, **kwargs)
        for group in self.trainer.optimizers[0].param_groups:
            group["lr"] *= 0.8


class EverySecond(Net):
    """Takes every second step only; gradients of the other batches are dropped."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        if batch_idx % 2:
            optimizer.step(closure=optimizer_closure)
        else:
            optimizer_closure()


class OwnClosure(Net):
    """Calls the closure by itself, and then the step without one."""

    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer_closure()
        optimizer.step()


class ClipsLate(Net):
    """Clips by its own rule: by the norm, then by value, then not at all."""

    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        if self.current_epoch == 0:
            self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        elif self.current_epoch == 1:
            self.clip_gradients(optimizer, gradient_clip_val=0.01 * (1 + self.global_step), gradient_clip_algorithm="value")


HARMLESS: dict[str, tuple[type[Net], dict[str, list[Any]]]] = {
    "logging": (Logging, {}),
    "warm-up": (WarmedUp, {"lr": [0.2 * min(1.0, (t + 1) / 8) for t in range(12)]}),
    "lr after the step": (LoweredAfter, {"lr": [0.05 * 0.8**t for t in range(12)]}),
    "every second step": (EverySecond, {"lr": [0.05] * 6}),
    "closure called by itself": (OwnClosure, {}),
    "own clipping": (
        ClipsLate,
        {
            "gradient_clip_val": [0.1] * 4 + [0.01 * t for t in range(5, 9)] + [None] * 4,
            "gradient_clip_algorithm": ["norm"] * 4 + ["value"] * 4 + ["norm"] * 4,
        },
    ),
}
"""Modules, and hyper-parameters that their steps have."""


def built(*kinds: type[Net]) -> Net:
    torch.manual_seed(0)
    kind = kinds[0] if len(kinds) == 1 else type("Built", kinds, {})
    return kind(hidden=4, optimizer=SGD).double()


@pytest.mark.parametrize("case", HARMLESS)
def test_module_hooks_that_leave_gradients_alone_are_recorded(tmp_path: Path, case: str) -> None:
    kind, expected = HARMLESS[case]
    module, plain = built(kind), built(kind)
    fit(plain, None)
    run = record(tmp_path / "run", module)
    assert torch.equal(flat(module), flat(plain))
    assert torch.equal(run.parameters(run.n_steps), flat(plain))
    assert run.audit().max_abs_error == 0
    for key, values in expected.items():
        assert [step.hyperparameters[key] for step in run.steps] == pytest.approx(values)

    def retrained(sample: int, weight: float) -> Tensor:
        weights = torch.ones(N, dtype=torch.float64)
        weights[sample] = weight
        return fit(built(Weighted, kind), TensorDataset(*data().tensors, weights))

    truth = la.score(run, "loo", [0, 7, 23], ray_address=None, keep_shifts=True, save=False).shifts
    assert truth is not None
    for shift, sample in zip(truth, (0, 7, 23), strict=True):
        other = retrained(sample, 0.0)
        assert (other - flat(plain)).abs().max() > 1e-4
        assert (flat(plain) + shift - other).abs().max() < 1e-9


class Clamps(Net):
    def on_after_backward(self) -> None:
        for p in self.parameters():
            p.grad.clamp_(-0.01, 0.01)


class ClampsBeforeTheStep(Net):
    def on_before_optimizer_step(self, optimizer: Any) -> None:
        for p in self.parameters():
            p.grad.clamp_(-0.01, 0.01)


class ClipsByHand(Net):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        nn.utils.clip_grad_norm_(self.parameters(), 0.01)


class ClipsTwice(Net):
    def configure_gradient_clipping(
        self, optimizer: Any, gradient_clip_val: Any = None, gradient_clip_algorithm: Any = None
    ) -> None:
        self.clip_gradients(optimizer, gradient_clip_val=0.1, gradient_clip_algorithm="norm")
        self.clip_gradients(optimizer, gradient_clip_val=0.01, gradient_clip_algorithm="value")


class StepsTwice(Net):
    def optimizer_step(self, epoch: int, batch_idx: int, optimizer: Any, optimizer_closure: Any = None) -> None:
        optimizer.step(closure=optimizer_closure)
        torch.optim.SGD.step(self.trainer.optimizers[0])


class KeepsGradients(Net):
    def optimizer_zero_grad(self, *args: Any) -> None:
        pass


class Doubles(Net):
    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        (2 * loss).backward()


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (Clamps, r"in step 0, .* their gradients differ by .* Clamps overrides on_after_backward, where this may come from"),
        (ClampsBeforeTheStep, r"Step 0 moved the parameters otherwise.* overrides on_before_optimizer_step"),
        (ClipsByHand, r"Step 0 moved the parameters otherwise.* overrides configure_gradient_clipping"),
        (ClipsTwice, r"configure_gradient_clipping clips the gradients of a step twice: clip them once\.$"),
        (StepsTwice, r"Step 0 moved the parameters otherwise.* overrides optimizer_step"),
        (KeepsGradients, r"in step 1, .* their gradients differ by .* overrides optimizer_zero_grad"),
        (Doubles, r"gradients differ by .* overrides backward"),
    ],
    ids=lambda one: getattr(one, "__name__", ""),
)
def test_module_hooks_that_alter_the_training_are_found_in_its_first_steps(tmp_path: Path, kind: Any, message: str) -> None:
    with pytest.raises(RecordingRefused, match=f"(?s){message}") as refusal:
        record(tmp_path / "run", built(kind))
    assert "\n" not in str(refusal.value)
    with pytest.raises(la.RunError):
        la.Run(tmp_path / "run")


class Found(Net):
    """Has the attributes that tuners set."""

    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.lr = 0.1

    def configure_optimizers(self) -> Any:
        return torch.optim.SGD(self.parameters(), lr=self.lr, momentum=0.9)


class Sized(pl.LightningDataModule):
    """Training data in batches of the size that is found, validated within the epoch."""

    def __init__(self) -> None:
        super().__init__()
        self.batch_size = 3

    def train_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(), self.batch_size, shuffle=True)

    def val_dataloader(self) -> DataLoader[Any]:
        return DataLoader(data(n=16, seed=9), 16)


CALLBACKS: dict[str, Any] = {
    "learning rate": lambda: LearningRateFinder(num_training_steps=40, min_lr=1e-3),
    "batch size": lambda: BatchSizeFinder(max_trials=2),
    "lambda": lambda: LambdaCallback(on_train_batch_end=lambda trainer, *_: trainer.callback_metrics.get("loss")),
}


@pytest.mark.filterwarnings("ignore:`weights_only` was not set")
@pytest.mark.parametrize("first", [True, False], ids=["recorder first", "recorder last"])
@pytest.mark.parametrize("case", CALLBACKS)
def test_callbacks_that_try_before_the_training_or_look_on_are_recorded(tmp_path: Path, case: str, first: bool) -> None:
    def train(*recorder: Any) -> Found:
        torch.manual_seed(0)
        module, mine = Found().double(), CALLBACKS[case]()
        pl.seed_everything(1)
        callbacks = (*recorder, mine) if first else (mine, *recorder)
        trainer(*callbacks, default_root_dir=tmp_path, val_check_interval=2).fit(module, datamodule=Sized())
        return module

    plain = train()
    module = train(la.TrajectoryRecorder(tmp_path / "run"))
    assert torch.equal(flat(module), flat(plain))
    run = la.Run(tmp_path / "run")
    assert run.n_samples == N
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), flat(plain))
    size = 4 if case == "batch size" else 3
    assert {len(step.sample_ids) for step in run.steps} == {size}
    assert run.n_steps == 3 * N // size
    assert {step.hyperparameters["lr"] for step in run.steps} == {module.lr}
    assert (module.lr != 0.1) == (case == "learning rate")


@pytest.mark.parametrize(
    ("callback", "message"),
    [
        (ModelPruning("l1_unstructured", amount=0.5), "the callback ModelPruning sets parameters to 0 outside"),
    ],
    ids=["pruning"],
)
def test_callbacks_that_are_known_to_alter_are_refused_before_the_training(tmp_path: Path, callback: Any, message: str) -> None:
    module = built(Net)
    start = flat(module).clone()
    with pytest.raises(RecordingRefused, match=message):
        record(tmp_path / "run", module, callbacks=(callback,))
    assert torch.equal(flat(module), start)


def test_a_lambda_that_alters_is_found(tmp_path: Path) -> None:
    def shrink(trainer: Any, module: Any, *_: Any) -> None:
        with torch.no_grad():
            next(module.parameters()).mul_(0.99)

    with pytest.raises(RecordingRefused, match="Step 0 moved the parameters otherwise"):
        record(tmp_path / "run", built(Net), callbacks=(LambdaCallback(on_train_batch_end=shrink),))
