"""Workers that die, hang or run out of memory, nodes that go, a driver that is killed: nothing is lost or counted twice."""

from __future__ import annotations

import multiprocessing
import pickle
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.context import ForkProcess
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from problems import data, make, record

import lightning_acc as la
from lightning_acc.methods import memory
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring.cluster import farm
from lightning_acc.scoring.worker import work_in_steps

pytestmark = [
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::FutureWarning"),
    pytest.mark.filterwarnings("ignore::pytest.PytestUnraisableExceptionWarning"),
]
N, CHUNK = 240, 20


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory) -> la.Run:
    return record(tmp_path_factory.mktemp("faults") / "run", make(hidden=6), data(n=N), batch_size=20)


@pytest.fixture
def run(recorded: la.Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> la.Run:
    """A copy without scores; small chunks, and work that may go wrong."""
    shutil.copytree(recorded.path, tmp_path / "run", ignore=shutil.ignore_patterns("scores"))
    (tmp_path / "faults").mkdir()
    monkeypatch.setattr(memory, "LARGEST_CHUNK", CHUNK)
    monkeypatch.setattr(scoring, "compute", faults.faulty)
    return la.Run(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(recorded: la.Run) -> np.ndarray:
    patch = pytest.MonkeyPatch()
    patch.setattr(memory, "LARGEST_CHUNK", CHUNK)
    values = la.score(recorded, "loo", ray_address=None, save=False, check=0).values
    patch.undo()
    return values


def strike(tmp_path: Path, **kinds: str) -> None:
    for first, kind in kinds.items():
        (tmp_path / "faults" / first.removeprefix("at")).write_text(kind)


def computed(tmp_path: Path) -> list[str]:
    return (tmp_path / "faults/computed").read_text().split()


def whole_table(run: la.Run) -> np.ndarray:
    from lightning_acc.scoring import scores

    table = scores.read(run.store, "loo").by_removal()
    assert sorted(table) == [(i,) for i in range(N)]  # nothing missing, nothing twice
    return np.array([table[(i,)] for i in range(N)])


def test_what_fails_for_good_is_named_and_the_rest_is_kept(
    run: la.Run, undisturbed: np.ndarray, tmp_path: Path, local_ray: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(farm, "TRIES", 2)  # each costs a worker, and the next one must import everything
    strike(tmp_path, at40="killed always")
    with pytest.raises(la.RunError, match=r"20 of 240 removals failed \(40, 41, .*others are stored; score again"):
        la.score(run, "loo", check=0)
    assert len(computed(tmp_path)) == N // CHUNK - 1
    (tmp_path / "faults/40").unlink()
    (tmp_path / "faults/computed").unlink()
    found = la.score(run, "loo", ray_address=None, check=0)
    assert found.conditions["reused"] == N - CHUNK
    assert np.array_equal(found.values, undisturbed)
    assert np.array_equal(whole_table(run), undisturbed)


def test_a_repeated_command_computes_nothing_and_starts_no_workers(run: la.Run, no_ray: None) -> None:
    first = la.score(run, "loo", ray_address=None, check=0)
    started = time.monotonic()
    again = la.score(run, "loo", ray_address="ray://nowhere:1", check=0)
    assert time.monotonic() - started < 5
    assert again.conditions["reused"] == N
    assert np.array_equal(first.values, again.values)
    assert la.score(run, "loo", dtype="float32", ray_address=None, check=0).conditions["reused"] == 0
    own = la.Query("own", run.query("val").batches and [data(n=5).tensors], lambda module, batch: module.net(batch[0])[:, 0])
    for _ in range(2):  # a function may have changed under its name
        assert la.score(run, "loo", [1, 2], own, ray_address=None, check=0).conditions["reused"] == 0


def test_a_worker_is_heard_before_it_unpacks() -> None:
    """So that one that hangs there, importing what it was sent, counts as hung like any other."""
    messages = work_in_steps(b"no pickle", None, [], 0.0)
    assert next(messages) is None
    with pytest.raises(pickle.UnpicklingError):
        next(messages)


HUNG = 12.0


def drive(path: str, address: str | None = None) -> None:
    """What a driver does: it waits for seconds only, and its work may go wrong."""
    memory.LARGEST_CHUNK = CHUNK
    farm.SECONDS_UNTIL_HUNG, farm.SECONDS_TO_MAKE_ROOM, farm.TRIES = HUNG, 0.2, 3
    scoring.compute = faults.faulty
    la.score(path, "loo", ray_address=address, progress=False)


def start(run: la.Run) -> ForkProcess:
    """A driver that computes by itself."""
    process = multiprocessing.get_context("fork").Process(target=drive, args=(run.path,))
    process.start()
    return process


def test_a_killed_driver_is_resumed(run: la.Run, undisturbed: np.ndarray, tmp_path: Path) -> None:
    strike(tmp_path, at100="slow")
    process = start(run)
    while (tmp_path / "faults/100").exists():
        time.sleep(0.05)
    process.kill()
    process.join()
    found = la.score(run, "loo", ray_address=None, check=0)
    assert found.conditions["reused"] == 100
    assert np.array_equal(found.values, undisturbed)


def test_two_commands_at_once_do_no_harm(run: la.Run, undisturbed: np.ndarray) -> None:
    processes = [start(run), start(run)]
    for process in processes:
        process.join(600)
        assert process.exitcode == 0
    assert np.array_equal(whole_table(run), undisturbed)


NODE = {"num_cpus": 1, "object_store_memory": 80 * 2**20}


@pytest.fixture(scope="module")
def head() -> Iterator[Any]:
    """A cluster of one node, with a CPU."""
    from ray.cluster_utils import Cluster

    # Ray's own patience, half a minute, is for networks: here a node is missed after a second or two.
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 5}
    cluster = Cluster(initialize_head=True, head_node_args={**NODE, "include_dashboard": False, "_system_config": checks})
    try:
        yield cluster
    finally:
        cluster.shutdown()


@pytest.fixture
def nodes(head: Any, no_ray: None) -> Any:
    """The cluster with a second node like the first, which may go, and this process connected to it."""
    import ray

    head.second = head.add_node(**NODE)
    head.wait_for_nodes()
    ray.init(address=head.address, log_to_driver=False, logging_level=40)
    return head


def remove_when_it_works(nodes: Any, tmp_path: Path) -> None:
    """Remove the second node as soon as it hangs in a piece, and return when Ray has noticed: it misses some checks first."""
    import ray

    until(lambda: (tmp_path / "faults/hanging").exists())
    nodes.remove_node(nodes.second, allow_graceful=False)
    until(lambda: {node["NodeID"]: node["Alive"] for node in ray.nodes()}[nodes.second.node_id] is False)


def until(true: Callable[[], bool], seconds: float = 600) -> None:
    started = time.monotonic()
    while not true():
        assert time.monotonic() - started < seconds, f"nothing happened in {seconds} s"
        time.sleep(0.05)


def test_a_node_that_goes(run: la.Run, undisturbed: np.ndarray, tmp_path: Path, nodes: Any) -> None:
    strike(tmp_path, **{f"at{first}": f"hangs on {nodes.second.node_id}" for first in range(0, N, CHUNK)})
    thread = ThreadPoolExecutor(1)
    removed = thread.submit(remove_when_it_works, nodes, tmp_path)
    found = la.score(run, "loo", ray_address="auto", check=0)
    removed.result()
    hanging = (tmp_path / "faults/hanging").read_text().split()
    assert len(hanging) == 1  # the node went while it worked on this piece,
    assert set(hanging) <= set(computed(tmp_path))  # which another one took over
    assert len(computed(tmp_path)) == len(set(computed(tmp_path))) == N // CHUNK
    assert np.array_equal(found.values, undisturbed)
    assert np.array_equal(whole_table(run), undisturbed)


def test_every_fault_in_one_run(run: la.Run, undisturbed: np.ndarray, tmp_path: Path, nodes: Any) -> None:
    """Each fault strikes once, the driver is killed last, and the next one computes what is missing."""
    import ray

    full = ray.put(np.zeros(9_000_000))  # 72 MB of the 80 there are, and in use
    held = ray.get(full)
    strike(tmp_path, at0="killed", at20="memory", at40="full", at60="hangs", at80="storage", at120="diverges")
    strike(tmp_path, **{f"at{first}": f"hangs on {nodes.second.node_id}" for first in (100, 140, 160, 180)})
    strike(tmp_path, at220="hangs always")
    script = f"import sys; sys.path.insert(0, {str(Path(__file__).parent)!r}); import test_faults as t; t.drive(*sys.argv[1:])"
    driver = subprocess.Popen([sys.executable, "-c", script, run.path, nodes.address])
    remove_when_it_works(nodes, tmp_path)
    until(lambda: len(list((Path(run.path) / "shards").glob("*.parquet"))) == N // CHUNK)  # but for 220; 20 is in halves
    driver.kill()
    assert driver.wait() == -signal.SIGKILL
    assert len((tmp_path / "faults/busy").read_text().splitlines()) == 2
    (tmp_path / "faults/220").unlink()
    assert not list((tmp_path / "faults").glob("[0-9]*"))  # all of them struck
    with pytest.warns(UserWarning, match=r"1 of 240 removals have no finite score \(120\)"):
        found = la.score(run, "loo", ray_address="auto", check=0)
    assert len(held) == 9_000_000
    assert found.conditions["reused"] == N - CHUNK
    assert len(computed(tmp_path)) == len(set(computed(tmp_path))) == N // CHUNK + 1  # no piece twice
    assert {"20-29", "30-39"} <= set(computed(tmp_path))
    halves, bad = np.arange(20, 40), [120]  # two halves round otherwise than the whole
    np.testing.assert_allclose(found.values[halves], undisturbed[halves], rtol=1e-9, atol=1e-13)
    rest = np.setdiff1d(np.arange(N), [*halves, *bad])
    assert np.array_equal(found.values[rest], undisturbed[rest])
    assert np.isnan(found.values[bad]).all()
    assert np.array_equal(whole_table(run), found.values, equal_nan=True)


def test_a_removal_that_diverges_is_reported_and_the_rest_finishes(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc.scoring import work

    def diverging(job: Any, removals: Any, progress: Any, replay: Any = None) -> Any:
        result = work.compute(job, removals, progress)
        result.scores[[removal == (7,) for removal in removals]] = np.nan
        return result

    monkeypatch.setattr(scoring, "compute", diverging)
    with pytest.warns(UserWarning, match=r"1 of 240 removals have no finite score \(7\)"):
        found = la.score(run, "loo", ray_address=None, check=0)
    assert np.isfinite(found.values).sum() == N - 1
