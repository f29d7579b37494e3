"""Trainings in which not every step moves every parameter: those are recorded as they are, and counted for each."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import pytorch_lightning as pl
import torch
from problems import CLASSES, FEATURES, N, Net, Weighted, data, fit, flat, make, record, trainer, weighing
from pytorch_lightning.callbacks import BackboneFinetuning
from safetensors.torch import save
from test_ddp import DDP
from test_optimizers import CASES, NO_DERIVATIVE, ROUNDED_OTHERWISE, SINGLE, Small, everything, held_out, shifts
from test_resume import Stop, checkpoint, train
from test_schema import manifest_of, put
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

import lightning_acc as la
from lightning_acc.core.optimizers import PARAMETER_STEPS, UNUSED
from lightning_acc.core.removals import Removals
from lightning_acc.core.replay import Replay
from lightning_acc.judge.self_influence import self_influence
from lightning_acc.record.schema.files import unpacked
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*Skipping val loop",
    "ignore:Training has no validation data",
    "ignore:.*fork",
    "ignore:.*is gone without an end",
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:Checkpoint directory .* exists",
)
LATER = {"frozen": "trained-later"}
ADAMW = {"class": "AdamW", "lr": 0.03, "weight_decay": 0.1}


class InTurn(Small):
    """The first parameter rests in every other epoch, the last one in each third, and one of them learns."""

    def on_train_epoch_start(self) -> None:
        first, *_, last = self.parameters()
        last.requires_grad_(self.current_epoch % 3 != 1 or first is last)
        first.requires_grad_(self.current_epoch % 2 == 1)

    def on_train_epoch_end(self) -> None:
        self.requires_grad_(True)

    def configure_optimizers(self) -> Any:
        (optimizer,), schedules = super().configure_optimizers()
        if len(optimizer.param_groups) > 1 and len(optimizer.param_groups[-1]["params"]) > 1:
            last = optimizer.param_groups[-1]["params"].pop()
            optimizer.add_param_group({**optimizer.param_groups[-1], "params": [last]})
        schedules[0]["scheduler"] = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        return [optimizer], schedules


def in_turn(name: str, kept: Tensor, *callbacks: Any, loss: str = "cross-entropy", **options: Any) -> Tensor:
    torch.manual_seed(0)
    module = InTurn(name, loss).double()
    samples = TensorDataset(*data(loss).tensors, kept)
    return fit(module, samples, *callbacks, batch_size=9, max_epochs=4, validation=False, **options)


@pytest.mark.parametrize("name", [name for name in CASES if name not in SINGLE])
def test_loo_is_retraining_whatever_the_optimizer(tmp_path: Path, name: str) -> None:
    options = {"gradient_clip_val": 0.3}
    base = in_turn(name, everything(), **options)
    assert torch.equal(in_turn(name, everything(), la.TrajectoryRecorder(tmp_path / "run", **LATER), **options), base)
    run = la.Run(tmp_path / "run")
    assert [step.groups[0][PARAMETER_STEPS][0] for step in run.steps] == [0, 0, 0, 1, 2, 3, 0, 0, 0, 4, 5, 6]
    report = run.audit()
    assert report.ok
    assert name in ROUNDED_OTHERWISE or report.max_abs_error == 0
    for sample, shift in zip((0, 11), shifts(run, "loo", [0, 11]), strict=True):
        kept = everything()
        kept[sample] = 0
        change = in_turn(name, kept, **options) - base
        assert float((shift - change).norm() / change.norm()) < 1e-6


@pytest.mark.parametrize("name", ["adam-tensor-lr", "asgd", "rmsprop-centered"])
def test_acc_is_exact_for_squared_loss_and_a_linear_model(tmp_path: Path, name: str) -> None:
    in_turn(name, everything(), la.TrajectoryRecorder(tmp_path / "run", **LATER), loss="squared", gradient_clip_val=0.5)
    run = la.Run(tmp_path / "run")
    truth = shifts(run, "loo", loss="squared")
    assert float((shifts(run, "acc-sgd-ie", loss="squared") - truth).norm() / truth.norm()) < 1e-8
    assert float((shifts(run, "sgd-ie", loss="squared") - truth).norm() / truth.norm()) > 1e-3


@pytest.mark.parametrize("clipping", [None, 0.3])
@pytest.mark.parametrize("name", [name for name in CASES if name not in (*NO_DERIVATIVE, *SINGLE) and "muon" not in name])
def test_sgd_ie_is_the_derivative_and_forward_equals_reverse(tmp_path: Path, name: str, clipping: float | None) -> None:
    in_turn(name, everything(), la.TrajectoryRecorder(tmp_path / "run", **LATER), gradient_clip_val=clipping)
    run = la.Run(tmp_path / "run")
    replay = Replay(run)

    eps = 1e-5
    found = shifts(run, "sgd-ie", [4, 9])
    for sample, shift in zip((4, 9), found, strict=True):
        difference = (weighing(replay, sample, 1 - eps) - weighing(replay, sample, 1 + eps)) / (2 * eps)
        assert float((shift - difference).norm() / difference.norm()) < 1e-5
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0}
    forward = la.score(run, "sgd-ie", None, held_out(), readout="linear", keep_shifts=True, **options).values
    reverse = la.score(run, "sgd-ie", None, held_out(), **options).values
    np.testing.assert_allclose(forward, reverse, rtol=1e-8, atol=1e-13)


class Transfer(Weighted):
    """A backbone that comes from elsewhere, and a head, the optimizer's alone at first."""

    def __init__(self, optimizer: dict[str, Any] | None = None) -> None:
        super().__init__(hidden=4, activation="gelu", optimizer=optimizer or ADAMW)
        layers = list(self.net)
        del self.net
        self.backbone, self.net = nn.Sequential(*layers[:2]), nn.Sequential(*layers[2:])

    def per_sample_loss(self, batch: Any) -> Tensor:
        return super().per_sample_loss([self.backbone(batch[0]), *batch[1:]])

    def configure_optimizers(self) -> Any:
        return self.optimizer_class([p for p in self.parameters() if p.requires_grad], **self.options)


