"""The steps a record names for checkpoints: the parameters there are those in the files, bit for bit."""

from __future__ import annotations

import multiprocessing
import os
import signal
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import data, fit, flat, make
from pytorch_lightning.callbacks import ModelCheckpoint
from torch import Tensor

import lightning_acc as la
from lightning_acc.errors import RunError
from lightning_acc.record import manifest
from lightning_acc.record.store import Store

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*resuming from a checkpoint that ended before the epoch",
    "ignore:.*Checkpoint directory .* exists and is not",
    "ignore:.*callbacks used to create the checkpoint",
    "ignore:.*sync_dist",
    "ignore:.*is gone without an end",
    "ignore:The recording in .* has ended",
)
NAMES = ("best", "last")


class Stop(pl.Callback):
    """Ends the training after a number of steps, in one way or another."""

    def __init__(self, step: int, how: BaseException | None) -> None:
        self.step, self.how = step, how

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            if self.how is None:
                os.kill(os.getpid(), signal.SIGKILL)
            raise self.how


class Saves(pl.Callback):
    """Saves by hand, in a hook before the recorder's or after it."""

    def __init__(self, path: Path, hook: str, step: int) -> None:
        def save(trainer: Any, *_: Any) -> None:
            if trainer.global_step == step:
                trainer.save_checkpoint(path, weights_only=True)

        setattr(self, hook, save)


class Judge(pl.Callback):
    """The validation after ``step`` is the best one."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_validation_epoch_end(self, trainer: Any, pl_module: Any) -> None:
        pl_module.log("distance", float(abs(trainer.global_step - self.step)))


class Average(pl.Callback):
    """Puts other parameters than the training's into its checkpoints."""

    def on_save_checkpoint(self, trainer: Any, pl_module: Any, checkpoint: dict[str, Any]) -> None:
        checkpoint["state_dict"] = {name: 0.9 * value for name, value in checkpoint["state_dict"].items()}


def module() -> Any:
    return make(hidden=4, activation="gelu", optimizer={"class": "AdamW", "lr": 0.05})


def train(path: Path, *callbacks: Any, **options: Any) -> Any:
    """Four epochs of 5 steps, validated after each."""
    settings = {"enable_checkpointing": True, "max_epochs": 4, "batch_size": 5, "default_root_dir": path}
    net = module()
    fit(net, data(), la.TrajectoryRecorder(path / "run"), *callbacks, **{**settings, **options})
    return net


def best(path: Path, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "kept", "best-{step}", **{"monitor": "val", "save_last": True, **options})


def every(path: Path, n: int, **options: Any) -> ModelCheckpoint:
    return ModelCheckpoint(path / "every", "{step}", every_n_train_steps=n, **{"save_top_k": -1, **options})


def parameters_in(path: str | Path) -> Tensor:
    stored = torch.load(path, weights_only=False)["state_dict"]
    return torch.cat([value.reshape(-1) for value in stored.values()])


def checked(path: Path) -> dict[str, int]:
    """The record's checkpoints, once each file has been compared with it."""
    run = la.Run(path / "run")
    steps = run.checkpoints
    for name, step in steps.items():
        if name not in NAMES:
            assert torch.equal(parameters_in(name), run.parameters(step)), name
    others = [t for t in range(run.n_steps + 1) if t not in steps.values()]
    assert all(not torch.equal(run.parameters(t), run.parameters(step)) for t in others for step in steps.values())
    assert all(step in [steps[path] for path in steps if path not in NAMES] for step in steps.values())
    return steps


def files(path: Path) -> set[str]:
    return {str(file) for file in path.rglob("*.ckpt")}


def test_the_best_and_the_last(tmp_path: Path) -> None:
    """What has been deleted for a better one is not listed."""

    keep = best(tmp_path, monitor="distance", save_last=None)
    newest = ModelCheckpoint(tmp_path / "newest", "{step}", every_n_train_steps=3, save_last=True)
    train(tmp_path, Judge(15), keep, newest)
    steps = checked(tmp_path)
    assert steps == {"best": 15, "last": 18, keep.best_model_path: 15, newest.best_model_path: 18, newest.last_model_path: 18}
    assert set(steps) - set(NAMES) == files(tmp_path)


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_few_steps(tmp_path: Path, accumulate: int) -> None:
    """Steps are the optimizer's, also where it accumulates gradients; without a monitor there is no best."""
    train(tmp_path, every(tmp_path, 2), accumulate_grad_batches=accumulate)
    n_steps = 20 if accumulate == 1 else 12
    steps = checked(tmp_path)
    expected = {str(tmp_path / f"every/step={t}.ckpt"): t for t in range(2, n_steps + 1, 2)}
    assert steps == {"last": n_steps, **expected}


