"""A recorder never costs the training: what befalls the record ends the record, at its last whole step."""

from __future__ import annotations

import contextlib
import errno
import json
import multiprocessing
import os
import random
import shutil
import signal
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import Net, fit, flat, make, record
from pytorch_lightning.callbacks import ModelCheckpoint
from test_ddp import train as train_on_two
from torch import Tensor

import lightning_acc as la
from lightning_acc.record import local, writer
from lightning_acc.record.store import Store
from lightning_acc.record.writer import RunWriter

pytestmark = [
    pytest.mark.filterwarnings("ignore:.*fork"),
    pytest.mark.filterwarnings("ignore:.*is gone without an end"),
    pytest.mark.filterwarnings("ignore:Training has no validation data"),
]
ENDED = "has ended, and the training goes on without it"


@pytest.fixture
def always_written(monkeypatch: pytest.MonkeyPatch) -> None:
    """What has been collected is written after every step."""
    monkeypatch.setattr(writer, "SECONDS", 0.0)
    monkeypatch.setattr(writer, "SHARE", float("inf"))


def writers(trainer: Any) -> list[RunWriter]:
    """Those of this process's recorder, where it records."""
    found = [c._write for c in trainer.callbacks if isinstance(c, la.TrajectoryRecorder) and c.recording]
    return [one for both in found for one in (both.own, both.main) if one is not None]


def wait_until_written(trainer: Any) -> None:
    """What is being written is there; what failed is left for the recorder to meet."""
    for one in writers(trainer):
        while one._background.busy:
            time.sleep(0.001)


class At(pl.Callback):
    """Does something after a number of optimizer steps, once what was recorded before has been written."""

    def __init__(self, step: int, do: Callable[[], Any]) -> None:
        self.step, self.do = step, do

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        wait_until_written(trainer)
        if trainer.global_step == self.step:
            self.do()


def trained(path: Path, *callbacks: Any, recorder: la.TrajectoryRecorder | None = None) -> tuple[Tensor, Any]:
    """The final weights, and the weights of the checkpoints by name."""
    keep = ModelCheckpoint(path / "checkpoints", "{step}", every_n_train_steps=3, save_top_k=-1)
    extra = [] if recorder is None else [recorder]
    final = fit(make(hidden=4), None, *extra, keep, *callbacks, enable_checkpointing=True, max_epochs=4)
    states = {file.name: torch.load(file)["state_dict"] for file in sorted((path / "checkpoints").iterdir())}
    return final, states


def same(one: tuple[Tensor, Any], other: tuple[Tensor, Any]) -> bool:
    return torch.equal(one[0], other[0]) and str(one[1]) == str(other[1])


def fails(monkeypatch: pytest.MonkeyPatch, number: int) -> Callable[[], None]:
    """From here on nothing can be written to a run directory: as on a full disk, or one mounted read-only."""
    honest = local.write

    def write(path: str, content: bytes, root: str) -> None:
        if path.endswith(("safetensors", "manifest.json")):
            raise OSError(number, os.strerror(number))
        honest(path, content, root)

    return lambda: monkeypatch.setattr(local, "write", write)