def transferred(path: Path, optimizer: dict[str, Any] | None = None, *callbacks: Any, **options: Any) -> la.Run:
    torch.manual_seed(0)
    module = Transfer(optimizer).double()
    return record(path, module, callbacks=(BackboneFinetuning(1, lambda epoch: 1.5), *callbacks), **options)


def test_every_method_answers_under_a_finetuning_callback(tmp_path: Path) -> None:
    run = transferred(tmp_path / "run", gradient_clip_val=0.5)
    assert run.manifest["optimizer"] == {"name": "AdamW", "group_of": [1, 1, 0, 0], "slots": 2, "rests": True}
    assert [step.groups[0][PARAMETER_STEPS] for step in run.steps[3:6]] == [[0, 0, 4, 4], [1, 1, 5, 5], [2, 2, 6, 6]]
    assert [len(step.groups) for step in run.steps] == [1] * 4 + [2] * 8
    assert run.audit().max_abs_error == 0
    options: dict[str, Any] = {"ray_address": None, "save": False, "check": 0}
    truth = la.score(run, "loo", **options).values
    for method in ("acc-sgd-ie", "sgd-ie", "acc-low-rank"):
        assert np.corrcoef(la.score(run, method, **options).values, truth)[0, 1] > 0.95, method
    low_rank = la.score(run, "acc-low-rank", followed=N, **options)
    assert low_rank.conditions["followed_by_the_update"] == N
    first = la.score(run, "sgd-ie", **options).values
    assert np.sqrt(np.mean((low_rank.values - truth) ** 2)) < 0.8 * np.sqrt(np.mean((first - truth) ** 2))


