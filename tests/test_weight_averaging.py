"""Averages of the parameters that callbacks keep (EMA, SWA): the training is recorded, and queries can be read at them."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import N, Net, Normalised, Weighted, data, fit, flat, make, record
from pytorch_lightning.callbacks import EMAWeightAveraging, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from torch import Tensor, nn
from torch.optim.swa_utils import get_ema_avg_fn, get_ema_multi_avg_fn, get_swa_multi_avg_fn
from torch.utils.data import TensorDataset

import lightning_acc as la
from lightning_acc.cli import main
from lightning_acc.methods.registry import METHODS
from lightning_acc.show.tracking import dashboard

SGD = {"momentum": 0.9, "lr": 0.05, "weight_decay": 0.01}


class Late(WeightAveraging):
    """Averages equally what is there after the second and after each later epoch."""

    def should_update(self, step_idx: int | None = None, epoch_idx: int | None = None) -> bool:
        return epoch_idx is not None and epoch_idx >= 1


def warmed_up(average: Tensor, now: Tensor, n: Tensor) -> Tensor:
    decay = min(0.9, (1 + int(n)) / (10 + int(n)))
    return decay * average + (1 - decay) * now


def ema(**options: Any) -> EMAWeightAveraging:
    return EMAWeightAveraging(**{"decay": 0.8, **options})


CALLBACKS: dict[str, tuple[Any, str, list[int]]] = {
    "ema": (ema, "ema", list(range(1, 13))),
    "every third, late": (lambda: ema(update_every_n_steps=3, update_starting_at_step=2), "ema", [4, 7, 10]),
    "by epoch": (lambda: ema(update_every_n_steps=0, update_starting_at_epoch=1), "ema", [8, 12]),
    "twice at a step": (lambda: ema(update_starting_at_epoch=0), "ema", list(range(1, 13))),
    "ema by hand": (lambda: WeightAveraging(avg_fn=get_ema_avg_fn(0.7)), "ema", list(range(1, 13))),
    "ema of several": (lambda: WeightAveraging(multi_avg_fn=get_ema_multi_avg_fn(0.7)), "ema", list(range(1, 13))),
    "warmed up": (lambda: WeightAveraging(avg_fn=warmed_up), "average", list(range(1, 13))),
    "equal": (WeightAveraging, "average", list(range(1, 13))),
    "equal, of several": (lambda: WeightAveraging(multi_avg_fn=get_swa_multi_avg_fn()), "average", list(range(1, 13))),
    "equal, late": (Late, "average", [8, 12]),
    "swa": (lambda: StochasticWeightAveraging(0.02, 2, annealing_epochs=2), "swa", [4, 8]),
    "swa from the start": (lambda: StochasticWeightAveraging(0.02, 1, annealing_epochs=2), "swa", [0, 4, 8]),
}


def averaged(callback: Any) -> Tensor:
    """The callback's own averaged parameters."""
    model = callback._average_model
    return flat(model.module if isinstance(callback, WeightAveraging) else model)


def trained(module: pl.LightningModule, *callbacks: Any, **options: Any) -> Tensor:
    """The parameters after the last step of a training: before any callback has put others in their place."""
    kept: list[Tensor] = []

    class Keep(pl.Callback):
        def on_train_batch_end(self, trainer: Any, pl_module: Any, *_: Any) -> None:
            kept.append(flat(pl_module).clone())

    fit(module, options.pop("train", None), Keep(), *callbacks, **options)
    return kept[-1]


@pytest.mark.parametrize("first", [True, False], ids=["recorder first", "recorder last"])
@pytest.mark.parametrize("case", CALLBACKS)
def test_the_training_is_recorded_and_its_average(tmp_path: Path, case: str, first: bool) -> None:
    build, name, steps = CALLBACKS[case]
    plain, mine = build(), build()
    module, other = (make(hidden=4, optimizer=SGD, decay_lr=0.9) for _ in range(2))
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    last = trained(other, plain)
    fit(module, None, *((recorder, mine) if first else (mine, recorder)))
    assert torch.equal(flat(module), flat(other))
    assert torch.equal(averaged(mine), averaged(plain))
    run = la.Run(tmp_path / "run")
    assert torch.equal(run.parameters(run.n_steps), last)
    assert run.n_steps in run.snapshots
    assert run.audit().max_abs_error == 0
    assert list(run.averages) == [name]
    average = run.averages[name]
    assert average["steps"].tolist() == steps
    assert torch.equal(average["theta"], averaged(mine))
    assert not torch.equal(average["theta"], last)
    theta = sum(weight * run.parameters(t) for t, weight in zip(steps, average["weights"].tolist(), strict=True))
    assert (theta - average["theta"]).abs().max() < 1e-12


