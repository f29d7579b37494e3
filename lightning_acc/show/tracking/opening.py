"""How to open what was logged to W&B: the addresses of its projects, or the commands for runs that are offline."""

from __future__ import annotations

import os
import re
import shlex
import time
from pathlib import Path

from lightning_acc.errors import RequestError
from lightning_acc.show.tracking.connection import MARK, PROJECT, mode
from lightning_acc.show.tracking.layout import files, saved, workspace

SHOWN_RUNS = 20
"""Offline runs that are listed, the newest first."""
_IDENTITY = re.compile(rb"\x8a\x01[\x80-\xff]*[\x00-\x7f](?=\x0a)")
"""Of a run's file: where the record begins (kind 17 of W&B's protocol buffers) whose first fields are id, entity, project."""
_PROJECT, _HEAD = 3, 2**20
_EMPTY, _WRITTEN_IN = 7, 5.0
"""Bytes of a file that holds no record as yet; and seconds in which it comes to one."""


def dashboards(project: str | None = None, directory: str | None = None) -> str:
    """How to open what was logged, as text for a terminal.

    With a key: the addresses of the projects and of their workspaces, which are made if need be. For every run that W&B keeps
    on this machine and has not uploaded: the commands that show it in the terminal, and that upload it.

    Args:
        project: None for every project that results were logged to from here.
        directory: where W&B keeps its files; None takes ``WANDB_DIR``, else the working directory.
    """
    runs = _runs(directory)
    if project is None:
        ours = list(dict.fromkeys(name for name, _, is_ours in runs.values() if is_ours))
        return "\n".join(_of(one, directory, runs) for one in ours or [PROJECT])
    return _of(project, directory, runs)


def _of(project: str, directory: str | None, runs: dict[Path, tuple[str, bool, bool]]) -> str:
    lines = _online(project, directory) if mode() == "online" else []
    waiting = [run for run, (name, is_waiting, _) in runs.items() if name == project and is_waiting]
    if waiting:
        lines.append(f"{len(waiting)} offline run{'s' * (len(waiting) > 1)} of {project} on this machine, the newest first:")
        lines += [f"  wandb leet {_word(run)}" for run in waiting[:SHOWN_RUNS]]
        lines += [f"  and {len(waiting) - SHOWN_RUNS} more in {_word(files(directory))}"] * (len(waiting) > SHOWN_RUNS)
        lines.append("To upload them later, from this machine and after wandb login:")
        lines += [f"  wandb sync {_word(run)}" for run in waiting[:SHOWN_RUNS]]
    elif not lines:
        lines.append(f"Nothing of {project} was logged in {_word(files(directory))} yet: lightning-acc track RUN does it.")
    return "\n".join(lines)


def _online(project: str, directory: str | None) -> list[str]:
    try:
        built = workspace(project, directory=directory)
    except RequestError as error:
        return [str(error)]
    known = saved(directory).get(f"{built.entity}/{project}", "")
    return [f"project:   {known.split('?')[0]}", f"workspace: {known}"] if known else []


def _runs(directory: str | None) -> dict[Path, tuple[str, bool, bool]]:
    """The runs W&B keeps here, the newest first: their project, whether they wait to be uploaded, and whether they are ours."""
    found = {}
    folders = [*files(directory).glob("offline-run-*"), *files(directory).glob("run-*")]
    for run in sorted(folders, key=lambda run: run.name.removeprefix("offline-"), reverse=True):
        for file in run.glob("*.wandb"):
            head = _head(file)
            is_waiting = run.name.startswith("offline-") and not list(run.glob("*.wandb.synced"))
            found[run] = _project(head), is_waiting, MARK.encode() in head
    return found


def _head(file: Path) -> bytes:
    """The beginning of a run's file. W&B may write it a moment after it says that the run is finished."""
    age = max(0.0, time.time() - file.stat().st_mtime)  # by another machine's clock it may be of the future
    until = time.monotonic() + _WRITTEN_IN - age
    while True:
        with file.open("rb") as content:
            head = content.read(_HEAD)
        if len(head) > _EMPTY or time.monotonic() > until:
            return head
        time.sleep(0.05)


def _project(head: bytes) -> str:
    """The project of a run, from the beginning of its file; nothing where it names none."""
    start = _IDENTITY.search(head)
    at = len(head) if start is None else start.end()
    while at + 2 <= len(head):
        field, size = head[at] >> 3, head[at + 1]
        if field == _PROJECT:
            return head[at + 2 : at + 2 + size].decode("utf-8", "replace")
        at = at + 2 + size if field < _PROJECT else len(head)
    return ""


def _word(path: Path) -> str:
    return shlex.quote(os.path.relpath(path) if path.resolve().is_relative_to(Path.cwd()) else str(path.resolve()))
