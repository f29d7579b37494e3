"""Narrow precisions: what is recorded is the very training, to its bits; what is scored is that training without rounding."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import FEATURES, N, Net, Normalised, StepOnly, Weighted, data, fit, make, record
from pytorch_lightning.plugins import MixedPrecision
from pytorch_lightning.plugins.precision import Precision
from pytorch_lightning.strategies import DDPStrategy, FSDPStrategy, ModelParallelStrategy
from scipy.stats import spearmanr
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import Replay
from lightning_acc.recorder import RecordingRefused
from lightning_acc.recorder.checks import refusals

pytestmark = pytest.mark.filterwarnings(
    *("ignore:.*Skipping val loop", "ignore:Training has no validation data", "ignore:.*fork", "ignore:.*sync_dist"),
    *("ignore:.*validation_step", "ignore:Detected call of `lr_scheduler.step"),
)
SAMPLES = (0, 11, 23)
EVERYTHING = torch.ones(N)
SETUPS: dict[str, dict[str, Any]] = {
    "sgd": {"optimizer": {"momentum": 0.9, "lr": 0.05}},
    "adamw-clipped-dropout": {
        "optimizer": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1},
        "gradient_clip_val": 0.3,
        "accumulate_grad_batches": 2,
        "dropout": 0.2,
    },
}


def samples_of(dtype: torch.dtype) -> tuple[Tensor, ...]:
    x, y = data(dtype=torch.float32).tensors
    return x.to(dtype).float(), y


def train(
    kept: Tensor, *callbacks: Any, rounded: torch.dtype = torch.float32, optimizer: Any, dropout: float = 0.0, **options: Any
) -> Tensor:
    """The training, from parameters and on data that a narrow dtype holds exactly where it is asked for."""
    torch.manual_seed(0)
    module = Weighted(hidden=8, activation="gelu", dropout=dropout, optimizer=optimizer).to(rounded).float()
    loader = DataLoader(TensorDataset(*samples_of(rounded), kept), 6, shuffle=True)
    return fit(module, loader, *callbacks, validation=False, **options)


def without(sample: int) -> Tensor:
    kept = EVERYTHING.clone()
    kept[sample] = 0
    return kept


def final_without(run: la.Run, sample: int) -> Tensor:
    """Where F, as the run was trained, ends without the sample."""
    replay = Replay(run, as_trained=True)
    state = replay.initial
    for t in range(len(replay)):
        step = replay.step(t)
        step.weights = torch.where(step.sample_ids == sample, 0, step.weights)
        state = step(state)
    return state[0]


def relative(found: Tensor, expected: Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


def held_out() -> la.Query:
    return la.Query("held-out", [data(n=8, seed=5, dtype=torch.float32).tensors])


@pytest.mark.parametrize(
    ("precision", "setup"), [("bf16-true", "sgd"), ("bf16-true", "adamw-clipped-dropout"), ("16-true", "sgd")]
)
def test_narrow_parameters(tmp_path: Path, precision: str, setup: str) -> None:
    options = SETUPS[setup]
    base = train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), precision=precision, **options)
    assert torch.equal(base, train(EVERYTHING, precision=precision, **options))
    run = la.Run(tmp_path / "run")
    assert (run.manifest["precision"], run.dtype) == (precision, str(base.dtype).removeprefix("torch."))
    assert torch.equal(run.parameters(run.n_steps), base)
    assert run.audit().max_abs_error == 0
    found = la.score(run, "loo", SAMPLES, held_out(), keep_shifts=True, ray_address=None, check=0)
    assert (found.conditions["dtype"], found.conditions["trained_in"]) == ("float32", run.dtype)
    assert found.shifts is not None
    # The same training without rounding: from the same parameters, on the same numbers, in float32.
    wide = {"precision": "32-true", "rounded": base.dtype, **options}
    wide_base = train(EVERYTHING, **wide)
    for sample, shift in zip(SAMPLES, found.shifts, strict=True):
        assert torch.equal(final_without(run, sample), train(without(sample), precision=precision, **options))
        assert relative(shift, train(without(sample), **wide) - wide_base) < 1e-4


def test_float32_scores_rank_as_retraining_in_bfloat16_does(tmp_path: Path) -> None:
    """The shifts differ by a tenth, which is rounding; the order of the samples is the same."""
    train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), precision="bf16-true", **SETUPS["sgd"])
    run = la.Run(tmp_path / "run")
    found = la.score(run, "loo", query=held_out(), keep_shifts=True, ray_address=None, check=0)
    objective = Replay(run, "float64").objective
    ends = torch.stack([final_without(run, sample) for sample in range(N)]).double()
    values = held_out().values(objective, torch.cat([run.parameters(run.n_steps)[None].double(), ends]))
    assert spearmanr(found.values, (values[1:] - values[0]).numpy()).statistic > 0.95
    assert found.shifts is not None
    assert 0.01 < relative(found.shifts, ends - run.parameters(run.n_steps).double()) < 0.3


def test_narrow_dtypes_are_not_scored_in(tmp_path: Path) -> None:
    train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), precision="bf16-true", **SETUPS["sgd"])
    run = la.Run(tmp_path / "run")
    with pytest.raises(la.RequestError, match="float32"):
        la.score(run, "loo", SAMPLES, held_out(), dtype="bfloat16", ray_address=None)
    estimates = [la.score(run, m, None, held_out(), ray_address=None, check=0).values for m in ("loo", "acc-sgd-ie", "sgd-ie")]
    assert np.corrcoef(estimates[:2])[0, 1] > 0.99
    assert np.corrcoef(estimates[::2])[0, 1] > 0.9


def test_a_wrong_learning_rate_is_found_in_bfloat16(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from test_audit import told

    train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), precision="bf16-true", **SETUPS["sgd"])
    told(monkeypatch, lr=1.5)
    assert not la.Run(tmp_path / "run").audit().ok


def scaled(start: float, growth_interval: int = 1000) -> dict[str, Any]:
    scaler = torch.amp.GradScaler("cpu", init_scale=start, growth_interval=growth_interval)
    return {"precision": None, "plugins": [MixedPrecision("16-mixed", "cpu", scaler=scaler)]}


class Scales(pl.Callback):
    """Watches the scale of the loss, which is halved where a step was left out."""

    def __init__(self) -> None:
        self.after: list[float] = []

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.after.append(trainer.precision_plugin.scaler.get_scale())


@pytest.mark.parametrize("setup", [*SETUPS, "fused"])
def test_scaled_losses_and_skipped_steps(tmp_path: Path, setup: str) -> None:
    """A step whose gradient overflows is left out by the scaler: it is none of the record's, and told there."""
    options = {**SETUPS.get(setup, {"optimizer": {"class": "AdamW", "lr": 0.02, "fused": True}}), "max_epochs": 2}
    base = train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), **scaled(2.0**20), **options)
    scales = Scales()
    assert torch.equal(base, train(EVERYTHING, scales, **scaled(2.0**20), **options))
    run = la.Run(tmp_path / "run")
    assert run.manifest["skipped"]
    assert run.n_steps == 8 // options.get("accumulate_grad_batches", 1) - len(run.manifest["skipped"])
    assert run.steps[0].hyperparameters["loss_scale"] == 2.0 ** (20 - run.manifest["skipped"].count(0))
    report = run.audit()
    assert report.ok
    assert report.max_abs_error <= (1e-6 if setup == "fused" else 0)
    found = la.score(run, "loo", SAMPLES, held_out(), keep_shifts=True, ray_address=None, check=0).shifts
    assert found is not None
    compared = 0
    for sample, shift in zip(SAMPLES, found, strict=True):
        seen = Scales()
        change = train(without(sample), seen, **scaled(2.0**20), **options) - base
        if seen.after != scales.after:  # others are left out without it: it made the gradient that overflowed
            continue
        compared += 1
        assert relative(final_without(run, sample) - base, change) < 1e-5
        assert relative(shift, change) < 0.02
    assert compared