def test_what_rests_has_no_share_in_a_sample_s_gradient(tmp_path: Path) -> None:
    run = transferred(tmp_path / "run")
    replay = Replay(run)
    head = slice(sum(replay.layout.sizes[:2]), None)
    for t in (0, 5):
        point = replay.step(t).at(replay.initial)
        removed = point.removed(Removals([(i,) for i in range(N)]))
        resting = removed.gradients[:, : head.start]
        assert bool(resting.any()) == (t == 5)
        assert bool(removed.gradients[:, head].any())
        assert bool(point.gradient[: head.start].any()) == (t == 5)
        assert bool(replay.step(t).gradient(replay.initial[0])[: head.start].any()) == (t == 5)
    assert bool((self_influence(run, 2**30) > 0).all())


class Taught(Transfer):
    """Learns from a frozen network in single precision, too."""

    def __init__(self) -> None:
        super().__init__()
        self.teacher = nn.Linear(5, 3).requires_grad_(False)

    def on_fit_start(self) -> None:
        self.teacher.float()

    def per_sample_loss(self, batch: Any) -> Tensor:
        taught = self.teacher(batch[0].to(self.teacher.weight.dtype)).to(batch[0].dtype).sum(1)
        return super().per_sample_loss(batch) * (1 + 0.1 * taught.sigmoid())


def test_a_frozen_part_of_another_dtype_is_no_backbone(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", Taught().double(), callbacks=(BackboneFinetuning(1, lambda epoch: 1.5),))
    assert [name.partition(".")[0] for name, _ in run.manifest["layout"]] == ["backbone", "backbone", "net", "net"]
    assert run.audit().ok


class NeverUnfrozen(Transfer):
    """Its backbone is frozen for good, and given to the optimizer without a thought."""

    def __init__(self) -> None:
        super().__init__()
        self.backbone.requires_grad_(False)

    def configure_optimizers(self) -> Any:
        return torch.optim.AdamW(self.parameters(), lr=0.01)


class UnfrozenLater(NeverUnfrozen):
    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch > 0)


def test_what_is_frozen_for_good_is_no_part_of_the_record(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", NeverUnfrozen().double())
    assert [name for name, _ in run.manifest["layout"]] == ["net.1.weight", "net.1.bias"]
    assert PARAMETER_STEPS not in run.steps[0].groups[0]
    assert "rests" not in run.manifest["optimizer"]


def test_what_is_trained_later_unsaid_ends_the_record_and_not_the_training(tmp_path: Path) -> None:
    modules = []
    for _ in range(2):
        torch.manual_seed(0)
        modules.append(UnfrozenLater().double())
    fit(modules[0], None)
    message = r"'backbone.0.weight' is trained from step 4 on .* pass TrajectoryRecorder\(..., frozen='trained-later'\)"
    with pytest.warns(UserWarning, match=message):
        run = record(tmp_path / "run", modules[1])
    assert torch.equal(flat(modules[1]), flat(modules[0]))
    assert run.n_steps == 4
    assert run.audit()
    torch.manual_seed(0)
    whole = record(tmp_path / "whole", UnfrozenLater().double(), recorder=LATER)
    assert torch.equal(whole.parameters(whole.n_steps), flat(modules[0]))
    assert whole.audit().max_abs_error == 0


class KeepsGradients(UnfrozenLater):
    """Frozen again, its backbone keeps a gradient of zeros, by which Adam's memory moves it."""

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch < 1)

    def on_after_backward(self) -> None:
        for parameter in self.backbone.parameters() if self.current_epoch else ():
            parameter.grad = torch.zeros_like(parameter)


