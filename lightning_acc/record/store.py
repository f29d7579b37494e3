"""Files of a run directory, on a local disk or behind any fsspec URL.

A file appears whole or not at all: locally it is written beside its final name and renamed (see ``local``); object stores
show an object when all of it has arrived. What may pass (lost connections, throttling, errors of the server) is
tried again a few times; everything else ends at once, in one sentence. Credentials within a URL are used, never shown.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import random
import re
import stat
import time
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

import fsspec
from fsspec.implementations.local import LocalFileSystem

from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.record import local

T = TypeVar("T")

TRIES = 5
PAUSE = 0.2
"""Seconds before the second try; each further pause is twice as long, and all vary by half."""
PATIENCE = 30.0
"""Seconds after which nothing is tried again: some file systems have been trying themselves."""

_FULL = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
_PASSING_ERRNO = {
    *(errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EPIPE, getattr(errno, "EREMOTEIO", errno.EIO), errno.ETIMEDOUT),
    *(errno.ECONNABORTED, errno.ECONNREFUSED, errno.ECONNRESET),
    *(errno.EHOSTUNREACH, errno.ENETDOWN, errno.ENETRESET, errno.ENETUNREACH),
}
_PASSING_NAMES = {
    *("ConnectionError", "ConnectTimeoutError", "HTTPClientError", "ResponseStreamingError", "IncompleteReadError"),
    *("ClientConnectionError", "ClientPayloadError", "ServerTimeoutError", "Timeout", "TransportError", "ProtocolError"),
    *("ServiceRequestError", "ServiceResponseError"),
}
"""Classes of botocore, aiohttp, requests, google-auth, urllib3 and azure-core, none of which is imported here."""
_jitter = random.Random()  # not the global generator: training may draw from it
_HIERARCHICAL = {"sftp", "ssh", "ftp", "smb", "hdfs", "arrow_hdfs", "webhdfs"}

_UNSAFE = re.compile(r"[\\\x00-\x1f\x7f]")


class Store:
    """Whole files under one root directory or URL, by their relative names.

    Raises:
        RunError: from every method, where the storage fails; ``FileNotFoundError`` never leaves it.
    """

    def __init__(self, root: str | os.PathLike[str]) -> None:
        self._root = os.fspath(root)
        self._connect()
        self.local = isinstance(self._filesystem, LocalFileSystem)
        # Workers have another working directory: what they are given must be absolute.
        self.url: str = self.path if self.local else self._root.rstrip("/")
        """Opens the same place anywhere; holds the credentials it was given. ``str()`` of a store does not."""

    def _connect(self) -> None:
        try:
            self._filesystem, path = fsspec.core.url_to_fs(self._root)
        except (ImportError, ValueError) as error:
            raise RunError(f"{without_credentials(self._root)} cannot be opened: {_words(error)}.") from None
        self._process = os.getpid()
        # The query of a web address comes after the name of the file.
        root, mark, query = path.partition("?") if re.match("https?://", path) else (path, "", "")
        self.path: str = root.rstrip("/")
        self._query = mark + query

    @property
    def filesystem(self) -> Any:
        """The fsspec file system; another one after a fork, which connections do not survive."""
        if self._process != os.getpid():
            self._connect()
        return self._filesystem

    def __str__(self) -> str:
        return str(without_credentials(self.url))

    def __reduce__(self) -> Any:
        return Store, (self.url,)

    def locate(self, name: str) -> str:
        """The full path or URL of the file ``name``, as it may be shown."""
        return f"{self}/{check_name(name)}"

    def _path(self, name: str) -> str:
        return f"{self.path}/{check_name(name)}{self._query}" if name else self.path + self._query

    def exists(self, name: str = "") -> bool:
        """Whether the file ``name`` (or, without a name, the root itself) is there."""
        return self._info(name) is not None

    def size(self, name: str) -> int:
        """Bytes of the file ``name``, or -1 where it does not exist."""
        info = self._info(name)
        if info is not None:
            self._refuse_irregular(name)
        return -1 if info is None else int(info["size"])

    def sizes(self, names: Iterable[str]) -> dict[str, int]:
        """Bytes of each of these files, or -1 where it does not exist."""
        names = list(names)
        if self.local or self._query:
            return {name: self.size(name) for name in names}
        # One question for a folder, not one for a file: a long run has thousands of them.
        found: dict[str, int] = {}
        for folder in {name.rpartition("/")[0] for name in names}:
            found.update({name: int(entry["size"] or 0) for name, entry in self._list(folder).items()})
        return {name: found.get(name, -1) for name in names}

    def _info(self, name: str) -> dict[str, Any] | None:
        path = self._path(name)
        try:
            return dict(self._attempt(name, "cannot be looked up", lambda files: files.info(path), fresh=True))
        except FileNotFoundError:
            return None

    def _list(self, folder: str) -> dict[str, dict[str, Any]]:
        """The files directly in ``folder``, by relative name; pipes and the like too, for the reader to be told of."""
        path = self._path(folder)
        try:
            entries = self._attempt(folder, "cannot be listed", lambda files: files.ls(path, detail=True), fresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return {}
        places = ((str(entry["name"]).rsplit("/", 1)[-1], entry) for entry in entries if entry["type"] != "directory")
        return {f"{folder}/{name}".lstrip("/"): entry for name, entry in places if name}

    def read(self, name: str, size: int | None = None) -> bytes:
        """The whole file ``name``; a local one of another ``size`` is refused unread."""
        path = self._path(name)
        self._refuse_irregular(name, size)
        try:
            return bytes(self._attempt(name, "cannot be read", lambda files: files.cat_file(path)))
        except FileNotFoundError:
            raise RunError(f"{self.locate(name)} is missing: restore it, or record the run again.") from None

    def _refuse_irregular(self, name: str, size: int | None = None) -> None:
        """Refuse what is no file of that size: reading from a pipe or a device may never end."""
        if not self.local:
            return
        try:
            status = os.stat(self._path(name))
        except (OSError, ValueError):  # for the reader to tell
            return
        if not stat.S_ISREG(status.st_mode):
            raise RunError(f"{self.locate(name)} is no regular file: restore it, or record the run again.")
        if size is not None and status.st_size != size:
            raise RunError(
                f"{self.locate(name)} has {status.st_size:,} bytes and not {size:,}: restore it, or record the run again."
            )

    def write(self, name: str, data: bytes) -> None:
        """Write the file ``name``; it replaces an older one in a single step, or leaves it as it was."""
        path = self._path(name)

        def write(files: Any) -> None:
            if self.local:
                local.write(path, data, self.path)
            else:
                if _HIERARCHICAL.intersection((files.protocol,) if isinstance(files.protocol, str) else files.protocol):
                    files.makedirs(path.rpartition("/")[0], exist_ok=True)
                files.pipe_file(path, data)

        what = f"({len(data):,} bytes) could not be written"
        try:
            self._attempt(name, what, write, changes=True)
        except FileNotFoundError as error:
            raise RunError(
                f"{self.locate(name)} {what}: {_words(error)}; make the bucket or folder, or choose another directory."
            ) from None

    def names(self, folder: str) -> list[str]:
        """Sorted relative names of the files directly in ``folder``."""
        return sorted(self._list(folder))

    def walk(self, within: Collection[str]) -> list[str]:
        """Sorted relative names of the files under the root; locally of other folders than those in ``within`` their names."""
        if self.local:
            return local.walk(self.path, within)
        try:
            paths = self._attempt("", "cannot be listed", lambda files: files.find(self.path), fresh=True)
        except (FileNotFoundError, NotADirectoryError):
            return []
        return sorted(str(path).removeprefix(self.path).lstrip("/") for path in paths)

    def remove(self, *names: str) -> None:
        """Delete these files and folders, where they exist."""
        for name in names:
            self._remove(name)

    def _remove(self, name: str) -> None:
        path = self._path(name)
        if self.local and os.path.islink(path):  # the link, not what it leads to
            self._attempt(name, "cannot be deleted", lambda files: os.unlink(path))
        elif self.exists(name):
            with contextlib.suppress(FileNotFoundError):  # deleted by someone else, or by the try before
                self._attempt(name, "cannot be deleted", lambda files: files.rm(path, recursive=True), fresh=True)

    def remove_empty_folders(self) -> None:
        """Delete the folders under a local root that nothing is in."""
        if self.local:
            local.remove_empty_folders(self.path)

    def free_bytes(self) -> int | None:
        """Bytes left where the root is or will be; None where that cannot be known."""
        if not self.local:
            return None
        path = self.path
        while not os.path.exists(path):
            path = os.path.dirname(path) or "/"
        statistics = os.statvfs(path)
        return statistics.f_bavail * statistics.f_frsize

    def _attempt(self, name: str, failed: str, call: Callable[[Any], T], fresh: bool = False, changes: bool = False) -> T:
        """``call(filesystem)``, tried again while it fails for reasons that may pass; ``fresh``: not from a listing cache.

        Raises:
            FileNotFoundError, NotADirectoryError: for the caller to tell what that means.
            RunError: anything else.
        """
        started = time.monotonic()
        for tries in range(1, TRIES + 1):
            try:
                if fresh:
                    self.filesystem.invalidate_cache()
                return call(self.filesystem)
            except (FileNotFoundError, NotADirectoryError, RunError):
                raise
            except Exception as error:
                if not may_pass(error) or tries == TRIES or time.monotonic() - started > PATIENCE:
                    where = self.locate(name) if name else str(self)
                    kept = "; nothing older was changed" if changes else ""
                    after = f" in {tries} tries" if tries > 1 else ""
                    message = f"{where} {failed}{after}: {_words(error)}{kept}. {_remedy(error)}"
                    # The error itself may show what its words do not.
                    raise RunError(message) from (error if without_credentials(str(error)) == str(error) else None)
            time.sleep(PAUSE * 2 ** (tries - 1) * _jitter.uniform(0.5, 1.5))
        raise AssertionError


def may_pass(error: BaseException | None) -> bool:
    """Whether what failed with ``error`` is worth another try: connections, timeouts, throttling, errors of the server."""
    if error is None or isinstance(error, (FileNotFoundError, PermissionError)) or getattr(error, "errno", None) in _FULL:
        return False
    if isinstance(error, (ConnectionError, TimeoutError, asyncio.TimeoutError)):
        return True
    if isinstance(error, OSError) and error.errno in _PASSING_ERRNO:
        return True
    if any(kind.__name__ in _PASSING_NAMES for kind in type(error).__mro__):
        return True
    response = getattr(error, "response", None)
    answers = [getattr(error, key, None) for key in ("status", "code", "status_code")] + [
        getattr(response, "status_code", None)
    ]
    if isinstance(response, Mapping):
        answers.append(response.get("ResponseMetadata", {}).get("HTTPStatusCode"))
    if any(str(answer) in ("408", "425", "429") or re.fullmatch(r"5\d\d", str(answer)) for answer in answers):
        return True
    return may_pass(error.__cause__)


def _words(error: BaseException) -> str:
    """The cause in a few words, on one line."""
    if getattr(error, "errno", None) in _FULL:
        return "the disk is full"
    text = " ".join(str(error).split()).rstrip(".")
    return str(without_credentials(text[:500])) or type(error).__name__


def _remedy(error: BaseException) -> str:
    if getattr(error, "errno", None) in _FULL:
        return "Free some space or choose another directory, then try again."
    if isinstance(error, PermissionError) or "Credential" in type(error).__name__:
        return "Check the permissions and the credentials, then try again."
    if may_pass(error):
        return "Check the connection and the storage service, then try again."
    return "Check the address and the storage, then try again."


def check_name(name: str) -> str:
    """``name``, where it is the relative name of a file within a directory.

    Raises:
        RunError: it is absolute, leads outside, or holds backslashes or control characters.
    """
    if any(part in ("", ".", "..") or _UNSAFE.search(part) for part in name.split("/")):
        raise RunError(f"{name!r} is no name for a file of a run directory: use relative names without '..' and backslashes.")
    return name


def digest(data: bytes) -> str:
    """SHA-256 of ``data`` in hexadecimal."""
    return hashlib.sha256(data).hexdigest()