def test_a_scale_that_grows_beyond_bounds_on_the_way(tmp_path: Path) -> None:
    base = train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), **scaled(2.0**16, growth_interval=3), **SETUPS["sgd"])
    run = la.Run(tmp_path / "run")
    assert run.manifest["skipped"]
    assert run.manifest["skipped"][0] > 0
    assert run.n_steps == 12 - len(run.manifest["skipped"])
    assert len({step.hyperparameters["loss_scale"] for step in run.steps}) > 1
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), base)


def test_where_every_step_is_skipped_there_is_no_run(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match="No optimizer step was taken"):
        train(EVERYTHING, la.TrajectoryRecorder(tmp_path / "run"), **scaled(2.0**60), **SETUPS["sgd"])
    with pytest.raises(la.RunError, match="no run directory"):
        la.Run(tmp_path / "run")


class DropoutStep(StepOnly):
    def training_step(self, batch: Any) -> dict[str, Tensor]:
        return {"loss": nn.functional.cross_entropy(self.layer(nn.functional.dropout(batch[0], 0.3)), batch[1])}


@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_narrow_precisions_without_per_sample_loss(tmp_path: Path, precision: str) -> None:
    run = record(tmp_path / "run", DropoutStep(), data(dtype=torch.float32), precision=precision, validation=False)
    assert run.audit().max_abs_error == 0


