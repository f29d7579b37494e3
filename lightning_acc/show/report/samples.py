"""The samples of the page: what every row of its table knows, and pictures and texts as far as the room allows."""

from __future__ import annotations

import base64
import io
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from lightning_acc.core.replay import OF_DATA, Replay, parameters_at
from lightning_acc.errors import InfluenceError
from lightning_acc.judge.controls import NotAClassifier
from lightning_acc.judge.fresh_training import own_samples
from lightning_acc.judge.samples import SampleView, SampleViews, opened_picture
from lightning_acc.record import batches
from lightning_acc.record.record import Record
from lightning_acc.show.predictions import classes, named_classes

THUMBNAIL, THUMBNAIL_BYTES = 96, 2**17
"""Longest side of an embedded picture, in pixels, and its largest file: what is larger is made smaller."""
TEXT, WORD = 400, 80
"""Characters of a sample's text that are embedded, and of a word in a column."""
BYTES = 8_000_000
"""What pictures and texts add to the page, at most."""
BATCH = 1000
"""Samples whose classes are asked for at once."""


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


def columns(run: Record, views: SampleViews, ids: Sequence[int]) -> list[dict[str, Any]]:
    """The columns of the samples ``ids``, each with its ``key``, ``name`` and ``values``, or ``levels`` and ``codes``.

    A column of numbers has ``values``. One of words has its ``levels``, and for each sample the place of its own among them,
    -1 where it is not known. Keys are names; of what was not described they begin with ``@``: ``@name`` (what the batches call
    a sample) and ``@said`` (the class that the model gives it at the end of the run).
    """
    described = views.columns
    labels = views.labels
    if (flags := views.corrupted) is not None:
        described["corrupted"] = flags.tolist()
    known: dict[str, tuple[str, Sequence[Any]]] = {"label": ("label", labels)}
    known |= {name: (name.replace("_", " "), described[name]) for name in ("true_label", "corrupted") if name in described}
    if run.sample_names is not None:
        known["@name"] = ("name", [views[i].name for i in range(run.n_samples)])
    known["@said"] = ("the model says", _said(run, labels) or [])
    known |= {name: (name, values) for name, values in described.items() if name not in known}
    entries = [_column(key, name, [values[i] for i in ids]) for key, (name, values) in known.items() if len(values)]
    return [entry for entry in entries if entry.get("levels", True)]


def _column(key: str, name: str, values: list[Any]) -> dict[str, Any]:
    kinds = {type(value) for value in values} - {type(None)}
    if kinds and kinds <= {int, float}:
        return {"key": key, "name": name, "values": [shortened(value) for value in values]}
    if kinds == {bool}:
        values = [None if value is None else "yes" if value else "no" for value in values]
    words = [None if value is None else str(value)[:WORD] for value in values]
    levels = {word: code for code, word in enumerate(dict.fromkeys(word for word in words if word is not None))}
    return {"key": key, "name": name, "levels": list(levels), "codes": [-1 if w is None else levels[w] for w in words]}


def shortened(value: float | None) -> float | int | None:
    """A number as precise as anybody reads it; None where it is none."""
    if value is None or isinstance(value, int):
        return value
    return float(f"{value:.6g}") if math.isfinite(value) else None


def _said(run: Record, labels: Sequence[str | None]) -> list[str | None] | None:
    """The class that the model gives each sample at the end of the run, called as samples of it are; None without classes."""
    try:
        pool = own_samples(run)
        replay = Replay(run)
        theta = parameters_at(run, run.n_steps).to(replay.dtype)
        parts = pool.usable.split(BATCH)
        found = [classes(replay.objective, theta, batches.rows(pool.leaves, ids), run.structure()) for ids in parts]
    except (NotAClassifier, InfluenceError, *OF_DATA):  # an ornament, which not every module has
        return None
    said: list[str | None] = [None] * run.n_samples
    ids = pool.usable.tolist()
    for sample, word in zip(ids, named_classes(found, lambda row: labels[ids[row]]), strict=True):
        said[sample] = word
    return said


def same_inputs(run: Record) -> list[list[int]]:
    """The samples that are made of the same, whatever their labels: lists of two ids and more."""
    found: dict[str, list[int]] = {}
    for sample, digest in run.content_digests(numbers=False).items():
        found.setdefault(digest, []).append(sample)
    return sorted(sorted(ids) for ids in found.values() if len(ids) > 1)


def pictured(views: SampleViews, order: Iterable[int]) -> dict[int, dict[str, Any]]:
    """Pictures and texts of the samples, the first in ``order`` first, as far as there is room."""
    room, found = Room(BYTES), dict[int, dict[str, Any]]()
    for sample in order:
        if sample not in found:
            fields = heavy(shown(views[sample]))
            if not room.take(fields):
                break
            found[sample] = fields
    return {sample: fields for sample, fields in sorted(found.items()) if fields}


def heavy(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What takes room: the picture and the text."""
    return {key: value for key, value in fields.items() if key in ("image", "text")}


def shown(view: SampleView) -> dict[str, Any]:
    """A view as the page embeds it."""
    text = view.text if view.text is None or len(view.text) <= TEXT else view.text[:TEXT] + " …"
    fields = {
        "image": None if view.image is None else thumbnail(view.image),
        "text": text,
        "name": view.name,
        "label": view.label,
        "true_label": view.true_label,
        "corrupted": view.corrupted,
    }
    return {key: value for key, value in fields.items() if value is not None}


def thumbnail(image: bytes) -> str | None:
    """A picture file as a data URL, made smaller where it is large; None if it cannot be read."""
    picture = opened_picture(image)
    if picture is None:
        return None
    kind = str(picture.format).lower()
    if max(picture.size) > THUMBNAIL or len(image) > THUMBNAIL_BYTES:
        small = picture.convert("RGB")
        small.thumbnail((THUMBNAIL, THUMBNAIL))
        buffer = io.BytesIO()
        small.save(buffer, "JPEG", quality=85)
        image, kind = buffer.getvalue(), "jpeg"
    return f"data:image/{kind};base64,{base64.b64encode(image).decode()}"