@pytest.fixture(scope="module", params=["ema", "every third, late", "swa from the start"])
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[la.Run, str, Any]:
    """A run, the name of its average, and what makes the callback that keeps it."""
    build, name, _ = CALLBACKS[request.param]
    module = make(hidden=4, activation="gelu", optimizer=SGD, decay_lr=0.9)
    return record(tmp_path_factory.mktemp("averages") / "run", module, callbacks=(build(),)), name, build


class Wayward(WeightAveraging):
    """Averages by a rule that changes with every update, which its function does not show when it is asked."""

    def __init__(self) -> None:
        super().__init__(avg_fn=self.average)
        self.inner = False

    def average(self, before: Tensor, now: Tensor, number: Tensor) -> Tensor:
        return before.lerp(now, 0.9 if self.inner and int(number) % 2 else 0.1)

    def on_train_batch_end(self, *arguments: Any, **options: Any) -> None:
        self.inner = True
        super().on_train_batch_end(*arguments, **options)
        self.inner = False


@pytest.mark.parametrize("method", ["sgd-ie", "loo"])
def test_an_average_that_is_not_what_its_rule_says_is_no_moment(tmp_path: Path, method: str) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=SGD), callbacks=(Wayward(),))
    (name,) = run.averages
    with pytest.raises(la.RunError, match=f"The average {name!r} .* is not the sum of parameters that its weights make"):
        scored(run, method, at=name)


def scored(run: la.Run, method: str = "sgd-ie", **options: Any) -> la.Scores:
    return la.score(run, method, **{"ray_address": None, "save": False, "check": 0, **options})


def mean_loss(module: Net, theta: Tensor) -> float:
    """Of the validation data, at parameters ``theta``."""
    module = copy.deepcopy(module)
    nn.utils.vector_to_parameters(theta, module.parameters())
    with torch.no_grad():
        return float(module.per_sample_loss(data(module.loss, n=16, seed=9).tensors).mean())


def retrained(sample: int, weight: float, build: Any, **arguments: Any) -> float:
    """The loss at the averaged weights of a real training in which the loss of one sample counts ``weight`` times."""
    torch.manual_seed(0)
    module = Weighted(**{"hidden": 4, "activation": "gelu", "optimizer": SGD, "decay_lr": 0.9, **arguments}).double()
    weights = torch.ones(N, dtype=torch.float64)
    weights[sample] = weight
    callback = build()
    fit(module, TensorDataset(*data(module.loss).tensors, weights), callback)
    return mean_loss(module, averaged(callback))


def test_the_truth_at_an_average_is_that_of_a_training_with_the_callback(case: tuple[la.Run, str, Any]) -> None:
    run, name, build = case
    truth = scored(run, "loo", at=name)
    assert truth.conditions["at"] == name
    base = retrained(0, 1.0, build)
    differences = [retrained(i, 0.0, build) - base for i in (0, 7, 23)]
    assert min(map(abs, differences)) > 1e-6
    np.testing.assert_allclose(truth.values[[0, 7, 23]], differences, rtol=0, atol=1e-9)
    ends = scored(run, "loo")
    assert np.abs(truth.values - ends.values).max() > 1e-4


def test_the_derivative_at_an_average_forward_back_and_by_finite_differences(case: tuple[la.Run, str, Any]) -> None:
    run, name, build = case
    back = scored(run, at=name).values
    forward = scored(run, at=name, keep_shifts=True, readout="linear")
    np.testing.assert_allclose(forward.values, back, rtol=0, atol=1e-12)
    in_parts = scored(run, at=name, readout="linear", memory_gb=2e-6)  # the states of the tape are computed again
    np.testing.assert_allclose(in_parts.values, back, rtol=0, atol=1e-12)
    for i in (0, 7, 23):
        h = 1e-5
        slope = (retrained(i, 1 + h, build) - retrained(i, 1 - h, build)) / (2 * h)
        assert back[i] == pytest.approx(-slope, rel=1e-6, abs=1e-9)


