"""``lock``: one training at a time writes into a run directory.

The file names the training that does. On a local disk it is made in one step, so that of two trainings one is refused; on
other file systems, where that cannot be had, the one that comes later sees it. A training that was killed leaves it behind:
where its process is known to be gone, the next one takes it over.
"""

from __future__ import annotations

import contextlib
import json
import os
import socket
import uuid
import warnings
import weakref
from dataclasses import asdict, dataclass
from datetime import datetime, timezone

from lightning_acc.errors import RunError
from lightning_acc.record import local
from lightning_acc.record.store import Store

NAME = "lock"
UNKNOWN = "a training that cannot be told from it"
_held: set[str] = set()
"""Tokens of the locks this process holds."""


@dataclass(frozen=True)
class Holder:
    """Which training writes.

    Attributes:
        run_id: the run it records.
        pid: its process.
        started: when that process started, as far as the system tells: numbers of processes are used again.
        host: the machine it runs on.
        time: since when it writes.
        token: tells this lock from all others.
    """

    run_id: str
    pid: int
    started: str
    host: str
    time: str
    token: str

    def gone(self) -> bool:
        """Whether its process is known to have ended: only on this machine can that be seen."""
        if self.host != socket.gethostname():
            return False
        if self.pid == os.getpid() and self.started == _started(self.pid):
            return self.token not in _held
        return not local.is_alive(self.pid) or self.started != _started(self.pid)

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}, since {self.time}, run {self.run_id}"


class Lock:
    """The right to write a run into ``store``.

    Args:
        store: the run directory.
        run_id: the run that will be written.

    Raises:
        RunError: another training writes there; names the file, the process and the remedy.
    """

    def __init__(self, store: Store, run_id: str) -> None:
        self.store = store
        self.run_id = run_id
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        self._me = Holder(run_id, os.getpid(), _started(os.getpid()), socket.gethostname(), now, uuid.uuid4().hex)
        self._made_directory = store.local and not store.exists()
        for _ in range(3):
            if self._made():
                _held.add(self._me.token)
                weakref.finalize(self, _held.discard, self._me.token)  # nobody can release it any more: it is as good as gone
                return
            holder = self._holder()
            if holder is None:
                continue  # it has just been released
            if not (isinstance(holder, Holder) and holder.gone()):
                break
            self._take_from(holder)
        raise RunError(
            f"Another training writes into {store}: {store.locate(NAME)} is held by {holder or 'a training that is ending'}. "
            "Wait until it has ended, or choose another directory; if it is certainly gone, delete that file."
        )

    def release(self) -> None:
        """Give the right back; a lock that another training has taken over meanwhile stays."""
        if self._me.token not in _held:
            return
        _held.discard(self._me.token)
        if self._holder() == self._me:
            self.store.remove(NAME)
        if self._made_directory:
            with contextlib.suppress(OSError):
                os.rmdir(self.store.path)  # where nothing was written

    def _made(self) -> bool:
        data = json.dumps(asdict(self._me), indent=1).encode()
        if not self.store.local:
            if self.store.exists(NAME):
                return False
            self.store.write(NAME, data)
            return self._holder() == self._me  # unless another training did the same at the same time
        # Written beside and linked, so that nobody sees half of it; where there are no links, made exclusively.
        path, beside = f"{self.store.path}/{NAME}", f"{self.store.path}/{NAME}.{self._me.token}.part"
        self.store.write(f"{NAME}.{self._me.token}.part", data)
        try:
            os.link(beside, path)
        except FileExistsError:
            return False
        except OSError:
            return _made_exclusively(path, data)
        finally:
            os.unlink(beside)
        return True

    def _holder(self) -> Holder | str | None:
        if not self.store.exists(NAME):
            return None
        try:
            words = json.loads(self.store.read(NAME))
            number = words["pid"]
            known = type(number) is int and 0 < number < 2**31
            known = known and all(isinstance(value, str) for key, value in words.items() if key != "pid")
            return Holder(**words) if known else UNKNOWN
        except (ValueError, TypeError, LookupError, AttributeError, RecursionError):
            return UNKNOWN
        except RunError:
            return None

    def _take_from(self, holder: Holder) -> None:
        if self.store.local:
            path, aside = f"{self.store.path}/{NAME}", f"{self.store.path}/{NAME}.{self._me.token}.old"
            try:
                os.rename(path, aside)  # of two trainings that find it, one
            except FileNotFoundError:
                return
            with open(aside, "rb") as file:
                taken = json.loads(file.read())
            if taken != asdict(holder):  # somebody was quicker, and this is already theirs
                with contextlib.suppress(OSError):
                    os.link(aside, path)
                os.unlink(aside)
                return
            os.unlink(aside)
        else:
            self.store.remove(NAME)
        warnings.warn(
            f"The training that wrote into {self.store} before is gone without an end ({holder}): its lock is taken over.",
            UserWarning,
            stacklevel=4,
        )


def _made_exclusively(path: str, data: bytes) -> bool:
    try:
        descriptor = os.open(path, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o644)
    except FileExistsError:
        return False
    with os.fdopen(descriptor, "wb") as file:
        file.write(data)
    return True


def _started(pid: int) -> str:
    """When a process started, in the system's own words; empty where it does not tell."""
    return "".join(local.status(pid)[19:20])
