"""Training that is stopped and resumed from a Lightning checkpoint goes on with its record, or is refused."""

from __future__ import annotations

import multiprocessing
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import Net, data, fit, flat, make
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor
from torch.utils.data import DataLoader

import lightning_acc as la

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:.*Checkpoint directory .* exists and is not",
    "ignore:The dirpath has changed",
)
OPTIMIZERS: dict[str, dict[str, Any]] = {
    "sgd": {"momentum": 0.9, "lr": 0.05},
    "adamw": {"class": "AdamW", "lr": 0.02, "weight_decay": 0.1, "amsgrad": True},
}


class Stop(pl.Callback):
    """Ends the training after a number of optimizer steps, one way or another."""

    def __init__(self, step: int, how: str) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step and self.how != "end of epoch":
            if self.how == "kill":
                os.kill(os.getpid(), signal.SIGKILL)
            raise RuntimeError("stopped")

    def on_train_epoch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stopped")


def module(optimizer: str = "adamw", hidden: int = 4) -> Any:
    return make(hidden=hidden, dropout=0.3, optimizer=OPTIMIZERS[optimizer], decay_lr=0.8)


def train(path: Path, net: Any, *callbacks: Any, recorded: bool = True, **options: Any) -> Tensor:
    """Train with a checkpoint every 3 steps; with the recorder, unless told otherwise."""
    recorder = [la.TrajectoryRecorder(path / "run")] if recorded else []
    keep = ModelCheckpoint(path / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    settings = {"enable_checkpointing": True, "max_epochs": 4, "batch_size": 5, "gradient_clip_val": 0.5}
    return fit(net, data(), *recorder, keep, *callbacks, **{**settings, **options})


def checkpoint(path: Path, step: int) -> Path:
    return path / "checkpoints" / f"step={step}.ckpt"


def stopped(path: Path, step: int, optimizer: str = "adamw", how: str = "error") -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        train(path, module(optimizer), Stop(step, how))


def files(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(("stop", "start"), [(8, 6), (11, 6), (13, 12)])
def test_a_resumed_training_is_one_run(tmp_path: Path, optimizer: str, stop: int, start: int) -> None:
    stopped(tmp_path, stop, optimizer)
    assert la.Run(tmp_path / "run").manifest["stopped"] == "error"
    alone = train(tmp_path, module(optimizer), recorded=False, ckpt_path=checkpoint(tmp_path, start))
    final = train(tmp_path, module(optimizer), ckpt_path=checkpoint(tmp_path, start))
    assert torch.equal(final, alone)
    run = la.Run(tmp_path / "run")
    assert run.manifest["resumed_at"] == [start]
    assert run.n_steps >= 18
    assert torch.equal(run.parameters(run.n_steps), final)
    assert run.audit().max_abs_error == 0
    names = {name for folder in ("steps", "parameters", "samples") for name in run.store.names(folder)}
    assert names <= set(run.manifest["files"])  # nothing of the steps that were dropped is left behind


def test_the_counterfactual_of_a_resumed_run_is_the_resumed_training(tmp_path: Path) -> None:
    """loo over the seam is what plain torch makes of the whole record."""
    from problems import replay_by_hand

    net = make(hidden=4, optimizer=OPTIMIZERS["sgd"])
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path, net, Stop(8, "error"), gradient_clip_val=None)
    train(tmp_path, net, ckpt_path=checkpoint(tmp_path, 6), gradient_clip_val=None)
    run = la.Run(tmp_path / "run")
    shifts = la.score(run, "loo", [3, 20], keep_shifts=True, ray_address=None, check=0).shifts
    assert shifts is not None
    whole = replay_by_hand(run, net, {})
    for sample, shift in zip((3, 20), shifts, strict=True):
        change = replay_by_hand(run, net, {sample: 0.0}) - whole
        assert float((shift - change).norm() / change.norm()) < 1e-8


def test_killed_outright_and_resumed(tmp_path: Path) -> None:
    process = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path, module(), Stop(8, "kill")))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    with pytest.warns(UserWarning, match="is gone without an end"):
        final = train(tmp_path, module(), ckpt_path=checkpoint(tmp_path, 6))
    run = la.Run(tmp_path / "run")
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), final)


