"""Checkpoint and resume: what a Lightning checkpoint says about the record, and whether both still belong together."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch

from lightning_acc.core.optimizers import State
from lightning_acc.record import manifest as manifests
from lightning_acc.record.store import Store, digest
from lightning_acc.record.writer import RunWriter
from lightning_acc.recorder.checks.refusals import refuse_if

KEY = "lightning_acc"
"""Where a checkpoint keeps the place in the record."""

SAME = (
    "module",
    "layout",
    "dtype",
    "precision",
    "n_samples",
    "loss",
    "optimizer",
    "world_size",
    "batch_structure",
    "sample_id",
)
"""What the header of a resumed run must share with that of its beginning."""
SEEN = ("independent_rows", "vectorised")
"""What of the loss was seen in one step, which may have drawn no random numbers yet: it holds where it was seen in all."""


@dataclass(frozen=True)
class Place:
    """Where in a record a checkpoint was written.

    Attributes:
        run_id: which record.
        n_steps: its optimizer steps by then.
        state: hash of the parameters and the optimizer's slots.
        parameter_steps: how many steps have moved each parameter; None, as in checkpoints of old: all of them.
        averages: for each average that a callback keeps, the step after which each of its updates came.
        resumed_at: where the record had been taken up before; None in checkpoints of old.
    """

    run_id: str
    n_steps: int
    state: str
    parameter_steps: list[int] | None = None
    averages: list[list[int]] = field(default_factory=list)
    resumed_at: list[int] | None = None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the place into a checkpoint."""
        checkpoint[KEY] = asdict(self)

    @classmethod
    def load(cls, checkpoint: dict[str, Any]) -> Place | None:
        """The place in a checkpoint; None where it was written without a recorder."""
        if KEY not in checkpoint:
            return None
        known = {one.name for one in fields(cls)}
        return cls(**{key: value for key, value in checkpoint[KEY].items() if key in known})

    def steps_of(self, parameters: Sequence[Any]) -> list[int]:
        """How many steps have moved each of the ``parameters``."""
        return self.parameter_steps or [self.n_steps] * len(parameters)

    def refuse_another(self, state: State) -> None:
        """Refuse to go on from a state that is not the one of this place.

        Raises:
            RecordingRefused: the checkpoint was changed, or loaded in part.
        """
        if fingerprint(state) != self.state:
            refuse_if(
                f"the parameters or the optimizer's state are not those the record has after step {self.n_steps}: "
                "resume from the checkpoint as it was written"
            )


def fingerprint(state: State) -> str:
    """Hash of a state, bit for bit."""
    return digest(b"".join(part.cpu().view(torch.uint8).numpy().tobytes() for part in state))


def difference(recorded: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a resumed training has changed that a run cannot change on the way; None where all is as it was."""
    for key in SAME:
        if key == "n_samples" and "sample_id" in recorded:
            continue  # those that have been seen by now
        was, there = recorded.get(key), now.get(key)
        if key == "optimizer":
            was, there = (_as_yet(said, now[key]) for said in (recorded[key], now[key]))
        if key == "loss":
            was, there = (_without(said, SEEN) for said in (recorded[key], now[key]))
        if was != there:
            return f"its {key} is {there!r}, but was {was!r}"
    return None


def _as_yet(recorded: dict[str, Any], now: dict[str, Any]) -> dict[str, Any]:
    """What is said of the optimizer, without what a training says only later: which parameters join it, and that some rest."""
    here, there = recorded["group_of"], now["group_of"]
    if len(here) == len(there):
        here = [None if later is None else group for group, later in zip(here, there, strict=True)]
    return {**_without(recorded, ("rests",)), "group_of": here}


def _without(said: dict[str, Any], keys: tuple[str, ...]) -> dict[str, Any]:
    return {key: value for key, value in said.items() if key not in keys}


def take_up(store: Store, place: Place, main: RunWriter | None, own: RunWriter, processes: int) -> bool:
    """Set the writers of this process to where the checkpoint was written; nothing in the store changes yet.

    Returns:
        Whether the record there is not that of a whole training yet.

    Raises:
        RecordingRefused: the checkpoint and the record do not belong together.
    """
    held = manifests.read(store, unfinished=True)
    if held["run_id"] != place.run_id:
        refuse_if(f"the checkpoint continues the record {place.run_id}, but {store} holds {held['run_id']}")
    since = held.get("resumed_at", []) if place.resumed_at is not None else []
    for step in since[len(place.resumed_at or ()) :]:
        if step < place.n_steps:
            refuse_if(
                f"the record was taken up at step {step} after the checkpoint of step {place.n_steps} was written, and its "
                "steps from there on are of that training: resume from a checkpoint that it wrote, or of an earlier step"
            )
    if held["status"] == "complete" and processes > 1:
        refuse_if(f"the run in {store} was finished, and its processes' parts are merged: train on in a new one")
    for writer in _distinct(main, own):
        writer.resume(place.n_steps)
    if own.n_steps != place.n_steps:
        refuse_if(
            f"the checkpoint was written after step {place.n_steps}, but {own.store} has a record up to step {own.n_steps} "
            "only: resume from an earlier checkpoint"
        )
    return bool(held["status"] != "complete" or held.get("stopped"))


def go_on(main: RunWriter | None, own: RunWriter, header: dict[str, Any]) -> None:
    """Before the first new step: compare with how the training began, then drop what was recorded after the checkpoint.

    Raises:
        RecordingRefused: the resumed training differs in what a run cannot change on the way.
    """
    if main is not None:
        different = difference(main.header, header)
        refuse_if(different and f"it does not go on with the training it resumes: {different}")
        seen = {key: main.header["loss"][key] and header["loss"][key] for key in SEEN}
        main.header["loss"] = {**main.header["loss"], **seen}
        main.header["resumed_at"] = [*main.header.get("resumed_at", []), own.n_steps]
    for writer in _distinct(main, own):
        writer.drop_later()


def _distinct(main: RunWriter | None, own: RunWriter) -> list[RunWriter]:
    return [own] if main is None or main is own else [main, own]
