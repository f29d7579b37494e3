"""``la.Run``: a recorded training run and its verbs."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.core import queries
from lightning_acc.core.audit import AuditReport, audit
from lightning_acc.core.queries import Query
from lightning_acc.core.rebuild import module_of, portable_trust
from lightning_acc.core.replay import parameters_at
from lightning_acc.errors import RequestError
from lightning_acc.judge.exports import cleaned_dataset
from lightning_acc.record.record import Record

if TYPE_CHECKING:
    import datasets


class Run(Record):
    """A recorded training run: every optimizer step, the samples it saw, the parameters before it.

    Opening reads the manifest alone and executes nothing; the other files are read, and checked, when they are needed.
    ``run.steps[t]``, ``run.manifest``, ``run.n_samples`` and all else that is data comes from ``Record``.

    Args:
        path: the run directory, a local path or an fsspec URL.
        module: the LightningModule to evaluate the losses with, where it cannot be rebuilt from the manifest.
        trust: packages the module's class may be imported from, or True for any; see ``Record``.
        partial: open the whole steps of a record that was not finished, as its training goes on or was killed.

    Raises:
        RunError: there is no finished run at ``path``, or a file is missing, truncated or damaged.
        RequestError: what is given is no path, module or names.
    """

    def parameters(self, t: int) -> Tensor:
        """Flat trained parameters (p,) before step ``t``; ``t = n_steps`` gives the final ones."""
        step = arguments.index(t)
        if step is None:
            raise RequestError(f"t={arguments.shown(t)} is no step: give a whole number from 0 to {self.n_steps}.")
        return parameters_at(self, step)

    def module(self) -> torch.nn.Module:
        """The LightningModule of the run; the values of its tensors are arbitrary."""
        return module_of(self)

    def query(self, name: str) -> Query:
        """The query stored under ``name``."""
        return queries.find(self, name)

    def add_query(self, name: str, loader: Any) -> None:
        """Store the batches of ``loader`` (a DataLoader, or any iterable of batches) as the query ``name``."""
        queries.add(self, name, loader)

    def audit(self) -> AuditReport:
        """Replay the training step over the record and compare with the recorded parameters."""
        return audit(self)

    def __reduce__(self) -> Any:
        return type(self), (self.store.url, self.given_module, portable_trust(self), self.partial)

    def cleaned_dataset(self, drop: Iterable[int], dataset: datasets.Dataset | None = None) -> datasets.Dataset:
        """The training set without the samples ``drop``, as a Hugging Face data set; see ``judge.exports``."""
        return cleaned_dataset(self, drop, dataset)