def test_a_finished_run_is_continued_for_more_epochs(tmp_path: Path) -> None:
    train(tmp_path, module(), max_epochs=3)
    first = la.Run(tmp_path / "run")
    train(tmp_path, module(), max_epochs=5, ckpt_path=checkpoint(tmp_path, 15))
    run = la.Run(tmp_path / "run")
    assert (first.n_steps, run.n_steps) == (15, 25)
    assert run.audit().max_abs_error == 0
    for t in range(15):
        assert torch.equal(run.steps[t].sample_ids, first.steps[t].sample_ids)


def test_killed_after_the_last_step_and_resumed_for_none(tmp_path: Path) -> None:
    stopped(tmp_path, 15, how="end of epoch")
    net = module()
    train(tmp_path, net, max_epochs=3, ckpt_path=checkpoint(tmp_path, 15))
    run = la.Run(tmp_path / "run")
    assert run.manifest["stopped"] is None
    assert run.n_steps == 15
    assert torch.equal(run.parameters(15), flat(net))
    assert run.audit().ok


def test_sparse_snapshots_over_the_seam(tmp_path: Path) -> None:
    def recorder() -> la.TrajectoryRecorder:
        return la.TrajectoryRecorder(tmp_path / "run", parameters="every-k", budget_gb=1e-6)

    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path, module(), recorder(), Stop(11, "error"), recorded=False)
    final = train(tmp_path, module(), recorder(), recorded=False, ckpt_path=checkpoint(tmp_path, 9))
    run = la.Run(tmp_path / "run")
    assert len(run.snapshots) < run.n_steps
    assert 9 in run.snapshots
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), final)


def refused(path: Path, match: str, net: Any = None, **options: Any) -> None:
    """The resumed training is refused, and nothing in the run directory changes."""
    before = files(path / "run")
    with pytest.raises(la.RunError, match=match):
        train(path, net or module(), **options)
    assert files(path / "run") == before


def test_parameters_that_do_not_continue_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 8)
    path = checkpoint(tmp_path, 6)
    written = torch.load(path)
    written["state_dict"]["net.0.bias"][0] += 1e-12
    torch.save(written, path)
    refused(tmp_path, "not those the record has after step 6", ckpt_path=path)
    written = torch.load(checkpoint(tmp_path, 3))
    written["optimizer_states"][0]["state"][1]["exp_avg"][0] += 1e-12
    torch.save(written, checkpoint(tmp_path, 3))
    refused(tmp_path, "not those the record has after step 3", ckpt_path=checkpoint(tmp_path, 3))


def test_a_changed_module_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 8)
    other = make(hidden=4, dropout=0.2, optimizer=OPTIMIZERS["adamw"], decay_lr=0.8)
    refused(tmp_path, "does not go on with the training it resumes: its module", other, ckpt_path=checkpoint(tmp_path, 6))


def test_batches_that_are_built_otherwise_are_refused(tmp_path: Path) -> None:
    stopped(tmp_path, 8)
    named = [{"x": x, "y": y} for x, y in data()]
    loader = DataLoader(named, 5, shuffle=True)
    before = files(tmp_path / "run")
    keep = ModelCheckpoint(tmp_path / "others", every_n_train_steps=3)
    with pytest.raises(la.RunError, match="does not go on with the training it resumes: its batch_structure is"):
        fit(
            module(),
            loader,
            la.TrajectoryRecorder(tmp_path / "run"),
            keep,
            enable_checkpointing=True,
            max_epochs=4,
            gradient_clip_val=0.5,
            ckpt_path=checkpoint(tmp_path, 6),
        )
    assert files(tmp_path / "run") == before


