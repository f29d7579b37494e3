"""Writing a run directory while training goes on.

Steps, parameters and samples are collected in memory and written as numbered files, by a thread of their own, and what the
manifest lists is there: a training that is killed loses a few seconds. The manifest says ``recording`` until ``finish``. A run
in the making can be taken up again where ``checkpoint`` has listed what was there.

What has been collected is written when it is much, and for good; and, every few seconds, what is new is written beside it, for
the time being, until all that was written so is written again for good, together.
"""

from __future__ import annotations

import math
import time
import uuid
from collections import defaultdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.record import batches
from lightning_acc.record import manifest as manifests
from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting.background import Background
from lightning_acc.record.collecting.collected import Collected
from lightning_acc.record.collecting.staging import Staging
from lightning_acc.record.samples import names
from lightning_acc.record.steps import Integers, SeenStep
from lightning_acc.record.store import Store, digest

FLUSH_BYTES = 64 * 2**20
FLUSH_STEPS = 1000
SECONDS, SECONDS_AT_FIRST = 2.0, 0.5
"""After so long what has been collected is written for the time being; a training that has just begun is killed most often."""
SHARE = 0.02
"""Of the training's time, at most, that such writing computes; and a tenth of the share that it waits for the storage."""
MOST_DRAFTS = 30
"""Files written for the time being, from which on all that was written so is written anew."""


class NotFinite(RunError):
    """The training has come to parameters, or to a gradient, that are no numbers."""


def check_finite(theta: Tensor, step: int) -> None:
    """Refuse parameters (p,) before ``step`` that are not finite.

    Raises:
        NotFinite: some are not.
    """
    if math.isfinite(theta.sum()):  # then all are, at a tenth of the price; a sum may also overflow
        return
    if not torch.isfinite(theta).all():
        raise NotFinite(
            f"The training has diverged: after step {step - 1} the parameters are not finite "
            f"({int((~torch.isfinite(theta)).sum())} of {theta.numel()}). There is nothing to attribute from there on; "
            "lower the learning rate or look for a NaN in the data."
        )


Files = dict[str, dict[str, Any]]
"""Files by name, and what the manifest says of each."""


