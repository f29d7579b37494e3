"""One training at a time writes into a run directory: the second is refused, what a dead one left is taken over."""

from __future__ import annotations

import json
import multiprocessing
import os
import signal
import socket
from pathlib import Path
from typing import Any

import pytest
import pytorch_lightning as pl
import torch
from problems import Net, Normalised, data, fit, flat, make, record

import lightning_acc as la
from lightning_acc.record.lock import Lock
from lightning_acc.record.store import Store
from lightning_acc.recorder import RecordingRefused

pytestmark = pytest.mark.filterwarnings("ignore:.*fork", "ignore:.*sync_dist", "ignore:.*validation_step")


class Meanwhile(pl.Callback):
    """Does something after a number of steps."""

    def __init__(self, step: int, do: Any) -> None:
        self.step, self.do = step, do

    def on_train_batch_end(self, trainer: Any, *_: Any) -> None:
        if trainer.global_step == self.step:
            self.do()


def kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


@pytest.mark.parametrize("overwrite", [False, True])
def test_a_second_training_in_the_directory_is_refused_and_the_first_goes_on(tmp_path: Path, overwrite: bool) -> None:
    refusals = []

    def second() -> None:
        held = json.loads((tmp_path / "run" / "lock").read_text())
        assert held["pid"] == os.getpid()
        state = torch.get_rng_state()
        with pytest.raises(RecordingRefused, match="Another training writes into") as error:
            fit(make(seed=5), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=overwrite))
        torch.set_rng_state(state)
        refusals.append((str(error.value), held["run_id"]))

    recorder = la.TrajectoryRecorder(tmp_path / "run", overwrite=overwrite)
    module = make()
    fit(module, None, recorder, Meanwhile(5, second))
    ((message, run_id),) = refusals
    run = la.Run(tmp_path / "run")
    assert f"process {os.getpid()} on {socket.gethostname()}" in message
    assert f"{tmp_path}/run/lock" in message
    assert "\n" not in message
    assert run.manifest["run_id"] == run_id
    assert run.audit().max_abs_error == 0
    assert torch.equal(run.parameters(run.n_steps), flat(module))
    assert not (tmp_path / "run" / "lock").exists()


def test_of_two_processes_that_begin_at_once_one_records(tmp_path: Path) -> None:
    context = multiprocessing.get_context("fork")
    both, ended = context.Barrier(2), context.Queue()

    def train(seed: int) -> None:
        both.wait()
        try:
            # The one that has the directory holds it until the other has been refused.
            record(tmp_path / "run", make(seed=seed), callbacks=(Meanwhile(3, lambda: both.wait(60)),))
            ended.put((seed, "recorded"))
        except RecordingRefused as error:
            both.wait(60)
            ended.put((seed, str(error)))

    processes = [context.Process(target=train, args=(seed,)) for seed in (1, 2)]
    for process in processes:
        process.start()
    outcomes = sorted((ended.get(timeout=100) for _ in processes), key=lambda outcome: outcome[1] == "recorded")
    for process in processes:
        process.join()
    (_, refused), (_, recorded) = outcomes
    assert refused.startswith("Another training writes into")
    assert recorded == "recorded"
    assert la.Run(tmp_path / "run").audit().ok


def test_a_training_that_was_killed_leaves_a_lock_that_the_next_one_takes_over(tmp_path: Path) -> None:
    recorder = la.TrajectoryRecorder(tmp_path / "run")
    process = multiprocessing.get_context("fork").Process(target=fit, args=(make(), None, recorder, Meanwhile(5, kill)))
    process.start()
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / "lock").exists()
    with pytest.warns(UserWarning, match=rf"is gone without an end \(process {process.pid} on"):
        run = record(tmp_path / "run", make(), recorder={"overwrite": True})
    assert run.audit().max_abs_error == 0
    assert run.query_names() == ["val"]
    assert not (tmp_path / "run" / "lock").exists()


def fail() -> None:
    raise RuntimeError("stopped")


