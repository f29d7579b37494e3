"""What the dashboard is made of: each table, figure and gallery as the W&B object it is logged as."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from lightning_acc.judge.samples import SampleView, SampleViews, detection_precision, opened_picture
from lightning_acc.scoring.matrices import ScoreMatrix
from lightning_acc.scoring.scores import Scores

SHOWN = 100
"""Rows of a ranking table from each end."""
GALLERY = 24
"""Pictures of the most harmful samples."""
POINTS = 500
"""Points of a curve; more are not seen, and make pages slow."""

CLEANED = ("accuracy", "loss", "gain")
"""Quantities of a cleaning table, each with its interval ``_low`` to ``_high``."""


class Pictures:
    """Views of samples as W&B shows them, each picture encoded once."""

    def __init__(self, views: SampleViews) -> None:
        self.views = views
        self._images: dict[int, Any] = {}

    def cells(self, sample: int | None) -> list[Any]:
        """Label, true label, corrupted, picture and text of a sample; of nothing for a removal of several."""
        view = SampleView(-1) if sample is None else self.views[sample]
        if view.sample not in self._images:
            self._images[view.sample] = image(view.image)
        return [view.label, view.true_label, view.corrupted, self._images[view.sample], view.text]

    def further(self, sample: int | None) -> list[Any]:
        """What else is described of a sample, in the order of the columns; of nothing for a removal of several."""
        return [None if sample is None else self.views[sample].more.get(column) for column in self.views.further]


def image(file: bytes | None, caption: str | None = None) -> Any:
    """A picture file as a W&B image; None for none, and for what cannot be read."""
    picture = None if file is None else opened_picture(file)
    if picture is None:
        return None
    import wandb

    return wandb.Image(picture, caption=caption)


def ranking(table: Scores, truth: Scores | None, pictures: Pictures) -> Any:
    """The most harmful and the most helpful removals: each with its size, and of a single sample all that is known of it.

    A column that the data module described, and whose name is taken, is called ``described <name>``.
    """
    import wandb

    expected = truth.by_removal() if truth is not None else {}
    places, sources = table.table["rank"].to_pylist(), table.table["source"].to_pylist()
    names = {removal: label for removal, label in zip(table.removals, table.labels, strict=True) if len(removal) > 1}
    rows = sorted(zip(places, table.removals, table.values.tolist(), sources, table.estimates.tolist(), strict=True))
    columns: list[str | int] = ["rank", "sample", "score", "loo", "label", "true label", "corrupted", "picture", "text"]
    columns += ["source", "estimate", "samples"]
    columns += [f"described {column}" if column in columns else column for column in pictures.views.further]
    data = []
    for rank, removal, score, source, estimate in rows if len(rows) <= 2 * SHOWN else rows[:SHOWN] + rows[-SHOWN:]:
        single = removal[0] if len(removal) == 1 else None
        true = expected.get(removal, score if source != "estimate" else None)
        name = names.get(removal, _name(removal, pictures.views))
        cells = [*pictures.cells(single), source, estimate, len(removal), *pictures.further(single)]
        data.append([rank, name, score, true, *cells])
    return wandb.Table(columns=columns, data=data)


def verdict(name: str, table: Scores | ScoreMatrix) -> dict[str, Any]:
    """How far scores can be trusted: its word, its figures and the whole sentence, by ``verdict/<table>/<figure>``."""
    said = table.verdict
    names = ("word", "n", "spearman", "spearman_low", "spearman_high", "kendall", "rmse_sd", "top_confirmed", "n_diverged")
    figures = {figure: getattr(said, figure) for figure in names if getattr(said, figure) is not None}
    return {f"verdict/{name}/{figure}": value for figure, value in {**figures, "sentence": str(said)}.items()}


def gallery(table: Scores, views: SampleViews) -> list[Any]:
    """Captioned pictures of the most harmful samples."""
    scores = table.by_sample()
    found = []
    for sample in sorted(scores, key=lambda sample: scores[sample])[:GALLERY]:
        view = views[sample]
        if view.image is not None:
            was = f" (was {view.true_label})" if view.corrupted and view.true_label is not None else ""
            found.append(image(view.image, f"{view.called}: {view.label}{was}, {scores[sample]:+.2e}"))
    return [picture for picture in found if picture is not None]


def scatter(name: str, table: Scores, truth: Scores, views: SampleViews) -> Any:
    """Estimated against true scores; the table behind it names the samples of each point."""
    import wandb

    expected, found = truth.by_removal(), table.by_removal("estimate")
    data = []
    for removal in found:
        if removal in expected:
            view = views[removal[0]] if len(removal) == 1 else SampleView(-1)
            data.append([expected[removal], found[removal], _name(removal, views), view.label, view.corrupted])
    points = wandb.Table(columns=["loo", name, "sample id", "label", "corrupted"], data=data)
    return wandb.plot.scatter(points, "loo", name, title=f"{name} against leave-one-out retraining")


def detection(tables: dict[str, Scores], corrupted: np.ndarray) -> Any | None:
    """Share of corrupted samples among the k most harmful, one line per table and one for chance."""
    lines: dict[str, tuple[Sequence[Any], Sequence[Any]]] = {}
    for name, table in tables.items():
        scores = table.by_sample()
        if scores:
            precision = detection_precision(np.array(list(scores.values())), corrupted[list(scores)])
            at = _thinned(len(precision))
            lines[name] = ((at + 1).tolist(), precision[at].tolist())
    if not lines:
        return None
    longest = max(x[-1] for x, _ in lines.values())
    lines["chance"] = ([1, longest], [float(corrupted.mean())] * 2)
    return _lines(lines, "Share of corrupted samples among the k most harmful", "k")


def cost(rows: Iterable[tuple[str, Scores]]) -> dict[str, Any]:
    """Seconds of work and peak memory of each table, as bars over one table."""
    import wandb

    columns: list[str | int] = ["method", "seconds", "peak_memory_gb", "wall_seconds", "n"]
    data = [[label, *(table.conditions[str(column)] for column in columns[1:])] for label, table in rows]

    def bars(value: str, title: str) -> Any:
        return wandb.plot.bar(wandb.Table(columns=columns, data=data), "method", value, title=title)

    return {"cost": bars("seconds", "Seconds of work"), "cost/memory": bars("peak_memory_gb", "Peak memory of a process, GB")}


def over_time(visits: pa.Table, titles: dict[int, str]) -> dict[str, Any]:
    """Cumulative influence over the steps, one line per sample, and the table of visits behind it."""
    import wandb

    rows = visits.to_pydict()
    lines = {}
    for sample, title in titles.items():
        own = np.flatnonzero(np.array(rows["sample"]) == sample)
        if len(own):
            at = own[_thinned(len(own))].tolist()
            lines[title] = ([rows["step"][i] for i in at], [rows["cumulative"][i] for i in at])
    if not lines:
        return {}
    data = [[*row, titles[row[0]]] for row in zip(*rows.values(), strict=True)]
    return {
        "over time": _lines(lines, "Influence gathered over training: the most harmful and the most helpful samples", "step"),
        "over time/visits": wandb.Table(columns=[*rows, "line"], data=data),
    }


def cleaning(table: pa.Table) -> dict[str, Any]:
    """Removal curves: all methods together, each method with its 95 % interval beside the control, and the whole table."""
    import wandb

    rows = table.to_pylist()
    logged: dict[str, Any] = {
        "cleaning": wandb.Table(columns=table.column_names, data=[[row[c] for c in table.column_names] for row in rows])
    }
    methods = [method for method in dict.fromkeys(row["method"] for row in rows) if method != "none"]
    # Every curve begins where nothing is removed.
    curves = {method: sorted(_of(rows, "none", method), key=lambda row: float(row["fraction"])) for method in methods}
    widest = max((row["fraction"] for row in rows), default=0.0)
    for method in methods:
        own = _of(rows, method)
        if not any(row["fraction"] for row in own):  # what removes nothing is a level to hold the curves against
            curves[method] = [{**own[0], "fraction": fraction} for fraction in (0.0, widest)]
    for quantity in CLEANED:
        lines = {method: _curve(curve, quantity) for method, curve in curves.items()}
        lines = {method: line for method, line in lines.items() if line[0]}
        if lines:
            logged[f"cleaning/{quantity}"] = _lines(lines, f"{quantity} after removing", "fraction removed")
    quantity = "accuracy" if any(row["accuracy"] is not None for row in rows) else "loss"
    for method in methods:
        shown = {method: quantity, f"{method}, 95 % low": f"{quantity}_low", f"{method}, 95 % high": f"{quantity}_high"}
        lines = {line: _curve(curves[method], column) for line, column in shown.items()}
        if "random" in curves and method != "random":
            lines["random"] = _curve(curves["random"], quantity)
        lines = {name: line for name, line in lines.items() if line[0]}
        if lines:
            logged[f"cleaning by {method}"] = _lines(lines, f"{quantity} after removing by {method}", "fraction removed")
    return logged


def cleaning_summary(table: pa.Table) -> dict[str, float]:
    """The gains of a cleaning table and what they are made of, by ``cleaning/<method> <percent> %/<figure>``."""
    figures = {}
    for row in table.to_pylist():
        label = f"{row['method']} {100 * row['fraction']:g} %" if row["fraction"] else row["method"]
        for name in ("accuracy", "loss", "gain", "gain_low", "gain_high"):
            if row[name] is not None:
                figures[f"cleaning/{label}/{name}"] = row[name]
    return figures


def _of(rows: list[dict[str, Any]], *methods: str) -> list[dict[str, Any]]:
    return [row for row in rows if row["method"] in methods]


def _curve(rows: list[dict[str, Any]], column: str) -> tuple[list[float], list[float]]:
    points = [(row["fraction"], row[column]) for row in rows if row[column] is not None and np.isfinite(row[column])]
    return [x for x, _ in points], [y for _, y in points]


def _lines(lines: Mapping[str, tuple[Sequence[Any], Sequence[Any]]], title: str, x: str) -> Any:
    import wandb

    # Lists: W&B takes the first of xs to tell one shared axis from one for each line.
    xs, ys = [list(xs) for xs, _ in lines.values()], [list(ys) for _, ys in lines.values()]
    return wandb.plot.line_series(xs=xs, ys=ys, keys=list(lines), title=title, xname=x)


def _thinned(count: int) -> np.ndarray:
    """At most POINTS places out of ``count``, evenly spaced, the first and the last among them."""
    return np.unique(np.linspace(0, count - 1, min(POINTS, count)).round().astype(int))


def _name(removal: tuple[int, ...], views: SampleViews) -> str:
    """Its ids, and of a single sample that its batches name the name."""
    name = views[removal[0]].name if len(removal) == 1 else None
    return " ".join([*map(str, removal), *([name] if name else [])])
