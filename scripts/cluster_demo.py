"""A cluster of two nodes on loopback, the digits run scored there as a submitted job while a node dies, and the same ranking.

scripts/cluster_demo        # installs into .venv first; about a minute and a half after that
"""

from __future__ import annotations

import argparse
import io
import os
import socket
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import numpy as np

import lightning_acc as la
from lightning_acc.cli import main as lightning_acc
from lightning_acc.scoring import scores

ROOT = Path(__file__).parent.parent
BIN = Path(sys.executable).parent
QUIET = {"RAY_AUTH_MODE": "disabled", "RAY_USAGE_STATS_ENABLED": "0", "RAY_LOG_TO_STDERR": "0"}


@contextmanager
def two_nodes() -> Iterator[Any]:
    """A head that serves the dashboard and takes jobs, and a second node; a CPU each. Both end with this block."""
    os.environ.update(QUIET, PATH=f"{BIN}:{os.environ['PATH']}")  # jobs find the commands of this environment
    from ray.cluster_utils import Cluster

    with socket.socket() as probe, socket.socket() as other:
        probe.bind(("127.0.0.1", 0))
        other.bind(("127.0.0.1", 0))
        port, agent = probe.getsockname()[1], other.getsockname()[1]
    checks = {"health_check_initial_delay_ms": 0, "health_check_period_ms": 500, "health_check_failure_threshold": 5}
    head = {"include_dashboard": True, "dashboard_host": "127.0.0.1", "dashboard_port": port, "_system_config": checks}
    head["dashboard_agent_listen_port"] = agent  # the usual one may be another Ray's
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, **head})
    try:
        cluster.second = cluster.add_node(num_cpus=1)
        cluster.wait_for_nodes()
        yield cluster
    finally:
        cluster.shutdown()


def score_while_a_node_dies(cluster: Any, run: la.Run, method: str) -> str:
    """Submit the job, kill the second node once it works, and return the job's log."""
    from ray.job_submission import JobSubmissionClient

    client = JobSubmissionClient(f"http://{cluster.webui_url}")
    words = f"lightning-acc score {run.path} --method {method} --ray-address auto --memory-gb {MEMORY_GB} --check 0"
    job = client.submit_job(entrypoint=words, runtime_env={"working_dir": str(ROOT / "configs")})
    print(f"submitted: {words}", flush=True)
    shards = Path(run.path) / "shards"
    while not client.get_job_status(job).is_terminal():
        if cluster.second is not None and any(shards.glob("*.parquet")):
            print("killed: the second node", flush=True)
            cluster.remove_node(cluster.second, allow_graceful=False)
            cluster.second = None
        time.sleep(0.1)
    log = client.get_job_logs(job)
    if client.get_job_status(job) != "SUCCEEDED":
        raise SystemExit(f"the job failed:\n{log}")
    if cluster.second is not None:
        raise SystemExit("the job was done before a node could be killed")
    return log


MEMORY_GB = 0.01
"""So little that the job has many pieces."""


def main(config: str, *overrides: str) -> None:
    with tempfile.TemporaryDirectory() as directory:
        path = f"{directory}/run"
        fit = ["fit", "--config", config, f"--recorder.directory={path}", f"--trainer.default_root_dir={directory}"]
        with redirect_stdout(io.StringIO()), redirect_stderr(io.StringIO()):
            lightning_acc([*fit, "--influence.wandb=false", *overrides])
        run = la.Run(path)
        alone = la.score(run, "acc-sgd-ie", ray_address=None, save=False, progress=False, memory_gb=MEMORY_GB, check=0)
        with two_nodes() as cluster:
            print(f"dashboard: http://{cluster.webui_url}", flush=True)
            print(score_while_a_node_dies(cluster, run, "acc-sgd-ie"))
        farmed = scores.read(run.store, "acc-sgd-ie")
        if not np.array_equal(farmed.estimates, alone.values):
            raise SystemExit("the ranking is another one")
        print(f"the same ranking of {len(farmed)} samples, to the last bit")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("overrides", nargs="*", help="options of lightning-acc fit, such as --trainer.max_epochs=3")
    known, more = parser.parse_known_args()
    main(str(ROOT / "configs/digits.yaml"), *known.overrides, *more)
