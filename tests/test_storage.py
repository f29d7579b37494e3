"""Run directories on an S3 server: recorded, scored, overwritten, and what happens when the storage fails."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import os
import pickle
import random
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from problems import N, data, fit, flat, make, record
from torch.utils.data import DataLoader

import lightning_acc as la
from lightning_acc.record import store as stores
from lightning_acc.record.store import Store, may_pass

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture
def url(server: int, request: pytest.FixtureRequest) -> str:
    return f"s3://bucket/{request.node.name.partition('[')[0]}/run"


@pytest.fixture
def no_pauses(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The pauses that would have been made."""
    pauses: list[float] = []
    monkeypatch.setattr(stores.time, "sleep", pauses.append)
    return pauses


def elsewhere(answer: Callable[[], Any]) -> Any:
    """What a process of its own answers."""
    context = multiprocessing.get_context("fork")
    answers = context.Queue()
    child = context.Process(target=lambda: answers.put(answer()))
    child.start()
    answered = answers.get(timeout=60)
    child.join()
    return answered


def test_everything_works_on_s3_as_on_a_disk(url: str, tmp_path: Path) -> None:
    here = record(tmp_path / "run", make(hidden=4), batch_size=7)
    random.seed(5)
    run = record(url, make(hidden=4), batch_size=7)  # type: ignore[arg-type]
    plain = make(hidden=4)
    fit(plain, None)
    assert torch.equal(run.parameters(run.n_steps), flat(plain))
    assert run.path == url
    assert run.audit().ok
    assert sorted(run.manifest["files"]) == sorted(here.manifest["files"])
    for method in ("loo", "acc-sgd-ie", "sgd-ie"):
        there = la.score(run, method, ray_address=None, check=0)
        assert np.array_equal(there.values, la.score(here, method, ray_address=None, check=0).values)
    assert la.evaluate(url).column("n").to_pylist() == [N] * 3
    assert la.write_report(url) == f"{url}/report/index.html"
    assert run.store.read("report/index.html").startswith(b"<!")
    run.add_query("more", [tuple(data(n=10, seed=3).tensors)])
    assert la.Run(url).query_names() == ["more", "val"]
    la.clean(url, "sgd-ie", [0.1], seeds=2, ray_address=None, test="val", controls=("none", "random"))
    assert run.store.exists("cleaning.parquet")
    assert not Path("s3:").exists()