FORMS: list[dict[str, Any]] = [{"method": method} for method in METHODS if method != "acc-low-rank"]
FORMS += [{"method": "acc-low-rank", "directions": 39}, {"method": "acc-low-rank", "followed": N}]


@pytest.mark.parametrize("form", FORMS, ids=lambda form: " ".join(map(str, form.values())))
@pytest.mark.parametrize("readout", ["exact", "linear"])
def test_every_method_reads_the_shift_of_the_average(case: tuple[la.Run, str, Any], form: Any, readout: str) -> None:
    """The shift is the weighted sum of the shifts at the steps, and what is read is one vector, not many."""
    run, name, _ = case
    average = run.averages[name]
    steps = {t: w for t, w in zip(average["steps"].tolist(), average["weights"].tolist(), strict=True) if t}
    shifts_of = form if "followed" not in form else {"method": "acc-sgd-ie"}  # all of them are followed
    shift: Any = sum(w * scored(run, at=t, keep_shifts=True, **shifts_of).shifts for t, w in steps.items())
    at = scored(run, at=name, readout=readout, **form)
    module, theta = make(hidden=4, activation="gelu"), average["theta"]
    if readout == "exact":
        read = [mean_loss(module, theta + row) - mean_loss(module, theta) for row in shift]
    else:
        h = 1e-6
        read = [(mean_loss(module, theta + h * row) - mean_loss(module, theta - h * row)) / (2 * h) for row in shift]
    np.testing.assert_allclose(at.values, read, rtol=0, atol=1e-9)
    if "followed" not in form:
        kept = scored(run, at=name, keep_shifts=True, **form).shifts
        assert kept is not None
        assert (kept - shift).abs().max() < 1e-12
    if form["method"] != "acc-low-rank":
        matrix = la.score_matrix(run, form["method"], at=name, readout=readout, ray_address=None, save=False, check=0)
        np.testing.assert_allclose(matrix.values.mean(1), at.values, rtol=0, atol=1e-6)


@pytest.mark.parametrize("build", [ema, lambda: StochasticWeightAveraging(0.02, 1, annealing_epochs=2)], ids=["ema", "swa"])
def test_acc_sgd_ie_is_the_truth_on_a_linear_model_with_squared_loss(tmp_path: Path, build: Any) -> None:
    arguments = {"loss": "squared", "optimizer": {"class": "AdamW", "lr": 0.05}}
    run = record(tmp_path / "run", make(**arguments), callbacks=(build(),), gradient_clip_val=1.0)
    (name,) = run.averages
    truth, estimate, derivative = (scored(run, method, at=name).values for method in ("loo", "acc-sgd-ie", "sgd-ie"))
    np.testing.assert_allclose(estimate, truth, rtol=0, atol=1e-11)
    assert np.abs(derivative - truth).max() > 1e-4


def kept(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "kept", "{step}", save_top_k=-1, every_n_train_steps=2, **options)


@pytest.mark.filterwarnings("ignore:.*resuming from a checkpoint that ended before", "ignore:Checkpoint directory .* exists")
@pytest.mark.parametrize("first", [True, False], ids=["recorder first", "recorder last"])
def test_a_resumed_training_goes_on_with_its_average(tmp_path: Path, first: bool) -> None:
    def train(path: Path, **options: Any) -> EMAWeightAveraging:
        mine, recorder = ema(update_every_n_steps=2), la.TrajectoryRecorder(path)
        callbacks = (recorder, mine) if first else (mine, recorder)
        settings = {"enable_checkpointing": True, "default_root_dir": tmp_path, **options}
        fit(make(hidden=4, optimizer=SGD), None, *callbacks, kept(tmp_path), **settings)
        return mine

    train(tmp_path / "run", max_epochs=2)
    (middle,) = (tmp_path / "kept").glob("step=6*")
    train(tmp_path / "run", max_epochs=3, ckpt_path=middle)
    resumed = la.Run(tmp_path / "run")
    assert resumed.manifest["resumed_at"] == [6]
    assert resumed.audit().max_abs_error == 0
    average = resumed.averages["ema"]
    assert average["steps"].tolist() == list(range(1, resumed.n_steps + 1, 2))
    weights = dict(zip(average["steps"].tolist(), average["weights"].tolist(), strict=True))
    theta = sum(weight * resumed.parameters(t) for t, weight in weights.items())
    assert (theta - average["theta"]).abs().max() < 1e-12