class InOneGroup(UnfrozenLater):
    def configure_optimizers(self) -> Any:
        return torch.optim.NAdam(self.parameters(), lr=0.01)


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (KeepsGradients, "'backbone.0.weight' is frozen in step 4 but has a gradient of before"),
        (InOneGroup, "'backbone.0.weight' and 'net.1.weight' are in one parameter group, but before step 4 .* NAdam counts"),
    ],
    ids=["stale", "NAdam"],
)
def test_what_moves_otherwise_is_refused(tmp_path: Path, kind: type[Transfer], message: str) -> None:
    with pytest.raises(RecordingRefused, match=message):
        record(tmp_path / "run", kind().double(), recorder=LATER)


class Regrouped(Net):
    def on_train_epoch_start(self) -> None:
        if self.current_epoch == 1:
            groups = self.trainer.optimizers[0].param_groups
            groups.append({**groups[0], "params": [groups[0]["params"].pop()]})


def test_a_parameter_in_another_group_ends_the_record(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=r"'net.0.bias' in group 1 in step 4 and had it in group 0: let parameters stay"):
        run = record(tmp_path / "run", Regrouped().double())
    assert run.n_steps == 4
    assert run.audit()


def test_a_group_with_a_momentum_that_the_first_has_not_ends_the_record(tmp_path: Path) -> None:
    class Slow(BackboneFinetuning):
        def finetune_function(self, pl_module: Any, epoch: int, optimizer: Any) -> None:
            super().finetune_function(pl_module, epoch, optimizer)
            optimizer.param_groups[-1]["momentum"] = 0.9 if epoch else 0.0

    torch.manual_seed(0)
    with pytest.warns(UserWarning, match=r"keeps 1 tensors of the parameter 'backbone.0.weight', which joins in step 4, and 0"):
        run = record(tmp_path / "run", Transfer({"lr": 0.1}).double(), callbacks=(Slow(1, lambda epoch: 1.5),))
    assert run.n_steps == 4
    assert run.audit()


@pytest.mark.parametrize("start", [3, 9, 12])
def test_resumed_before_and_after_parameters_join(tmp_path: Path, start: int) -> None:
    """Step 5 is the first of the epoch in which the backbone joins; the record goes on from any checkpoint."""

    def run_on(*callbacks: Any, recorded: bool = True, **options: Any) -> Tensor:
        torch.manual_seed(0)
        module = UnfrozenLater().double()
        recorder = [la.TrajectoryRecorder(tmp_path / "run", frozen="trained-later")] if recorded else []
        return train(tmp_path, module, *recorder, *callbacks, recorded=False, **options)

    with pytest.raises(RuntimeError, match="stopped"):
        run_on(Stop(14, "error"))
    alone = run_on(recorded=False, ckpt_path=checkpoint(tmp_path, start))
    assert torch.equal(run_on(ckpt_path=checkpoint(tmp_path, start)), alone)
    run = la.Run(tmp_path / "run")
    assert run.manifest["resumed_at"] == [start]
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), alone)


@pytest.mark.parametrize("start", [3, 12])
def test_a_finetuning_callback_is_resumed(tmp_path: Path, start: int) -> None:
    """In the later epoch Lightning leaves the backbone frozen, while the optimizer has it."""

    def run_on(*callbacks: Any, recorded: bool = True, **options: Any) -> Tensor:
        torch.manual_seed(0)
        recorder = [la.TrajectoryRecorder(tmp_path / "run")] if recorded else []
        finetuning = BackboneFinetuning(1, lambda epoch: 1.5)
        return train(tmp_path, Transfer().double(), *recorder, finetuning, *callbacks, recorded=False, **options)

    with pytest.raises(RuntimeError, match="stopped"):
        run_on(Stop(14, "error"))
    alone = run_on(recorded=False, ckpt_path=checkpoint(tmp_path, start))
    assert torch.equal(run_on(ckpt_path=checkpoint(tmp_path, start)), alone)
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error == 0
    assert (run.steps[19].groups[0][PARAMETER_STEPS][0] == 0) == (start == 12)


