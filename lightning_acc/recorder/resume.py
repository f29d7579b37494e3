"""Checkpoint and resume: what a Lightning checkpoint says about the record, and whether both still belong together."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

from lightning_acc.optimizers import State
from lightning_acc.trajectory.store import digest

KEY = "lightning_acc"
"""Where a checkpoint keeps the place in the record."""

SAME = ("module", "layout", "dtype", "precision", "n_samples", "loss", "optimizer", "world_size", "batch_structure")
"""What the header of a resumed run must share with that of its beginning."""


@dataclass(frozen=True)
class Place:
    """Where in a record a checkpoint was written.

    Attributes:
        run_id: which record.
        n_steps: its optimizer steps by then.
        state: hash of the parameters and the optimizer's slots.
        with_gradient: for each parameter, whether it had a gradient in the last step.
    """

    run_id: str
    n_steps: int
    state: str
    with_gradient: list[bool] | None

    def save(self, checkpoint: dict[str, Any]) -> None:
        """Put the place into a checkpoint."""
        checkpoint[KEY] = asdict(self)

    @classmethod
    def load(cls, checkpoint: dict[str, Any]) -> Place | None:
        """The place in a checkpoint; None where it was written without a recorder."""
        return cls(**checkpoint[KEY]) if KEY in checkpoint else None


def fingerprint(state: State) -> str:
    """Hash of a state, bit for bit."""
    return digest(b"".join(part.numpy().tobytes() for part in state))


def difference(recorded: dict[str, Any], now: dict[str, Any]) -> str | None:
    """What a resumed training has changed that a run cannot change on the way; None where all is as it was."""
    for key in SAME:
        if recorded.get(key) != now.get(key):
            return f"its {key} is {now.get(key)!r}, but was {recorded.get(key)!r}"
    return None
