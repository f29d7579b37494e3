"""What is collected of a run before it is written."""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, field
from typing import Any, TypedDict

from torch import Tensor

from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting.numbering import Signature


class SeenStep(TypedDict):
    """One optimizer step: its occurrences in order, their contents and loss weights, and the hyper-parameters.

    ``sizes`` are those of the batches it accumulated, ``rng`` the states of the random number generator before each of their
    forward passes, None where it was not used.
    """

    sample_ids: list[int]
    contents: list[int]
    weights: list[float]
    groups: list[dict[str, Any]]
    sizes: list[int]
    rng: list[Tensor | None]


@dataclass
class Collected:
    """Of a run, what is to be written: contents with their numbers, by signature; parameters before steps; steps."""

    contents: dict[Signature, list[tuple[list[int], Leaves]]] = field(default_factory=lambda: defaultdict(list))
    states: list[Tensor] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)
    steps: list[SeenStep] = field(default_factory=list)

    def and_then(self, later: Collected) -> Collected:
        """Both together."""
        contents = {
            key: self.contents.get(key, []) + later.contents.get(key, []) for key in {**self.contents, **later.contents}
        }
        return Collected(contents, self.states + later.states, self.snapshots + later.snapshots, self.steps + later.steps)