class RunWriter:
    """Collects one run and writes it to ``store``; nothing is visible as a run before ``finish``."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.header: dict[str, Any] = {}
        self.files: Files = {}
        self.n_steps = 0
        self.snapshots: list[int] = []
        self.names = names.Numbers()
        self._staging = Staging()
        self._new = Collected()
        """What is written nowhere yet."""
        self._drafted = Collected()
        """What is written for the time being."""
        self._pending_bytes = self._pending_steps = 0
        """Of both."""
        self._counters: dict[str, int] = defaultdict(int)
        self._settled: dict[str, int] = {}
        """The counters after what is written for good."""
        self._drafts: list[str] = []
        """Files written for the time being, in the manifest until others take their place."""
        self._n_drafts = 0
        self._pause = SECONDS_AT_FIRST
        self._next_draft = time.monotonic() + min(self._pause, SECONDS)
        self._background = Background()

    def begin(self, header: dict[str, Any]) -> None:
        """Mark the directory as a run in the making; ``header`` is the part of the manifest known by now."""
        self.header = {"run_id": uuid.uuid4().hex, **header}
        self._write_manifest()

    def _write_manifest(self, **facts: Any) -> None:
        files = dict(self.files)  # the thread beside this one may list more
        named = sum(file.get("names", 0) for file in files.values())
        counted = {"n_samples": named} if named else {}
        manifests.write(self.store, {**self.header, **counted, "status": "recording", "files": files, **facts})

    def _check_there(self) -> None:
        if not self.store.exists(manifests.NAME):
            raise RunError(f"{self.store} is gone: it was deleted, moved or unmounted while the training recorded into it.")

    def wait(self) -> None:
        """Wait until what is being written is there; raises what stopped that."""
        self._background.wait()

    def checkpoint(self) -> None:
        """Write everything collected so far, so that ``resume`` can go on from here."""
        self.flush()
        self._background.wait()

    def resume(self, n_steps: float = math.inf) -> None:
        """Go on with the run in the store after its first ``n_steps`` steps; what was written of later ones is dropped.

        Nothing in the store changes before ``checkpoint``, ``flush`` or ``finish``; ``self.n_steps`` tells how many of
        the steps are there.

        Raises:
            RunError: the run is damaged.
        """
        recorded = manifests.read(self.store, unfinished=True)
        self.header = {key: value for key, value in recorded.items() if key not in manifests.NOT_OF_THE_HEADER}
        for name, facts in recorded["files"].items():
            folder = name.partition("/")[0]
            if folder == "steps":
                if self.n_steps + facts["count"] > n_steps:
                    continue
                self.n_steps += facts["count"]
                if "names" in facts:
                    self.names.of(names.unpacked(*manifests.load(self.store, recorded, name)))
                    self.names.new()  # which are written
            if folder == "parameters":
                if facts["steps"][-1] > n_steps:
                    continue
                self.snapshots += facts["steps"]
            if folder == "samples" and "count" in facts:
                tensors, _ = manifests.load(self.store, recorded, name)
                leaves = batches.unpacked(tensors)
                numbers = leaves.pop("#").tolist()
                self._staging.numbering.known(leaves, numbers)
            if folder == "averages":
                continue  # of the end that the run had before
            self.files[name] = facts
            if "count" in facts:
                self._counters[folder] = self._settled[folder] = int(name.partition("/")[2][:6]) + 1

    def forget_steps(self) -> None:
        """Leave the steps and their samples out of the run, but not its parameters, as if none had been written."""
        steps = [name for name, facts in self.files.items() if name.startswith(("steps/", "samples/")) and "count" in facts]
        for name in steps:
            del self.files[name]
        self._staging, self.n_steps, self.names = Staging(), 0, names.Numbers()

    def drop_later(self) -> None:
        """Delete what a run that was taken up again has written beyond the step it is taken up at."""
        self._write_manifest()
        written, _ = manifests.own_files(self.store)
        later = [n for n in written if n.startswith(("steps/", "parameters/", "samples/", "averages/")) and n not in self.files]
        if later:
            self.store.remove(*later)

    def content_ids(self, leaves: Leaves, sample_ids: list[int] | None = None) -> Integers:
        """Numbers of the B samples of a batch, by content: equal contents get the same number and are stored once.

        Whose contents they are, where that is told, makes it quicker. They are there after ``numbered``.
        """
        return self._staging.add(leaves, sample_ids)

    def numbered(self) -> None:
        """Wait until all contents have their numbers."""
        self._new = self._new.and_then(Collected(self._staging.take()))

    def add_state(self, step: int, theta: Tensor) -> None:
        """The flat parameters before ``step`` (the number of steps: the final ones).

        Raises:
            NotFinite: some are not finite.
        """
        check_finite(theta, step)
        self._new.states.append(theta)
        self._new.snapshots.append(step)
        self.snapshots.append(step)
        self._pending_bytes += theta.nbytes
        self._flush_if_due()

    def add_step(self, step: SeenStep) -> None:
        """One optimizer step."""
        self._new.steps.append(step)
        self._pending_steps += 1
        self.n_steps += 1
        self._flush_if_due()

    def _flush_if_due(self) -> None:
        if not self._background.busy:
            self._background.wait()  # what failed is told at once, not when there is more to write
        full = max((self._pending_bytes + self._staging.new_bytes) / FLUSH_BYTES, self._pending_steps / FLUSH_STEPS)
        if full >= 1:
            self.flush()
        elif time.monotonic() >= self._next_draft and not self._background.busy:
            self.flush(for_good=full >= 0.5)  # what would soon be written again is written once

    def flush(self, for_good: bool = True) -> None:
        """Have what has been collected so far written, after what was collected before; with the manifest that lists it.

        Otherwise than ``for_good`` it stays collected, and is written again later.
        """
        self.numbered()
        self._background.wait()
        again = for_good or len(self._drafts) >= MOST_DRAFTS
        new, self._new = self._new, Collected()
        everything = self._drafted.and_then(new)
        self._drafted = everything
        if for_good:
            self._drafted = Collected()
            self._pending_bytes = self._pending_steps = self._staging.new_bytes = 0
        self._next_draft = float("inf")  # until this is written
        self._background.run(lambda: self._write_and_list(everything if again else new, again, for_good))

    def _write_and_list(self, collected: Collected, again: bool, for_good: bool) -> None:
        """Write this beside the files written for the time being, or ``again``, what is in these too, in their place."""
        started, computed = time.monotonic(), time.thread_time()
        self._check_there()
        older, kept = (self._drafts, []) if again else ([], self._drafts)
        if again:
            self._counters = defaultdict(int, self._settled)
        new = self._write_collected(collected, "" if for_good else f"-{self._n_drafts}")
        before = {name: self.files.pop(name) for name in older}
        self.files |= new
        try:
            self._write_manifest()
        except BaseException:
            for name in new:  # what is listed is there
                del self.files[name]
            self.files |= before
            raise
        self._drafts = [] if for_good else [*kept, *new]
        self._n_drafts += not for_good
        if for_good:
            self._settled = dict(self._counters)
        if older:
            self.store.remove(*older)
        seconds = max(time.thread_time() - computed, (time.monotonic() - started) / 10)
        self._pause = min(SECONDS, 2 * self._pause)
        self._next_draft = time.monotonic() + max(self._pause, seconds / SHARE)

    def _write_collected(self, collected: Collected, mark: str) -> Files:
        """Write this, and return what the manifest says of the files."""
        files: Files = {}
        for folder, tensors, metadata, facts in collected.files():
            name = f"{folder}/{self._counters[folder]:06d}{mark}.safetensors"
            self._counters[folder] += 1
            files |= self._stored(name, safetensors.torch.save(tensors, metadata), **facts)
        return files

    def _stored(self, name: str, data: bytes, **facts: Any) -> Files:
        self.store.write(name, data)
        return {name: {"bytes": len(data), "sha256": digest(data), **facts}}

    def write_file(self, name: str, data: bytes, **facts: Any) -> None:
        """Write one file and remember its size and hash for the manifest."""
        self.files |= self._stored(name, data, **facts)

    def finish(self, n_steps: int | None = None, **facts: Any) -> None:
        """Write the rest and the manifest; from here on the directory is a run, of its first ``n_steps`` steps or of all."""
        self.flush()
        self._background.wait()
        self.seal(self.n_steps if n_steps is None else n_steps, **facts)

    def seal(self, n_steps: int, **facts: Any) -> None:
        """Let what has been written by now be a run of its first ``n_steps`` steps."""
        self._check_there()
        if "checkpoints" in self.header:
            facts["checkpoints"] = manifests.checkpoints_within(self.header["checkpoints"], n_steps)
        self._write_manifest(**facts, status="complete", n_steps=n_steps)

    def refuse(self, reason: str) -> None:
        """Let what has been written never be taken for a run."""
        self._check_there()
        self._write_manifest(status=manifests.REFUSED, reason=reason)

    def written(self) -> int:
        """How many steps have been written, in whole: the manifest of a run in the making lists them."""
        return sum(facts["count"] for name, facts in self.files.items() if name.startswith("steps/"))
