"""The validation data becomes the query ``val``: the batches, as Lightning would hand them to ``validation_step``."""

from __future__ import annotations

import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from lightning_acc.core import queries
from lightning_acc.errors import InfluenceError
from lightning_acc.record.writer import RunWriter
from lightning_acc.recorder.checks.randomness import random_state_kept
from lightning_acc.recorder.checks.rows import transferred


def write_queries(writer: RunWriter, trainer: Any) -> None:
    """Store the validation batches as the query ``val`` (further loaders as ``val-1``, ``val-2`` ...)."""
    with validating(trainer):
        loaders = _validation_loaders(trainer)
        if not loaders:
            warnings.warn(
                "Training has no validation data, so no query is recorded: scoring will ask for a Query, or add one with "
                "run.add_query(name, loader).",
                UserWarning,
                stacklevel=2,
            )
        for i, loader in enumerate(loaders):
            name = "val" if i == 0 else f"val-{i}"
            with random_state_kept(loader):
                try:
                    queries.record_as(writer, name, (transferred(trainer, batch, i) for batch in _limited(loader, trainer, i)))
                except InfluenceError as error:
                    warnings.warn(f"The validation data is not recorded as a query: {error}", UserWarning, stacklevel=2)


@contextmanager
def validating(trainer: Any) -> Iterator[None]:
    """In here the trainer validates and the module is in evaluation mode, as hooks that treat batches by either expect."""
    modes = [(part, part.training) for part in trainer.lightning_module.modules()]
    stage = trainer.state.stage
    trainer.validating = True
    trainer.lightning_module.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        trainer.state.stage = stage
        for part, mode in modes:
            part.training = mode


def _validation_loaders(trainer: Any) -> list[Any]:
    # As the user gave them: under several processes Lightning's own share the data out.
    source = trainer.fit_loop.epoch_loop.val_loop._data_source
    if not source.is_defined():
        return []
    with random_state_kept():
        loaders = source.dataloader()
    if loaders is None:
        return []
    if isinstance(loaders, dict):
        return list(loaders.values())
    return list(loaders) if isinstance(loaders, (list, tuple)) else [loaders]


def _limited(loader: Any, trainer: Any, index: int) -> Iterator[Any]:
    """The batches Lightning would validate on; all of them where validation is switched off."""
    limit = trainer.limit_val_batches
    if isinstance(limit, float):
        limit = int(limit * len(loader)) if limit < 1.0 and hasattr(loader, "__len__") else 0
    limit = limit or float("inf")
    for i, batch in enumerate(loader):
        if i >= limit:
            return
        yield batch
