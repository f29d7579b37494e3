"""Workers that die, hang or run out of memory, nodes that go, a driver that is killed: nothing is lost or counted twice."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from problems import data, make, record

import lightning_acc as la
from lightning_acc import cluster, planning, scoring

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
    monkeypatch.setenv(faults.PLACE, str(tmp_path / "faults"))
    monkeypatch.setattr(planning, "LARGEST_CHUNK", CHUNK)
    monkeypatch.setattr(scoring, "compute", faults.faulty)
    return la.Run(tmp_path / "run")


@pytest.fixture(scope="module")
def undisturbed(recorded: la.Run) -> np.ndarray:
    patch = pytest.MonkeyPatch()
    patch.setattr(planning, "LARGEST_CHUNK", CHUNK)
    values = la.score(recorded, "loo", ray_address=None, save=False).values
    patch.undo()
    return values


def strike(tmp_path: Path, **kinds: str) -> None:
    for first, kind in kinds.items():
        (tmp_path / "faults" / first.removeprefix("at")).write_text(kind)


def computed(tmp_path: Path) -> list[str]:
    return (tmp_path / "faults/computed").read_text().split()


def whole_table(run: la.Run) -> np.ndarray:
    from lightning_acc import scores

    table = scores.read(run.store, "loo").by_removal()
    assert sorted(table) == [(i,) for i in range(N)]  # nothing missing, nothing twice
    return np.array([table[(i,)] for i in range(N)])


def test_killed_hanging_and_starved_workers(
    run: la.Run, undisturbed: np.ndarray, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cluster, "SECONDS_UNTIL_HUNG", 4.0)
    strike(tmp_path, at0="killed", at60="memory", at120="hangs", at180="killed")
    found = la.score(run, "loo")
    split = slice(60, 60 + CHUNK)  # computed in two halves, which round otherwise
    np.testing.assert_allclose(found.values[split], undisturbed[split], rtol=1e-9, atol=1e-13)
    rest = np.r_[0:60, 80:N]
    assert np.array_equal(found.values[rest], undisturbed[rest])
    assert np.array_equal(whole_table(run), found.values)
    assert {"60-69", "70-79"} <= set(computed(tmp_path))
    assert len(computed(tmp_path)) == len(set(computed(tmp_path))) == N // CHUNK + 1
    assert not list((tmp_path / "faults").glob("[0-9]*"))  # all of them struck


def test_what_fails_for_good_is_named_and_the_rest_is_kept(run: la.Run, undisturbed: np.ndarray, tmp_path: Path) -> None:
    strike(tmp_path, at40="killed always")
    with pytest.raises(la.RunError, match=r"20 of 240 removals failed \(40, 41, .*others are stored; score again"):
        la.score(run, "loo")
    assert len(computed(tmp_path)) == N // CHUNK - 1
    (tmp_path / "faults/40").unlink()
    (tmp_path / "faults/computed").unlink()
    found = la.score(run, "loo", ray_address=None)
    assert found.conditions["reused"] == N - CHUNK
    assert np.array_equal(found.values, undisturbed)
    assert np.array_equal(whole_table(run), undisturbed)


def test_a_repeated_command_computes_nothing_and_starts_no_workers(run: la.Run, tmp_path: Path) -> None:
    first = la.score(run, "loo", ray_address=None)
    started = time.monotonic()
    again = la.score(run, "loo", ray_address="ray://nowhere:1")
    assert time.monotonic() - started < 5
    assert again.conditions["reused"] == N
    assert np.array_equal(first.values, again.values)
    assert la.score(run, "loo", dtype="float32", ray_address=None).conditions["reused"] == 0
    own = la.Query("own", run.query("val").batches and [data(n=5).tensors], lambda module, batch: module.net(batch[0])[:, 0])
    for _ in range(2):  # a function may have changed under its name
        assert la.score(run, "loo", [1, 2], own, ray_address=None).conditions["reused"] == 0


SCRIPT = """
import sys
sys.path.insert(0, {tests!r})
import faults
import lightning_acc as la
from lightning_acc import planning, scoring
planning.LARGEST_CHUNK = {chunk}
if {slow!r}:
    scoring._compute_here = lambda replay, *arguments: faults.faulty(*arguments)
