"""The facts about the methods that must hold, in float64 (numbered as in the package's design)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import N, Net, Noting, asked, data, fit, make, record, replay_by_hand
from torch.utils.data import DataLoader, Subset, TensorDataset

import lightning_acc as la
from lightning_acc.core.replay import parameters_at
from lightning_acc.methods.registry import METHODS

EXACT = 1e-10  # relative, for what is equal up to round-off
OPTIMIZERS = [
    {},
    {"momentum": 0.9, "lr": 0.02},
    {"momentum": 0.8, "nesterov": True, "weight_decay": 0.05, "lr": 0.03},
    {"weight_decay": 0.1},
]


def shifts(run: la.Run, method: str, removals: Any = None, **options: Any) -> torch.Tensor:
    scores = la.score(run, method, removals, ray_address=None, keep_shifts=True, save=False, **options, check=0)
    assert scores.shifts is not None
    return scores.shifts


def relative(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found - expected).norm() / expected.norm())


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_1_acc_is_exact_for_squared_loss_and_a_linear_model(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(loss="squared", optimizer=optimizer, decay_lr=0.8))
    truth = shifts(run, "loo")
    assert relative(shifts(run, "acc-sgd-ie"), truth) < EXACT
    assert relative(shifts(run, "sgd-ie"), truth) > 1e-3
    groups = [[0, 1, 2], [5, 9], list(range(10, 20))]
    assert relative(shifts(run, "acc-sgd-ie", groups), shifts(run, "loo", groups)) < EXACT


def test_2_acc_equals_sgd_ie_when_every_sample_is_seen_once(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.5}), max_epochs=1)
    assert relative(shifts(run, "acc-sgd-ie"), shifts(run, "sgd-ie")) < EXACT
    again = record(tmp_path / "again", make(hidden=4, optimizer={"momentum": 0.5}), max_epochs=2)
    assert relative(shifts(again, "acc-sgd-ie"), shifts(again, "sgd-ie")) > 1e-4


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_3_sgd_ie_is_the_derivative_in_the_samples_weight(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer, decay_lr=0.9))
    found = shifts(run, "sgd-ie", [3, 11])
    step = 1e-5
    for sample, shift in zip((3, 11), found, strict=True):
        lighter = replay_by_hand(run, make(hidden=4, optimizer=optimizer), {sample: 1 - step})
        heavier = replay_by_hand(run, make(hidden=4, optimizer=optimizer), {sample: 1 + step})
        assert relative(shift, (lighter - heavier) / (2 * step)) < 1e-7


def test_4_what_removes_nothing_scores_exactly_zero(tmp_path: Path) -> None:
    seen = DataLoader(data(), batch_size=7, sampler=[i for i in range(N) if i not in (4, 20)])
    run = record(tmp_path / "run", make(hidden=4), seen)
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        for readout in ("exact", "linear"):
            values = la.score(
                run, method, [[], [4], [20, 4], [5]], readout=readout, ray_address=None, save=False, check=0
            ).values
            assert values[:3].tolist() == [0.0, 0.0, 0.0]
            assert values[3] != 0.0
        assert shifts(run, method, [[], [4]]).abs().max() == 0


def test_4_groups_add_up_for_sgd_ie_and_not_for_acc(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    group = [1, 6, 15]
    for method, adds in (("sgd-ie", True), ("acc-sgd-ie", False), ("loo", False)):
        together, single = shifts(run, method, [group])[0], shifts(run, method, group).sum(0)
        assert (relative(together, single) < EXACT) == adds, method
    together, single = (la.score(run, "sgd-ie", r, ray_address=None, save=False, check=0).values for r in ([group], group))
    assert together[0] == pytest.approx(single.sum(), rel=EXACT)


DECAY, RATE = 0.05, 0.2


def convex(path: Path, decay: float = DECAY) -> la.Run:
    """Logistic regression with weight decay: strongly convex, and every step of SGD a contraction."""
    return record(path, make(optimizer={"weight_decay": decay, "lr": RATE}), max_epochs=40)


def shifts_along(run: la.Run, method: str, error: torch.Tensor | None = None, put_in: int = 0) -> torch.Tensor:
    """Shifts (T + 1, n, p) before every step and after the last; an ``error`` (n, p) is added to them before one step."""
    from lightning_acc.core.replay import Replay
    from lightning_acc.methods import sweeps
    from lightning_acc.methods.swept import Swept

    entry = METHODS[method]
    assert isinstance(entry, Swept)
    rule: Any = entry.forward
    seen: list[torch.Tensor] = []

    class Watched(rule):  # type: ignore[misc]
        def advance(self, step: Any, carry: Any, removals: Any) -> Any:
            if error is not None and len(seen) == put_in + 1:
                carry[1][0].add_(error)  # to the parameters without each sample, in the order in which these were first seen
                seen[-1] = seen[-1] + error
            return super().advance(step, carry, removals)

    def see(t: int, theta: torch.Tensor, shifts: torch.Tensor) -> None:
        seen.append(shifts)

    sweeps.forward(Replay(run), Watched(), [(i,) for i in range(N)], reading=see, steps=range(run.n_steps + 1))
    return torch.stack(seen)


@pytest.mark.parametrize("put_in", [4, 10, 40])  # by then every sample was seen
def test_5_an_error_in_the_shift_decays_geometrically(tmp_path: Path, put_in: int) -> None:
    run = convex(tmp_path / "run")
    error = torch.nn.functional.normalize(torch.randn(N, run.n_parameters, dtype=torch.float64), dim=1)
    disturbed, plain = (shifts_along(run, "acc-sgd-ie", given, put_in) for given in (error, None))
    assert torch.equal(disturbed[:put_in], plain[:put_in])
    left = (disturbed - plain)[put_in:].norm(dim=2)
    assert left[0].tolist() == pytest.approx([1.0] * N, rel=EXACT)
    # Convex losses add to the Hessian of the weight decay: no direction shrinks by less than 1 - lr * decay.
    assert float((left[1:] / left[:-1]).max()) <= (1 - RATE * DECAY) * (1 + 1e-6)
    assert float(left.min()) > 1e-8  # what shrinks is no round-off


def test_5_without_weight_decay_an_error_may_stay(tmp_path: Path) -> None:
    """The same logit more for every class changes no loss: in this direction nothing but weight decay shrinks an error."""
    run = convex(tmp_path / "run", decay=0.0)
    error = torch.cat([torch.full((15,), 15**-0.5, dtype=torch.float64), torch.zeros(3, dtype=torch.float64)]).expand(N, -1)
    left = (shifts_along(run, "acc-sgd-ie", error, 4) - shifts_along(run, "acc-sgd-ie"))[-1].norm(dim=1)
    assert left.tolist() == pytest.approx([1.0] * N, rel=1e-9)


def test_5_accs_relative_error_stays_below_that_of_sgd_ie_at_every_epoch(tmp_path: Path) -> None:
    """In the first epoch both are exact but for round-off: every sample is seen once."""
    run = convex(tmp_path / "run")
    epochs = slice(8, None, 4)  # after the second, the third, ... of four steps each
    truth, acc, sgd_ie = (shifts_along(run, method)[epochs] for method in ("loo", "acc-sgd-ie", "sgd-ie"))
    assert len(truth) == 39
    acc_errors, sgd_ie_errors = ((found - truth).norm(dim=2) / truth.norm(dim=2) for found in (acc, sgd_ie))
    assert (acc_errors.median(1).values < sgd_ie_errors.median(1).values).all()
    assert (acc_errors.mean(1) < 0.5 * sgd_ie_errors.mean(1)).all()
    assert (acc_errors < sgd_ie_errors).double().mean() > 0.95


@pytest.mark.parametrize("method", ["sgd-ie", "tracin"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_6_forward_and_reverse_agree(tmp_path: Path, method: str, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer))
    reverse = la.score(run, method, ray_address=None, save=False, check=0)
    forward = la.score(run, method, readout="linear", keep_shifts=True, ray_address=None, save=False, check=0)
    assert reverse.shifts is None
    torch.testing.assert_close(torch.tensor(reverse.values), torch.tensor(forward.values), rtol=1e-9, atol=1e-15)


def test_6_a_reverse_sweep_in_segments_equals_one_that_keeps_everything(tmp_path: Path) -> None:
    from lightning_acc.core.replay import Replay
    from lightning_acc.methods import sweeps as sweep
    from lightning_acc.methods.rules import AdjointSgdIe

    run = record(tmp_path / "run", make(hidden=4, optimizer={"momentum": 0.9, "lr": 0.05}))
    replay = Replay(run)
    whole = sweep.reverse(replay, AdjointSgdIe(), asked(run))
    segmented = sweep.reverse(replay, AdjointSgdIe(), asked(run, memory=1))
    assert torch.equal(whole, segmented)
    assert whole.abs().min() > 0


@pytest.mark.parametrize("method", ["loo", "acc-sgd-ie", "sgd-ie", "tracin"])
def test_6_chunked_equals_unchunked(tmp_path: Path, method: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.methods import memory

    run = record(tmp_path / "run", make(hidden=4))
    whole = la.score(run, method, readout="exact", ray_address=None, save=False, check=0).values
    monkeypatch.setattr(memory, "LARGEST_CHUNK", 5)
    chunked = la.score(run, method, readout="exact", ray_address=None, save=False, check=0).values
    torch.testing.assert_close(torch.tensor(chunked), torch.tensor(whole), rtol=1e-9, atol=1e-15)


def test_7_the_audit_is_bit_exact(tmp_path: Path) -> None:
    for name, options in {"a": {}, "b": {"momentum": 0.9, "nesterov": True, "weight_decay": 0.01, "lr": 0.05}}.items():
        for precision in ("32-true", "64-true"):
            module = make(hidden=6, activation="gelu", optimizer=options, decay_lr=0.7).float()
            run = record(tmp_path / f"{name}{precision}", module, precision=precision)
            report = run.audit()
            assert report.ok
            assert report.max_abs_error == 0
            assert report.first_bad_step is None
            assert report.n_steps == run.n_steps == 12


def test_7_the_audit_runs_on_the_threads_of_the_training_and_gives_back_the_callers(
    tmp_path: Path, two_threads: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "run", Noting(hidden=4).double())
    assert run.manifest["threads"] == 2
    monkeypatch.setattr(type(run), "snapshots", property(lambda _: [0]))  # so that the others are replayed
    for callers in (1, 3):
        torch.set_num_threads(callers)
        for replay in (run.audit, lambda: parameters_at(run, 5)):
            Noting.seen.clear()
            replay()
            assert set(Noting.seen) == {2}, replay
            assert torch.get_num_threads() == callers

    def breaks(self: Any, batch: Any) -> torch.Tensor:
        raise ZeroDivisionError

    monkeypatch.setattr(Noting, "per_sample_loss", breaks)
    with pytest.raises(ZeroDivisionError):
        run.audit()
    assert torch.get_num_threads() == 3


def test_7_the_audit_finds_the_step_that_was_tampered_with(tmp_path: Path) -> None:
    class Nudging(pl.Callback):
        """Moves a weight a little after step 6, as a forgotten hook would."""

        def on_train_batch_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule, *_: Any) -> None:
            if trainer.global_step == 7:
                with torch.no_grad():
                    next(pl_module.parameters()).view(-1)[0] += 1e-4

    run = record(tmp_path / "run", make(hidden=4), callbacks=(Nudging(),))
    report = run.audit()
    assert not report.ok
    assert report.first_bad_step == 6
    assert report.max_abs_error == pytest.approx(1e-4, rel=1e-6)
    assert "step 6" in str(report)
    for method in METHODS:
        with pytest.raises(la.RunError, match=r"audit FAILED: step 6.*no score of this run can be trusted"):
            la.score(run, method, ray_address=None, check=0)


@pytest.mark.parametrize("optimizer", OPTIMIZERS, ids=str)
def test_loo_equals_a_retraining_by_hand(tmp_path: Path, optimizer: dict[str, Any]) -> None:
    run = record(tmp_path / "run", make(hidden=4, optimizer=optimizer, decay_lr=0.9))
    found = shifts(run, "loo", [[2], [17], [3, 4, 5]])
    base = replay_by_hand(run, make(hidden=4, optimizer=optimizer), {})
    for removal, shift in zip(([2], [17], [3, 4, 5]), found, strict=True):
        without = replay_by_hand(run, make(hidden=4, optimizer=optimizer), dict.fromkeys(removal, 0.0))
        assert relative(shift, without - base) < EXACT


class Weighted(Net):
    """Multiplies each sample's loss with a weight the data set carries."""

    def per_sample_loss(self, batch: Any) -> torch.Tensor:
        return batch[2] * super().per_sample_loss(batch[:2])


