"""Files of a run directory, on a local disk or behind any fsspec URL.

A file appears whole or not at all: locally it is written beside its final name, flushed to the disk and renamed.
"""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import uuid
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lightning_acc.errors import RunError


class Store:
    """Whole files under one root directory or URL, by their relative names."""

    def __init__(self, root: str | os.PathLike[str]) -> None:
        filesystem, path = fsspec.core.url_to_fs(os.fspath(root))
        self.filesystem: Any = filesystem
        self.path: str = path.rstrip("/")
        self.local = isinstance(filesystem, LocalFileSystem)
        # Workers have another working directory: what they are given must be absolute.
        self.url: str = self.path if self.local else filesystem.unstrip_protocol(path)

    def __str__(self) -> str:
        return self.url

    def locate(self, name: str) -> str:
        """The full path or URL of the file ``name``."""
        return f"{self.path}/{name}"

    def exists(self, name: str = "") -> bool:
        """Whether the file ``name`` (or, without a name, the root itself) is there."""
        return bool(self.filesystem.exists(self.locate(name) if name else self.path))

    def size(self, name: str) -> int:
        """Bytes of the file ``name``, or -1 where it does not exist."""
        try:
            return int(self.filesystem.size(self.locate(name)))
        except FileNotFoundError:
            return -1

    def read(self, name: str) -> bytes:
        """The whole file ``name``."""
        try:
            return bytes(self.filesystem.cat_file(self.locate(name)))
        except FileNotFoundError:
            raise RunError(f"{self.locate(name)} is missing: restore it, or record the run again.") from None
        except OSError as error:
            raise RunError(f"{self.locate(name)} cannot be read: {error}.") from error

    def write(self, name: str, data: bytes) -> None:
        """Write the file ``name``; it replaces an older one in a single step, or leaves it as it was.

        Raises:
            RunError: the disk is full or refuses the file.
        """
        try:
            if self.local:
                self._write_local(self.locate(name), data)
            else:
                self.filesystem.pipe_file(self.locate(name), data)
        except OSError as error:
            cause = "the disk is full" if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG) else str(error)
            raise RunError(
                f"{self.locate(name)} ({len(data):,} bytes) could not be written: {cause}; "
                "nothing older was changed. Free some space or choose another directory, then try again."
            ) from error

    @staticmethod
    def _write_local(path: str, data: bytes) -> None:
        os.makedirs(os.path.dirname(path), exist_ok=True)
        beside = f"{path}.{uuid.uuid4().hex[:8]}.part"
        try:
            with open(beside, "wb") as file:
                file.write(data)
                file.flush()
                os.fsync(file.fileno())
            os.replace(beside, path)
        except BaseException:
            with contextlib.suppress(OSError):
                os.unlink(beside)
            raise

    def names(self, folder: str) -> list[str]:
        """Sorted relative names of the files directly in ``folder``."""
        try:
            entries = self.filesystem.ls(self.locate(folder), detail=False)
        except FileNotFoundError:
            return []
        return sorted(f"{folder}/{str(entry).rsplit('/', 1)[-1]}" for entry in entries)

    def remove(self, *names: str) -> None:
        """Delete these files and folders, where they exist; without names the root and everything in it."""
        for path in [self.locate(name) for name in names] or [self.path]:
            if self.filesystem.exists(path):
                self.filesystem.rm(path, recursive=True)

    def free_bytes(self) -> int | None:
        """Bytes left where the root is or will be; None where that cannot be known."""
        if not self.local:
            return None
        path = self.path
        while not os.path.exists(path):
            path = os.path.dirname(path) or "/"
        statistics = os.statvfs(path)
        return statistics.f_bavail * statistics.f_frsize


def digest(data: bytes) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