print("scoring", flush=True)
la.score({path!r}, "loo", ray_address=None, progress=False)
"""


def start(run: la.Run, slow: bool = True) -> subprocess.Popen[str]:
    script = SCRIPT.format(tests=str(Path(__file__).parent), path=run.path, chunk=CHUNK, slow=slow)
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True, env={**os.environ})
    assert process.stdout is not None
    assert process.stdout.readline() == "scoring\n"
    return process


def test_a_killed_driver_is_resumed(run: la.Run, undisturbed: np.ndarray, tmp_path: Path) -> None:
    strike(tmp_path, at100="slow")
    process = start(run)
    while (tmp_path / "faults/100").exists():
        time.sleep(0.05)
    process.send_signal(signal.SIGKILL)
    process.communicate()
    found = la.score(run, "loo", ray_address=None)
    assert found.conditions["reused"] == 100
    assert np.array_equal(found.values, undisturbed)


def test_two_commands_at_once_do_no_harm(run: la.Run, undisturbed: np.ndarray) -> None:
    processes = [start(run), start(run)]
    for process in processes:
        process.communicate(timeout=120)
        assert process.returncode == 0
    assert np.array_equal(whole_table(run), undisturbed)


def test_a_node_that_goes(run: la.Run, undisturbed: np.ndarray, tmp_path: Path) -> None:
    import ray
    from ray.cluster_utils import Cluster

    # Ray's own patience, half a minute, is for networks: here a node is missed after a second or two.
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 300, "health_check_failure_threshold": 5}
    head = {"num_cpus": 1, "include_dashboard": False, "_system_config": checks}
    nodes = Cluster(initialize_head=True, head_node_args=head)
    try:
        second = nodes.add_node(num_cpus=1)
        nodes.wait_for_nodes()
        ray.init(address=nodes.address, log_to_driver=False, logging_level=40)
        strike(tmp_path, **{f"at{first}": f"hangs on {second.node_id}" for first in range(0, N, CHUNK)})

        def remove() -> None:
            while not (tmp_path / "faults/hanging").exists():
                time.sleep(0.05)
            nodes.remove_node(second, allow_graceful=False)

        thread = threading.Thread(target=remove, daemon=True)
        thread.start()
        found = la.score(run, "loo", ray_address="auto")
        thread.join(timeout=60)
        assert not thread.is_alive()
        assert {node["NodeID"]: node["Alive"] for node in nodes_without(second.node_id)}[second.node_id] is False
    finally:
        ray.shutdown()
        nodes.shutdown()
    hanging = (tmp_path / "faults/hanging").read_text().split()
    assert len(hanging) == 1  # the node went while it worked on this piece,
    assert set(hanging) <= set(computed(tmp_path))  # which another one took over
    assert len(computed(tmp_path)) == len(set(computed(tmp_path))) == N // CHUNK
    assert np.array_equal(found.values, undisturbed)
    assert np.array_equal(whole_table(run), undisturbed)


def nodes_without(gone: str) -> list[dict[str, Any]]:
    """Ray's nodes, as soon as it has noticed that one is gone: it takes several missed health checks for that."""
    import ray

    for _ in range(600):
        nodes: list[dict[str, Any]] = ray.nodes()
        if not any(node["NodeID"] == gone and node["Alive"] for node in nodes):
            break
        time.sleep(0.1)
    return nodes


def test_a_removal_that_diverges_is_reported_and_the_rest_finishes(run: la.Run, monkeypatch: pytest.MonkeyPatch) -> None:
    from lightning_acc import work

    def diverging(job: Any, removals: Any, progress: Any, replay: Any = None) -> Any:
        result = work.compute(job, removals, progress)
        result.scores[[removal == (7,) for removal in removals]] = np.nan
        return result

    monkeypatch.setattr(scoring, "_compute_here", lambda replay, *arguments: diverging(*arguments))
    with pytest.warns(UserWarning, match=r"1 of 240 removals have no finite score \(7\)"):
        found = la.score(run, "loo", ray_address=None)
    assert np.isfinite(found.values).sum() == N - 1
