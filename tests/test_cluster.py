"""A real local Ray: the same scores to the last bit, errors passed on, Ctrl-C harmless."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from problems import data, make, record

import lightning_acc as la
from lightning_acc.scoring.cluster import connection

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("ray") / "run", make(hidden=6), data(n=70), batch_size=10)


@pytest.fixture(scope="module", params=[1, 2])
def workers(request: pytest.FixtureRequest, local_ray: Path) -> Iterator[int]:
    """How many there are: all, or all but one, whose CPU is kept for nothing."""
    from ray.util import placement_group, remove_placement_group

    if request.param == 1:
        kept = placement_group([{"CPU": 1}])
        assert kept.wait(60)
    yield request.param
    if request.param == 1:
        remove_placement_group(kept)


def test_workers_give_the_scores_of_this_process_to_the_last_bit(
    run: la.Run, workers: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    from lightning_acc.methods import memory

    monkeypatch.setattr(memory, "LARGEST_CHUNK", 20)
    for method in ("loo", "acc-sgd-ie", "sgd-ie"):
        alone = la.score(run, method, readout="exact", ray_address=None, save=False, keep_shifts=True, check=0)
        farmed = la.score(run, method, readout="exact", save=False, keep_shifts=True, check=0)
        assert np.array_equal(alone.values, farmed.values)
        assert alone.shifts is not None
        assert farmed.shifts is not None
        assert bool((alone.shifts == farmed.shifts).all())


def test_a_query_of_ones_own_reaches_the_workers(run: la.Run, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.methods import memory

    monkeypatch.setattr(memory, "LARGEST_CHUNK", 20)
    query = la.Query("first-logit", [tuple(data(n=9, seed=2).tensors)], lambda module, batch: module.net(batch[0])[:, 0])
    alone, farmed = (la.score(run, "acc-sgd-ie", None, query, ray_address=a, save=False, check=0) for a in (None, "local"))
    assert np.array_equal(alone.values, farmed.values)


def test_an_error_in_a_worker_is_the_error_here(run: la.Run, workers: int, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.methods import memory

    monkeypatch.setattr(memory, "LARGEST_CHUNK", 20)

    def refuses(module: object, batch: object) -> None:
        raise la.RequestError("this query refuses")

    query = la.Query("refusing", [tuple(data(n=9, seed=2).tensors)], refuses)  # type: ignore[arg-type]
    with pytest.raises(la.RequestError, match="this query refuses"):
        la.score(run, "loo", None, query, save=False, check=0)


SCRIPT = """
import signal
import sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # whoever started the tests may ignore it
sys.path.insert(0, {tests!r})
import faults
from lightning_acc.cli import main
from lightning_acc.methods import memory
from lightning_acc.scoring import score as scoring
memory.LARGEST_CHUNK = 20
scoring.compute = faults.slowly
main(["retrain", {path!r}, "--ray-address", {address!r}])
"""


@pytest.mark.parametrize("address", ["null", "local"])
def test_ctrl_c_while_scoring_leaves_what_was_there(tmp_path: Path, no_ray: None, address: str) -> None:
    """In the midst of a sweep, which is known of by what it notes: in this process, and in workers."""
    record(tmp_path / "run", make(hidden=6), data(n=70), batch_size=5)
    la.score(tmp_path / "run", "loo", [1, 2, 3], ray_address=None, check=0)
    before = (tmp_path / "run/scores/loo.parquet").read_bytes()
    (tmp_path / "faults").mkdir()
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=str(tmp_path / "run"), address=address)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / "faults/begun").exists():
            assert process.poll() is None, process.communicate()
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        stopped = time.monotonic()
        _, said = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130, said
    assert said.endswith("lightning-acc: interrupted; what was finished before is kept\n")
    assert time.monotonic() - stopped < 15
    assert (tmp_path / "run/scores/loo.parquet").read_bytes() == before
    assert {file.suffix for file in (tmp_path / "run/scores").rglob("*") if file.is_file()} == {".parquet"}  # whole files only


def test_one_call_starts_ray_once(run: la.Run, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """For the estimates, and for the retrainings that check them; where nothing is left to do, not at all."""
    import ray

    starts: list[str] = []
    start = connection._initialise
    monkeypatch.setattr(connection, "_initialise", lambda ray, address: (starts.append(address), start(ray, address)))
    scores = la.score(run, "acc-sgd-ie", ray_address="local", check=66)
    assert (scores.verdict.n, starts) == (44, ["local"])
    assert not ray.is_initialized()
    la.score(run, "acc-sgd-ie", ray_address="local", check=66)
    assert starts == ["local"]