@pytest.mark.parametrize("case", ["ema", "swa"])
def test_checkpoints_that_hold_an_average_are_no_parameters_of_the_run(tmp_path: Path, case: str) -> None:
    mine = CALLBACKS[case][0]()

    class AtTheEnd(pl.Callback):
        def on_fit_end(self, trainer: Any, pl_module: Any) -> None:
            trainer.save_checkpoint(tmp_path / "end.ckpt")

    options = {"enable_checkpointing": True, "default_root_dir": tmp_path}
    run = record(tmp_path / "run", make(optimizer=SGD), callbacks=(mine, kept(tmp_path), AtTheEnd()), **options)
    listed = {name: step for name, step in run.checkpoints.items() if name != "last"}
    assert str(tmp_path / "end.ckpt") not in listed
    for path in (tmp_path / "kept").iterdir():
        stored = torch.load(path, weights_only=False)["state_dict"]
        theta = torch.cat([value.reshape(-1) for value in stored.values()])
        steps = [t for t in range(run.n_steps + 1) if torch.equal(run.parameters(t), theta)]
        assert [listed[str(path)]] == steps if steps else str(path) not in listed
    assert bool(listed) == (case == "swa")
    with pytest.raises(la.RequestError, match=rf"and the averages {case}\."):
        scored(run, at="sometimes")


@pytest.mark.parametrize("hook", ["on_validation_batch_end", "on_train_batch_end"])
def test_interrupted_while_the_average_is_in_place(tmp_path: Path, hook: str) -> None:
    """The record ends with trained parameters, not with the average that is being validated."""

    class Break(pl.Callback):
        def __init__(self) -> None:
            def stop(trainer: Any, *_: Any) -> None:
                if trainer.global_step == 8:
                    raise RuntimeError("the power failed")

            setattr(self, hook, stop)

    callbacks = (ema(), la.TrajectoryRecorder(tmp_path / "run"), Break())
    with pytest.raises(RuntimeError, match="the power failed"):
        fit(make(hidden=4, optimizer=SGD), None, *callbacks)
    run = la.Run(tmp_path / "run")
    whole = record(tmp_path / "whole", make(hidden=4, optimizer=SGD), callbacks=(ema(),))
    assert run.n_steps == 8
    assert torch.equal(run.parameters(8), whole.parameters(8))
    assert run.audit().max_abs_error == 0
    if hook == "on_validation_batch_end":
        assert not run.averages
    else:
        assert run.averages["ema"]["steps"].tolist() == list(range(1, 9))
        assert scored(run, at="ema").conditions["at"] == "ema"


UNUSABLE: dict[str, tuple[Any, Any, dict[str, Any], str]] = {
    "not linear": (
        lambda: WeightAveraging(avg_fn=lambda a, b, n: torch.maximum(a, b)),
        Net,
        {},
        "it is no sum of the parameters",
    ),
    "never updated": (lambda: ema(update_starting_at_step=99), Net, {}, "it was never updated"),
    "batch norm": (ema, Normalised, {"recorder": {"batch_norm": "keep-batch-statistics"}}, "running statistics of its own"),
}


@pytest.mark.parametrize("case", UNUSABLE)
def test_an_average_that_is_no_moment_is_told_of_and_the_training_recorded(tmp_path: Path, case: str) -> None:
    build, kind, options, why = UNUSABLE[case]
    torch.manual_seed(0)
    module = kind().double()
    state = copy.deepcopy(module)
    last = trained(state, build())
    with pytest.warns(UserWarning, match=f"keeps is no moment to read a query at: .*{why}"):
        run = record(tmp_path / "run", module, callbacks=(build(),), **options)
    assert torch.equal(flat(module), flat(state))
    assert torch.equal(run.parameters(run.n_steps), last)
    assert not run.averages
    with pytest.raises(la.RequestError, match="at='ema' is no moment"):
        scored(run, at="ema")