class Branches(Weighted):
    """Each step takes one of two branches; the other has no gradient then."""

    def __init__(self) -> None:
        super().__init__(hidden=4, activation="gelu", optimizer=ADAMW)
        self.other = nn.Linear(5, 3)

    def per_sample_loss(self, batch: Any) -> Tensor:
        if not self.training or self.trainer.global_step % 3 != 1:
            return super().per_sample_loss(batch)
        return nn.functional.cross_entropy(self.other(batch[0]), batch[1], reduction="none")


def test_unused_parameters_in_two_processes(tmp_path: Path) -> None:
    def fitted(*callbacks: Any) -> Tensor:
        torch.manual_seed(0)
        module = Branches().double()
        pl.seed_everything(1)
        options = {**DDP, "strategy": "ddp_fork_find_unused_parameters_true", "gradient_clip_val": 0.5}
        trainer(*callbacks, **options).fit(module, DataLoader(data(), 4, shuffle=True))
        return flat(module)

    assert torch.equal(fitted(), fitted(la.TrajectoryRecorder(tmp_path / "run")))
    run = la.Run(tmp_path / "run")
    assert run.steps[4].groups[0][PARAMETER_STEPS] == [0, 0, 0, 0, 2, 2]
    assert run.audit().ok


def test_what_was_frozen_at_first_is_not_averaged_over_processes(tmp_path: Path) -> None:
    torch.manual_seed(0)
    recorder = la.TrajectoryRecorder(tmp_path / "run", frozen="trained-later")
    with pytest.raises(Exception, match=r"'backbone.0.weight' was frozen when the training began, and Distributed"):
        trainer(recorder, **{**DDP, "strategy": "ddp_fork_find_unused_parameters_true"}).fit(
            UnfrozenLater().double(), DataLoader(data(), 4)
        )


class FrozenLater(Transfer):
    """Stops training its backbone after an epoch, which needs no word."""

    def on_train_epoch_start(self) -> None:
        self.backbone.requires_grad_(self.current_epoch == 0)


def test_a_layer_that_is_frozen_on_the_way(tmp_path: Path) -> None:
    torch.manual_seed(0)
    run = record(tmp_path / "run", FrozenLater().double(), gradient_clip_val=0.5)
    assert [step.groups[0].get(PARAMETER_STEPS) for step in run.steps[3:5]] == [None, [0, 0, 5, 5]]
    assert run.audit().max_abs_error == 0


def test_where_every_step_moves_all_nothing_is_said(tmp_path: Path) -> None:
    assert PARAMETER_STEPS not in record(tmp_path / "run", make(optimizer=ADAMW)).steps[0].groups[0]


class Experts(nn.Module):
    """Each sample goes to the expert that the router chooses: a batch may leave some without any."""

    def __init__(self) -> None:
        super().__init__()
        self.router, self.last = nn.Linear(FEATURES, 4), nn.Linear(6, CLASSES)
        self.experts = nn.ModuleList([nn.Linear(FEATURES, 6) for _ in range(4)])

    def forward(self, x: Tensor) -> Tensor:
        gates, chosen = self.router(x).softmax(1).max(1)
        hidden = gates.new_zeros(len(gates), 6)
        for number, expert in enumerate(self.experts):
            mine = chosen == number
            if mine.any():
                hidden[mine] = gates[mine, None] * torch.tanh(expert(x[mine]))
        out: Tensor = self.last(hidden)
        return out


class Routed(Weighted):
    """Trains the experts that a step uses, and all of them where they are part of the loss ``everywhere``."""

    everywhere = False

    def __init__(self) -> None:
        super().__init__(optimizer={**ADAMW, "lr": 0.2})
        self.net = Experts()

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        loss = super().training_step(batch, batch_idx)
        return loss + 0 * sum(p.sum() for p in self.parameters()) if self.everywhere else loss


def routed(everywhere: bool, kept: Tensor, *callbacks: Any) -> Tensor:
    torch.manual_seed(0)
    module = Routed().double()
    module.everywhere = everywhere
    return fit(module, TensorDataset(*data().tensors, kept), *callbacks, batch_size=3, max_epochs=3, validation=False)


