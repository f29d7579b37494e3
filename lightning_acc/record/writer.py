"""Writing a run directory while training goes on.

Steps, parameters and samples are collected in memory and written as numbered files, by a thread of their own; the manifest
says ``recording`` until ``finish`` has listed them all. A run in the making can be taken up again where ``checkpoint``
has listed what was there.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections import defaultdict
from typing import Any

import safetensors.torch
import torch
from torch import Tensor

from lightning_acc.errors import RunError
from lightning_acc.record import manifest as manifests
from lightning_acc.record.background import Background
from lightning_acc.record.batches import Leaves
from lightning_acc.record.store import Store, digest

FLUSH_BYTES = 64 * 2**20
FLUSH_STEPS = 1000


def check_finite(theta: Tensor, step: int) -> None:
    """Refuse parameters (p,) before ``step`` that are not finite.

    Raises:
        RunError: some are not.
    """
    if not torch.isfinite(theta).all():
        raise RunError(
            f"The training has diverged: after step {step - 1} the parameters are not finite "
            f"({int((~torch.isfinite(theta)).sum())} of {theta.numel()}). There is nothing to attribute in such a "
            "run; lower the learning rate or look for a NaN in the data."
        )


class RunWriter:
    """Collects one run and writes it to ``store``; nothing is visible as a run before ``finish``."""

    def __init__(self, store: Store) -> None:
        self.store = store
        self.header: dict[str, Any] = {}
        self.files: dict[str, dict[str, Any]] = {}
        self.n_steps = 0
        self.snapshots: list[int] = []
        self._contents: dict[bytes, int] = {}
        self._new_contents: dict[tuple[Any, ...], list[tuple[int, Leaves]]] = defaultdict(list)
        self._steps: list[dict[str, Any]] = []
        self._states: list[Tensor] = []
        """The newest ones of ``snapshots``, not written yet."""
        self._pending_bytes = 0
        self._counters: dict[str, int] = defaultdict(int)
        self._background = Background()

    def begin(self, header: dict[str, Any]) -> None:
        """Mark the directory as a run in the making; ``header`` is the part of the manifest known by now."""
        self.header = {"run_id": uuid.uuid4().hex, **header}
        self._write_manifest()

    def _write_manifest(self) -> None:
        manifests.write(self.store, {**self.header, "status": "recording", "files": self.files})

    def wait(self) -> None:
        """Wait until what is being written is there; raises what stopped that."""
        self._background.wait()

    def checkpoint(self) -> None:
        """Write everything collected so far, so that ``resume`` can go on from here."""
        self.flush()
        self._background.wait()
        self._write_manifest()

    def resume(self, n_steps: int) -> None:
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
            if folder == "parameters":
                if facts["steps"][-1] > n_steps:
                    continue
                self.snapshots += facts["steps"]
            if folder == "samples" and "count" in facts:
                leaves = safetensors.torch.load(manifests.read_file(self.store, name, facts["sha256"]))
                numbers = leaves.pop("#").tolist()
                self._contents.update(zip(_digests(leaves), numbers, strict=True))
            self.files[name] = facts
            if "count" in facts:
                self._counters[folder] = int(name.partition("/")[2].partition(".")[0]) + 1

    def drop_later(self) -> None:
        """Delete what a run that was taken up again has written beyond the step it is taken up at."""
        self._write_manifest()
        written = [name for folder in ("steps", "parameters", "samples") for name in self.store.names(folder)]
        later = [name for name in written if name not in self.files]
        if later:
            self.store.remove(*later)

    def content_ids(self, leaves: Leaves) -> list[int]:
        """Numbers of the samples of a batch, by content: equal contents get the same number and are stored once."""
        flat = {name: leaf.detach().cpu().contiguous() for name, leaf in leaves.items()}
        numbers = []
        for row, key in enumerate(_digests(flat)):
            if key not in self._contents:
                self._contents[key] = len(self._contents)
                content = {name: leaf[row].clone() for name, leaf in flat.items()}
                self._new_contents[_signature(flat)].append((self._contents[key], content))
                self._pending_bytes += sum(leaf.nbytes for leaf in content.values())
            numbers.append(self._contents[key])
        return numbers

    def add_state(self, step: int, theta: Tensor) -> None:
        """The flat parameters before ``step`` (the number of steps: the final ones).

        Raises:
            RunError: they are not finite.
        """
        check_finite(theta, step)
        self._states.append(theta)
        self.snapshots.append(step)
        self._pending_bytes += theta.nbytes
        if self._pending_bytes >= FLUSH_BYTES:
            self.flush()

    def add_step(
        self,
        sample_ids: list[int],
        contents: list[int],
        weights: list[float],
        groups: list[dict[str, Any]],
        sizes: list[int],
        rng: list[Tensor | None],
    ) -> None:
        """One optimizer step: its occurrences in order, their loss weights and the hyper-parameters.

        ``sizes`` are those of the batches it accumulated, ``rng`` the states of the random number generator before each of
        their forward passes, None where it was not used.
        """
        self._steps.append(
            {
                "sample_ids": sample_ids,
                "contents": contents,
                "weights": weights,
                "groups": groups,
                "sizes": sizes,
                "rng": rng,
            }
        )
        self.n_steps += 1
        if self._pending_bytes >= FLUSH_BYTES or len(self._steps) >= FLUSH_STEPS:
            self.flush()

    def flush(self) -> None:
        """Have what has been collected so far written, after what was collected before."""
        contents, states, records = self._new_contents, self._states, self._steps
        self._new_contents, self._states, self._steps = defaultdict(list), [], []
        self._pending_bytes = 0
        snapshots = self.snapshots[len(self.snapshots) - len(states) :]
        self._background.run(lambda: self._write_collected(contents, states, snapshots, records))

    def _write_collected(
        self,
        contents: dict[tuple[Any, ...], list[tuple[int, Leaves]]],
        states: list[Tensor],
        snapshots: list[int],
        records: list[dict[str, Any]],
    ) -> None:
        for signature in sorted(contents, key=repr):
            collected = contents[signature]
            tensors = {name: torch.stack([content[name] for _, content in collected]) for name in collected[0][1]}
            tensors["#"] = torch.tensor([number for number, _ in collected])
            self._write("samples", tensors)
        if states:
            self._write("parameters", {"theta": torch.stack(states)}, steps=snapshots)
        if records:
            tensors = {
                "offsets": torch.tensor([0] + [len(step["sample_ids"]) for step in records]).cumsum(0),
                "sample_ids": torch.tensor([i for step in records for i in step["sample_ids"]], dtype=torch.int64),
                "contents": torch.tensor([i for step in records for i in step["contents"]], dtype=torch.int64),
                "weights": torch.tensor([w for step in records for w in step["weights"]], dtype=torch.float64),
            }
            tensors["batch_offsets"] = torch.tensor([0] + [len(step["sizes"]) for step in records]).cumsum(0)
            tensors["batch_sizes"] = torch.tensor([size for step in records for size in step["sizes"]])
            states = [state for step in records for state in step["rng"]]
            random = [(i, state) for i, state in enumerate(states) if state is not None]
            if random:
                tensors["rng_batches"] = torch.tensor([i for i, _ in random])
                tensors["rng"] = torch.stack([state for _, state in random])
            self._write("steps", tensors, {"groups": json.dumps([step["groups"] for step in records])})

    def _write(self, folder: str, tensors: dict[str, Tensor], metadata: dict[str, str] | None = None, **facts: Any) -> None:
        name = f"{folder}/{self._counters[folder]:06d}.safetensors"
        count = len(next(iter(tensors.values()))) - (folder == "steps")
        self.write_file(name, safetensors.torch.save(tensors, metadata), count=count, **facts)
        self._counters[folder] += 1

    def write_file(self, name: str, data: bytes, **facts: Any) -> None:
        """Write one file and remember its size and hash for the manifest."""
        self.store.write(name, data)
        self.files[name] = {"bytes": len(data), "sha256": digest(data), **facts}

    def finish(self, **facts: Any) -> None:
        """Write the rest and the manifest; from here on the directory is a run."""
        self.flush()
        self._background.wait()
        complete = {**self.header, **facts, "status": "complete", "n_steps": self.n_steps, "files": self.files}
        manifests.write(self.store, complete)


def _signature(leaves: Leaves) -> tuple[Any, ...]:
    return tuple((name, leaves[name].dtype, tuple(leaves[name].shape[1:])) for name in sorted(leaves))


def _digests(leaves: Leaves) -> list[bytes]:
    """A hash of the content of each row of contiguous leaves."""
    prefix = repr(_signature(leaves)).encode()
    n = next(iter(leaves.values())).shape[0]
    ordered = [leaves[name] for name in sorted(leaves)]
    buffers = [leaf.reshape(n, -1).view(torch.uint8).numpy() for leaf in ordered if leaf.numel()]
    digests = []
    for row in range(n):
        hasher = hashlib.blake2b(prefix, digest_size=16)
        for buffer in buffers:
            hasher.update(buffer[row])
        digests.append(hasher.digest())
    return digests
