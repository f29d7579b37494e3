"""The Ray that tests share."""

from __future__ import annotations

import functools
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def local_ray(tmp_path_factory: pytest.TempPathFactory, server_port: int) -> Iterator[Path]:
    """A Ray of two workers on this machine, started once: what connects to ``local`` uses it. It knows of the S3 server.

    Gives the folder its workers stand in.
    """
    import ray

    folder = tmp_path_factory.mktemp("workers")
    leave_ray()
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        ray.init(address="local", num_cpus=2, include_dashboard=False, log_to_driver=False, logging_level=40)
    yield folder
    leave_ray()


@pytest.fixture
def no_ray() -> Iterator[None]:
    """For tests that start a Ray of their own, or must not find one: this process is connected to none."""
    leave_ray()
    yield
    leave_ray()


def leave_ray() -> None:
    """End this process's connection to Ray, if there is one."""
    if "ray" in sys.modules:
        sys.modules["ray"].shutdown()


KINDS = ("shared ray", "rays of their own")
"""Of test files that meet Ray: each kind is done by one process, which begins with it."""


@functools.cache
def kind(file: Path) -> str | None:
    """Whether tests of the file share a Ray, or start their own and nothing else, or meet none."""
    content = file.read_text()
    return KINDS[0] if "local_ray" in content else KINDS[1] if "no_ray" in content else None


def place(item: pytest.Item) -> int:
    """When to run a test that meets Ray: first where one is shared, then all others."""
    return 0 if "local_ray" in getattr(item, "fixturenames", ()) else 1