def test_of_several_that_have_a_monitor_the_first_is_the_best(tmp_path: Path) -> None:
    first = ModelCheckpoint(tmp_path / "first", "{step}", monitor="val", mode="min", save_top_k=2)
    second = ModelCheckpoint(tmp_path / "second", "{step}", monitor="val", mode="max")
    train(tmp_path, every(tmp_path, 7), first, second)
    steps = checked(tmp_path)
    assert first.best_model_path != second.best_model_path
    assert steps["best"] == steps[first.best_model_path]
    assert set(steps) - set(NAMES) == files(tmp_path)


def test_a_link_to_the_last(tmp_path: Path) -> None:
    keep = best(tmp_path, save_last="link")
    train(tmp_path, keep)
    steps = checked(tmp_path)
    assert Path(keep.last_model_path).is_symlink()
    assert steps[keep.last_model_path] == steps[str(Path(keep.last_model_path).resolve())]


@pytest.mark.parametrize("hook", ["on_train_start", "on_before_optimizer_step", "on_before_zero_grad", "on_train_batch_end"])
@pytest.mark.parametrize("first", [True, False])
def test_saved_by_hand(tmp_path: Path, hook: str, first: bool) -> None:
    """Before the recorder has noted a step, or after; before its first one, too."""
    path = tmp_path / "by hand.ckpt"
    saves = Saves(path, hook, 0 if hook == "on_train_start" else 3)
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    settings = {"max_epochs": 2, "batch_size": 5}
    fit(module(), data(), *([saves, recorder] if first else [recorder, saves]), **settings)
    steps = checked(tmp_path)
    if hook == "on_train_start" and first:  # before the recorder looks at the parameters
        assert steps == {}
    else:
        assert steps == {"last": 0 if hook == "on_train_start" else 3, str(path): steps["last"]}


def test_what_lightning_saves_after_the_end_of_training(tmp_path: Path) -> None:
    """Where nothing was saved before, ``save_last`` saves in ``on_train_end``, when the record is finished already."""
    keep = best(tmp_path, every_n_epochs=10)
    train(tmp_path, keep)
    assert checked(tmp_path) == {"last": 20, keep.last_model_path: 20}
    assert la.Run(tmp_path / "run").audit().ok


def test_none(tmp_path: Path) -> None:
    train(tmp_path, enable_checkpointing=False)
    run = la.Run(tmp_path / "run")
    assert run.checkpoints == {}
    assert "checkpoints" not in run.manifest


def test_lightnings_own_and_the_trainer_gets_its_methods_back(tmp_path: Path) -> None:
    """Without a ModelCheckpoint of the user's, Lightning adds one."""
    trainers: list[Any] = []

    class Look(pl.Callback):
        def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
            trainers.append(trainer)
            assert "save_checkpoint" in vars(trainer.strategy)

    train(tmp_path, Look())
    assert set(checked(tmp_path)) - set(NAMES) == files(tmp_path)
    assert not {"save_checkpoint", "remove_checkpoint"} & set(vars(trainers[0].strategy))


def test_resumed(tmp_path: Path) -> None:
    """Those of before are kept where they are there still; what was written after the one resumed from is not of this run."""
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path, every(tmp_path, 3), Stop(11, RuntimeError("stopped")))
    before = checked(tmp_path)
    assert list(before.values()) == [9, 3, 6, 9]
    (tmp_path / "every/step=3.ckpt").unlink()
    options = {"every_n_train_steps": 5, "save_top_k": -1}
    other = ModelCheckpoint(tmp_path / "other", "{step}", **options)
    net = train(tmp_path, other, ckpt_path=tmp_path / "every/step=6.ckpt")
    steps = checked(tmp_path)
    later = {str(tmp_path / f"other/step={t}.ckpt"): t for t in (10, 15, 20)}
    assert steps == {"last": 20, str(tmp_path / "every/step=6.ckpt"): 6, **later}
    assert torch.equal(la.Run(tmp_path / "run").parameters(20), flat(net))