class Noisy(Net):
    """Draws noise of torch's default dtype, and multiplies by how precisely torch multiplies."""

    def per_sample_loss(self, batch: Any) -> Tensor:
        x, y = batch
        if self.training:
            x = x + 0.1 * torch.rand(x.shape) + torch.linspace(0, 1, FEATURES)
        precise = torch.get_float32_matmul_precision() == "highest"
        return nn.functional.cross_entropy(self.net(x), y, reduction="none") * (1.0 if precise else 0.5)


@pytest.mark.parametrize("precision", ["64-true", "32-true", "bf16-true", "bf16-mixed"])
def test_what_a_module_creates_is_of_the_dtype_it_was_of_in_training(tmp_path: Path, precision: str) -> None:
    module = Noisy(hidden=4)
    samples = data(dtype=torch.float64 if precision == "64-true" else torch.float32)
    run = record(tmp_path / "run", module, samples, precision=precision, validation=False)
    assert run.audit().max_abs_error == 0


def test_the_precision_of_products_is_recorded(tmp_path: Path) -> None:
    torch.set_float32_matmul_precision("medium")
    try:
        run = record(tmp_path / "run", Noisy(), data(dtype=torch.float32), precision="32-true", validation=False)
    finally:
        torch.set_float32_matmul_precision("highest")
    assert run.manifest["matmul_precision"] == "medium"
    assert run.audit().max_abs_error == 0
    assert torch.get_float32_matmul_precision() == "highest"


@pytest.mark.parametrize("options", [{"deterministic": True}, {"benchmark": True}, {"detect_anomaly": True}], ids=str)
def test_settings_of_the_trainer(tmp_path: Path, options: dict[str, Any]) -> None:
    before = torch.are_deterministic_algorithms_enabled(), torch.is_anomaly_enabled(), torch.backends.cudnn.benchmark
    try:
        run = record(tmp_path / "run", make(hidden=4), **options)
    finally:
        torch.use_deterministic_algorithms(before[0])
        torch.autograd.set_detect_anomaly(before[1])
        torch.backends.cudnn.benchmark = before[2]
    assert run.audit().max_abs_error == 0


@pytest.mark.parametrize(
    "options", [{"static_graph": True, "gradient_as_bucket_view": True}, {"find_unused_parameters": True}], ids=str
)
def test_options_of_ddp(tmp_path: Path, options: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(hidden=4), strategy=DDPStrategy(start_method="fork", **options), devices=2)
    assert run.manifest["world_size"] == 2
    assert run.audit().max_abs_error == 0


def test_bfloat16_in_two_processes(tmp_path: Path) -> None:
    run = record(
        tmp_path / "run", Net(hidden=4), data(dtype=torch.float32), precision="bf16-true", strategy="ddp_fork", devices=2
    )
    assert run.dtype == "bfloat16"
    assert run.audit().ok


def test_statistics_of_several_processes_are_refused() -> None:
    reason = refusals.module_refusal(nn.SyncBatchNorm.convert_sync_batchnorm(Normalised()), refusals.KEEP_BATCH_STATISTICS)
    assert reason is not None
    assert "SyncBatchNorm in training mode, whose statistics couple the processes: freeze it" in reason


@pytest.mark.parametrize("strategy", [FSDPStrategy, ModelParallelStrategy])
def test_sharded_parameters_are_refused(strategy: Any) -> None:
    trainer = SimpleNamespace(strategy=strategy())
    for allow_untested in (False, True):
        reason = refusals.trainer_refusal(trainer, Net(), allow_untested)
        assert reason is not None
        assert f"{strategy.__name__} shares the parameters out" in reason
        assert "use strategy='ddp'" in reason


class Eighths(Precision):
    """Stands for a plugin that is not installed."""

    precision: Any = "transformer-engine"


def test_formats_of_other_libraries_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingRefused, match=r"'transformer-engine' puts layers .* use one of 32-true, .*16-true"):
        record(tmp_path / "run", Net(), data(dtype=torch.float32), precision=None, plugins=[Eighths()])


class HalfAndHalf(Net):
    def configure_optimizers(self) -> Any:
        self.net[0].bfloat16()
        return super().configure_optimizers()

    def per_sample_loss(self, batch: Any) -> Tensor:
        return nn.functional.cross_entropy(self.net[1:](self.net[0](batch[0].bfloat16()).float()), batch[1], reduction="none")


def test_parameters_of_two_dtypes_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecordingRefused, match=r"'torch.bfloat16', 'torch.float32'.*use one of float32, .* for all"):
        record(tmp_path / "run", HalfAndHalf(hidden=4), data(dtype=torch.float32), precision="32-true")