@pytest.mark.parametrize("sample", [0, 13, 23])
def test_loo_equals_a_real_lightning_retraining(tmp_path: Path, sample: int) -> None:
    def trained(kept: torch.Tensor, *callbacks: Any) -> torch.Tensor:
        torch.manual_seed(0)
        module = Weighted(hidden=4, activation="gelu", optimizer={"momentum": 0.9, "lr": 0.05}).double()
        loader = DataLoader(TensorDataset(*data().tensors, kept), 5, shuffle=True)
        return fit(module, loader, *callbacks, validation=False)

    everything = torch.ones(N, dtype=torch.float64)
    without = everything.clone()
    without[sample] = 0
    with pytest.warns(UserWarning, match="no validation data"):
        base = trained(everything, la.TrajectoryRecorder(tmp_path / "run"))
    query = la.Query("held_out", [(*data(n=8, seed=5).tensors, torch.ones(8, dtype=torch.float64))])
    scores = la.score(la.Run(tmp_path / "run"), "loo", [sample], query, keep_shifts=True, ray_address=None, check=0)
    assert scores.shifts is not None
    assert relative(scores.shifts[0], trained(without) - base) < EXACT


def test_exact_and_linear_readout_are_what_they_say(tmp_path: Path) -> None:
    module = make(hidden=4)
    run = record(tmp_path / "run", module)
    held_out = data(n=16, seed=9).tensors

    def query(theta: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(theta, module.parameters())
        return module.per_sample_loss(held_out).mean()

    final = run.parameters(run.n_steps)
    torch.nn.utils.vector_to_parameters(final, module.parameters())
    gradient = torch.cat([g.reshape(-1) for g in torch.autograd.grad(query(final.clone()), module.parameters())])
    for method in ("loo", "acc-sgd-ie", "sgd-ie", "tracin"):
        moved = shifts(run, method)
        linear = la.score(run, method, readout="linear", ray_address=None, save=False, check=0).values
        torch.testing.assert_close(torch.tensor(linear), moved @ gradient, rtol=1e-8, atol=1e-14)
        exact = la.score(run, method, readout="exact", ray_address=None, save=False, check=0).values
        expected = torch.stack([query(final + shift) - query(final.clone()) for shift in moved]).detach()
        torch.testing.assert_close(torch.tensor(exact), expected, rtol=1e-8, atol=1e-14)


def test_tracin_is_the_sum_of_gradient_products(tmp_path: Path) -> None:
    module = make(hidden=4, decay_lr=0.5)
    run = record(tmp_path / "run", module)
    final = run.parameters(run.n_steps)

    def gradient(theta: torch.Tensor, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        torch.nn.utils.vector_to_parameters(theta, module.parameters())
        loss = module.per_sample_loss((x, y)).mean()
        return torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, module.parameters())])

    query = gradient(final, *data(n=16, seed=9).tensors)
    x, y = data().tensors
    expected = torch.zeros(N, dtype=torch.float64)
    for t, step in enumerate(run.steps):
        for sample, weight in zip(step.sample_ids.tolist(), step.weights.tolist(), strict=True):
            g = gradient(run.parameters(t), x[sample : sample + 1], y[sample : sample + 1])
            expected[sample] += step.hyperparameters["lr"] * weight * float(query @ g)
    found = la.score(run, "tracin", ray_address=None, save=False, check=0).values
    torch.testing.assert_close(torch.tensor(found), expected, rtol=1e-9, atol=1e-15)


