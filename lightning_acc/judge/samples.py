"""What a reader sees of a training sample, or of an example of a query: picture or text, label, whether it is corrupted."""

from __future__ import annotations

import bisect
import io
import itertools
import warnings
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from lightning_acc.core.queries import Query
from lightning_acc.record import batches
from lightning_acc.record.batches import Leaves
from lightning_acc.record.record import Record
from lightning_acc.record.samples.names import COLUMN

if TYPE_CHECKING:
    from PIL import Image


FORMATS = ("PNG", "JPEG", "GIF", "WEBP")
"""Formats a picture may have. Pillow knows dozens, some of which start other programs."""
MOST_BYTES, MOST_PIXELS = 2**25, 2**26
"""Larger pictures are left out: a few kilobytes may unpack to gigabytes."""
LABELS = ("label", "labels", "target", "targets", "y")
NAME = 80
"""Characters of a name."""
NUMBERS = 16
"""Of an example of which nothing else can be shown."""


@dataclass(frozen=True)
class SampleView:
    """One training sample, or example of a query, as shown in tables and pages; None where a thing is not known.

    Attributes:
        sample: its id or number.
        image: a picture file, for ``opened_picture`` alone to open.
        text: its text.
        label: its label in training.
        true_label: its label before a known corruption.
        corrupted: whether it is known to be corrupted.
        name: the id it had in its batches, where that is not its number.
        more: what else its data module described of it, by column: numbers, booleans and texts.
    """

    sample: int
    image: bytes | None = None
    text: str | None = None
    label: str | None = None
    true_label: str | None = None
    corrupted: bool | None = None
    name: str | None = None
    more: Mapping[str, Any] = field(default_factory=dict)

    @property
    def called(self) -> str:
        """Its number, and its name where it has one."""
        return f"#{self.sample}" if self.name is None else f"#{self.sample} {self.name}"