def test_what_a_step_uses_by_its_data_is_no_truth_without_a_sample(tmp_path: Path) -> None:
    routed(False, everything(), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    unused = [step.groups[0].get(UNUSED) for step in run.steps]
    assert any(unused)
    assert run.audit()
    message = r"Without what is removed, step \d+ uses the parameter 'net.experts.\d.\w+', which it did not use in training: .*"
    with pytest.raises(la.RunError, match=message + r"by adding 0 \* sum"):
        shifts(run, "loo")
    scores = la.score(run, "sgd-ie", query=held_out(), ray_address=None, save=False, check=18)
    assert scores.verdict is not None
    assert scores.verdict.word == "unchecked"
    assert "uses the parameter 'net.experts" in str(scores.verdict)


def test_where_every_step_uses_all_loo_is_retraining(tmp_path: Path) -> None:
    """What the refusal says to do, done."""
    routed(True, everything(), la.TrajectoryRecorder(tmp_path / "run"))
    run = la.Run(tmp_path / "run")
    found = shifts(run, "loo", [2, 11, 20])
    base = routed(True, everything())
    for sample, shift in zip((2, 11, 20), found, strict=True):
        kept = everything()
        kept[sample] = 0
        truth = routed(True, kept) - base
        assert float((shift - truth).norm() / truth.norm()) < 1e-9


WRONG: dict[str, tuple[str, Any]] = {
    "few steps": (PARAMETER_STEPS, [1, 1, 1]),
    "steps in words": (PARAMETER_STEPS, "many"),
    "steps below none": (PARAMETER_STEPS, [1, 1, 1, -1]),
    "steps of what is in no group": (PARAMETER_STEPS, [1, 1, 1, 1]),
    "unused beyond all": (UNUSED, [9]),
    "unused in words": (UNUSED, "all"),
    "unused below none": (UNUSED, [-1]),
    "settings of no batch": ("settings_of_batches", []),
}


@pytest.mark.parametrize(("key", "value"), WRONG.values(), ids=WRONG)
def test_a_record_that_says_what_cannot_be_is_refused(tmp_path: Path, key: str, value: Any) -> None:
    run = transferred(tmp_path / "run", max_epochs=1)
    (name,) = (name for name in manifest_of(tmp_path / "run")["files"] if name.startswith("steps/"))
    tensors, metadata = unpacked((tmp_path / "run" / name).read_bytes())
    for group in metadata["groups"][1]:
        group[key] = value
    put(tmp_path / "run", name, save(tensors, {key: json.dumps(value) for key, value in metadata.items()}))
    with pytest.raises(la.RunError, match="groups"):
        la.score(la.Run(run.path), "loo", [0], ray_address=None, save=False, check=0)


class MeanTeacher(Weighted):
    """Follows the mean of its own weights, which a hook keeps."""

    def __init__(self) -> None:
        super().__init__(hidden=4)
        self.teacher = nn.Linear(FEATURES, CLASSES).requires_grad_(False)
        self.student = nn.Linear(FEATURES, CLASSES)

    def per_sample_loss(self, batch: Any) -> Tensor:
        apart = (self.student(batch[0]) - self.teacher(batch[0])).square().mean(1)
        return super().per_sample_loss(batch) + apart

    def on_train_batch_end(self, *_: Any) -> None:
        for mine, own in zip(self.teacher.parameters(), self.student.parameters(), strict=True):
            mine.data.mul_(0.9).add_(own.data, alpha=0.1)


def test_untrained_parameters_that_follow_others_are_refused(tmp_path: Path) -> None:
    samples = TensorDataset(*data().tensors, everything())
    with pytest.raises(RecordingRefused, match=r"'teacher\.weight' changes while training, and not by the optimizer: it"):
        fit(MeanTeacher().double(), samples, la.TrajectoryRecorder(tmp_path / "run"), validation=False)
