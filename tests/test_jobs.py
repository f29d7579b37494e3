"""One cluster of two nodes and a run on S3: the same scores to the last bit as in one process, also of a submitted job."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import faults
import numpy as np
import pytest
from problems import data, make, record
from s3 import free_port

import lightning_acc as la
from lightning_acc.progress import watched_by
from lightning_acc.scoring import score as scoring
from lightning_acc.scoring import scores
from lightning_acc.scoring.cluster import farm

pytestmark = pytest.mark.filterwarnings("ignore")
N = 120
README = Path(__file__).parent.parent / "README.md"
BIN = Path(sys.executable).parent
URL = "s3://bucket/jobs/run"


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory, server: int) -> np.ndarray:
    """The scores of the run on a disk, computed in this process; beside it stands the same run on S3, unscored."""
    run = record(tmp_path_factory.mktemp("jobs") / "run", make(hidden=6), data(n=N), batch_size=20)
    assert record(URL, make(hidden=6), data(n=N), batch_size=20).store.names("scores") == []  # type: ignore[arg-type]
    values = la.score(run, "acc-sgd-ie", ray_address=None, check=0).values
    shutil.rmtree(run.path)  # no node could read it
    return values


@pytest.fixture(scope="module")
def nodes(alone: np.ndarray, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """Two nodes with a CPU each, and a job server; they know the storage, and where faults are noted."""
    from ray.cluster_utils import Cluster

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{BIN}:{os.environ['PATH']}")
        patch.setenv("RAY_CLIENT_SERVER_CHECK_CHANNEL_TIMEOUT_S", "10")
        patch.setenv(faults.PLACE, str(tmp_path_factory.mktemp("faults")))
        head = {"num_cpus": 1, "include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": free_port()}
        head["ray_client_server_port"] = free_port()
        head["dashboard_agent_listen_port"] = free_port()  # or another Ray's agent on this machine stands in the way
        both = Cluster(initialize_head=True, head_node_args=head)
        try:
            both.client = f"ray://127.0.0.1:{head['ray_client_server_port']}"
            both.add_node(num_cpus=1)
            both.wait_for_nodes()
            yield both
        finally:
            both.shutdown()


@pytest.fixture(scope="module")
def jobs(nodes: Any) -> Any:
    """What takes jobs: the head's agent, which starts them, is there some seconds after the rest."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(f"http://{nodes.webui_url}")
    started = time.monotonic()
    while True:
        try:
            client.submit_job(entrypoint="true")
            return client
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() - started > 120:
                raise


def test_two_nodes_that_see_nothing_of_the_drivers_disk(
    nodes: Any, alone: np.ndarray, no_ray: None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import ray

    (here := tmp_path / "here").mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setattr(scoring, "compute", faults.noted_node)
    ray.init(address=nodes.address, log_to_driver=False, logging_level=40)
    farmed = la.score(URL, "acc-sgd-ie", ray_address="auto", save=False, check=0)
    assert np.array_equal(farmed.values, alone)
    assert len(set((Path(os.environ[faults.PLACE]) / "nodes").read_text().split())) == 2
    assert not list(here.iterdir())


def test_a_client_far_from_the_cluster(nodes: Any, alone: np.ndarray, no_ray: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """By ray://, which has no streams: pieces are heard all the same, so that one that hangs is noticed."""
    monkeypatch.setattr(scoring, "compute", faults.faulty)
    monkeypatch.setattr(farm, "SECONDS_UNTIL_HUNG", 4.0)
    hanging = Path(os.environ[faults.PLACE]) / "0"
    hanging.write_text("hangs")
    heard: list[float] = []
    with watched_by(lambda done, rate, left: heard.append(done)):
        farmed = la.score(URL, "acc-sgd-ie", ray_address=nodes.client, save=False, check=0)
    assert not hanging.exists()
    assert np.array_equal(farmed.values, alone)
    assert heard[-1] == 1


@pytest.fixture
def project(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A user's project: the package of the run's module, which no node has installed."""
    for name in ("problems.py", "lightly.py"):
        shutil.copy(Path(__file__).parent / name, tmp_path / name)
    return tmp_path


def forgotten() -> la.Run:
    """The run, with nothing scored."""
    run = la.Run(URL)
    run.store.remove("scores", "shards")
    assert run.store.names("scores") == []
    return run


def of_the_readme(start: str) -> list[str]:
    """The command of the README that begins so, for this run."""
    lines = [line.partition("#")[0].split() for line in README.read_text().splitlines() if line.startswith(start)]
    assert lines, start
    return [{"s3://my-bucket/runs/mine": URL, "mypackage": "problems"}.get(word, word) for word in lines[0]]


def test_a_job_submitted_on_the_command_line(nodes: Any, jobs: Any, alone: np.ndarray, project: Path) -> None:
    run = forgotten()
    there = {**os.environ, "RAY_API_SERVER_ADDRESS": f"http://{nodes.webui_url}"}
    words = of_the_readme("ray job submit ")
    done = subprocess.run(words, cwd=project, env=there, capture_output=True, text=True, check=False, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert re.search(rf"Scores\(acc-sgd-ie: {N} removals", done.stdout)
    assert np.array_equal(scores.read(run.store, "acc-sgd-ie").estimates, alone)


def test_a_job_submitted_through_the_api(jobs: Any, alone: np.ndarray, project: Path) -> None:
    run = forgotten()
    words = of_the_readme("lightning-acc score s3://")
    job = jobs.submit_job(entrypoint=" ".join(words), runtime_env={"working_dir": str(project)})
    started = time.monotonic()
    while not jobs.get_job_status(job).is_terminal():
        assert time.monotonic() - started < 600  # on a machine that is busy with other clusters
        time.sleep(0.2)
    assert jobs.get_job_status(job) == "SUCCEEDED", jobs.get_job_logs(job)
    assert np.array_equal(scores.read(run.store, "acc-sgd-ie").estimates, alone)
    assert "most harmful first" in jobs.get_job_logs(job)
