"""Single predictions in W&B: the examples with the highest loss, and the training samples that made them what they are."""

from __future__ import annotations

from typing import Any

from lightning_acc.core.removals import Removal
from lightning_acc.judge.samples import SampleView
from lightning_acc.record.record import Record
from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.show.predictions import NEAR, Examples, stored_matrices
from lightning_acc.show.tracking import panels
from lightning_acc.show.tracking.panels import Pictures

WORST = 24
"""Examples in the table."""
PICTURED = 3
"""Samples that have a column of their own, of those that helped and of those that harmed."""
TEXT = 400
"""Characters of a text."""


def predictions(run: Record, pictures: Pictures) -> tuple[Any, dict[str, Any]] | None:
    """The table of the examples with the highest loss, and the verdict of the matrix it is read from; None without a matrix.

    Of several matrices it is that of the most faithful estimate. Each sample stands there by number, label and score, and the
    first ones with their picture, or where there are none with their text.
    """
    name, asked = next(iter(stored_matrices(run).items()), (None, None))
    if name is None or asked is None:
        return None
    import wandb

    examples = Examples(run, asked)
    rows = [_row(asked, examples, example, pictures) for example in examples.ordered(asked)[:WORST]]
    seen = [picture for row in rows for near in row[-2:] for picture, _ in near]
    # A column of W&B is of one kind.
    kind = 0 if any(picture is not None for picture in seen) else 1
    columns: list[str | int] = ["example", "loss", "label", "said", "picture", "text", "helped", "harmed"]
    columns += [f"{word} {i + 1}" for word in ("helped", "harmed") for i in range(PICTURED)]
    data = [[*row[:-2], *(cell for near in row[-2:] for cell in _cells(near, kind))] for row in rows]
    return wandb.Table(columns=columns, data=data), panels.verdict(f"predictions by {name}", asked)


def _row(asked: ScoreMatrix, examples: Examples, example: int, pictures: Pictures) -> list[Any]:
    """An example, the samples near it in words, and those as pairs of picture and text."""
    view = examples[example]
    near, words = [], []
    for (removals, scores), sign in ((asked.helpful(example, NEAR), 1), (asked.harmful(example, NEAR), -1)):
        kept = [(r, s) for r, s in zip(removals, scores.tolist(), strict=True) if s * sign > 0]
        words.append(", ".join(f"{_name(removal, pictures)} ({score:+.2e})" for removal, score in kept))
        near.append([_seen(removal, score, pictures) for removal, score in kept[:PICTURED]])
    return [
        example,
        examples.loss(example),
        view.label,
        examples.said(example),
        panels.image(view.image),
        _cut(view),
        *words,
        *near,
    ]


def _cells(near: list[tuple[Any, str | None]], kind: int) -> list[Any]:
    """Pictures or texts of the first samples, and nothing where there are fewer."""
    return [near[i][kind] if i < len(near) else None for i in range(PICTURED)]


def _seen(removal: Removal, score: float, pictures: Pictures) -> tuple[Any, str | None]:
    """Picture and text of what is removed, where that is one sample."""
    view = pictures.views[removal[0]] if len(removal) == 1 else SampleView(-1)
    return panels.image(view.image, f"{_name(removal, pictures)}: {score:+.2e}"), _cut(view)


def _name(removal: Removal, pictures: Pictures) -> str:
    """A sample by number and label; a group by the first of its samples."""
    if len(removal) != 1:
        return " ".join(f"#{sample}" for sample in removal[:NEAR]) + (
            f" … {len(removal)} samples" if len(removal) > NEAR else ""
        )
    view = pictures.views[removal[0]]
    was = f", was {view.true_label}" if view.corrupted and view.true_label is not None else ""
    return view.called + ("" if view.label is None else f" {view.label}{was}")


def _cut(view: SampleView) -> str | None:
    return view.text if view.text is None or len(view.text) <= TEXT else view.text[:TEXT] + " …"
