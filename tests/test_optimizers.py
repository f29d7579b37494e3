"""Every optimizer of torch whose step is a function: its rule, the record of its training, and what the methods make of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from problems import N, Net, Weighted, data, fit, weighing
from torch import Tensor, nn
from torch.utils.data import TensorDataset

import lightning_acc as la
from lightning_acc.core.losses.tracing import quiet
from lightning_acc.core.optimizers import RULES, Update, by_matrix
from lightning_acc.core.replay import Replay
from lightning_acc.recorder import RecordingRefused
from lightning_acc.recorder.optimizer import TrainedOptimizer

pytestmark = pytest.mark.filterwarnings("ignore:.*Skipping val loop", "ignore:Training has no validation data")
SAMPLES = (0, 11, 23)


class Lion(torch.optim.Optimizer):
    """As users copy it: the authors' few lines."""

    def __init__(self, params: Any, lr: float = 1e-4, betas: tuple[float, float] = (0.9, 0.99), weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        with torch.enable_grad():
            loss = closure() if closure is not None else None
        for group in self.param_groups:
            for p in [p for p in group["params"] if p.grad is not None]:
                p.mul_(1 - group["lr"] * group["weight_decay"])
                mean = self.state[p].setdefault("exp_avg", torch.zeros_like(p))
                beta1, beta2 = group["betas"]
                p.add_(mean.clone().mul_(beta1).add(p.grad, alpha=1 - beta1).sign_(), alpha=-group["lr"])
                mean.mul_(beta2).add_(p.grad, alpha=1 - beta2)
        return loss


class ByAnotherRule(Lion):
    """Decays its weights otherwise than others of its name do."""

    def step(self, closure: Any = None) -> Any:
        loss = super().step(closure)
        with torch.no_grad():
            for p in self.param_groups[0]["params"]:
                p.mul_(0.99)
        return loss


ByAnotherRule.__name__ = "Lion"
CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "rmsprop": (torch.optim.RMSprop, {"lr": 0.01}),
    "rmsprop-centered": (torch.optim.RMSprop, {"lr": 0.01, "centered": True, "momentum": 0.9, "weight_decay": 0.01}),
    "adagrad": (torch.optim.Adagrad, {"lr": 0.1, "lr_decay": 0.1, "initial_accumulator_value": 0.3, "weight_decay": 0.01}),
    "adadelta": (torch.optim.Adadelta, {"lr": 1.0, "maximize": True}),
    "adamax": (torch.optim.Adamax, {"lr": 0.02, "weight_decay": 0.01}),
    "nadam": (torch.optim.NAdam, {"lr": 0.02, "weight_decay": 0.1, "decoupled_weight_decay": True, "momentum_decay": 0.1}),
    "radam": (torch.optim.RAdam, {"lr": 0.02, "betas": (0.8, 0.7), "weight_decay": 0.1}),
    "asgd": (torch.optim.ASGD, {"lr": 0.1, "t0": 2, "lambd": 0.01, "weight_decay": 0.01}),
    "rprop": (torch.optim.Rprop, {"lr": 0.01, "etas": (0.4, 1.3), "step_sizes": (1e-4, 0.03)}),
    "adam-tensor-lr": (torch.optim.Adam, {"lr": 0.02, "amsgrad": True, "weight_decay": 0.01}),
    "adamw-fused": (torch.optim.AdamW, {"lr": 0.02, "fused": True, "maximize": True}),
    "nadam-foreach": (torch.optim.NAdam, {"lr": 0.02, "foreach": True}),
    "lion": (Lion, {"lr": 0.01, "weight_decay": 0.1}),
    "adafactor": (torch.optim.Adafactor, {"lr": 0.1, "weight_decay": 0.1}),
    "adafactor-clipped": (torch.optim.Adafactor, {"lr": 0.1, "d": 1.2, "eps": (1e-8, 0.1), "beta2_decay": -0.5}),
    "adafactor-tensor-lr": (torch.optim.Adafactor, {"lr": 0.02}),
    "muon": (torch.optim.Muon, {"lr": 0.05}),
    "muon-adjusted": (torch.optim.Muon, {"lr": 0.05, "nesterov": False, "adjust_lr_fn": "match_rms_adamw"}),
}
"""For each, a class and its options; parameter groups and a schedule come on top."""
NO_DERIVATIVE = ("rprop", "lion")
SINGLE = ("adafactor-tensor-lr",)
"""In which a number that depends on the parameters is rounded to single precision."""
ROUNDED_OTHERWISE = ("adamw-fused", "nadam-foreach", "adafactor", "adafactor-clipped", *SINGLE)
"""Equal to torch but for the last digit."""


