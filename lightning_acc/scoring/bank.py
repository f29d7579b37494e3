"""The bank: shifts of retrained removals, kept so that another question about them needs no retraining.

What a training without some samples ended with, and where it stood at the steps that were asked about, answers any query: of
other data, of each example by itself. Files in ``bank/`` hold shifts (steps, n, p) in the replay's dtype, each beside a small
one that says of which removals and steps. Nothing is kept beyond a budget; what is damaged or deleted is retrained.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lightning_acc import arguments
from lightning_acc.core.devices import CPU
from lightning_acc.core.process import as_scored
from lightning_acc.core.queries.moments import Moments
from lightning_acc.core.removals import Removal
from lightning_acc.core.replay import Replay
from lightning_acc.errors import RequestError
from lightning_acc.methods.method import Question
from lightning_acc.methods.reading import Reading
from lightning_acc.record import seal
from lightning_acc.record.record import Record
from lightning_acc.record.schema import files
from lightning_acc.record.store import digest
from lightning_acc.scoring import shards
from lightning_acc.scoring.scores import threads
from lightning_acc.scoring.work import Result

FOLDER = "bank"
DEFAULT_GB = 1.0
REMEDY = "delete it; what it held is retrained where it is needed"
SAME = ("manifest_hash", "dtype", "convention", "version")
"""Conditions under which two shifts of one removal are the same, beside a device that is not the CPU."""


def budget(bank_gb: float) -> int:
    """The bytes of ``bank_gb``.

    Raises:
        RequestError: it is no size.
    """
    size = arguments.real(bank_gb)
    if size is None or not 0 <= size < 2**20:
        raise RequestError(f"bank_gb={arguments.shown(bank_gb)} is no size: give 0, which keeps nothing, or more.")
    return int(size * 2**30)


class Bank:
    """The kept shifts of a run, replayed in one dtype.

    Args:
        run: the run.
        conditions: of the table that is asked for.
        budget: bytes that all kept shifts of the run may take.
    """

    def __init__(self, run: Record, conditions: dict[str, Any], budget: int) -> None:
        self._run, self._budget = run, budget
        self._same = {name: str(conditions[name]) for name in SAME}
        if shards.device_of(conditions) != CPU.type:
            self._same["device"] = shards.device_of(conditions)
        self._key = digest(json.dumps(self._same).encode())[:16]
        self._left: int | None = None

    def keep(self, steps: Sequence[int], removals: Sequence[Removal], result: Result) -> None:
        """Keep the shifts of a piece of retrained removals, where there is room for them."""
        if result.shifts is None or result.thetas is None or not len(removals):
            return
        size = result.shifts.nbytes + result.thetas.nbytes
        if size > self._room():
            return
        self._left = self._room() - size
        name = self._name(digest(json.dumps([list(steps), list(removals)]).encode())[:16])
        tensors = {"shifts": result.shifts.contiguous(), "thetas": result.thetas.contiguous()}
        self._run.store.write(f"{name}.safetensors", files.sealed_tensors(tensors, {}, f"{name}.safetensors"))
        about = {**self._same, "steps": list(steps), "removals": list(removals), "bytes": size, "threads": result.threads}
        self._run.store.write(f"{name}.json", seal.to_json(about, f"{name}.json"))

    def fits(self, replay: Replay, moments: Moments, removals: int) -> bool:
        """Whether there is room for the shifts of so many removals at all these steps: all of them are kept, or none.

        Those of an average are not kept, as they are the shifts of no step.
        """
        if moments.average is not None:
            return False
        return bool(removals) and len(moments.steps) * (removals + 1) * replay.initial[0].nbytes <= self._room()

    def _room(self) -> int:
        if self._left is None:
            known = [name for name in self._run.store.names(FOLDER) if name.endswith(".safetensors")]
            self._left = self._budget - sum(self._run.store.sizes(known).values()) if self._budget else 0
        return self._left

    def _name(self, which: str) -> str:
        return f"{FOLDER}/{self._key}-{which}"

    def answer(self, replay: Replay, question: Question, removals: Sequence[Removal]) -> tuple[list[Removal], np.ndarray, str]:
        """Those of the removals that are kept at all steps asked about, their true scores, (m,) or (m, examples), and on how
        many threads they were retrained."""
        missing = dict.fromkeys(removals)
        found: list[Removal] = []
        scores: list[Tensor] = []
        used: list[dict[str, Any]] = []
        for name, about in self._entries():
            rows = [i for i, removal in enumerate(about["removals"]) if tuple(removal) in missing]
            if not rows or not set(question.moments.steps) <= set(about["steps"]):
                continue
            tensors = shards.intact(self._run, f"{name}.safetensors", partial(self._shifts, name, about, replay))
            if tensors is None:
                continue
            here = [tuple(about["removals"][i]) for i in rows]
            for removal in here:
                del missing[removal]
            found += here
            used.append(about)
            scores.append(_read(replay, question, tensors, about["steps"], rows))
        empty = torch.zeros(0, *((question.query.n_examples,) if question.each else ()))
        return found, torch.cat(scores or [empty]).double().numpy(), threads(*used)

    def holds(self, steps: Sequence[int], removals: Sequence[Removal]) -> bool:
        """Whether all these removals are kept at all these steps."""
        missing = set(removals)
        for _, about in self._entries():
            if set(steps) <= set(about["steps"]):
                missing -= set(map(tuple, about["removals"]))
        return not missing

    def _entries(self) -> list[tuple[str, dict[str, Any]]]:
        """What is kept under these conditions, as far as it is intact."""
        prefix, entries = self._name(""), []
        for file in sorted(self._run.store.names(FOLDER)):
            if file.startswith(prefix) and file.endswith(".json"):
                about = shards.intact(self._run, file, partial(self._about, file))
                if about is not None:
                    entries.append((file.removesuffix(".json"), about))
        return entries

    def _about(self, file: str) -> dict[str, Any]:
        about = seal.from_json(self._run.store, file, REMEDY)
        removals, steps = about.get("removals"), about.get("steps")
        if not (
            all(about.get(name) == value for name, value in self._same.items())
            and type(about.get("threads", 1)) is int
            and isinstance(steps, list)
            and all(type(t) is int and 1 <= t <= self._run.n_steps for t in steps)
            and isinstance(removals, list)
            and all(isinstance(removal, list) for removal in removals)
            and all(type(i) is int and 0 <= i < self._run.n_samples for removal in removals for i in removal)
        ):
            raise seal.damaged(self._run.store, file, REMEDY)
        return about

    def _shifts(self, name: str, about: dict[str, Any], replay: Replay) -> dict[str, Tensor]:
        tensors, _ = files.opened_tensors(self._run.store, f"{name}.safetensors", REMEDY)
        k, n, p = len(about["steps"]), len(about["removals"]), len(replay.initial[0])
        shapes = {key: (tensor.shape, tensor.dtype) for key, tensor in tensors.items()}
        if shapes != {"shifts": ((k, n, p), replay.dtype), "thetas": ((k, p), replay.dtype)}:
            raise seal.damaged(self._run.store, f"{name}.safetensors", REMEDY)
        return tensors


def _read(replay: Replay, question: Question, tensors: dict[str, Tensor], steps: list[int], rows: list[int]) -> Tensor:
    reading = Reading(replay, replace(question, keep_shifts=False))
    with as_scored():
        for t in question.moments.steps:
            place = steps.index(t)
            reading(t, replay.placed(tensors["thetas"][place]), replay.placed(tensors["shifts"][place][rows]))
    assert reading.scores is not None
    return reading.scores.cpu()