def test_a_float64_replay_of_a_float32_run_is_close_to_it_and_smoother(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4).float(), precision="32-true")
    single, double = shifts(run, "loo"), shifts(run, "loo", dtype="float64")
    assert single.dtype == torch.float32
    assert double.dtype == torch.float64
    assert 0 < relative(single.double(), double) < 1e-3


def test_a_sample_that_occurs_twice_in_a_batch_is_removed_twice(tmp_path: Path) -> None:
    order = [[0, 1, 2, 1], [3, 4, 1, 5], [5, 5, 0, 2]]
    loader = DataLoader(data(), batch_sampler=order)
    run = record(tmp_path / "run", make(hidden=4), loader)
    found = shifts(run, "loo", [1, 5])
    base = replay_by_hand(run, make(hidden=4), {})
    for sample, shift in zip((1, 5), found, strict=True):
        assert relative(shift, replay_by_hand(run, make(hidden=4), {sample: 0.0}) - base) < EXACT
    squared = record(tmp_path / "squared", make(loss="squared"), DataLoader(data("squared"), batch_sampler=order))
    assert relative(shifts(squared, "acc-sgd-ie", [1, 5]), shifts(squared, "loo", [1, 5])) < EXACT


def test_dropout_keeps_its_masks_in_every_counterfactual(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=8, dropout=0.4))
    assert run.audit().max_abs_error == 0
    assert list(run.steps[0].rng[0]) == ["cpu"]
    once = shifts(run, "loo", [2, 3])
    assert torch.equal(once, shifts(run, "loo", [2, 3]))
    # With other masks the two replays would differ everywhere, and the estimate by far more than its own error.
    assert relative(shifts(run, "acc-sgd-ie", [2, 3]), once) < 0.2


def test_a_subset_keeps_the_ids_of_the_loaders_own_dataset(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(), Subset(data(), range(10, 20)))
    assert run.n_samples == 10
    assert sorted({i for step in run.steps for i in step.sample_ids.tolist()}) == list(range(10))
