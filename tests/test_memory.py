"""Memory that is short is told by one function, whoever says it; work is divided where that helps, and no further."""

from __future__ import annotations

import platform
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from problems import N, make, record

import lightning_acc as la
from lightning_acc.core.process import is_out_of_memory
from lightning_acc.scoring import cluster, work
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring.cluster import farm

CPU = "[enforce fail at alloc_cpu.cpp:124] . DefaultCPUAllocator: can't allocate memory: you tried to allocate 8 bytes."


class OutOfMemoryError(Exception):
    """As Ray's is called."""


@pytest.mark.parametrize(
    ("error", "short"),
    [
        (MemoryError(), True),
        (RuntimeError(CPU), True),
        (RuntimeError("DefaultCPUAllocator: not enough memory: you tried to allocate 8 bytes."), True),
        (RuntimeError("CUDA out of memory. Tried to allocate 20.00 MiB"), True),
        (torch.OutOfMemoryError("CUDA out of memory."), True),
        (OutOfMemoryError("Task was killed due to the node running low on memory."), True),
        (OSError(12, "Cannot allocate memory"), True),
        (RuntimeError("a tensor on memory format channels_last"), False),
        (ValueError("out of memory"), False),
        (None, False),
    ],
)
def test_whoever_says_that_memory_is_short_is_understood(error: BaseException | None, short: bool) -> None:
    assert is_out_of_memory(error) is short


def test_torch_really_says_so() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60)
    assert is_out_of_memory(caught.value)


class Bar:
    def of(self, part: int) -> Any:
        return lambda done: None


def halves(piece: list[int]) -> list[list[int]]:
    middle = len(piece) // 2
    return [piece[:middle], piece[middle:]] if middle else [piece]


def test_a_piece_is_halved_until_it_fits() -> None:
    seen: list[int] = []

    def fits(job: Any, piece: list[int], progress: Any) -> int:
        seen.append(len(piece))
        if len(piece) > 10:
            raise RuntimeError(CPU)
        return sum(piece)

    results = cluster.each(fits, None, [list(range(64))], None, Bar(), halves)  # type: ignore[arg-type]
    done = {tuple(piece): result for piece, result in results}
    assert sum(done.values()) == sum(range(64))
    assert set(map(len, done)) == {8}
    assert seen == [64, 32, 16, 8, 8, 16, 8, 8, 32, 16, 8, 8, 16, 8, 8]


def test_what_never_fits_ends_soon_and_in_a_sentence() -> None:
    tries = 0

    def never(job: Any, piece: list[int], progress: Any) -> int:
        nonlocal tries
        tries += 1
        raise RuntimeError(CPU)

    results = list(cluster.each(never, None, [list(range(8000))], None, Bar(), halves))  # type: ignore[arg-type]
    assert tries < 2 ** (farm.MOST_HALVINGS + 1)  # 15 999 before
    assert {type(result) for _, result in results} == {cluster.Failure}
    assert sum(len(piece) for piece, _ in results) == 8000
    assert "ran out of memory" in results[0][1].reason
    assert "memory_gb" in results[0][1].reason


@pytest.mark.parametrize(("method", "pieces"), [("sgd-ie", [N]), ("loo", [N, 12, 6])])
def test_a_reverse_sweep_is_never_divided(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, method: str, pieces: list[int]
) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    seen: list[int] = []

    def short(job: Any, removals: Any, progress: Any, replay: Any = None) -> Any:
        seen.append(len(removals))
        raise MemoryError

    monkeypatch.setattr(scoring, "compute", short)
    with pytest.raises(la.RunError, match=rf"{N} of {N} removals failed .* ran out of memory"):
        la.score(run, method, ray_address=None, check=0)
    assert seen[: len(pieces)] == pieces
    assert len(seen) == 1 or len(seen) > 20


def test_what_was_divided_is_the_same(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    whole = la.score(run, "loo", ray_address=None, check=0, save=False).values

    def small(job: Any, removals: Any, progress: Any, replay: Any = None) -> Any:
        if len(removals) > 7:
            raise RuntimeError(CPU)
        return work.compute(job, removals, progress, replay)

    monkeypatch.setattr(scoring, "compute", small)
    assert la.score(run, "loo", ray_address=None, check=0, save=False).values == pytest.approx(whole, rel=1e-9)


def test_a_temporary_file_that_has_no_room_is_named_before_anything_is_computed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run = record(tmp_path / "run", make(hidden=4))
    (row,) = [row for row in la.plan(run, ray_address=None).table.to_pylist() if row["method"] == "acc-low-rank"]
    scratch = run.n_steps * run.n_parameters * 8
    assert row["disk_gb"] * 2**30 > scratch
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=scratch - 1))
    with pytest.raises(la.RequestError, match=rf"each of the {run.n_steps} steps, .* in a temporary file, but .* TMPDIR"):
        la.score(run, "acc-low-rank", ray_address=None, check=0)


KEEPING = """
import contextlib, torch
from lightning_acc.core import process

def after_using(size):
    torch.ones(size // 4)
    return process.resident_bytes()

size = 2**28
sizes = [after_using(size)]
with contextlib.suppress(KeyError), process.as_scored(), process.as_recorded({"threads": 1}):
    sizes += [after_using(size)]
    raise KeyError
sizes += [after_using(size)]
with process.as_scored():
    with process.as_scored():
        after_using(size)
    sizes += [process.resident_bytes()]
sizes += [process.resident_bytes()]
print([round((one - sizes[0]) / size) for one in sizes])
"""


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="other allocators keep memory in their own ways")
def test_memory_is_kept_while_scores_are_computed_and_given_back_after() -> None:
    """Also where that goes wrong, and one within the other; in a process whose threads have met no shortage."""
    done = subprocess.run([sys.executable, "-c", KEEPING], capture_output=True, text=True, check=True)
    assert done.stdout.split("\n")[0] == "[0, 1, 0, 1, 0]"