def test_running_statistics_stay_those_of_the_training(tmp_path: Path) -> None:
    options = {"recorder": {"batch_norm": "keep-batch-statistics"}}
    torch.manual_seed(0)
    module = Normalised().double()
    plain = record(tmp_path / "plain", copy.deepcopy(module), **options)
    for name, build in {"ema": ema, "swa": CALLBACKS["swa"][0]}.items():
        swa = name == "swa"
        with pytest.warns(UserWarning, match="running statistics of its own"):
            run = record(tmp_path / name, copy.deepcopy(module), callbacks=(build(),), **options)
        assert run.n_steps == plain.n_steps
        assert run.audit().max_abs_error == 0
        same = [torch.equal(value, run.frozen_tensors()[key]) for key, value in plain.frozen_tensors().items()]
        assert all(same)  # of the inputs, whatever the learning rate
        assert torch.equal(run.parameters(12), plain.parameters(12)) != swa


def test_two_averages_and_their_names_where_scores_are_shown(tmp_path: Path) -> None:
    """Validation is off: at it these callbacks would put each other's averages in the place of the parameters."""
    callbacks = (ema(), WeightAveraging(avg_fn=get_ema_avg_fn(0.5)), CALLBACKS["swa"][0]())
    run = record(tmp_path / "run", make(optimizer=SGD), callbacks=callbacks, limit_val_batches=0)
    assert sorted(run.averages) == ["ema", "ema-1", "swa"]
    for at in (*run.averages, "end"):
        assert scored(run, at=at, save=True).conditions["at"] == at
    names = {path.stem for path in (tmp_path / "run" / "scores").iterdir()}
    assert names == {"sgd-ie", "sgd-ie.ema", "sgd-ie.ema-1", "sgd-ie.swa"}
    scored(run, "loo", at="ema", save=True)
    assert not (tmp_path / "run" / "bank").exists()
    assert scored(run, "loo", at="ema", save=True).conditions["reused"] == N
    steps = scored(run, "loo", at=list(range(1, 13)), save=True)  # the bank has the shifts of all steps now
    assert steps.conditions["at"] == "along"
    banked = la.score(run, "loo", at="ema-1", ray_address=None)
    assert banked.conditions["banked"] == N
    np.testing.assert_allclose(banked.values, scored(run, "loo", at="ema-1").values, rtol=0, atol=1e-12)
    checked = la.score(run, "acc-sgd-ie", at="ema", check=18, ray_address=None)
    assert checked.verdict.n == 12
    assert checked.truths == {key: pytest.approx(scored(run, "loo", at="ema").by_removal()[key]) for key in checked.truths}
    assert {row["at"] for row in la.evaluate(run).to_pylist()} >= {"ema", "along"}
    assert '"at": "ema"' in Path(la.write_report(run)).read_text().replace('":"', '": "')
    assert dashboard._label(run, checked.conditions) == "acc-sgd-ie (exact, at ema)"
    main(["score", str(tmp_path / "run"), "--method=tracin", "--at=ema", "--check=0", "--ray-address=null"])
    assert (tmp_path / "run" / "scores" / "tracin.ema.parquet").exists()


@pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*sync_dist", "ignore:'set_vital' is deprecated")
def test_two_processes_keep_one_average(tmp_path: Path) -> None:
    arguments = {"loss": "squared", "optimizer": SGD}
    run = record(tmp_path / "run", make(**arguments), callbacks=(ema(),), strategy="ddp_fork", devices=2)
    average = run.averages["ema"]
    assert average["steps"].tolist() == list(range(1, run.n_steps + 1))
    theta = sum(w * run.parameters(t) for t, w in zip(average["steps"].tolist(), average["weights"].tolist(), strict=True))
    assert (theta - average["theta"]).abs().max() < 1e-12
    truth, estimate = (scored(run, method, at="ema").values for method in ("loo", "acc-sgd-ie"))
    np.testing.assert_allclose(estimate, truth, rtol=0, atol=1e-11)  # which it is on a linear model with squared loss