@pytest.mark.parametrize("what", ["full", "read-only", "permission", "vanished", "moved"])
def test_storage_that_fails_ends_the_record_alone(
    tmp_path: Path, what: str, always_written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "run"
    number = {"full": errno.ENOSPC, "read-only": errno.EROFS, "permission": errno.EACCES}.get(what)
    goes = {"vanished": lambda: shutil.rmtree(path), "moved": lambda: path.rename(tmp_path / "elsewhere")}
    do = goes[what] if number is None else fails(monkeypatch, number)
    alone = trained(tmp_path / "alone")
    with pytest.warns(UserWarning, match=ENDED) as told:
        recorded = trained(tmp_path / "with", At(5, do), recorder=la.TrajectoryRecorder(path))
    assert same(alone, recorded)
    assert len([warning for warning in told if ENDED in str(warning.message)]) == 1
    if what == "vanished":
        assert not path.exists()
        return
    run = la.Run(tmp_path / "elsewhere" if what == "moved" else path, partial=True)
    assert 4 <= run.n_steps <= 6
    assert run.audit().max_abs_error == 0
    with pytest.raises(la.RunError, match="half written"):
        la.Run(run.path)
    assert not list(Path(run.path).rglob("*.part"))


def mount(path: Path, *options: str) -> None:
    words = ["mount", *options, str(path)]
    if shutil.which("mount") is None or subprocess.run(words, capture_output=True, check=False).returncode:
        pytest.skip("no file system can be mounted here")


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of a megabyte."""
    (tmp_path / "disk").mkdir()
    mount(tmp_path / "disk", "-t", "tmpfs", "-o", "size=1m", "tmpfs")
    yield tmp_path / "disk"
    subprocess.run(["umount", "-l", str(tmp_path / "disk")], check=True)


def test_a_disk_that_really_fills_up(tmp_path: Path, small_disk: Path, always_written: None) -> None:
    def fill() -> None:
        with contextlib.suppress(OSError), open(small_disk / "others", "wb", buffering=0) as file:
            while True:  # until there is no space left
                file.write(bytes(4096))

    alone, recorder, filled = trained(tmp_path / "alone"), la.TrajectoryRecorder(small_disk / "run"), At(5, fill)
    with pytest.warns(UserWarning, match=rf"{ENDED}.*the disk is full"):
        assert same(alone, trained(tmp_path / "with", filled, recorder=recorder))
    run = la.Run(small_disk / "run", partial=True)
    assert 4 <= run.n_steps <= 6
    assert run.audit().max_abs_error == 0
    assert not list((small_disk / "run").rglob("*.part"))


def test_a_disk_that_really_becomes_read_only(tmp_path: Path, small_disk: Path, always_written: None) -> None:
    turned = At(5, lambda: mount(small_disk, "-o", "remount,ro"))
    alone, recorder = trained(tmp_path / "alone"), la.TrajectoryRecorder(small_disk / "run")
    with pytest.warns(UserWarning, match=rf"{ENDED}.*Read-only file system"):
        assert same(alone, trained(tmp_path / "with", turned, recorder=recorder))
    run = la.Run(small_disk / "run", partial=True)
    assert 4 <= run.n_steps <= 6
    assert run.audit().max_abs_error == 0


def test_where_only_a_large_file_fails_the_record_is_a_run_up_to_there(
    tmp_path: Path, always_written: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a disk that is nearly full: the manifest, which is small, can be written."""
    honest = local.write

    def write(path: str, content: bytes, root: str) -> None:
        if "/parameters/" in path and len(content) > 2_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        honest(path, content, root)

    monkeypatch.setattr(local, "write", write)
    with pytest.warns(UserWarning, match=rf"{ENDED}.*the disk is full.*the \d+ steps before it are kept"):
        fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run"), At(0, lambda: None), max_epochs=4)
    run = la.Run(tmp_path / "run")
    assert 0 < run.n_steps < 16
    assert (run.manifest["stopped"], "the disk is full" in run.manifest["reason"]) == ("error", True)
    assert run.audit().max_abs_error == 0
    la.score(run, "acc-sgd-ie", ray_address=None, check=0)


def test_storage_that_is_gone_when_a_checkpoint_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning writes its checkpoint first; then the record ends, or, where that is asked for, the training."""
    alone = trained(tmp_path / "alone")
    for on_error in ("warn", "stop"):
        with monkeypatch.context() as patch:
            recorder = la.TrajectoryRecorder(tmp_path / on_error, on_error=on_error)  # type: ignore[arg-type]
            broken = At(2, fails(patch, errno.ENOSPC))
            if on_error == "warn":
                with pytest.warns(UserWarning, match=ENDED):
                    assert same(alone, trained(tmp_path / "with", broken, recorder=recorder))
            else:
                with pytest.raises(la.RunError, match="the disk is full"):
                    trained(tmp_path / "stopped", broken, recorder=recorder)
                assert [file.name for file in (tmp_path / "stopped/checkpoints").iterdir()] == ["step=3.ckpt"]
    with pytest.raises(la.RequestError, match="on_error='ask' is none of its choices"):
        la.TrajectoryRecorder(tmp_path, on_error="ask")  # type: ignore[arg-type]


class Poisoned(Net):
    """One of its steps comes to nothing."""

    at = 5

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        factor = float("nan") if self.trainer.global_step == self.at else 1.0
        return super().training_step(batch, batch_idx) * factor


@pytest.mark.parametrize("parameters", ["every-step", "every-k"])
def test_a_loss_that_is_not_finite_ends_the_record(tmp_path: Path, parameters: Any) -> None:
    torch.manual_seed(0)
    module, alone = Poisoned().double(), Poisoned().double()
    alone.load_state_dict(module.state_dict())
    fit(alone, None)
    recorder = la.TrajectoryRecorder(tmp_path / "run", parameters=parameters, budget_gb=1e-6)
    with pytest.warns(UserWarning, match=rf"{ENDED}: .* not finite"):
        fit(module, None, recorder)
    assert flat(module).isnan().all()
    assert torch.equal(flat(module).isnan(), flat(alone).isnan())
    run = la.Run(tmp_path / "run")
    assert 3 <= run.n_steps <= 5
    assert run.audit().max_abs_error == 0
    assert la.score(run, "loo", [0, 1], ray_address=None, check=0).values.all()


class Noticing(Poisoned):
    """Stops, as its users wrote it to, once it has come to nothing."""

    def on_train_batch_end(self, *_: Any) -> None:
        if self.trainer.global_step == 9 and not all(p.isfinite().all() for p in self.parameters()):
            raise ZeroDivisionError("no number")


@pytest.mark.filterwarnings("ignore:.*has ended, and the training goes on")
@pytest.mark.parametrize("stops", ["the recorder", "the module"])
@pytest.mark.parametrize("parameters", ["every-step", "every-k"])
def test_what_is_kept_of_a_training_that_stops_at_a_nan_is_finite(tmp_path: Path, stops: str, parameters: Any) -> None:
    torch.manual_seed(0)
    options = {"parameters": parameters, "budget_gb": 1e-6}
    if stops == "the recorder":
        with pytest.raises(la.RunError, match="not finite"):
            fit(Poisoned().double(), None, la.TrajectoryRecorder(tmp_path / "run", on_error="stop", **options), max_epochs=9)
    else:
        # It comes to the end of a step before the recorder has looked at the parameters again.
        with pytest.raises(ZeroDivisionError):
            fit(Noticing().double(), None, la.TrajectoryRecorder(tmp_path / "run", **options), max_epochs=9)
    run = la.Run(tmp_path / "run")
    assert 3 <= run.n_steps <= 5
    assert run.manifest["stopped"] == "error"
    assert run.parameters(run.n_steps).isfinite().all()
    assert run.audit().max_abs_error == 0


@pytest.mark.filterwarnings("ignore:.*has ended, and the training goes on", "ignore:.*sync_dist")
@pytest.mark.parametrize("at", [5, 11])  # in a step whose gradient is looked at, or in the last one, where none is
@pytest.mark.parametrize("parameters", ["every-step", "every-k"])
def test_what_is_kept_of_several_processes_is_finite(tmp_path: Path, parameters: Any, at: int) -> None:
    recorder = {"parameters": parameters, "budget_gb": 1e-6}
    options = {"batch_size": 4, "strategy": "ddp_fork", "devices": 2, "max_epochs": 4}
    module = Poisoned().double()
    module.at = at
    run = record(tmp_path / "run", module, recorder=recorder, **options)
    assert 3 <= run.n_steps <= at
    assert run.manifest["stopped"] == "error"
    assert "not finite" in run.manifest["reason"]
    assert run.audit().ok
    assert run.parameters(run.n_steps).isfinite().all()


class Unscheduled(Net):
    """Its scheduler comes to no number."""

    def configure_optimizers(self) -> Any:
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        rates = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0 if step < 5 else float("nan"))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": rates, "interval": "step"}}


def test_a_rate_that_is_no_number_ends_the_record(tmp_path: Path) -> None:
    with pytest.warns(UserWarning, match=rf"{ENDED}: The optimizer's lr is nan in step 5"):
        run = record(tmp_path / "run", Unscheduled().double())
    assert run.n_steps == 5
    assert run.audit().max_abs_error == 0


def test_an_exception_in_the_training_keeps_its_whole_steps(tmp_path: Path) -> None:
    def fault() -> None:
        raise ZeroDivisionError("the user's own")

    module = make(hidden=4)
    with pytest.raises(ZeroDivisionError, match="the user's own"):
        fit(module, None, la.TrajectoryRecorder(tmp_path / "run"), At(5, fault))
    run = la.Run(tmp_path / "run")
    assert (run.n_steps, run.manifest["stopped"]) == (5, "error")
    assert run.manifest["reason"] == "ZeroDivisionError: the user's own"
    assert torch.equal(run.parameters(5), flat(module))
    assert run.audit().max_abs_error == 0


class Changing(Net):
    """After the first epoch its loss is no longer what it was: a penalty joins."""

    def training_step(self, batch: Any, batch_idx: int) -> Tensor:
        penalty = sum(p.square().sum() for p in self.parameters()) if self.current_epoch else 0.0
        return super().training_step(batch, batch_idx) + penalty


def test_what_turns_out_to_be_another_training_is_no_run(tmp_path: Path) -> None:
    with pytest.raises(la.recorder.RecordingRefused):
        record(tmp_path / "run", Changing().double())
    for partial in (False, True):
        with pytest.raises(la.RunError, match="is no run: its recording was refused"):
            la.Run(tmp_path / "run", partial=partial)
    with pytest.raises(la.RunError, match="is no run: its recording was refused"):
        la.repair(tmp_path / "run")


class Long(pl.Callback):
    """Tells how far the training is, and takes a while for each step."""

    def __init__(self, told: Any, seconds: float) -> None:
        self.told, self.seconds = told, seconds

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        self.told.value = trainer.global_step
        time.sleep(self.seconds)


def long_training(path: Path, told: Any, seconds: float) -> None:
    fit(make(hidden=4), None, la.TrajectoryRecorder(path), Long(told, seconds), max_epochs=10_000)


@pytest.mark.parametrize("kill", range(3))
def test_a_killed_training_loses_seconds(tmp_path: Path, kill: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """``scripts/soak`` does it twenty times, with the seconds that are usual."""
    monkeypatch.setattr(writer, "SECONDS", 0.3)
    context = multiprocessing.get_context("fork")
    told = context.Value("i", 0)
    process = context.Process(target=long_training, args=(tmp_path / "run", told, 0.01))
    process.start()
    last = random.Random(kill).randint(80, 160)  # however long these take
    while told.value < last:
        assert process.is_alive(), process.exitcode
        time.sleep(0.02)
    os.kill(process.pid or 0, signal.SIGKILL)
    process.join()
    run = la.Run(tmp_path / "run", partial=True)
    assert told.value - run.n_steps < 1.5 / 0.01  # as many steps as that many seconds have at most
    assert run.n_steps > 10
    assert run.audit().max_abs_error == 0
    scores = la.score(run, "sgd-ie", ray_address=None, check=0, save=False)
    assert la.repair(tmp_path / "run") == run.n_steps
    repaired = la.Run(tmp_path / "run")
    assert (repaired.n_steps, repaired.manifest["stopped"]) == (run.n_steps, "killed")
    assert la.score(repaired, "sgd-ie", ray_address=None, check=0).values.tolist() == scores.values.tolist()
    with pytest.raises(la.RunError, match="needs no repair"):
        la.repair(tmp_path / "run")


def test_what_is_being_recorded_is_not_repaired(tmp_path: Path, always_written: None) -> None:
    def attempt() -> None:
        with pytest.raises(la.RunError, match="Another training writes into"):
            la.repair(tmp_path / "run")
        assert la.Run(tmp_path / "run", partial=True).n_steps in (4, 5)

    record(tmp_path / "run", make(hidden=4), callbacks=(At(5, attempt),))
    assert la.Run(tmp_path / "run").n_steps == 12


class FailsOn(pl.Callback):
    """On one rank nothing can be written any more, from a step on."""

    def __init__(self, rank: int, step: int) -> None:
        self.rank, self.step = rank, step

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        wait_until_written(trainer)
        if (trainer.global_rank, trainer.global_step) == (self.rank, self.step):

            def write(*_: Any) -> None:
                raise la.RunError("the disk of this rank is full")

            own, *_ = writers(trainer)
            own.store.write = write  # type: ignore[method-assign]


@pytest.mark.filterwarnings("ignore:.*has ended, and the training goes on")  # told by the processes, which are not this one
@pytest.mark.parametrize("rank", [0, 1])
def test_all_ranks_end_together(tmp_path: Path, rank: int, always_written: None) -> None:
    kept = torch.ones(23, dtype=torch.float64)
    alone = train_on_two(kept, max_epochs=6)
    final = train_on_two(kept, la.TrajectoryRecorder(tmp_path / "run"), FailsOn(rank, 4), max_epochs=6)
    assert torch.equal(final, alone)
    run = la.Run(tmp_path / "run")
    assert 3 <= run.n_steps <= 5
    assert run.audit().ok
    assert not (tmp_path / "run/ranks").exists()


def kill_all(path: Path) -> None:
    os.setpgid(0, 0)
    train_on_two(
        torch.ones(23, dtype=torch.float64),
        la.TrajectoryRecorder(path),
        At(8, lambda: os.killpg(0, signal.SIGKILL)),
        max_epochs=6,
    )


def test_killed_ranks_are_repaired(tmp_path: Path, always_written: None) -> None:
    process = multiprocessing.get_context("fork").Process(target=kill_all, args=(tmp_path / "run",))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    while local.is_alive(json.loads((tmp_path / "run/lock").read_text())["pid"]):
        time.sleep(0.01)  # all were killed at once, which is not to say that all have died
    with pytest.raises(la.RunError, match="lightning-acc repair"):
        la.Run(tmp_path / "run", partial=True)
    n_steps = la.repair(tmp_path / "run")
    run = la.Run(tmp_path / "run")
    assert 5 <= run.n_steps == n_steps <= 8
    assert run.steps[0].sizes == [5, 5]
    assert run.audit().ok
    assert not (tmp_path / "run/ranks").exists()


def test_what_is_written_beside_a_draft_is_none_of_it(tmp_path: Path) -> None:
    """As the averages at the end of a training of several processes, whose merged steps are still being written."""
    recorded = RunWriter(Store(tmp_path / "run"))
    recorded.begin({})
    under_way, go_on, write = threading.Event(), threading.Event(), recorded.store.write

    def slow(name: str, content: bytes) -> None:
        if name.startswith("parameters/"):
            under_way.set()
            assert go_on.wait(60)
        write(name, content)

    recorded.store.write = slow  # type: ignore[method-assign]
    recorded.add_state(0, torch.zeros(3))
    recorded.flush(for_good=False)
    assert under_way.wait(60)
    recorded.write_file("averages/ema.safetensors", b"content")
    go_on.set()
    recorded.checkpoint()
    listed = json.loads((tmp_path / "run/manifest.json").read_text())["files"]
    assert sorted(listed) == ["averages/ema.safetensors", "parameters/000000.safetensors"]
    assert sorted(str(file.relative_to(tmp_path / "run")) for file in (tmp_path / "run").glob("*/*")) == sorted(listed)