def test_loader_workers_that_fork_while_steps_are_written(url: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.record import writer

    monkeypatch.setattr(writer, "FLUSH_STEPS", 2)
    monkeypatch.setattr(writer, "SECONDS_AT_FIRST", math.inf)  # no file for the time being, however slow the storage is
    monkeypatch.setattr(writer, "SECONDS", math.inf)
    loader = DataLoader(data(), 7, shuffle=True, num_workers=2, multiprocessing_context="fork")
    run = record(url, make(), loader)  # type: ignore[arg-type]
    assert len(run.store.names("steps")) == 6
    assert run.audit().ok


def test_ray_workers_read_the_run_by_its_url(
    url: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, local_ray: Path
) -> None:
    from lightning_acc.methods import memory

    run = record(url, make(hidden=6), data(n=70), batch_size=10)  # type: ignore[arg-type]
    monkeypatch.setattr(memory, "LARGEST_CHUNK", 20)
    alone = la.score(run, "loo", ray_address=None, save=False, check=0)
    # Relative names would be found, or left, here.
    monkeypatch.chdir(tmp_path)
    farmed = la.score(url, "loo", ray_address="local", check=0)
    assert np.array_equal(alone.values, farmed.values)
    for folder in (tmp_path, local_ray):
        assert not [path for path in folder.rglob("*") if path.is_file()]
    assert la.score(la.Run(url), "loo", ray_address=None, check=0).values.tolist() == alone.values.tolist()


def test_a_run_overwritten_by_another_process_is_seen(url: str) -> None:
    first = record(url, make(), max_epochs=1)  # type: ignore[arg-type]
    la.score(first, "loo", [0], ray_address=None, check=0)
    assert la.evaluate(url).column("n").to_pylist() == [1]
    assert elsewhere(lambda: len(la.score(url, "sgd-ie", [0, 1], ray_address=None, check=0))) == 2
    assert la.evaluate(url).column("method").to_pylist() == ["loo", "sgd-ie"]
    seen = elsewhere(lambda: record(url, make(hidden=3), recorder={"overwrite": True}).hash)  # type: ignore[arg-type]
    second = la.Run(url)
    assert second.hash == seen != first.hash
    assert second.n_parameters != first.n_parameters
    assert second.store.names("scores") == []
    with pytest.raises(la.RequestError, match="no scores yet"):
        la.evaluate(second)


def fails(times: int, monkeypatch: pytest.MonkeyPatch, method: str, error: Exception, within: str = "") -> list[int]:
    """Let the file system's ``method`` raise ``error`` so many times; returns the growing list of its calls."""
    calls: list[int] = []
    files = Store("s3://bucket").filesystem  # fsspec makes one for all stores
    works: Callable[..., Any] = getattr(files, method)

    def flaky(path: str, *arguments: Any, **options: Any) -> Any:
        if within in path:
            calls.append(1)
            if len(calls) <= times:
                raise error
        return works(path, *arguments, **options)

    monkeypatch.setattr(files, method, flaky)
    return calls


SERVER_BUSY = OSError(errno.EBUSY, "Please reduce your request rate")


@pytest.mark.parametrize("error", [SERVER_BUSY, ConnectionResetError("reset by peer"), TimeoutError("no answer")])
def test_what_passes_is_tried_again(
    url: str, error: Exception, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    store = Store(url)
    state = random.getstate()
    calls = fails(2, monkeypatch, "pipe_file", error)
    store.write("steps/a", b"content")
    assert len(calls) == 3
    assert fails(2, monkeypatch, "cat_file", error) == []
    assert store.read("steps/a") == b"content"
    fails(2, monkeypatch, "info", error)
    assert store.exists("steps/a")
    fails(2, monkeypatch, "ls", error)
    assert store.names("steps") == ["steps/a"]
    assert len(no_pauses) == 8
    assert all(0.1 <= first <= 0.3 and 0.2 <= second <= 0.6 for first, second in zip(*[iter(no_pauses)] * 2, strict=True))
    assert random.getstate() == state  # training may draw from it


def test_what_does_not_pass_ends_in_one_sentence(url: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]) -> None:
    store = Store(url)
    store.write("steps/a", b"older")
    calls = fails(99, monkeypatch, "pipe_file", SERVER_BUSY)
    with pytest.raises(la.RunError) as error:
        store.write("steps/a", b"newer")
    assert str(error.value) == (
        f"{url}/steps/a (5 bytes) could not be written in 5 tries: [Errno {errno.EBUSY}] Please reduce your request rate; "
        "nothing older was changed. Check the connection and the storage service, then try again."
    )
    assert len(calls) == 5
    assert len(no_pauses) == 4
    assert store.read("steps/a") == b"older"
    with pytest.raises(la.RunError, match=r"lock \(.*could not be written in 5 tries"):
        record(f"{url}2", make())  # type: ignore[arg-type]
    with pytest.raises(la.RunError, match="no run directory"):
        la.Run(f"{url}2")


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (PermissionError("Access Denied"), "Check the permissions and the credentials"),
        (OSError(errno.ENOSPC, "No space"), "the disk is full; nothing older was changed. Free some space"),
        (OSError(errno.EINVAL, "Bad\nRequest"), "Bad Request; nothing older was changed. Check the address"),
        (FileNotFoundError("The specified bucket does not exist"), "make the bucket or folder"),
    ],
)
def test_what_cannot_pass_is_not_tried_again(
    url: str, error: Exception, remedy: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    calls = fails(99, monkeypatch, "pipe_file", error)
    with pytest.raises(la.RunError, match=remedy) as raised:
        Store(url).write("steps/a", b"content")
    assert "\n" not in str(raised.value)
    assert len(calls) == 1
    assert no_pauses == []


class Answered(Exception):
    def __init__(self, status: int) -> None:
        self.status = status
        self.response = {"ResponseMetadata": {"HTTPStatusCode": status}}


def test_answers_of_servers() -> None:
    assert [status for status in (400, 403, 404, 408, 412, 429, 500, 503) if may_pass(Answered(status))] == [408, 429, 500, 503]
    wrapped = OSError(errno.EINVAL, "wrapped")
    wrapped.__cause__ = Answered(503)
    assert may_pass(wrapped)
    assert not may_pass(ValueError("no"))


def test_a_missing_bucket_is_named(server: int, no_pauses: list[float]) -> None:
    with pytest.raises(la.RunError, match=r"s3://nowhere/run/lock \(.*bucket does not exist; make the bucket"):
        record("s3://nowhere/run", make())  # type: ignore[arg-type]
    with pytest.raises(la.RunError, match="no run directory at s3://nowhere/run: check the path"):
        la.Run("s3://nowhere/run")
    assert no_pauses == []


def test_a_file_system_that_is_not_installed_is_named() -> None:
    with pytest.raises(la.RunError, match=r"nosuch://bucket/run cannot be opened: Protocol not known"):
        la.Run("nosuch://user:password@bucket/run")


@pytest.mark.parametrize("use", [la.Run, la.TrajectoryRecorder, la.score, la.repair, la.evaluate], ids=lambda use: use.__name__)
def test_a_url_that_became_a_path_is_not_taken_for_a_folder(use: Any) -> None:
    with pytest.raises(la.RequestError, match=r"=.*s3:/bucket/run.* was a URL before it became a Path: pass it as a string"):
        use(Path("s3://bucket/run"))


UPLOAD = """
from lightning_acc.record.store import Store
import s3fs
upload = s3fs.S3FileSystem._call_s3
async def slow(self, method, *arguments, **options):
    if method in ("put_object", "complete_multipart_upload"):
        print("uploading", flush=True)
        import asyncio
        await asyncio.sleep(60)
    return await upload(self, method, *arguments, **options)
s3fs.S3FileSystem._call_s3 = slow
Store({url!r}).write("parameters/a", bytes({size}))
"""


@pytest.mark.parametrize("size", [1_000, 110 * 2**20])
def test_an_interrupted_upload_leaves_nothing_half_visible(url: str, size: int) -> None:
    store = Store(url)
    store.remove("parameters")
    words = [sys.executable, "-c", UPLOAD.format(url=url, size=size)]
    process = subprocess.Popen(words, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    assert process.stdout is not None
    assert process.stdout.readline() == "uploading\n"
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    assert store.names("parameters") == []
    assert not store.exists("parameters/a")
    assert not store.exists()


def test_a_training_goes_on_without_the_storage_and_leaves_its_record_half_written(
    url: str, monkeypatch: pytest.MonkeyPatch, no_pauses: list[float]
) -> None:
    fails(99, monkeypatch, "pipe_file", SERVER_BUSY, within="/parameters/")
    with pytest.warns(UserWarning, match=r"parameters/000000(-0)?.safetensors \(.*in 5 tries"):
        fit(make(), None, la.TrajectoryRecorder(url))
    with pytest.raises(la.RunError, match="is half written"):
        la.Run(url)


def test_a_run_goes_on_in_a_fork_and_through_pickle(url: str) -> None:
    run = record(url, make())  # type: ignore[arg-type]
    there = elsewhere(lambda: (run.store.names("steps"), run.parameters(0).tolist()))
    assert there == (run.store.names("steps"), run.parameters(0).tolist())
    again = pickle.loads(pickle.dumps(run))
    assert again.hash == run.hash
    assert pickle.loads(pickle.dumps(run.store)).read("manifest.json") == run.store.read("manifest.json")


def test_nothing_of_the_credentials_is_stored(url: str) -> None:
    run = record(url, make())  # type: ignore[arg-type]
    la.score(run, "sgd-ie", ray_address=None, check=0)
    files = run.store.filesystem.find(run.store.path)
    content = b"".join(run.store.filesystem.cat(files).values()) + json.dumps(run.manifest).encode()
    assert len(files) > 5
    assert b"the-key" not in content
    assert b"the-secret" not in content
