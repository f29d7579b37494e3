"""Scores are stored shard by shard, as they are done, so that what was finished is never computed twice.

A shard is a table of some removals in the folder ``shards``, named by a hash of its conditions and its removals. It appears
whole or not at all, and the same shard written twice is the same file: commands that work on one run at once, and commands
that were stopped and repeated, do no harm. The table of a method is the union of its shards and what it held before.

Figures that are no scores, such as what a training of ``clean`` ended with, are kept in the same way, as JSON by name.

What is damaged, or answers another question than its name says, is left out with a warning, deleted, and computed again.
"""

from __future__ import annotations

import json
import warnings
from collections.abc import Callable, Mapping
from functools import partial, reduce
from typing import Any, TypeVar

from lightning_acc.core.devices import CPU
from lightning_acc.core.removals import Removal
from lightning_acc.record import seal
from lightning_acc.record.record import Record
from lightning_acc.record.store import digest
from lightning_acc.scoring import scores
from lightning_acc.scoring.scores import Scores
from lightning_acc.scoring.trust.verdict import UNCHECKED

T = TypeVar("T")

FOLDER = "shards"
SAME = (
    "manifest_hash",
    "method",
    "query_fingerprint",
    "at",
    "readout",
    "dtype",
    "convention",
    "version",
    "form",
    "directions",
    "followed",
    "trainings",
    "among",
    "run_hashes",
)
"""Conditions under which two scores of one removal are the same number, beside the device."""

COST = ("seconds", "wall_seconds", "peak_memory_gb")
FREE = {"n": 0, **dict.fromkeys(COST, 0.0)}
"""Of what was there already."""


def device_of(conditions: Mapping[str, Any]) -> str:
    """The kind of device that scores were computed on; what does not say was the CPU's."""
    return str(conditions.get("device", CPU.type))


def same(one: Mapping[str, Any], other: Mapping[str, Any]) -> bool:
    """Whether scores under these conditions are the same numbers."""
    alike = all(str(one.get(name)) == str(other.get(name)) for name in SAME)
    return alike and device_of(one) == device_of(other)


def key(conditions: dict[str, Any]) -> str:
    """Short hash of the conditions that matter."""
    device = [] if device_of(conditions) == CPU.type else [device_of(conditions)]
    return digest(json.dumps([conditions.get(name) for name in SAME] + device).encode())[:16]


def write(run: Record, shard: Scores) -> None:
    """Store a shard."""
    which = digest(json.dumps(shard.removals).encode())[:16]
    scores.write(run.store, f"{key(shard.conditions)}-{which}", shard, FOLDER)


def stored(run: Record, conditions: dict[str, Any], name: str) -> Scores | None:
    """Everything there is under these conditions: the table ``name`` where it is of the same kind, and the shards."""
    parts = [intact(run, f"{FOLDER}/{part}.parquet", partial(_part, run, conditions, part)) for part in _parts(run, conditions)]
    tables = [table for table in (_table(run, conditions, name), *parts) if table is not None]
    return reduce(Scores.merged, tables) if tables else None


def gather(run: Record, conditions: dict[str, Any], name: str, newest: Scores | None) -> None:
    """Write the table ``name`` from everything there is under these conditions, the newest scores before all others.

    Args:
        run: the run.
        conditions: of the scores.
        name: of the table.
        newest: what was scored just now, checked; its verdict stands unless an older one is on more removals. None where
            that failed in part.
    """
    older = _table(run, conditions, name)
    seen: set[str] = set()
    # Whoever writes last has seen the other's shards: they are written before any table is.
    while (parts := set(_parts(run, conditions))) != seen or newest is not None:
        seen = parts
        table = stored(run, conditions, name)
        if newest is not None:
            # What it cost is told by what was computed, now or before; not by what was looked up just now.
            cost = {} if table is None else {name: table.conditions[name] for name in COST}
            table = newest if table is None else newest.merged(table)
            table = table.picked(table.removals, {**table.conditions, **cost})
        if table is not None:
            names = {**(older.names if older else {}), **(newest.names if newest else {})}
            checked = [one for one in (newest, older) if one is not None and "verdict" in one.conditions]
            if checked:
                table = table.checked({}, max(checked, key=lambda one: (one.verdict.word != UNCHECKED, len(one))).verdict)
            whole = table.picked(sorted(set(table.removals)), table.conditions).named(names)
            scores.write(run.store, name, whole)
        newest = None


def _table(run: Record, conditions: dict[str, Any], name: str) -> Scores | None:
    """The table ``name``, where it holds scores under these conditions."""
    if name not in scores.names(run.store):
        return None
    table = intact(run, f"scores/{name}.parquet", partial(scores.read, run.store, name, n_samples=run.n_samples))
    return table if table is not None and same(table.conditions, conditions) else None


def _part(run: Record, conditions: dict[str, Any], part: str) -> Scores:
    """The shard ``part``.

    Raises:
        DamagedResult: it is not what was written, or under other conditions.
    """
    shard = scores.read(run.store, part, FOLDER, run.n_samples)
    if not same(shard.conditions, conditions):
        raise seal.damaged(run.store, f"{FOLDER}/{part}.parquet", scores.REMEDY)
    return shard


def intact(run: Record, file: str, read: Callable[[], T]) -> T | None:
    """What ``read`` reads from a file; None, with a warning, where that is damaged. It goes, so that all can be as new."""
    try:
        return read()
    except seal.DamagedResult as error:
        run.store.remove(file)
        what, _, _ = str(error).rpartition(": ")
        warnings.warn(f"{what}: it is left out and deleted, and computed again where it is needed.", UserWarning, stacklevel=4)
        return None


def write_figures(run: Record, kind: str, figures: dict[str, list[float]]) -> None:
    """Store some figures of a kind: names that say all there is to know of what was done, and what came out."""
    which = digest(json.dumps(sorted(figures)).encode())[:16]
    file = f"{FOLDER}/{kind}-{which}.json"
    run.store.write(file, seal.to_json(figures, file))


def stored_figures(run: Record, kind: str, count: int) -> dict[str, list[float]]:
    """All figures of a kind that are stored, ``count`` by each name."""
    files = [file for file in run.store.names(FOLDER) if file.startswith(f"{FOLDER}/{kind}-") and file.endswith(".json")]
    figures: dict[str, list[float]] = {}
    for file in files:
        figures.update(intact(run, file, partial(_figures, run, file, count)) or {})
    return figures


def _figures(run: Record, file: str, count: int) -> dict[str, list[float]]:
    remedy = "delete it and repeat the command"
    figures = seal.from_json(run.store, file, remedy)
    if not all(
        isinstance(row, list) and len(row) == count and all(isinstance(one, float) for one in row) for row in figures.values()
    ):
        raise seal.damaged(run.store, file, remedy)
    return figures


def missing(pieces: list[list[Removal]], known: Scores | None) -> list[list[Removal]]:
    """What of the pieces is not known yet."""
    have = set(known.removals) if known is not None else set()
    left = [[removal for removal in piece if removal not in have] for piece in pieces]
    return [piece for piece in left if piece]


def _parts(run: Record, conditions: dict[str, Any]) -> list[str]:
    prefix = f"{FOLDER}/{key(conditions)}-"
    files = run.store.names(FOLDER)
    return [
        file.split("/")[-1].removesuffix(".parquet") for file in files if file.startswith(prefix) and file.endswith(".parquet")
    ]
