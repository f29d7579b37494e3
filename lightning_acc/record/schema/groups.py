"""What a file of steps says of each step beside its tensors: the hyper-parameters of the optimizer's parameter groups."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from lightning_acc.arguments import shown
from lightning_acc.record.schema.keys import DTYPES, Manifest
from lightning_acc.record.schema.kinds import LIMIT, PLAIN, POSITIVE, Kind, among, first_fault, named, several, whole

IN_EVERY_ONE: dict[str, Kind] = {
    "step": whole(1, 10**12),
    "gradient_clip_val": LIMIT.or_none(),
    "gradient_clip_algorithm": among("norm", "value"),
}
"""What stands in the hyper-parameters of every parameter group; those of the optimizer are beside it."""
WHERE_GIVEN: dict[str, Kind] = {
    "dtypes": named(among(*DTYPES)),
    "loss_scale": POSITIVE,
    "global_step": whole(0, 10**12),
    "current_epoch": whole(0, 10**12),
    "parameter_steps": several(whole(0, 10**12)),
    "unused": several(whole(0, 10**6)),
    "settings": named(PLAIN),
    "settings_of_batches": several(named(PLAIN)),
}
"""Of hyper-parameters that are tensors, the dtypes; what the loss was multiplied by; what the trainer counted; of each
parameter the number of the step, and 0 where it rests; which of these rest as the loss was not made of them; what the module
was set to, of what has changed since the first step; and for each batch, where it was set otherwise for each."""


def faults(groups: Any, counts: list[int], manifest: Manifest) -> Iterator[str]:
    """What is wrong with the ``groups`` of steps of so many batches, in words that go on after "its file"."""
    right = isinstance(groups, list) and len(groups) == len(counts)
    if not (right and all(isinstance(step, list) and step for step in groups)):
        yield f"its groups are no list of {len(counts):,} lists"
        return
    of_each = manifest.get("optimizer", {}).get("group_of", ())
    for step, count in zip(groups, counts, strict=True):
        least = _needed(step[0], of_each)
        for group in step:
            if not isinstance(group, dict) or group.keys() != step[0].keys() or least is None or len(step) < least:
                yield f"its groups are {shown(step)} and not hyper-parameters of the {least or 1} groups of its parameters"
                return
            fault = first_fault(group, IN_EVERY_ONE) or first_fault(group, WHERE_GIVEN, optional=True)
            if fault:
                yield f"of its groups {fault}"
            elif len(group.get("settings_of_batches", range(count))) != count:
                yield f"its groups say what the module was set to for {len(group['settings_of_batches'])} batches of {count}"
            elif any(place >= len(of_each) for place in group.get("unused", ()) if of_each):
                yield f"its groups say that of {len(of_each)} parameters those at {group['unused']} were not used"
            for key, value in group.items():
                if not PLAIN.holds(value):
                    yield f"of its groups its {key} is {shown(value)} and not {PLAIN.words}"


def _needed(first: Any, of_each: Sequence[int | None]) -> int | None:
    """How many parameter groups those are that a step moves, by its ``first`` one; None where it is not known."""
    moved = first.get("parameter_steps", [True] * len(of_each)) if isinstance(first, dict) else None
    if not isinstance(moved, list) or (of_each and len(moved) != len(of_each)):
        return None
    least = 1
    for group, steps in zip(of_each, moved, strict=False):
        if steps and group is None:
            return None
        least = max(least, 1 + (group or 0)) if steps else least
    return least