class SampleViews:
    """Views of the samples of a run, from what its data module described, else from the tensors it was trained on.

    Attributes:
        further: columns that the data module described beside those a view has a field for, in its order.
    """

    def __init__(self, run: Record) -> None:
        self._run = run
        self._names = run.sample_names
        table = run.sample_info()
        self._columns: dict[str, list[Any]] = table.to_pydict() if table is not None else {}
        self.further = _further(self._columns)

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What was described beside pictures and texts: columns by name, with a value of each sample, (n_samples,).

        Numbers, flags and words stay what they are; of all else it is how it is written. Ids that the batches gave are names.
        """
        left_out = {"image", "text", *(() if self._names is None else (COLUMN,))}
        return {name: list(map(_in_a_cell, values)) for name, values in self._columns.items() if name not in left_out}

    @property
    def corrupted(self) -> np.ndarray | None:
        """Whether each sample is known to be corrupted, (n_samples,) of bool; None where nothing is known."""
        column = self._columns.get("corrupted")
        return None if column is None or not all(map(_is_flag, column)) else np.array(column, dtype=bool)

    @property
    def labels(self) -> list[str | None]:
        """The label in training of each sample, as in its view."""
        if self._columns:
            return [None if label is None else str(label) for label in self._columns.get("label", [None] * self._run.n_samples)]
        contents = map(self._run.content_of, range(self._run.n_samples))
        return [_label(batches.readable(content or {})) for content in contents]

    def __getitem__(self, sample: int) -> SampleView:
        known = (
            _described(sample, self._columns, self.further)
            if self._columns
            else _seen(sample, self._run.content_of(sample) or {})
        )
        return known if self._names is None else replace(known, name=_in_a_line(self._names[sample]))


class ExampleViews:
    """Views of the examples of a query, from what the data module described, else from the tensors the query is read with.

    Args:
        run: the recorded run.
        query: one of its queries.
    """

    def __init__(self, run: Record, query: Query) -> None:
        table = run.example_info(query.name)
        fits = table is not None and len(table) == query.n_examples
        self._columns: dict[str, list[Any]] = table.to_pydict() if table is not None and fits else {}
        sizes = [batches.batch_size(leaves) for leaves, _ in query.batches]
        self._ends, self._query = list(itertools.accumulate(sizes)), query

    def __getitem__(self, example: int) -> SampleView:
        if self._columns:
            return _described(example, self._columns)
        batch = bisect.bisect_right(self._ends, example)
        row = example - (self._ends[batch - 1] if batch else 0)
        leaves = batches.row(self._query.batches[batch][0], row)
        view = _seen(example, leaves)
        return view if view.image is not None or view.text is not None else replace(view, text=_numbers(leaves))


def _described(number: int, columns: dict[str, list[Any]], further: Iterable[str] = ()) -> SampleView:
    """The view of what a data module told, row ``number`` of its columns; of those ``further`` ones as they are."""
    known = {name: column[number] for name, column in columns.items()}
    names = {name: str(known[name]) for name in ("label", "true_label") if known.get(name) is not None}
    return SampleView(
        number,
        image=image if isinstance(image := known.get("image"), bytes) else None,
        text=None if known.get("text") is None else str(known["text"]),
        label=names.get("label"),
        true_label=names.get("true_label"),
        corrupted=known.get("corrupted") if _is_flag(known.get("corrupted")) else None,
        more={name: _plain(known[name]) for name in further},
    )


def _further(columns: Mapping[str, list[Any]]) -> list[str]:
    """The columns that a view has no field for, but those of bytes."""
    taken = {one.name for one in fields(SampleView)} - {"sample", "name", "more"}
    return [name for name in columns if name not in taken and not any(isinstance(one, bytes) for one in columns[name])]


def _plain(value: Any) -> Any:
    """A number, a boolean or a text; of dates, lists and the like their text."""
    return value if value is None or isinstance(value, (bool, int, float)) else str(value)


def _seen(number: int, leaves: Leaves) -> SampleView:
    """The view of what the model sees: its first tensor that looks like an image, its longest text, its label."""
    parts = batches.readable(leaves)
    images = [picture for picture in map(_picture, parts.values()) if picture is not None]
    texts = [part for part in parts.values() if isinstance(part, str)]
    return SampleView(
        number,
        image=images[0] if images else None,
        text=max(texts, key=len) if texts else None,
        label=_label(parts),
    )


def _label(parts: dict[str, Any]) -> str | None:
    """The label among the parts of a sample: the whole number that is called so, or else the last."""
    labels = {name: label for name, part in parts.items() if (label := _whole_number(part)) is not None}
    called = next((labels[name] for name in LABELS if name in labels), None)
    return called if called is not None else [None, *labels.values()][-1]


def _whole_number(part: Any) -> str | None:
    if isinstance(part, Tensor):
        return str(int(part)) if part.ndim == 0 and not part.is_floating_point() else None
    return str(part) if type(part) in (int, bool) else None


def _numbers(leaves: Leaves) -> str | None:
    """The first numbers of the first tensor there is: better than nothing."""
    parts = batches.readable(leaves).values()
    inputs = next((part.flatten() for part in parts if isinstance(part, Tensor) and part.ndim), None)
    if inputs is None:
        return None
    shown = ", ".join(f"{number:.3g}" for number in inputs[:NUMBERS].tolist())
    return f"{shown}, … ({len(inputs):,} numbers)" if len(inputs) > NUMBERS else shown


def _in_a_line(name: Any) -> str:
    """A name as it can be shown: no line breaks, and not endless."""
    text = "".join(letter if letter.isprintable() else " " for letter in str(name))
    return text if len(text) <= NAME else f"{text[: NAME - 1]}…"


def _in_a_cell(value: Any) -> Any:
    """A value as a cell of a table holds it."""
    return value if value is None or isinstance(value, (bool, int, float, str)) else str(value)


def _is_flag(value: Any) -> bool:
    return value is None or isinstance(value, (bool, int, float))


def _picture(leaf: Any) -> bytes | None:
    """A PNG of a tensor that looks like an image: (H, W), (1, H, W) or (3, H, W), at least 4 pixels a side."""
    if not isinstance(leaf, Tensor):
        return None
    if leaf.ndim == 2:
        leaf = leaf[None]
    if leaf.ndim != 3 or leaf.shape[0] not in (1, 3) or min(leaf.shape[1:]) < 4 or not leaf.is_floating_point():
        return None
    from PIL import Image

    low, high = leaf.min(), leaf.max()
    pixels = ((leaf - low) / (high - low).clamp_min(1e-12) * 255).byte().numpy()
    buffer = io.BytesIO()
    Image.fromarray(pixels[0] if len(pixels) == 1 else pixels.transpose(1, 2, 0)).save(buffer, "PNG")
    return buffer.getvalue()


def opened_picture(data: bytes) -> Image.Image | None:
    """A picture file from a run directory, decoded; None where it is no picture, damaged, or too large."""
    from PIL import Image

    if not isinstance(data, bytes) or len(data) > MOST_BYTES:
        return None
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of its size, which is looked at here
            picture = Image.open(io.BytesIO(data), formats=FORMATS)
            if picture.width * picture.height > MOST_PIXELS:
                return None
            picture.load()
    except Exception:  # decoders raise what they like
        return None
    return picture


def detection_precision(scores: np.ndarray, corrupted: np.ndarray) -> np.ndarray:
    """Share of corrupted samples among the k most harmful, for k = 1 ... n; both inputs (n,)."""
    found = np.cumsum(corrupted[np.argsort(scores, kind="stable")])
    return np.asarray(found / np.arange(1, len(scores) + 1))
