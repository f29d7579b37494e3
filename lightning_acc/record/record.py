"""``Record``: a run directory, opened, as plain data.

What is done with it is in ``core`` and above; users open it as ``la.Run``, which adds the verbs.
"""

from __future__ import annotations

import bisect
import itertools
import os
from collections.abc import Iterable, Sequence
from functools import cached_property
from typing import Any

import pyarrow as pa
import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.errors import RequestError, RunError
from lightning_acc.record import manifest
from lightning_acc.record.batches import Leaves, Structure, leaf_names, row
from lightning_acc.record.samples import names
from lightning_acc.record.samples.contents import Contents
from lightning_acc.record.samples.names import Name, SampleNames
from lightning_acc.record.schema import keys
from lightning_acc.record.steps import Steps
from lightning_acc.record.store import Store

Trust = bool | str | Iterable[str]
"""Packages that a record's module may be imported from, besides modules this process has imported already; True: any."""


class Record:
    """A recorded training run: every optimizer step, the samples it saw, the parameters before it.

    Opening reads the manifest alone and executes nothing; the other files are read, and checked, when they are needed.

    Args:
        path: the run directory, a local path or an fsspec URL.
        module: the LightningModule to evaluate the losses with. By default it is rebuilt from the class and the saved
            hyper-parameters named in the manifest; pass it where that cannot work. Its parameters are not used.
        trust: packages that class may be imported from, or True for any. Importing executes code, so that by default only
            modules which this process has imported already will do, this package, and those named in the environment
            variable ``LIGHTNING_ACC_TRUST``, separated by commas.
        partial: open the whole steps of a record that was not finished, as its training goes on or was killed.

    Raises:
        RunError: there is no finished run at ``path``, or a file is missing, truncated or damaged.
        RequestError: what is given is no path, module or names.
    """

    def __init__(
        self,
        path: str | os.PathLike[str],
        module: torch.nn.Module | None = None,
        trust: Trust = False,
        partial: bool = False,
    ) -> None:
        if module is not None and not isinstance(module, torch.nn.Module):
            raise RequestError(f"module={arguments.shown(module)} is no module: give an instance of your LightningModule.")
        self.store = Store(arguments.path("path", path))
        self.trust: bool | tuple[str, ...] = arguments.trust(trust)
        self.partial = partial
        self.manifest = manifest.read(self.store, unfinished=partial)
        if self.manifest["status"] != "complete":
            self.manifest = {**self.manifest, **self._whole_steps()}
        self.given_module = module
        self._loaded: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {}

    def _whole_steps(self) -> dict[str, Any]:
        """What the manifest of an unfinished record lacks: how many steps are there."""
        n_steps = sum(self._file(name)["count"] for name in self._names("steps"))
        if not n_steps:
            remedy = "merge them with lightning-acc repair" if self.store.exists("ranks/0") else "record the run again"
            raise RunError(f"{self.store} is half written, and none of its steps is there in whole: {remedy}.")
        return {"n_steps": n_steps, "stopped": "unfinished"}

    def __repr__(self) -> str:
        return (
            f"{type(self).__name__}({self.path!r}: {self.n_samples} samples, {self.n_steps} steps, "
            f"{self.n_parameters} parameters of {self.manifest['module']['class']})"
        )

    @property
    def path(self) -> str:
        """Absolute path or URL of the run directory, without credentials."""
        return str(self.store)

    @property
    def name(self) -> str:
        """Last part of the path."""
        return self.path.rsplit("/", 1)[-1]

    @property
    def hash(self) -> str:
        """Content hash of the manifest, which covers every file of the record."""
        return str(self.manifest["hash"])

    @property
    def n_samples(self) -> int:
        """Size of the training data set; sample ids are 0 to n_samples - 1, visited or not.

        Of a run whose batches named their samples (``sample_id=``) the number of samples that were seen.
        """
        return int(self.manifest["n_samples"])

    @property
    def sample_names(self) -> list[Any] | None:
        """What the batches called the samples (``sample_id=``), integers or texts, by number, ``sample_names[number]``.

        The numbers are in the order in which the samples were first seen. None where they are the names themselves: where
        samples are counted in their data set, or called 0 to n_samples - 1.
        """
        return None if self._named is None or self._named.plain else list(self._named.by_number)

    def sample_number(self, name: Name) -> int:
        """The number, in all tables, of the sample that the batches called ``name``.

        Raises:
            RequestError: there is no such sample, or they have no names.
        """
        return names.number_of(self._named, name, self.n_samples)

    @property
    def n_steps(self) -> int:
        """Number of optimizer steps T."""
        return int(self.manifest["n_steps"])

    @property
    def n_parameters(self) -> int:
        """Number p of trained parameters."""
        return keys.numel(self.manifest)

    @property
    def dtype(self) -> str:
        """Name of the dtype the run was trained in, such as ``"float32"``."""
        return str(self.manifest["dtype"])

    @property
    def scored_in(self) -> str:
        """Name of the dtype scores are computed in: as trained, or float32 where that is narrower (see ``keys.SCORED``)."""
        return self.dtype if self.dtype in keys.SCORED else "float32"

    @cached_property
    def steps(self) -> Steps:
        """The steps, ``run.steps[t]``."""
        return Steps(self)

    @property
    def checkpoints(self) -> dict[str, int]:
        """Of each checkpoint the training wrote and kept, by its path, the optimizer steps taken by then.

        ``run.parameters(step)`` are the checkpoint's. ``"best"`` is the best one of the ModelCheckpoint that has a monitor,
        of several the first; ``"last"`` the one written last. Empty where none was written, or none was looked for.
        """
        return manifest.checkpoints_within(self.manifest.get("checkpoints", {}), self.n_steps)

    @property
    def averages(self) -> dict[str, dict[str, Tensor]]:
        """Of each average of the parameters that a callback kept (``"ema"``, ``"swa"``) its ``steps`` (k,), ``weights`` (k,) of
        these and ``theta`` (p,), what it came to: the sum over its steps of ``weight * run.parameters(step)``.
        """
        return {name.partition("/")[2].rpartition(".")[0]: self._load(name)[0] for name in self._names("averages")}

    def snapshot(self, t: int) -> Tensor:
        """A copy of the flat trained parameters (p,) before step ``t``, one of ``snapshots``."""
        name, i = self._snapshots[t]
        return self._load(name)[0]["theta"][i].clone()

    @cached_property
    def _snapshots(self) -> dict[int, tuple[str, int]]:
        """File and row of the parameters at the steps they were written at."""
        names = self._names("parameters")
        places = {step: (name, i) for name in names for i, step in enumerate(self._file(name)["steps"])}
        return {step: place for step, place in places.items() if step <= self.n_steps}  # more may be there than is whole

    @property
    def snapshots(self) -> list[int]:
        """The steps whose parameters were written, in order."""
        return sorted(self._snapshots)

    def batches(self, t: int, shares: Sequence[tuple[int, range]] | None = None) -> list[Leaves]:
        """The leaves of each batch whose gradient step ``t`` accumulated, usually one; or of rows of some, by their numbers."""
        step = self.steps[t]
        parts = step.contents.split(step.sizes)
        if shares is not None:
            parts = tuple(parts[number][rows.start : rows.stop] for number, rows in shares)
        return [self._contents[numbers] for numbers in parts]

    def content_of(self, sample_id: int) -> Leaves | None:
        """The leaves of a sample as it was first seen, without the batch dimension; None if it never was."""
        number = self._first_contents.get(sample_id)
        if number is None:
            return None
        sample = row(self._contents[torch.tensor([number])], 0)
        return {name: sample[name] for name in leaf_names(self.structure())}

    def content_digests(self, numbers: bool = True) -> dict[int, str]:
        """Of every sample that was seen a hash of what ``content_of`` gives, by its id; without single ``numbers`` if asked."""
        digests = self._contents.digests(numbers)
        return {sample: digests[number] for sample, number in self._first_contents.items()}

    def structure(self) -> Structure:
        """How the leaves make up a batch."""
        return dict(self.manifest["batch_structure"])

    def frozen_tensors(self) -> dict[str, Tensor]:
        """Buffers and untrained parameters of the module, by name, each of its own shape, such as (features,)."""
        return self._load("module.safetensors")[0] if "module.safetensors" in self.manifest["files"] else {}

    def query_names(self) -> list[str]:
        """Names of the queries recorded with the run, and of those added since."""
        added = [name for name in self.store.names("queries") if name.endswith(".json")]
        return sorted({name.partition("/")[2].rpartition(".")[0] for name in [*self._names("queries"), *added]})

    def sample_info(self) -> pa.Table | None:
        """What the data module told about the samples (``describe_samples``), one row per sample id; None if nothing."""
        name, named = "samples/info.parquet", self._named
        table = manifest.description(self.store, self.manifest, name, None if named else self.n_samples)
        if table is None or named is None:
            return table
        if names.COLUMN not in table.column_names:
            raise self._fault(name, f"it has no column {names.COLUMN!r}, by which samples are known")
        return named.rows(table)

    def example_info(self, query: str) -> pa.Table | None:
        """What the data module told about the examples of a recorded query (``describe_examples``), in their order."""
        examples = self.manifest["files"].get(f"queries/{query}.safetensors", {}).get("n_examples")
        return manifest.description(self.store, self.manifest, f"queries/{query}.info.parquet", examples)

    def _file(self, name: str) -> dict[str, Any]:
        return dict(self.manifest["files"][name])

    def _fault(self, name: str, fault: str) -> RunError:
        return manifest.fault(self.store, name, fault)

    def _names(self, folder: str) -> list[str]:
        return sorted(
            name for name in self.manifest["files"] if name.startswith(f"{folder}/") and name.endswith(".safetensors")
        )

    def _load(self, name: str) -> tuple[dict[str, Tensor], dict[str, Any]]:
        if name not in self._loaded:
            tensors, metadata = manifest.load(self.store, self.manifest, name)
            if name.startswith("parameters/"):
                # Large and read in order: only the newest file is kept.
                self._loaded = {key: value for key, value in self._loaded.items() if not key.startswith("parameters/")}
            self._loaded[name] = tensors, metadata
        return self._loaded[name]

    @cached_property
    def _step_files(self) -> tuple[list[int], list[str]]:
        """The first step in each of the files of steps, and their names."""
        names = self._names("steps")
        counts = [self._file(name)["count"] for name in names]
        return [0, *itertools.accumulate(counts[:-1])], names

    def _locate(self, step: int) -> tuple[dict[str, Tensor], int, dict[str, Any]]:
        firsts, names = self._step_files
        file = bisect.bisect_right(firsts, step) - 1
        tensors, metadata = self._load(names[file])
        return tensors, step - firsts[file], metadata

    @cached_property
    def _named(self) -> SampleNames | None:
        """The names of the samples; None where they are counted in their data set."""
        files = [name for name in self._names("steps") if "names" in self._file(name)]
        try:
            return SampleNames([one for name in files for one in names.unpacked(*self._load(name))]) if files else None
        except ValueError as error:
            raise self._fault(files[-1], str(error)) from error

    def _numbers(self, seen: Tensor) -> Tensor:
        return seen if self._named is None else self._named.numbers(seen)

    @cached_property
    def _contents(self) -> Contents:
        files = {name: self._load(name)[0] for name in self._names("samples")}
        for name in files:
            del self._loaded[name]  # its tensors are the contents' now
        return Contents(files, self._shared(), self._fault)

    def _shared(self) -> Leaves:
        """The tensors of the batches that belong to no sample."""
        if manifest.SHARED not in self.manifest["files"]:
            return {}
        return self._load(manifest.SHARED)[0]

    @cached_property
    def _first_contents(self) -> dict[int, int]:
        first: dict[int, int] = {}
        for step in self.steps:
            for sample, content in zip(step.sample_ids.tolist(), step.contents.tolist(), strict=True):
                first.setdefault(sample, content)
        return first

    def __reduce__(self) -> Any:
        return type(self), (self.store.url, self.given_module, self.trust, self.partial)


def opened(record: Record | str | os.PathLike[str]) -> Record:
    """The record itself, or what is at the path."""
    return record if isinstance(record, Record) else Record(arguments.path("run", record))
