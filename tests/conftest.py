from __future__ import annotations

import gc
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import rays
import torch
from rays import local_ray as local_ray
from rays import no_ray as no_ray
from s3 import server as server
from s3 import server_port as server_port

os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
# Ray reads this once in a process: clusters of all tests must agree, and those of several nodes here have no token to share.
os.environ.setdefault("RAY_AUTH_MODE", "disabled")
os.environ.setdefault("RAY_gcs_server_port_wait_time_s", "120")  # the machine may be busy
# A process that has met Ray forks workers of a DataLoader later, in which gRPC would start its threads anew, and crash.
os.environ.setdefault("GRPC_ENABLE_FORK_SUPPORT", "0")
os.environ.setdefault("LIGHTNING_ACC_TRUST", "problems")  # for processes that open a run without importing its module
torch.set_num_threads(1)  # small products on several threads wait for each other

LONG = ("test_readme", "test_low_rank", "test_ddp", "test_plan", "test_report", "test_tracking")
"""Files that take longest, the longest first."""


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """What meets Ray is begun first, in a good order, and then what takes long."""

    def place(item: pytest.Item) -> tuple[int, int]:
        if (kind := rays.kind(item.path)) is not None:
            return rays.KINDS.index(kind), rays.place(item)
        name = item.path.stem
        return len(rays.KINDS), LONG.index(name) if name in LONG else len(LONG)

    items.sort(key=place)


def pytest_collection_finish() -> None:
    """What has been imported lives as long as the tests: no collection of garbage needs to look at all of it again."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """Where several processes share the tests, each file is done by one of them, and files that meet Ray by one a kind."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return rays.kind(config.rootpath / file) or file

    config.option.loadscopereorder = False  # what comes first is begun first
    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def rays_apart() -> Iterator[None]:
    """Rays of several test processes do not find each other. The folder is outside of pytest's: names of sockets are short."""
    with tempfile.TemporaryDirectory(prefix="ray", ignore_cleanup_errors=True) as folder:
        os.environ["RAY_TMPDIR"] = folder
        yield


@pytest.fixture(autouse=True)
def wandb_stays_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("WANDB_DIR", "WANDB_DATA_DIR", "WANDB_CACHE_DIR", "WANDB_CONFIG_DIR"):
        monkeypatch.setenv(name, str(tmp_path / "wandb-files"))
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "wandb-files").mkdir()


@pytest.fixture
def two_threads() -> Iterator[None]:
    """As many as torch computes on in this process."""
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)
