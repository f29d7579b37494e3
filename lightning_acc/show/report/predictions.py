"""The page's section on single predictions: which training samples made this one what it is.

Of every example of a matrix the samples are there by number, label and score; pictures and texts are embedded, each once, for
the examples that matter most, as far as the room allows.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from typing import Any

from lightning_acc.core.removals import Removal
from lightning_acc.judge.samples import SampleView, SampleViews
from lightning_acc.methods import registry
from lightning_acc.record.record import Record
from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.show.predictions import NEAR, Examples, extreme, stored_matrices

BYTES = 2_000_000
"""What the section adds to the page, at most."""
ROWS_BYTES = 1_700_000
"""Of these for numbers, labels and scores; the examples with the highest loss come first."""
FIRST = 60
"""Examples whose pictures come first: of those with the highest loss, and of those with the most extreme scores."""
NAMED = 10
"""Samples of a group that are named."""
LABEL = 80
"""Characters of a label."""

Shown = Callable[[SampleView], dict[str, Any]]


class Room:
    """Bytes that are left, as JSON takes them."""

    def __init__(self, left: int) -> None:
        self.left = left

    def take(self, *content: Any) -> bool:
        """Whether there is room for all of ``content``; then it is taken."""
        size = sum(len(json.dumps(one, separators=(",", ":"))) + 10 for one in content)
        if size > self.left:
            return False
        self.left -= size
        return True


def collect(run: Record, views: SampleViews, shown: Shown, known: dict[int, dict[str, Any]]) -> dict[str, Any] | None:
    """What the section shows, as plain JSON, with the samples that are to be added to the page's; None without a matrix.

    Args:
        run: the recorded run.
        views: of its training samples.
        shown: makes a view what the page embeds.
        known: the samples that the page has without this section.
    """
    stored = stored_matrices(run)
    if not stored:
        return None
    room = Room(ROWS_BYTES)
    samples: dict[int, dict[str, Any]] = {}
    about: dict[tuple[str, str], Examples] = {}
    entries, described = [], [dict[int, dict[str, Any]]() for _ in stored]
    for name, asked in stored.items():
        key = (asked.conditions["query"], asked.conditions["query_fingerprint"])
        if key not in about:
            about[key] = Examples(run, asked)
        examples = about[key]
        place = list(about).index(key)
        entry = _entry(run, name, asked, examples, place)
        for number in examples.ordered(asked):
            row = [*_near(*asked.helpful(number, NEAR), 1), *_near(*asked.harmful(number, NEAR), -1)]
            new = {i: _plain(views[i]) for i in _singles(row) if i not in known and i not in samples}
            one = _described(examples, number)
            if not room.take([number, row], *new.values(), *([] if number in described[place] else [one])):
                break
            entry["numbers"].append(number)
            entry["rows"].append(row)
            described[place].setdefault(number, one)
            samples.update(new)
        entries.append(entry)
    room.left += BYTES - ROWS_BYTES
    for entry, number, row in _by_weight(entries, stored):
        examples = list(about.values())[entry["about"]]
        own = described[entry["about"]][number]
        seen = {} if "whole" in own else shown(examples[number])
        added = {i: shown(views[i]) for i in _singles(row) if i in samples and "whole" not in samples[i]}
        if not room.take(_heavy(seen), *map(_heavy, added.values())):
            break
        own.update(_heavy(seen), whole=True)
        for i, fields in added.items():
            samples[i].update(_heavy(fields), whole=True)
        entry["pictured"] += 1
    for fields in (*samples.values(), *(one for part in described for one in part.values())):
        fields.pop("whole", None)
    return {"matrices": entries, "examples": described[: len(about)], "samples": samples}


def _entry(run: Record, name: str, asked: ScoreMatrix, examples: Examples, place: int) -> dict[str, Any]:
    """A matrix' conditions and verdict; its rows are still to come."""
    word, _, rest = str(asked.verdict).partition(": ")
    return {
        "name": name,
        "conditions": {key: asked.conditions[key] for key in ("method", "query", "at", "readout", "dtype")},
        "truth": registry.is_truth(asked.conditions["method"]),
        "verdict": {"word": word, "text": rest},
        "missing": examples.missing,
        "losses": examples.losses is not None,
        "classes": examples.classes,
        "total": len(asked.examples),
        "removals": len(asked.removals),
        "groups": any(len(removal) != 1 for removal in asked.removals),
        "n_samples": run.n_samples,
        "about": place,
        "pictured": 0,
        "numbers": [],
        "rows": [],
    }


def _by_weight(entries: list[dict[str, Any]], stored: dict[str, ScoreMatrix]) -> Iterator[tuple[dict[str, Any], int, Any]]:
    """The examples whose pictures are wanted, the most important first, each once a matrix."""
    rows = [dict(zip(entry["numbers"], entry["rows"], strict=True)) for entry in entries]
    done: list[set[int]] = [set() for _ in entries]

    def some(i: int, numbers: list[int]) -> Iterator[tuple[dict[str, Any], int, Any]]:
        for number in numbers:
            if number in rows[i] and number not in done[i]:
                done[i].add(number)
                yield entries[i], number, rows[i][number]

    for i, asked in enumerate(stored.values()):
        yield from some(i, entries[i]["numbers"][:FIRST])
        yield from some(i, extreme(asked)[:FIRST])
    for i, entry in enumerate(entries):
        yield from some(i, entry["numbers"])


def _near(removals: list[Removal], scores: Any, sign: int) -> tuple[list[Any], list[float]]:
    """Removals and their scores, as long as these have the sign; a group by the first of its samples and their number."""
    kept = [(removal, score) for removal, score in zip(removals, scores.tolist(), strict=True) if score * sign > 0]
    named = [r[0] if len(r) == 1 else {"samples": list(r[:NAMED]), "n": len(r)} for r, _ in kept]
    return named, [_short(score) for _, score in kept]


def _singles(row: list[list[Any]]) -> list[int]:
    return [removal for removal in (*row[0], *row[2]) if isinstance(removal, int)]


def _described(examples: Examples, number: int) -> dict[str, Any]:
    """What is known of an example beside its picture and its text; of the class the model said only where it is another."""
    view, loss, said = examples[number], examples.loss(number), examples.said(number)
    found = _plain(view)
    if loss is not None:
        found["loss"] = _short(loss)
    if said is not None and said != view.label:
        found["said"] = said[:LABEL]
    return found


def _plain(view: SampleView) -> dict[str, Any]:
    """What is known of a sample beside its picture and its text."""
    fields: dict[str, Any] = {} if view.label is None else {"label": view.label[:LABEL]}
    if view.name is not None:
        fields["name"] = view.name
    if view.corrupted:
        fields["corrupted"] = True
        if view.true_label is not None:
            fields["true_label"] = view.true_label[:LABEL]
    return fields


def _short(number: float) -> float:
    """As precise as it is shown."""
    return float(f"{number:.3g}")


def _heavy(fields: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in fields.items() if key in ("image", "text")}