def test_the_best_was_before_the_seam(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        train(tmp_path, Judge(5), best(tmp_path, monitor="distance"), every(tmp_path, 4), Stop(11, RuntimeError("stopped")))
    keep = best(tmp_path, monitor="distance")
    train(tmp_path, Judge(5), keep, every(tmp_path, 4), ckpt_path=tmp_path / "every/step=8.ckpt")
    steps = checked(tmp_path)
    assert la.Run(tmp_path / "run").manifest["resumed_at"] == [8]
    assert (steps["best"], steps[keep.best_model_path], steps["last"]) == (5, 5, 20)


def test_interrupted(tmp_path: Path) -> None:
    with pytest.raises(SystemExit):
        train(tmp_path, every(tmp_path, 3), Stop(8, KeyboardInterrupt()))
    assert la.Run(tmp_path / "run").manifest["stopped"] == "interrupted"
    assert list(checked(tmp_path).values()) == [6, 3, 6]


def test_killed_and_repaired_or_resumed(tmp_path: Path) -> None:
    """Of what was written after the last one, no more is known than what is resumed from."""
    stop = Stop(8, None)
    process = multiprocessing.get_context("fork").Process(target=train, args=(tmp_path, every(tmp_path, 2), stop))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    unfinished = la.Run(tmp_path / "run", partial=True)
    assert set(unfinished.checkpoints) <= {"last", *files(tmp_path)}
    assert la.repair(tmp_path / "run") >= 6
    assert {2, 4} <= set(checked(tmp_path).values())
    train(tmp_path, every(tmp_path, 9), ckpt_path=tmp_path / "every/step=6.ckpt")
    assert list(checked(tmp_path).values()) == [18, 2, 4, 6, 9, 18]


def test_a_record_that_ended_early_lists_what_is_there_of_its_own_steps(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Later checkpoints are not in it, and those which were deleted after it had ended are not, either."""
    from lightning_acc.recorder.following import Following

    step_ends = Following.step_ends

    def fails(self: Following) -> None:
        step_ends(self)
        if self._write.own.n_steps == 9 and not self.ended:
            raise OSError("no space left")

    monkeypatch.setattr(Following, "step_ends", fails)
    keep = every(tmp_path, 4)
    one = ModelCheckpoint(tmp_path / "one", "{step}", every_n_train_steps=7, save_top_k=1)
    train(tmp_path, keep, one)
    run = la.Run(tmp_path / "run")
    assert (run.n_steps, run.manifest["stopped"]) == (9, "error")
    assert {name: step for name, step in checked(tmp_path).items() if name not in NAMES} == {
        str(tmp_path / f"every/step={t}.ckpt"): t for t in (4, 8)
    }
    assert (tmp_path / "every/step=20.ckpt").exists()
    assert run.audit().ok


def test_averages_are_no_parameters_of_the_run(tmp_path: Path) -> None:
    train(tmp_path, Average(), every(tmp_path, 5))
    assert files(tmp_path)
    assert la.Run(tmp_path / "run").checkpoints == {}


def test_two_processes(tmp_path: Path) -> None:
    keep = ModelCheckpoint(tmp_path / "kept", "{step}", monitor="val", save_top_k=2, save_last=True)
    train(tmp_path, every(tmp_path, 4), keep, strategy="ddp_fork", devices=2)
    assert la.Run(tmp_path / "run").n_steps == 12
    steps = checked(tmp_path)
    assert {4, 8, 12} <= set(steps.values())
    assert steps["last"] == 12
    assert set(steps) - set(NAMES) == files(tmp_path)


def test_a_list_that_fails_costs_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.recorder.checkpoints.written import Checkpoints

    def fails(*_: Any, **__: Any) -> Any:
        raise OSError("nothing to be seen")

    reference = train(tmp_path / "with", every(tmp_path / "with", 3))
    for name in ("listed", "_note", "_is_of_the_training"):
        monkeypatch.setattr(Checkpoints, name, fails)
        net = train(tmp_path / name, every(tmp_path / name, 3))
        assert torch.equal(flat(net), flat(reference))
        run = la.Run(tmp_path / name / "run")
        assert (run.checkpoints, run.n_steps, run.manifest["stopped"]) == ({}, 20, None)


def test_credentials_in_a_path_are_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.recorder.checkpoints.written import Checkpoints

    train(tmp_path, every(tmp_path, 20))
    monkeypatch.setattr(Checkpoints, "listed", lambda *_, **__: {"s3://key:secret@bucket/a.ckpt": 3})
    train(tmp_path / "again", every(tmp_path / "again", 20))
    assert la.Run(tmp_path / "again/run").checkpoints == {"last": 3, "s3://bucket/a.ckpt": 3}


@pytest.mark.parametrize(
    ("checkpoints", "words"),
    [
        ({"a.ckpt": 21}, "its checkpoint a.ckpt is of step 21 of 20"),
        ({"a.ckpt": -1}, "its checkpoints is .* and not a mapping of texts, each to a whole number"),
        ({"a.ckpt": 1.5}, "its checkpoints is .* and not a mapping of texts"),
        ({"a\nb": 1}, "its checkpoints is .* and not a mapping of texts"),
        ([3], "its checkpoints is .* and not a mapping of texts"),
    ],
)
def test_a_list_that_makes_no_sense_is_refused(tmp_path: Path, checkpoints: Any, words: str) -> None:
    train(tmp_path, enable_checkpointing=False)
    store = Store(tmp_path / "run")
    manifest.write(store, {**manifest.identify(store), "checkpoints": checkpoints})
    with pytest.raises(RunError, match=words):
        la.Run(tmp_path / "run")
