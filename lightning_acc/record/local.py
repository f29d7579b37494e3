"""Files on a local disk: written whole or not at all, never through a link out of their root, and what the killed leave behind.

A file is written beside its final name, flushed to the disk and renamed. What it is called until then tells which process is
writing, so that the next one that writes into the folder can delete what a killed one left.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import socket
import sys
import time
import uuid
from collections.abc import Collection

from lightning_acc.errors import RunError

LEFT_BEHIND = 3600.0
"""Seconds after which a file that a process of another machine was writing counts as left behind."""
_HOST = hashlib.sha256(socket.gethostname().encode()).hexdigest()[:8]
_PART = re.compile(r"\.([0-9a-f]{8})-(\d+)-[0-9a-f]{8}\.part$")
_swept: dict[str, int] = {}
"""Folders that were cleared of what killed processes left there, and by which process: a fork clears anew."""


def write(path: str, data: bytes, root: str) -> None:
    """Write a file within ``root``; it replaces an older one in a single step, or leaves it as it was.

    Raises:
        RunError: its folder is a symbolic link out of ``root``.
        OSError: it cannot be written.
    """
    folder = os.path.dirname(path)
    inside, place = os.path.realpath(root), os.path.realpath(folder)
    if os.path.commonpath([inside, place]) != inside:
        raise RunError(f"{path} is not written: {folder} is a symbolic link out of {root}, to {place}. Delete that link.")
    os.makedirs(folder, exist_ok=True)
    if _swept.get(folder) != os.getpid():
        _swept[folder] = os.getpid()
        remove_parts(folder)
    beside = f"{path}.{_HOST}-{os.getpid()}-{uuid.uuid4().hex[:8]}.part"
    try:
        with open(beside, "xb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(beside, path)
    except BaseException:
        with contextlib.suppress(OSError):
            os.unlink(beside)
        raise


def remove_parts(folder: str) -> None:
    """Delete what processes that are gone left half written in a folder; what others may be writing stays."""
    for entry in os.scandir(folder):
        if not entry.name.endswith(".part"):
            continue
        part = _PART.search(entry.name)
        with contextlib.suppress(OSError):  # it may be gone by now
            if part and part[1] == _HOST:
                left = not is_alive(int(part[2]))
            else:
                left = time.time() - entry.stat(follow_symlinks=False).st_mtime > LEFT_BEHIND
            if left:
                os.unlink(entry.path)


def is_alive(pid: int) -> bool:
    """Whether a process of this machine has that number and runs, as far as can be told."""
    if sys.platform == "win32":  # where asking would end it
        return True
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except (OSError, OverflowError):
        return True
    # One that was killed keeps its number until its parent asks for it, which in some containers nobody does.
    return status(pid)[:1] not in (["Z"], ["X"])


def status(pid: int) -> list[str]:
    """What the system says of a process, after its name (``proc(5)``): state, parent ...; nothing where it does not tell."""
    try:
        with open(f"/proc/{pid}/stat", "rb") as file:
            return file.read().rpartition(b")")[2].decode().split()
    except OSError:
        return []


def walk(root: str, within: Collection[str]) -> list[str]:
    """Sorted relative names of the files under ``root``; symbolic links to folders are named, not followed.

    Of the folders in ``root`` itself those not named in ``within`` are not looked into: where anything is in one, its name is
    given, and a slash.
    """
    found = []
    for folder, folders, files in os.walk(root):
        links = [name for name in folders if os.path.islink(os.path.join(folder, name))]
        if folder == root:
            others = [name for name in folders if name not in (*within, *links)]
            found += [f"{name}/" for name in others if os.listdir(os.path.join(root, name))]
            folders[:] = [name for name in folders if name in within]
        found += [os.path.relpath(os.path.join(folder, name), root) for name in (*files, *links)]
    return sorted(name.replace(os.sep, "/") for name in found)


def remove_empty_folders(root: str) -> None:
    """Delete the folders under ``root`` that nothing is in."""
    for folder, _, _ in sorted(os.walk(root), reverse=True):
        if folder != root:
            with contextlib.suppress(OSError):  # there is something in it
                os.rmdir(folder)