def optimizer_of(name: str, parameters: list[nn.Parameter]) -> torch.optim.Optimizer:
    """The optimizer of a case, with another learning rate for all parameters but the first."""
    kind, options = CASES[name]
    groups: list[dict[str, Any]] = [{"params": parameters[:1]}, {"params": parameters[1:], "lr": options["lr"] / 2}]
    if "tensor" in name:
        for group in groups:
            group["lr"] = torch.tensor(group.get("lr", options["lr"]))
    optimizer: torch.optim.Optimizer = kind([group for group in groups if group["params"]], **options)
    return optimizer


class Small(Weighted):
    """A network whose optimizer is that of a case; Muon trains matrices alone."""

    def __init__(self, name: str, loss: str = "cross-entropy") -> None:
        super().__init__(hidden=0 if loss == "squared" else 4, loss=loss, activation="gelu")
        self.name = name
        if "muon" in name:
            for layer in self.net:
                layer.bias = None

    def configure_optimizers(self) -> Any:
        optimizer = optimizer_of(self.name, list(self.parameters()))
        return [optimizer], [{"scheduler": torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9), "interval": "step"}]


def train(name: str, loss: str, kept: Tensor, *callbacks: Any) -> Tensor:
    torch.manual_seed(0)
    module = Small(name, loss).double()
    samples = TensorDataset(*data(loss).tensors, kept)
    return fit(module, samples, *callbacks, batch_size=9, max_epochs=2, validation=False)


def everything() -> Tensor:
    return torch.ones(N, dtype=torch.float64)


def held_out(loss: str = "cross-entropy") -> la.Query:
    return la.Query("held-out", [(*data(loss, n=8, seed=5).tensors, torch.ones(8, dtype=torch.float64))])


def shifts(run: la.Run, method: str, removals: Any = None, loss: str = "cross-entropy") -> Tensor:
    options = {"keep_shifts": True, "ray_address": None, "save": False, "check": 0}
    found = la.score(run, method, removals, held_out(loss), **options).shifts
    assert found is not None
    return found


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], tuple[la.Run, Tensor]]:
    """The recorded training of a small network by an optimizer, and its final parameters; each trained once."""
    known: dict[str, tuple[la.Run, Tensor]] = {}

    def of(name: str) -> tuple[la.Run, Tensor]:
        if name not in known:
            path = tmp_path_factory.mktemp("runs") / name
            end = train(name, "cross-entropy", everything(), la.TrajectoryRecorder(path))
            known[name] = la.Run(path), end
        return known[name]

    return of


