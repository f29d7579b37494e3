"""A server that speaks the S3 protocol, on loopback."""

from __future__ import annotations

import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator

import fsspec
import pytest

from lightning_acc.record.store import Store


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


@pytest.fixture(scope="session")
def server_port() -> Iterator[int]:
    """The port at which there is an S3 server, or will be; clients find it through the environment."""
    port = free_port()
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("AWS_ENDPOINT_URL", f"http://127.0.0.1:{port}")
        patch.setenv("AWS_ACCESS_KEY_ID", "the-key")
        patch.setenv("AWS_SECRET_ACCESS_KEY", "the-secret")
        patch.setenv("AWS_DEFAULT_REGION", "us-east-1")
        yield port


@pytest.fixture(scope="session")
def server(server_port: int) -> Iterator[int]:
    """The port of an S3 server with the bucket ``bucket``."""
    port = server_port
    words = [sys.executable, "-m", "moto.server", "-H", "127.0.0.1", "-p", str(port)]
    with tempfile.TemporaryFile() as said:
        process = subprocess.Popen(words, stdout=said, stderr=said)
        try:
            for _ in range(1200):  # two minutes: the machine may be busy
                try:
                    socket.create_connection(("127.0.0.1", port), 1).close()
                    break
                except OSError:
                    if process.poll() is not None:
                        said.seek(0)
                        pytest.fail(f"the server ended with status {process.returncode}: {said.read().decode()}")
                    time.sleep(0.1)
            fsspec.get_filesystem_class("s3").clear_instance_cache()  # one may be connected to an earlier server
            Store("s3://bucket").filesystem.mkdir("bucket")
            yield port
        finally:
            process.terminate()
            process.wait()
