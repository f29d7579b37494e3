"""What is collected of a run before it is written."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting.numbering import Signature
from lightning_acc.record.steps import SeenStep

Contents = dict[Signature, list[tuple[list[int], Leaves]]]
"""Contents with their numbers, by signature."""


@dataclass
class Collected:
    """Of a run, what is to be written: contents; parameters before steps; steps."""

    contents: Contents = field(default_factory=dict)
    states: list[Tensor] = field(default_factory=list)
    snapshots: list[int] = field(default_factory=list)
    steps: list[SeenStep] = field(default_factory=list)

    def and_then(self, later: Collected) -> Collected:
        """Both together."""
        contents = {
            key: self.contents.get(key, []) + later.contents.get(key, []) for key in {**self.contents, **later.contents}
        }
        return Collected(contents, self.states + later.states, self.snapshots + later.snapshots, self.steps + later.steps)