def trainer_of(optimizer: torch.optim.Optimizer) -> Any:
    """What of a trainer is looked at for its optimizer."""
    options = {"gradient_clip_val": None, "gradient_clip_algorithm": None, "precision": "64-true"}
    options.update(global_step=0, current_epoch=0, world_size=1)
    return SimpleNamespace(optimizers=[optimizer], precision_plugin=SimpleNamespace(), **options)


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_the_rule_is_torchs_own_step(name: str, dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    shapes: list[tuple[int, ...]] = [(4, 3), (2, 5)] if "muon" in name else [(4, 3), (2, 5), (7,), (), (2, 3, 4)]
    module = nn.ParameterList([nn.Parameter(torch.randn(shape, dtype=dtype)) for shape in shapes])
    optimizer = optimizer_of(name, list(module))
    trainer = trainer_of(optimizer)
    own = TrainedOptimizer(trainer, module)
    state = own.update.initial(own.parameters())
    schedule = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for t in range(20):
        for i, p in enumerate(module):
            p.grad = torch.randn_like(p) * (t % 4 > 0 or i != 1)
            p.grad.reshape(-1)[:2] *= p.ndim != 2  # never seen
        groups = json.loads(json.dumps(own.hyperparameters(t)))  # as it is written and read
        own.update.check(groups)
        state = own.update(state, own.gradient(t), groups)
        optimizer.step()
        schedule.step()
        for part, real in zip(state, own.state(), strict=True):
            if name in ROUNDED_OTHERWISE:
                scale = 1e-12 if dtype == torch.float64 else 1e-5
                torch.testing.assert_close(part, real, rtol=scale, atol=scale)
            else:
                assert torch.equal(part, real)


def test_what_is_written_to_is_told_anew_and_what_is_replaced_too() -> None:
    parameter = nn.Parameter(torch.zeros(2))
    rate, pair = torch.tensor(0.5), [0.9, 0.99]
    optimizer = torch.optim.Adam([parameter], lr=rate, capturable=False, foreach=False, betas=(0.9, 0.99))
    (group,) = optimizer.param_groups
    own = TrainedOptimizer(trainer_of(optimizer), nn.ParameterList([parameter]))

    def told(step: int) -> tuple[Any, Any, Any]:
        parameter.grad = torch.ones(2)
        (h,) = own.hyperparameters(step)
        return h["lr"], list(h["betas"]), h["weight_decay"]

    assert told(0) == (0.5, [0.9, 0.99], 0)
    rate.fill_(0.25)
    assert told(1) == (0.25, [0.9, 0.99], 0)
    group.update(lr=0.125, betas=pair)
    assert told(2) == told(3) == (0.125, [0.9, 0.99], 0)
    pair[0] = 0.5
    assert told(4) == (0.125, [0.5, 0.99], 0)
    group.update(betas=(0.5, 0.75), weight_decay=0.1)
    assert told(5) == told(6) == (0.125, [0.5, 0.75], 0.1)
    group["lr"] = math.nan
    with pytest.raises(la.RunError, match="The optimizer's lr is nan in step 7: give the scheduler"):
        told(7)


def rule_at(name: str, step: int) -> tuple[Update, list[dict[str, Any]]]:
    """The update of a case for one matrix, and its hyper-parameters at a step."""
    module = nn.ParameterList([nn.Parameter(torch.zeros(3, 2, dtype=torch.float64))])
    trainer = trainer_of(optimizer_of(name, list(module)))
    own = TrainedOptimizer(trainer, module)
    module[0].grad = torch.zeros(3, 2, dtype=torch.float64)
    return own.update, own.hyperparameters(step)


@pytest.mark.parametrize("name", [name for name in CASES if name not in NO_DERIVATIVE])
def test_derivatives_are_finite_where_no_gradient_ever_was_and_rows_stay_apart(name: str) -> None:
    for step in (0, 5):
        update, groups = rule_at(name, step)
        state = update.initial(torch.zeros(6, dtype=torch.float64))
        gradient = torch.zeros(6, dtype=torch.float64)

        def of(*arguments: Tensor, update: Any = update, groups: Any = groups) -> Any:
            return update(arguments[:-1], arguments[-1], groups)

        directions = [torch.eye(6, dtype=torch.float64) for _ in (*state, gradient)]
        with quiet():
            tangents = torch.vmap(lambda *d: torch.func.jvp(of, (*state, gradient), d)[1])(*directions)  # noqa: B023
        assert all(bool(torch.isfinite(part).all()) for part in tangents)
        inputs = [part.clone().requires_grad_() for part in (*state, gradient)]
        back = torch.autograd.grad(of(*inputs)[0].sum(), inputs, materialize_grads=True)
        assert all(bool(torch.isfinite(part).all()) for part in back)
        rows = [torch.rand(4, 6, dtype=torch.float64) for _ in (*state, gradient)]
        rows[1] += 1  # a mean of squares is no less than the square of the mean
        together = of(*rows)
        for i in range(4):
            for all_of, alone in zip(together, of(*(part[i] for part in rows)), strict=True):
                torch.testing.assert_close(all_of[i], alone, rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("name", CASES)
def test_a_training_passes_its_audit_and_loo_is_retraining(trained: Any, name: str) -> None:
    run, end = trained(name)
    report = run.audit()
    assert report.ok
    assert report.max_abs_error <= (1e-14 if name in ROUNDED_OTHERWISE else 0)
    for sample, shift in zip(SAMPLES, shifts(run, "loo", list(SAMPLES)), strict=True):
        kept = everything()
        kept[sample] = 0
        change = train(name, "cross-entropy", kept) - end
        assert float(change.norm()) > 0
        assert float((shift - change).norm() / change.norm()) < 1e-9


@pytest.mark.parametrize("name", CASES)
def test_acc_is_exact_for_squared_loss_and_a_linear_model(tmp_path: Path, name: str) -> None:
    train(name, "squared", everything(), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    truth, found = (shifts(run, method, loss="squared") for method in ("loo", "acc-sgd-ie"))
    assert float((found - truth).norm() / truth.norm()) < 1e-8


@pytest.mark.parametrize("name", [name for name in CASES if name not in (*NO_DERIVATIVE, *SINGLE)])
def test_sgd_ie_is_the_derivative_in_the_weight_and_forward_equals_reverse(
    trained: Any, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, _ = trained(name)

    def forward_and_reverse() -> None:
        for method in ("sgd-ie", "tracin"):
            options: dict[str, Any] = {"readout": "linear", "ray_address": None, "save": False, "check": 0}
            forward = la.score(run, method, list(SAMPLES), held_out(), keep_shifts=True, **options).values
            reverse = la.score(run, method, list(SAMPLES), held_out(), **options).values
            torch.testing.assert_close(torch.tensor(forward), torch.tensor(reverse), rtol=1e-8, atol=1e-13)

    forward_and_reverse()
    monkeypatch.setattr(by_matrix, "ROUNDED_TO", torch.float64)  # a rounded number has no difference quotient
    replay = Replay(run)

    carry = shifts_by_hand(replay)
    for sample, shift in zip((4, 9), carry, strict=True):
        eps = 1e-5
        difference = (weighing(replay, sample, 1 - eps) - weighing(replay, sample, 1 + eps)) / (2 * eps)
        assert float((shift - difference).norm() / difference.norm()) < 2e-6


def shifts_by_hand(replay: Replay) -> Tensor:
    """SGD-IE's shifts of the samples 4 and 9; no sweep, as a run of Muon is not confirmed without its rounding."""
    from lightning_acc.core.removals import Removals
    from lightning_acc.methods.rules import SgdIe

    rule, removals = SgdIe(), Removals([(4,), (9,)])
    carry = rule.init(replay.initial, removals)
    for t in range(len(replay)):
        carry = rule.advance(replay.step(t), carry, removals)
    return rule.finish(carry)[1]


class OneGroup(Small):
    def configure_optimizers(self) -> Any:
        kind, options = CASES[self.name]
        return kind(self.parameters(), **options)


def test_low_rank_follows_averaged_sgd(tmp_path: Path) -> None:
    torch.manual_seed(0)
    module = OneGroup("asgd").double()
    fit(module, data(), la.TrajectoryRecorder(tmp_path / "run"), batch_size=9, max_epochs=2, validation=False)
    run = la.Run(tmp_path / "run")
    query = la.Query("held-out", [data(n=8, seed=5).tensors])
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0, "readout": "linear"}
    low_rank = la.score(run, "acc-low-rank", None, query, directions=run.n_parameters, **options).values
    exact = la.score(run, "acc-sgd-ie", None, query, **options).values
    torch.testing.assert_close(torch.tensor(low_rank), torch.tensor(exact), rtol=1e-6, atol=1e-10)


@pytest.mark.parametrize("name", NO_DERIVATIVE)
def test_without_a_derivative_only_methods_that_take_the_update_itself_answer(trained: Any, name: str) -> None:
    from lightning_acc.scoring.over_time import influence_over_time

    run, _ = trained(name)
    reason = r"follows the derivative of the update, which is 0 for .* because .*sign.*: use acc-sgd-ie or loo"
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0}
    with pytest.raises(la.RequestError, match=f"acc-low-rank {reason}"):
        la.score(run, "acc-low-rank", None, held_out(), **options)
    for method in ("sgd-ie", "tracin"):
        for readout in ("linear", "exact"):
            with pytest.raises(la.RequestError, match=f"{method} {reason}"):
                la.score(run, method, None, held_out(), readout=readout, **options)
        with pytest.raises(la.RequestError, match=f"{method} {reason}"):
            la.score_matrix(run, method, held_out(), **options)
    with pytest.raises(la.RequestError, match=reason):
        influence_over_time(run, [0], held_out())
    plan = la.plan(run, list(SAMPLES), held_out(), ray_address=None)
    assert "sgd-ie cannot be computed on this run (sgd-ie follows the derivative" in str(plan)
    assert la.score(run, "acc-sgd-ie", list(SAMPLES), held_out(), **options).values.any()


class Refused(Net):
    """Trained by what is refused."""

    make: Any = None

    def configure_optimizers(self) -> Any:
        return self.make(self.parameters())


class OtherKeys(Lion):
    def __init__(self, params: Any) -> None:
        torch.optim.Optimizer.__init__(self, params, {"lr": 0.1, "beta": 0.9})


OtherKeys.__name__ = "Lion"
REFUSED: dict[str, tuple[Any, str]] = {
    "LBFGS": (torch.optim.LBFGS, r"LBFGS takes the gradient at several parameters within a step.*use SGD or Adam"),
    "SparseAdam": (torch.optim.SparseAdam, r"SparseAdam moves the rows that a sparse gradient stores.*sparse=False"),
    "another of the name": (OtherKeys, r"test_optimizers.Lion is not known: use one of torch.optim \(ASGD.*register_optimizer"),
    "another rule of the name": (
        lambda p: ByAnotherRule(p, lr=0.01),
        r"Step 0 moved the parameters otherwise than its record says",
    ),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_no_function_or_not_known_is_refused(tmp_path: Path, case: str) -> None:
    make, reason = REFUSED[case]
    module = Refused().double()
    module.make = make
    with pytest.raises(RecordingRefused, match=reason):
        fit(module, data(), la.TrajectoryRecorder(tmp_path / "run"), max_epochs=1, validation=False)


class Words(Weighted):
    """A mean of embeddings, whose gradient is sparse."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.words = nn.Embedding(20, 5, sparse=True)

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss([self.words(batch[0]).mean(1), *batch[1:]])

    def configure_optimizers(self) -> Any:
        options = {"SGD": {"momentum": 0.9, "nesterov": True}, "Adagrad": {}}[self.kind]
        return getattr(torch.optim, self.kind)(self.parameters(), lr=0.1, **options)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")
@pytest.mark.parametrize("kind", ["SGD", "Adagrad"])
def test_sparse_gradients_are_those_of_a_dense_embedding(tmp_path: Path, kind: str) -> None:
    words, labels = torch.randint(0, 20, (N, 3), generator=torch.Generator().manual_seed(3)), data().tensors[1]

    def trained(kept: Tensor, *callbacks: Any) -> Tensor:
        torch.manual_seed(0)
        samples = TensorDataset(words, labels, kept)
        return fit(Words(kind).double(), samples, *callbacks, batch_size=9, max_epochs=2, validation=False)

    end = trained(everything(), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error < 1e-14
    query = la.Query("held-out", [(words[:6], labels[:6], torch.ones(6, dtype=torch.float64))])
    found = la.score(run, "loo", [4], query, keep_shifts=True, ray_address=None, save=False, check=0).shifts
    kept = everything()
    kept[4] = 0
    change = trained(kept) - end
    assert found is not None
    assert float((found[0] - change).norm() / change.norm()) < 1e-9
    assert bool(la.score(run, "sgd-ie", [4], query, ray_address=None, save=False, check=0).values.all())


class HalfUsed(Net):
    """One of its parameters never has a gradient."""

    decay = 0.0

    def __init__(self) -> None:
        super().__init__()
        self.extra = nn.Linear(2, 2)

    def configure_optimizers(self) -> Any:
        return torch.optim.ASGD(self.parameters(), lr=0.1, lambd=self.decay)


def test_a_parameter_without_a_gradient_stays_as_it_is(tmp_path: Path) -> None:
    module = HalfUsed().double()
    run_of = la.TrajectoryRecorder(tmp_path / "run")
    fit(module, data(), run_of, max_epochs=1, validation=False)
    assert la.Run(tmp_path / "run").audit().max_abs_error == 0
    module = HalfUsed().double()
    module.decay = 0.01  # which torch leaves out where there is no gradient
    fit(module, data(), la.TrajectoryRecorder(tmp_path / "decayed"), max_epochs=1, validation=False)
    assert la.Run(tmp_path / "decayed").audit().max_abs_error == 0


def test_every_optimizer_of_torch_is_known_or_refused_with_a_reason() -> None:
    from lightning_acc.core.optimizers import NO_FUNCTION

    kinds = [kind for kind in vars(torch.optim).values() if isinstance(kind, type) and issubclass(kind, torch.optim.Optimizer)]
    names = {kind.__name__ for kind in kinds} - {"Optimizer"}
    assert names <= {*RULES, *NO_FUNCTION}
    assert not set(RULES) & set(NO_FUNCTION)
