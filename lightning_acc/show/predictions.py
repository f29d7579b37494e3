"""What is shown of single predictions, on the page and in W&B: the stored matrices, and the examples they are about."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from lightning_acc.core import queries
from lightning_acc.core.queries import Query
from lightning_acc.core.replay import OF_DATA, Replay, parameters_at
from lightning_acc.errors import InfluenceError
from lightning_acc.judge.controls import NotAClassifier, logits_of
from lightning_acc.judge.samples import ExampleViews, SampleView
from lightning_acc.methods import registry
from lightning_acc.record import batches
from lightning_acc.record.record import Record
from lightning_acc.scoring.matrices import ScoreMatrix, final_values, matrix

NEAR = 5
"""Removals that are shown of those that helped an example most, and of those that harmed it most."""


def stored_matrices(run: Record) -> dict[str, ScoreMatrix]:
    """The matrices of a run that belong to its present content, by name: the estimates, the most faithful first, then others.

    Raises:
        RunError: one is damaged.
    """
    found = {name: matrix.read(run.store, name, run.n_samples) for name in matrix.names(run.store)}
    own = {name: one for name, one in found.items() if one.conditions["manifest_hash"] == run.hash and one.examples}

    def place(name: str) -> tuple[bool, int, bool, str]:
        c = own[name].conditions
        return registry.is_truth(c["method"]), registry.place(c["method"]), c["query"] != "val", name

    return {name: own[name] for name in sorted(own, key=place)}


class Examples:
    """The examples a matrix is about.

    Attributes:
        losses: of each example of the query at the end of the run, (n_examples,); None where they cannot be had.
        missing: why nothing, or less, is known of them, as a sentence; empty where all is.
    """

    def __init__(self, run: Record, asked: ScoreMatrix) -> None:
        self.losses: np.ndarray | None = None
        self.missing = ""
        self._views: ExampleViews | None = None
        self._said: list[str] | None = None
        query = _query(run, asked)
        if query is None or max(asked.examples) >= query.n_examples:
            self.missing = (
                f"The query {asked.conditions['query']} is not stored with the run, and its examples are known by number."
            )
            return
        self._views = ExampleViews(run, query)
        try:
            replay = Replay(run)
            objective, theta = replay.objective, parameters_at(run, run.n_steps).to(replay.dtype)
            self.losses = final_values(replay, query).double().numpy()
        except InfluenceError as error:
            self.missing = f"The losses are not known: {error}"
            return
        try:
            found = [classes(objective, theta, leaves, kind) for leaves, kind in query.batches]
            self._said = named_classes(found, lambda example: self[example].label)
        except (NotAClassifier, InfluenceError, *OF_DATA):  # an ornament, which not every module has
            self._said = None

    def __getitem__(self, example: int) -> SampleView:
        """What there is to see of an example."""
        return SampleView(example) if self._views is None else self._views[example]

    @property
    def classes(self) -> bool:
        """Whether the model's classes are known."""
        return self._said is not None

    def loss(self, example: int) -> float | None:
        """The loss of an example at the end of the run; None where it is not known."""
        if self.losses is None or not np.isfinite(self.losses[example]):
            return None
        return float(self.losses[example])

    def said(self, example: int) -> str | None:
        """The class that the model gave the highest output at the end of the run; None where it has no classes."""
        return None if self._said is None else self._said[example]

    def ordered(self, asked: ScoreMatrix) -> list[int]:
        """The examples of a matrix, those with the highest loss first; without losses those with the most extreme scores."""
        if self.losses is None:
            return extreme(asked)
        keys = np.where(np.isfinite(self.losses), self.losses, np.inf)
        return sorted(asked.examples, key=lambda example: (-keys[example], example))


def extreme(asked: ScoreMatrix) -> list[int]:
    """The examples of a matrix, those first that some removal moves most."""
    most = {example: float(np.nanmax(np.abs(asked.of(example)), initial=0.0)) for example in asked.examples}
    return sorted(asked.examples, key=lambda example: (-most[example], example))


def _query(run: Record, asked: ScoreMatrix) -> Query | None:
    """The query as it is stored with the run; None where the matrix was asked with another one."""
    name = asked.conditions["query"]
    if name not in run.query_names():
        return None
    query = queries.find(run, name)
    return query if query.fingerprint == asked.conditions["query_fingerprint"] else None


def classes(objective: Any, theta: torch.Tensor, leaves: Any, structure: Any) -> tuple[torch.Tensor, torch.Tensor]:
    """The classes (B,) that the model gives the highest output, and those it should."""
    batch = batches.unflatten(structure, batches.cast(leaves, objective.dtype))
    with torch.no_grad(), objective.evaluating():
        logits = objective.call(theta, lambda module, one: logits_of(module, one)[0], batch)
    return logits.argmax(-1), batch[1]


def named_classes(found: list[tuple[torch.Tensor, torch.Tensor]], label: Callable[[int], str | None]) -> list[str]:
    """What ``classes`` gave of batches, as words: a class has the ``label`` of the first row, of all batches, that is of it."""
    said = [int(one) for batch, _ in found for one in batch]
    names: dict[int, str | None] = {}
    for row, number in enumerate(int(one) for _, batch in found for one in batch):
        if number not in names:
            names[number] = label(row)
    return [names.get(one) or str(one) for one in said]
