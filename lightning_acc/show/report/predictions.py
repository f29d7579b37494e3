"""The page's section on single predictions: which training samples made this one what it is.

Of every example of a matrix the samples are there by number, label and score; pictures and texts are embedded, each once, for
the examples that matter most, as far as the room allows.
"""

from __future__ import annotations

from collections.abc import Container, Iterator
from typing import Any

from lightning_acc.core.removals import Removal
from lightning_acc.judge.samples import SampleView, SampleViews
from lightning_acc.methods import registry
from lightning_acc.record.record import Record
from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.show.predictions import NEAR, Examples, extreme, stored_matrices
from lightning_acc.show.report.classes import effects
from lightning_acc.show.report.samples import Room, heavy, shown

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


def collect(
    run: Record, views: SampleViews, known: Container[int], pictured: dict[int, dict[str, Any]]
) -> dict[str, Any] | None:
    """What the section shows, as plain JSON, with the samples that are to be added to the page's; None without a matrix.

    Args:
        run: the recorded run.
        views: of its training samples.
        known: the samples that the page's table has.
        pictured: those whose pictures and texts are there without this section.
    """
    stored = stored_matrices(run)
    if not stored:
        return None
    room = Room(ROWS_BYTES)
    samples: dict[int, dict[str, Any]] = {}
    labels = views.labels
    about: dict[tuple[str, str], Examples] = {}
    entries, described = [], [dict[int, dict[str, Any]]() for _ in stored]
    for name, asked in stored.items():
        key = (asked.conditions["query"], asked.conditions["query_fingerprint"])
        if key not in about:
            about[key] = Examples(run, asked)
        examples = about[key]
        place = list(about).index(key)
        entry = _entry(run, name, asked, examples, place)
        entry["effects"] = effects(asked, labels, {number: examples[number].label for number in asked.examples})
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
    whole: list[set[int]] = [set() for _ in about]
    also: dict[int, dict[str, Any]] = {}
    for entry, number, row in _by_weight(entries, stored):
        examples = list(about.values())[entry["about"]]
        own = described[entry["about"]][number]
        seen = {} if number in whole[entry["about"]] else heavy(shown(examples[number]))
        added = {i: heavy(shown(views[i])) for i in _singles(row) if i not in pictured and i not in also}
        if not room.take(seen, *added.values()):
            break
        own.update(seen)
        whole[entry["about"]].add(number)
        also |= added
        entry["pictured"] += 1
    for i, fields in also.items():
        samples.setdefault(i, {}).update(fields)
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
