"""Who writes what: every process the steps it takes, the first one the run as it will be read; one training at a time."""

from __future__ import annotations

import contextlib
import os
import uuid
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import safetensors.torch
from torch import Tensor

from lightning_acc.core import rebuild
from lightning_acc.credentials import without_credentials
from lightning_acc.errors import RunError
from lightning_acc.record import lock
from lightning_acc.record import manifest as manifests
from lightning_acc.record.lock import Lock
from lightning_acc.record.store import Store
from lightning_acc.record.writer import NotFinite, RunWriter
from lightning_acc.recorder import description, ranks
from lightning_acc.recorder.checkpoints import resume
from lightning_acc.recorder.checkpoints.averages import Averages
from lightning_acc.recorder.checkpoints.resume import Place
from lightning_acc.recorder.checks.refusals import RecordingRefused, refuse_if
from lightning_acc.recorder.ending import in_words


@dataclass(frozen=True)
class Final:
    """What is known of a training only at its end.

    Attributes:
        state: of the module; empty where it is not the training's any more.
        theta: the parameters (p,) after the last recorded step; None where they are not known, and left to be replayed.
        averages: of the parameters, that callbacks kept.
    """

    state: Mapping[str, Any]
    theta: Tensor | None = None
    averages: Averages | None = None


class Writers:
    """The writers of this process.

    Args:
        directory: the run directory.
        trainer: the Lightning trainer.

    Attributes:
        main: the run as it will be read: parameters, queries and, at last, the steps; rank 0 alone has it.
        own: the steps this process takes; the same as ``main`` where there is one process.
    """

    def __init__(self, directory: str | os.PathLike[str], trainer: Any) -> None:
        self.store = Store(directory)
        self.processes: int = trainer.world_size
        self.main = RunWriter(self.store) if trainer.is_global_zero else None
        alone = self.main if self.processes == 1 else None
        self.own = alone or RunWriter(ranks.part_of(self.store, trainer.global_rank))
        self._lock: Lock | None = None
        self._skipped: list[int] = []
        """Before which steps of the record one was left out by the loss scaler: that is no step of it."""
        self._end: int | None = None
        """Steps of a record that has ended before its training."""
        self._reason: str | None = None

    def claim(self, trainer: Any, place: Place | None, overwrite: bool) -> bool:
        """Take the directory for this training, and decide what becomes of a run that is already there.

        Args:
            trainer: the Lightning trainer.
            place: where in a record a resumed training goes on.
            overwrite: whether another run there will be replaced.

        Returns:
            Whether there is a record that this training goes on with and that is unfinished.

        Raises:
            RecordingRefused: another training writes there, a run is there already, or the one to go on with is not.
        """
        reason = None
        if self.main is not None:
            try:
                self._lock = Lock(self.store, place.run_id if place is not None else uuid.uuid4().hex)
            except RunError as error:
                reason = str(error)
        if self.processes > 1:  # all of them stop, or none
            reason = trainer.strategy.broadcast(reason)
        if reason:
            raise RecordingRefused(reason)
        own, others = manifests.own_files(self.store)
        if not self.store.exists(manifests.NAME):
            if own := [name for name in own if name != lock.NAME]:  # by their names
                raise RecordingRefused(
                    f"{self.store} holds {_some(own)}, which would be written over, and no run: choose another directory."
                )
            if place is not None:
                refuse_if(f"the checkpoint continues the record {place.run_id}, which is not in {self.store}")
        elif place is not None:
            left_open = resume.take_up(self.store, place, self.main, self.own, self.processes)
            before = self.main.header.get("skipped", []) if self.main is not None else []
            self._skipped = [number for number in before if number <= place.n_steps]
            return left_open
        elif not overwrite:
            raise RecordingRefused(
                f"{self.store} already holds a run: choose another directory, delete it, pass overwrite=True, or resume it "
                "with trainer.fit(..., ckpt_path=...) from a checkpoint written beside it."
            )
        else:
            self._may_be_replaced(others)
        return False

    def _may_be_replaced(self, others: list[str]) -> None:
        """Refuse to delete a directory that is no run, or not only a run.

        Raises:
            RecordingRefused: it is none, or holds ``others``, which are not of a run.
        """
        if others:
            raise RecordingRefused(
                f"{self.store} holds more than a run, and overwrite=True deletes nothing else: {_some(others)}. "
                "Move that away, or choose another directory."
            )
        try:
            manifests.identify(self.store)
        except RunError as error:
            raise RecordingRefused(f"overwrite=True deletes runs alone, and this is none that can be read: {error}") from error

    def release(self) -> None:
        """Let other trainings have the directory; what is being written is written first."""
        for writer in (self.own, self.main):
            if writer is not None:
                with contextlib.suppress(Exception):  # the training ends anyway, with what it had to say
                    writer.wait()
        if self._lock is not None:
            with contextlib.suppress(RunError):  # on a disk that cannot be written to it stays, and is taken over later
                self._lock.release()
            self._lock = None

    def begin(self, trainer: Any, module: Any, header: dict[str, Any], place: Place | None, overwrite: bool) -> None:
        """Before the first new step: write what is known of the run by now, or go on with the one that is resumed.

        Raises:
            RecordingRefused: the resumed training differs in what a run cannot change on the way.
        """
        if self._skipped:
            header["skipped"] = self._skipped
        if place is not None:
            resume.go_on(self.main, self.own, header)
            rebuild.LIVE[place.run_id] = module
            return
        if self.own is not self.main:
            manifests.remove_run(self.own.store)
            self.own.begin({"batch_structure": header["batch_structure"]})
        if self.main is None:
            return
        if overwrite:
            manifests.remove_run(self.main.store)
        self.main.begin({"run_id": self._lock.run_id, **header} if self._lock else header)
        rebuild.LIVE[self.main.header["run_id"]] = module
        description.write_frozen(self.main, module.state_dict())
        description.write_sample_info(self.main, trainer, self.own.names)
        description.write_queries(self.main, trainer)

    def shared(self, tensors: dict[str, Tensor]) -> None:
        """Write the tensors of the batches that belong to no sample."""
        if self.main is not None and tensors and manifests.SHARED not in self.main.files:
            self.main.write_file(manifests.SHARED, safetensors.torch.save(tensors))

    def note_skipped(self) -> None:
        """The loss scaler leaves a step out, which changes neither the parameters nor the optimizer's state."""
        self._skipped.append(self.own.n_steps)
        if self.main is not None and self.main.header:
            self.main.header["skipped"] = self._skipped

    def note(self, **more: dict[str, Any]) -> None:
        """What the manifest says is more by now: parameters have joined the optimizer, or rest; the module is set otherwise."""
        if self.main is not None and self.main.header:
            for key, now in more.items():
                if now:
                    self.main.header[key] = {**self.main.header.get(key, {}), **now}

    def list_checkpoints(self, steps: dict[str, int]) -> None:
        """Have the manifest list these checkpoints from when it is written next."""
        if self.main is not None and self.main.header and (steps or "checkpoints" in self.main.header):
            self.main.header["checkpoints"] = steps

    @property
    def resumed_at(self) -> list[int]:
        """At which steps the record was taken up; known to the process that writes it."""
        return list(self.main.header.get("resumed_at", [])) if self.main is not None else []

    def amend(self) -> None:
        """Write the list of checkpoints once more where the run is finished and the list has changed since."""
        if self.main is None or "checkpoints" not in self.main.header:
            return
        with contextlib.suppress(Exception):  # the run is there, with the list as it was
            held = manifests.identify(self.store)
            steps = manifests.checkpoints_within(self.main.header["checkpoints"], held.get("n_steps", 0))
            if held["status"] == "complete" and held.get("checkpoints", {}) != without_credentials(steps):
                manifests.write(self.store, {**held, "checkpoints": steps})

    def checkpoint(self) -> None:
        """Write what is recorded so far, so that a resumed training can go on from here."""
        self.own.checkpoint()
        if self.main is not None and self.main is not self.own:
            self.main.checkpoint()

    def finish(self, trainer: Any, final: Final, stopped: str | None, reason: str | None = None) -> None:
        """Write the rest, and let the record be a run.

        Args:
            trainer: the Lightning trainer.
            final: what is known only now.
            stopped: why the training ended before its time.
            reason: the same in words.

        Raises:
            RunError: something could not be written; what was before is there.
        """
        failed: list[Exception] = []
        facts = {"stopped": stopped, **({"reason": reason} if reason else {})}
        if self.own is not self.main:
            if self._end is None:
                _attempt(failed, self.own.finish)
            trainer.strategy.barrier("recorded")
        if self.main is not None:
            _attempt(failed, lambda: self._finish_main(final, facts))
        if self.own is not self.main:
            trainer.strategy.barrier("merged")
        if failed:
            raise failed[0]

    def _finish_main(self, final: Final, facts: dict[str, Any]) -> None:
        assert self.main is not None
        if final.theta is not None and self.own.n_steps not in self.main.snapshots:
            self.main.add_state(self.own.n_steps, final.theta.cpu())
        self.main.wait()
        description.write_frozen(self.main, final.state)  # again, for running statistics have moved
        n_steps = self.own.n_steps
        if self.own is not self.main:
            n_steps = ranks.merge(self.main, self.processes, self._end)
            if n_steps < self.own.n_steps:
                reason = self._reason or "the recording of another process ended before"
                facts = {"stopped": "error", "reason": reason, **{key: value for key, value in facts.items() if value}}
        if final.averages is not None and n_steps == self.own.n_steps:
            final.averages.write(self.main)
        self.main.finish(n_steps, **facts)
        if self.own is not self.main:
            ranks.remove_parts(self.store)

    def end(self, error: Exception) -> int:
        """Let what is recorded by now be a run, as far as it can be written, and return of how many steps.

        After an ``error`` that the training is no number any more, of those before the last parameters that were seen to be.
        """
        with contextlib.suppress(Exception):  # what failed may fail again; what was written before is there
            self.own.flush()
        for writer in (self.own, self.main):
            if writer is not None:
                with contextlib.suppress(Exception):
                    writer.wait()
        self._reason, self._end = in_words(error), self.own.written()
        if isinstance(error, NotFinite) and self.main is not None:
            self._end = min(self._end, self.main.snapshots[-1])
        if self._end and self.own is self.main:
            try:
                self.own.seal(self._end, stopped="error", reason=self._reason)
            except RunError:
                return 0
        return self._end

    def refuse(self, reason: str) -> None:
        """Let nobody take for a run what turned out not to be one."""
        if self.main is not None and self.main.header:
            with contextlib.suppress(RunError):
                self.main.wait()
                self.main.refuse(reason)


def _attempt(failed: list[Exception], call: Callable[[], None]) -> None:
    try:
        call()
    except Exception as error:
        failed.append(error)


def _some(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
