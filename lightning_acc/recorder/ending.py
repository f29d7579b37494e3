"""How a record ends: with its training, before it where it cannot go on, or later, by hand, where both were killed."""

from __future__ import annotations

import functools
import os
import warnings
from collections.abc import Callable
from typing import Any, TypeVar

from lightning_acc import arguments
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.record import manifest as manifests
from lightning_acc.record.lock import Lock
from lightning_acc.record.store import Store
from lightning_acc.record.writer import RunWriter
from lightning_acc.recorder import ranks
from lightning_acc.recorder.checks.refusals import RecordingRefused

Hook = TypeVar("Hook", bound=Callable[..., None])


def costs_no_training(hook: Hook) -> Hook:
    """A hook of the recorder in which nothing that befalls the record befalls the training, once that has begun.

    What goes wrong (a full disk, a lost connection, parameters that are not finite any more) ends the record, with a warning,
    at its last whole step, unless ``on_error`` is ``"stop"``. What cannot be recorded rightly is refused all the same.
    """

    @functools.wraps(hook)
    def guarded(recorder: Any, trainer: Any, *args: Any) -> None:
        try:
            hook(recorder, trainer, *args)
        except RecordingRefused as refusal:
            recorder.refused(refusal)
            raise
        except Exception as error:
            if recorder.ended:
                return
            if not recorder.recording or recorder.on_error == "stop":
                raise
            recorder.end(error, within_step=hook.__name__ == "on_before_optimizer_step")

    return guarded  # type: ignore[return-value]


def in_words(error: BaseException) -> str:
    """Why a record ended, in one line that holds no credentials."""
    text = " ".join("".join(letter if letter.isprintable() else " " for letter in str(error)).split())[:500]
    text = text if isinstance(error, RunError) else f"{type(error).__name__}: {text}"
    return str(without_credentials(text)).rstrip(".")


def warn_that_it_ended(error: BaseException, store: Store, kept: int, several: bool) -> None:
    """Tell, once, that the record has ended before its training."""
    what = f"the {kept} steps before it are kept as a run" if kept else "no step of it is kept"
    if several:
        what = "what all processes have recorded is kept at the end"
    warnings.warn(
        f"The recording in {store} has ended, and the training goes on without it: {in_words(error)}; {what}. "
        "(on_error='stop' stops the training too.)",
        UserWarning,
        stacklevel=4,
    )


def repair(path: str | os.PathLike[str]) -> int:
    """Make the whole steps of a record whose training was killed a run.

    The parts of several processes are merged. A training that is resumed from a checkpoint goes on with the record all the
    same, where it was that of one process.

    Args:
        path: the run directory.

    Returns:
        How many steps the run has.

    Raises:
        RunError: there is no unfinished record at ``path``, its training is still alive, or no step of it is there.
    """
    store = Store(arguments.path("path", path))
    held = manifests.read(store, unfinished=True)
    if held["status"] == "complete":
        raise RunError(f"{store} needs no repair: it is a finished run of {held['n_steps']} steps.")
    lock = Lock(store, held["run_id"])
    try:
        writer = RunWriter(store)
        parts = held["world_size"] if store.exists("ranks/0") else 0
        writer.resume()
        if parts:
            writer.forget_steps()
        writer.drop_later()
        n_steps = ranks.merge(writer, parts) if parts else writer.n_steps
        if not n_steps:
            raise RunError(f"No step of {store} was recorded in whole: delete the directory, and record the run again.")
        writer.finish(n_steps, stopped="killed")
        if parts:
            ranks.remove_parts(store)
    finally:
        lock.release()
    return n_steps