def test_a_checkpoint_of_another_run_is_refused(tmp_path: Path) -> None:
    stopped(tmp_path / "one", 8)
    stopped(tmp_path / "two", 8)
    refused(tmp_path / "one", "but .*one/run holds", ckpt_path=checkpoint(tmp_path / "two", 6))
    with pytest.raises(la.RunError, match="which is not in"):
        train(tmp_path / "three", module(), ckpt_path=checkpoint(tmp_path / "two", 6))


def test_a_checkpoint_from_before_the_record_was_taken_up_elsewhere_is_refused(tmp_path: Path) -> None:
    """Resumed within an epoch, a training sees other batches than it saw: its record is no beginning of the old one's rest."""
    stopped(tmp_path, 14)
    shutil.copy(checkpoint(tmp_path, 12), tmp_path / "old.ckpt")
    train(tmp_path, module(), ckpt_path=checkpoint(tmp_path, 6))
    refused(tmp_path, "taken up at step 6 after the checkpoint of step 12 was written", ckpt_path=tmp_path / "old.ckpt")
    assert la.Run(tmp_path / "run").audit().ok
    train(tmp_path, module(), ckpt_path=checkpoint(tmp_path, 3))
    assert la.Run(tmp_path / "run").audit().ok


def test_a_record_that_is_too_short_is_refused(tmp_path: Path) -> None:
    """As when the disk of the run directory was restored from an earlier backup."""
    stopped(tmp_path, 5)
    early = files(tmp_path / "run")
    train(tmp_path, module(), ckpt_path=checkpoint(tmp_path, 3))
    for name, content in early.items():
        (tmp_path / "run" / name).write_bytes(content)
    refused(tmp_path, "has a record up to step 5 only", ckpt_path=checkpoint(tmp_path, 12))


def test_a_training_without_its_beginning_is_refused_even_with_overwrite(tmp_path: Path) -> None:
    """Continuing from a checkpoint without a record; the run that is in the directory stays."""
    train(tmp_path, module())
    before = files(tmp_path / "run")
    train(tmp_path / "other", module(), recorded=False)
    again = la.TrajectoryRecorder(tmp_path / "run", overwrite=True)
    with pytest.raises(la.RunError, match="whose record is not here"):
        train(tmp_path, module(), again, recorded=False, ckpt_path=checkpoint(tmp_path / "other", 6))
    assert files(tmp_path / "run") == before


class Annealed(Net):
    """Its loss is weighed by a number that a hook sets, and the rate of its dropout changes."""

    weight = 1.0

    def on_train_epoch_start(self) -> None:
        self.weight = 1.0 / (1 + self.current_epoch)
        self.net[2].p = 0.1 * self.current_epoch

    def per_sample_loss(self, batch: Any) -> Tensor:
        return self.weight * super().per_sample_loss(batch)


@pytest.mark.parametrize(("stop", "start"), [(8, 6), (17, 15)], ids=["within an epoch", "at its end"])
def test_what_hooks_set_goes_on_in_a_resumed_training(tmp_path: Path, stop: int, start: int) -> None:
    def made() -> Annealed:
        torch.manual_seed(0)
        return Annealed(hidden=4, dropout=0.3, optimizer=OPTIMIZERS["adamw"]).double()

    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path, made(), Stop(stop, "error"))
    train(tmp_path, made(), ckpt_path=checkpoint(tmp_path, start))
    run = la.Run(tmp_path / "run")
    first = {"weight": 1.0, "net.2.p": 0.0}
    assert run.manifest["settings"] == first
    expected = [{"weight": 1 / (1 + epoch), "net.2.p": 0.1 * epoch} for epoch in range(4) for _ in range(5)]
    end = 5 * -(-(start + 1) // 5)  # Lightning begins no epoch where it resumes one: the module is as it was made
    expected[start:end] = [{"weight": 1.0, "net.2.p": 0.3}] * (end - start)
    assert [first | step.groups[0].get("settings", {}) for step in run.steps] == expected
    assert run.audit().max_abs_error == 0