def test_a_training_that_fails_or_is_refused_gives_the_directory_free(tmp_path: Path) -> None:
    with pytest.raises(RuntimeError, match="stopped"):
        record(tmp_path / "failed", make(), callbacks=(Meanwhile(5, fail),))
    assert not (tmp_path / "failed" / "lock").exists()
    with pytest.raises(RecordingRefused, match="already holds a run"):
        record(tmp_path / "failed", make())
    assert not (tmp_path / "failed" / "lock").exists()
    with pytest.raises(RecordingRefused, match="BatchNorm1d"):
        record(tmp_path / "refused", Normalised().double())
    assert not (tmp_path / "refused").exists()
    assert record(tmp_path / "refused", make()).audit().ok


HERE = {"run_id": "r", "time": "2026-01-01T00:00:00+00:00", "token": "t", "started": "1"}


@pytest.mark.parametrize(
    ("content", "held_by"),
    [
        (
            json.dumps({**HERE, "pid": os.getpid(), "host": "elsewhere"}),
            f"process {os.getpid()} on elsewhere, since 2026-01-01",
        ),
        ("{", "a training that cannot be told from it"),
        (json.dumps({**HERE, "pid": 2**63, "host": socket.gethostname()}), "a training that cannot be told from it"),
        ("[" * 10**5, "a training that cannot be told from it"),
        (json.dumps({**HERE, "host": 3}), "a training that cannot be told from it"),
        (json.dumps({**HERE, "pid": -1, "host": socket.gethostname()}), "a training that cannot be told from it"),
    ],
    ids=["elsewhere", "no JSON", "a huge number", "nested", "no text", "no process"],
)
def test_a_lock_whose_training_may_be_alive_is_respected(tmp_path: Path, content: str, held_by: str) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text(content)
    with pytest.raises(RecordingRefused, match=rf"{held_by}.*choose another directory; if it is certainly gone, delete"):
        record(tmp_path / "run", make(), recorder={"overwrite": True})
    (tmp_path / "run" / "lock").unlink()
    assert record(tmp_path / "run", make()).audit().ok


def test_a_process_with_the_number_of_a_dead_one_is_not_taken_for_it(tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "lock").write_text(json.dumps({**HERE, "pid": os.getpid(), "host": socket.gethostname()}))
    with pytest.warns(UserWarning, match="its lock is taken over"):
        Lock(Store(tmp_path / "run"), "mine").release()
    assert os.listdir(tmp_path / "run") == []


def test_a_lock_that_this_process_has_forgotten_is_taken_over(tmp_path: Path) -> None:
    forgotten = Lock(Store(tmp_path / "run"), "one")
    with pytest.raises(la.RunError, match="run one"):
        Lock(Store(tmp_path / "run"), "two")
    del forgotten
    with pytest.warns(UserWarning, match="run one"):
        Lock(Store(tmp_path / "run"), "two").release()


def test_where_files_cannot_be_made_exclusively_the_later_one_sees_the_earlier() -> None:
    store = Store("memory://locked/run")
    first = Lock(store, "one")
    with pytest.raises(la.RunError, match=r"memory://.*run one"):
        Lock(store, "two")
    first.release()
    Lock(store, "two").release()
    assert not store.exists("lock")


def test_a_disk_without_links_has_locks_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: Any) -> None:
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", no_links)
    first = Lock(Store(tmp_path / "run"), "one")
    with pytest.raises(la.RunError, match="run one"):
        Lock(Store(tmp_path / "run"), "two")
    first.release()
    assert not (tmp_path / "run").exists()


def test_all_processes_of_a_second_training_stop(tmp_path: Path) -> None:
    lock = Lock(Store(tmp_path / "run"), "one")
    with pytest.raises(Exception, match="Another training writes into"):
        record(tmp_path / "run", Net().double(), data(n=24), strategy="ddp_fork", devices=2)
    lock.release()
    run = record(tmp_path / "run", Net().double(), data(n=24), strategy="ddp_fork", devices=2)
    assert run.audit().ok
    assert not (tmp_path / "run" / "lock").exists()
