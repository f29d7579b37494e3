"""A recorder writes over nothing that is no run, and follows no link out of its directory."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from problems import data, fit, make, record

import lightning_acc as la
from lightning_acc.record import local
from lightning_acc.record.store import Store
from lightning_acc.recorder import RecordingRefused


def tree(path: Path) -> dict[str, bytes]:
    return {str(file.relative_to(path)): file.read_bytes() for file in sorted(path.rglob("*")) if file.is_file()}


def plant(path: Path, name: str) -> None:
    (path / name).parent.mkdir(parents=True, exist_ok=True)
    (path / name).write_text("the user's own")


OTHERS = ["notes.txt", "samples/mine.csv", "steps/more/000000.safetensors", "scores/thesis.tex", "checkpoints/last.ckpt"]


@pytest.mark.parametrize("name", OTHERS)
def test_a_directory_with_anything_else_in_it_is_not_replaced(tmp_path: Path, name: str) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    plant(tmp_path / "run", name)
    before = tree(tmp_path / "run")
    named = "checkpoints/" if "checkpoints" in name else name
    with pytest.raises(RecordingRefused, match=rf"holds more than a run, and overwrite=True deletes nothing else: {named}\."):
        fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=True))
    assert tree(tmp_path / "run") == before


def test_a_run_and_all_that_was_computed_of_it_is_replaced(tmp_path: Path) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    run.add_query("test", [tuple(data(n=12, seed=3).tensors)])
    for method in ("sgd-ie", "loo"):
        la.score(run, method, ray_address=None, check=0)
    la.evaluate(run)
    la.clean(run, "sgd-ie", [0.2], seeds=2, ray_address=None)
    la.write_report(run, over_time=2)
    again = record(tmp_path / "run", make(hidden=6), recorder={"overwrite": True})
    assert again.manifest["run_id"] != run.manifest["run_id"]
    assert set(tree(tmp_path / "run")) == {*again.manifest["files"], "manifest.json"}
    assert not (tmp_path / "run/scores").exists()


def damaged(path: Path) -> None:
    (path / "manifest.json").write_text('{"format": "lightning_acc run"')


def foreign(path: Path) -> None:
    (path / "manifest.json").write_text('{"name": "an app", "icons": []}')


@pytest.mark.parametrize("make_strange", [damaged, foreign])
@pytest.mark.parametrize("overwrite", [False, True])
def test_what_is_no_run_is_not_replaced(tmp_path: Path, make_strange: Callable[[Path], None], overwrite: bool) -> None:
    record(tmp_path / "run", make(hidden=4))
    make_strange(tmp_path / "run")
    before = tree(tmp_path / "run")
    with pytest.raises(RecordingRefused, match="deletes runs alone" if overwrite else "already holds a run"):
        fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=overwrite))
    assert tree(tmp_path / "run") == before


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize(
    "name", ["steps/000000.safetensors", "module.safetensors", "queries/val.safetensors", "ranks/0/steps/000000.safetensors"]
)
def test_files_without_a_manifest_are_not_written_over(tmp_path: Path, name: str, overwrite: bool) -> None:
    plant(tmp_path / "run", name)
    with pytest.raises(RecordingRefused, match=rf"holds {name}, which would be written over, and no run"):
        fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=overwrite))
    assert tree(tmp_path / "run") == {name: b"the user's own"}


def test_a_folder_full_of_other_things_is_not_searched(tmp_path: Path) -> None:
    """Whoever records into his home does not wait for a walk through all that is there."""
    for name in ("a", "a/b", "a/b/c"):
        plant(tmp_path, f"{name}/file")
    (tmp_path / "empty").mkdir()
    plant(tmp_path, "steps/x/000000.safetensors")
    assert Store(tmp_path).walk(["steps"]) == ["a/", "steps/x/000000.safetensors"]


def test_other_files_beside_a_new_run_stay(tmp_path: Path) -> None:
    plant(tmp_path / "run", "hparams.yaml")
    run = record(tmp_path / "run", make(hidden=4))
    assert run.audit().max_abs_error == 0
    assert (tmp_path / "run/hparams.yaml").read_text() == "the user's own"


@pytest.mark.parametrize("name", ["scores", "shards", "report"])
def test_no_result_is_written_through_a_link_out_of_the_run(tmp_path: Path, name: str) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    la.score(run, "sgd-ie", ray_address=None, check=0)
    (tmp_path / "elsewhere").mkdir()
    folder = tmp_path / "run" / name
    if folder.exists():
        folder.rename(tmp_path / f"was-{name}")
    folder.symlink_to(tmp_path / "elsewhere")

    def write_results() -> None:
        la.score(run, "loo", ray_address=None, check=0)
        la.write_report(run)

    with pytest.raises(la.RunError, match=rf"{name} is a symbolic link out of .* to .*elsewhere. Delete that link"):
        write_results()
    assert not list((tmp_path / "elsewhere").iterdir())
    with pytest.raises(RecordingRefused, match="holds more than a run"):
        fit(make(hidden=4), None, la.TrajectoryRecorder(tmp_path / "run", overwrite=True))


def test_a_link_is_deleted_and_not_what_it_leads_to(tmp_path: Path) -> None:
    plant(tmp_path, "mine/000000.safetensors")
    (tmp_path / "run").mkdir()
    (tmp_path / "run/steps").symlink_to(tmp_path / "mine")
    Store(tmp_path / "run").remove("steps")
    assert not (tmp_path / "run/steps").exists()
    assert (tmp_path / "mine/000000.safetensors").exists()


def test_nothing_named_is_nothing_deleted(tmp_path: Path) -> None:
    plant(tmp_path, "mine")
    Store(tmp_path).remove()
    assert (tmp_path / "mine").exists()


WRITES = """
import os, signal, sys
from lightning_acc.record import local
honest = os.fsync
os.fsync = lambda file: (honest(file), os.kill(os.getpid(), signal.SIGKILL))
local.write(sys.argv[1], b"x" * 1000, os.path.dirname(sys.argv[1]))
"""


def test_what_a_killed_process_left_half_written_is_deleted_by_the_next(tmp_path: Path) -> None:
    path = tmp_path / "scores" / "loo.parquet"
    path.parent.mkdir()
    assert subprocess.run([sys.executable, "-c", WRITES, str(path)], check=False).returncode == -9
    (left,) = path.parent.iterdir()
    assert left.suffix == ".part"
    theirs = path.parent / f"sgd-ie.parquet.{local._HOST}-{os.getppid()}-0123abcd.part"  # a process that lives
    elsewhere = path.parent / "tracin.parquet.0123abcd-1-0123abcd.part"  # of another machine, but just now
    long_ago = path.parent / "old.parquet.0123abcd-2-0123abcd.part"
    for file in (theirs, elsewhere, long_ago):
        file.touch()
    os.utime(long_ago, (0, 0))
    Store(tmp_path).write("scores/loo.parquet", b"whole")
    assert {file.name for file in path.parent.iterdir()} == {"loo.parquet", theirs.name, elsewhere.name}
