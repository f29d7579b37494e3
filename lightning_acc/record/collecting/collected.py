"""What is collected of a run before it is written."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lightning_acc.record.batches import Leaves
from lightning_acc.record.collecting.numbering import Signature
from lightning_acc.record.samples import names
from lightning_acc.record.steps import RANDOM, SeenStep, joined

Contents = dict[Signature, list[tuple[list[int], Leaves]]]
"""Contents with their numbers, by signature."""
File = tuple[str, dict[str, Tensor], dict[str, str], dict[str, Any]]
"""Its folder, its tensors and metadata, and what the manifest says of it."""


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

    def files(self) -> Iterator[File]:
        """What to write of it."""
        for key in sorted(self.contents, key=repr):
            parts = self.contents[key]
            tensors = {name: torch.cat([leaves[name] for _, leaves in parts]) for name in parts[0][1]}
            tensors["#"] = torch.tensor([number for numbers, _ in parts for number in numbers])
            yield "samples", tensors, {}, {"count": len(tensors["#"])}
        if self.states:
            facts = {"count": len(self.states), "steps": self.snapshots}
            yield "parameters", {"theta": torch.stack(self.states)}, {}, facts
        if self.steps:
            yield _of_steps(self.steps)


def _of_steps(steps: list[SeenStep]) -> File:
    sizes = [[len(ids) for ids in step["sample_ids"]] for step in steps]
    tensors = {
        "offsets": torch.tensor([0] + [sum(of_step) for of_step in sizes]).cumsum(0),
        "sample_ids": joined(ids for step in steps for ids in step["sample_ids"]),
        "contents": joined(contents for step in steps for contents in step["contents"]),
        "weights": torch.cat([step["weights"] for step in steps]),
        "batch_offsets": torch.tensor([0] + [len(of_step) for of_step in sizes]).cumsum(0),
        "batch_sizes": torch.tensor([size for of_step in sizes for size in of_step]),
    }
    drawn = [states for step in steps for states in step["rng"]]
    for device, end_of_name in RANDOM.items():
        if random := [(i, states[device]) for i, states in enumerate(drawn) if device in states]:
            tensors[f"rng_batches{end_of_name}"] = torch.tensor([i for i, _ in random])
            tensors[f"rng{end_of_name}"] = torch.stack([state for _, state in random])
    metadata, facts = {"groups": json.dumps([step["groups"] for step in steps])}, {"count": len(steps)}
    if new := [name for step in steps for name in step["names"]]:
        more, kind = names.packed(new)
        return "steps", {**tensors, **more}, {**metadata, **kind}, {**facts, "names": len(new)}
    return "steps", tensors, metadata, facts
